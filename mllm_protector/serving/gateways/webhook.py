"""The guardrail webhook of agentgateway, kgateway and Gloo AI Gateway: ``/request`` and ``/response``.

An action has no name there: one with choices masks, and what is not understood passes. So a flagged answer is
always masked, by a rewrite or by a refusal, because some releases know no rejection of answers. The question
is not told with them.
"""

from typing import Any

from mllm_protector.records import Outcome
from mllm_protector.serving.api_errors import bad_request
from mllm_protector.serving.gateways.asking import Answer, Asking


async def on_request(body: dict[str, Any], asking: Asking) -> dict[str, Any]:
    """Pass: answers are guarded, not questions."""
    return {"action": {"reason": "answers are guarded"}}


async def on_response(body: dict[str, Any], asking: Asking) -> dict[str, Any]:
    """Pass, or mask the choices that are flagged.

    Raises:
        ApiError: a body of another form, or the guard has no verdict.
    """
    messages = _messages(body.get("body"))
    answers = [Answer(each["content"], None, asking.rewrites) for each in messages]
    verdicts = await asking.judge(answers, "")
    if all(each.outcome is Outcome.ALLOWED for each in verdicts):
        return {"action": {"reason": "allowed"}}
    choices = [
        {"message": {**message, "content": verdict.text}}
        for message, verdict in zip(messages, verdicts, strict=True)
    ]
    return {"action": {"body": {"choices": choices}, "reason": "flagged"}}


def _messages(content: Any) -> list[dict[str, str]]:
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list):
        raise bad_request("body: must hold a list of choices")
    found = []
    for choice in choices:
        message = choice.get("message") if isinstance(choice, dict) else None
        role, text = (message.get("role"), message.get("content")) if isinstance(message, dict) else (0, 0)
        if not isinstance(role, str) or not isinstance(text, str):
            raise bad_request("choices: each must have a message with role and content")
        found.append({"role": role, "content": text})
    return found
