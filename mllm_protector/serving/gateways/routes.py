"""Which path speaks which protocol."""

import json
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any

from mllm_protector.serving.api_errors import bad_request
from mllm_protector.serving.gateways import litellm, moderations, webhook
from mllm_protector.serving.gateways.asking import Asking

Translate = Callable[[dict[str, Any], Asking], Awaitable[dict[str, Any]]]

GATEWAYS: Mapping[str, Translate] = MappingProxyType(
    {
        "/beta/litellm_basic_guardrail_api": litellm.answer,
        "/v1/moderations": moderations.answer,
        "/request": webhook.on_request,
        "/response": webhook.on_response,
    }
)
"""All of them are POST with a JSON object, and answer with one."""


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        ApiError: it is none.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object")
    return body
