"""A front for gateways: no upstream is ever asked."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from mllm_protector.serving.settings import ApiKey
from tests.serving.fakes import HTTP, Asked, Said, Served, served
from tests.serving.test_proxy import to

KEYS = [ApiKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest()) for name in ("one", "two")]


def nothing(asked: Asked) -> Said:
    raise AssertionError("a gateway's request reached the upstream")


@contextmanager
def guarded(keys: Any = (), limits: Any = None, **policy: Any) -> Iterator[Served]:
    """A front with this policy."""
    with served(nothing, lambda url: to(url, keys=keys, limits=limits or {}, policy=policy)) as on:
        yield on


def post(on: Served, path: str, body: Any, **headers: str) -> httpx.Response:
    return HTTP.post(on.url + path, json=body, headers=headers)
