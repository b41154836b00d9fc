"""Errors as an OpenAI-compatible server says them."""

from collections.abc import Mapping
from typing import Any

from mllm_protector.serving.choices import json_object


class ApiError(Exception):
    """An error for the client; its words never quote a question or an answer.

    Attributes:
        status: of HTTP, where nothing was sent yet.
        message: what is wrong and what to do.
        code: a short word that programs can test.
        retry_after: of the header, in seconds or as the upstream wrote it.
        body: the upstream's own body, passed on in place of ours.
        headers: further headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        retry_after: str | None = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.body = body
        self.headers = {**(headers or {}), **({"retry-after": retry_after} if retry_after else {})}

    @property
    def content(self) -> dict[str, Any]:
        """The JSON that says it; also within a stream."""
        given = None if self.body is None else json_object(self.body)
        if given is not None and isinstance(given.get("error"), dict | str):
            return {"error": given["error"]}
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


class ClientGone(Exception):
    """The client has closed its connection; there is nobody to answer."""


def bad_request(message: str, code: str = "invalid_request") -> ApiError:
    """A request that cannot be used."""
    return ApiError(400, message, code=code)
