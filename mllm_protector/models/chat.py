"""A language model behind an OpenAI-compatible address.

Nothing here knows what the conversations are about. What a service or a model says is data: it is never
quoted in an error, and the key leaves this module in the header of a request only.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, OpenAIError, Timeout

from mllm_protector.errors import InputError, RunError
from mllm_protector.models.connections import (
    MAX_REPLY_MB,
    BoundedClient,
    TooLarge,
    checked_address,
    key_from,
    public,
    run_in_background,
)
from mllm_protector.protocols import Card
from mllm_protector.ranges import Amount, Count, Positive, Temperature
from mllm_protector.reading import whole_characters
from mllm_protector.records import CutText, Failure

OPENAI = "https://api.openai.com/v1"

CONNECT_SECONDS = 10.0
"""A server that is there accepts a connection sooner."""

FATAL = {
    401: "does not accept the key",
    402: "says that no credit is left",
    403: "does not let the key use it",
    404: "does not know the model or the address",
}
"""Statuses that every other row would get too."""

DECLINED = ("content_filter", "content_policy_violation", "invalid_prompt", "ResponsibleAIPolicyViolation")
"""Error codes of content filters: OpenAI's, Azure's, LiteLLM's and OpenRouter's."""

Conversation = Sequence[Mapping[str, Any]]

Keep = Callable[[int, str | Failure], None]
"""Takes the index of a conversation and its reply as soon as it is there; called from another thread."""


class ServedChat:
    """A model behind an OpenAI-compatible address (vLLM, SGLang, ``transformers serve``, a hosted one).

    Retries are those of the official client (as of openai 3.54): connections that fail or break, timeouts,
    and the statuses 408, 409, 429 and 5xx are tried again, ``max_retries`` times at most, after the seconds
    of ``Retry-After`` (or ``retry-after-ms``, or an HTTP date) or else after 0.5 s, doubled each time up to
    8 s, less up to a quarter at random. A server that asks for more than 120 s is not asked again in this
    run (releases before version 3 wait at most 60 s and take their own pause where the server wants more).
    ``x-should-retry`` overrules the status. A 200 that is not JSON is not tried again. So a conversation
    takes at most ``(max_retries + 1) * timeout`` seconds and the pauses between.
    """

    def __init__(
        self,
        *,
        model: str,
        concurrency: Count,
        timeout: Positive,
        max_retries: Amount,
        temperature: Temperature | None,
        base_url: str | None = None,
        api_key_env: str | None = "OPENAI_API_KEY",
        seed: int | None = None,
        length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        identity: str | None = None,
    ) -> None:
        """Read the key and check the address; nothing is sent.

        ``configs/chat/served.yaml`` explains the arguments. ``timeout`` is in seconds, from connecting (10 at
        most) to the end of the reply. ``identity`` replaces the address in the card, which is written into
        results, so it must not be secret.

        Raises:
            InputError: no key, or a base_url that is not an address or holds a secret.
        """
        self._base_url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
        address = checked_address(self._base_url)
        self.model = model
        self.concurrency = concurrency
        self.temperature = None if temperature is None else float(temperature)  # 0 and 0.0 are one identity
        self.seed = seed
        self.length_field = length_field
        self.api_key_env = api_key_env
        self._timeout = timeout
        self._max_retries = max_retries
        self._identity = identity
        self._address = public(address)
        self._host = str(address.hostname)
        key_from(api_key_env, self._host)

    def complete(
        self,
        conversations: Sequence[Conversation],
        *,
        max_tokens: int,
        seeds: Sequence[int | None] | None = None,
        keep: Keep | None = None,
    ) -> list[str | Failure]:
        """The reply to each conversation, or why there is none; a reply cut at ``max_tokens`` is a reply.

        Once the server cannot be reached, conversations that wait for their turn are not sent.

        ``seeds`` has one for each conversation, instead of the model's own. ``keep`` gets each reply as it
        comes; one that is under way when the run is stopped is lost.

        Raises:
            InputError: the server refuses the key, the model or the address.
            RunError: no credit is left.
        """
        seeds = [self.seed] * len(conversations) if seeds is None else seeds
        rows = [*zip(conversations, seeds, strict=True)]

        async def ask_all() -> list[str | Failure]:
            async with self._client() as client:
                return await self._in_turn(
                    len(rows), lambda index: self._reply(client, *rows[index], max_tokens), keep
                )

        return run_in_background(ask_all) if rows else []

    @property
    def card(self) -> Card:
        """What the replies depend on. A server at another address, or port, is another one unless named."""
        return Card(
            identity={
                "model": self.model,
                **({"base_url": self._address} if self._identity is None else {"identity": self._identity}),
                "temperature": self.temperature,
                "seed": self.seed,
            }
        )

    def _client(self) -> AsyncOpenAI:
        return AsyncOpenAI(
            http_client=BoundedClient(self._timeout),
            api_key=key_from(self.api_key_env, self._host),  # read when it is needed, and never kept
            base_url=self._base_url,
            timeout=Timeout(self._timeout, connect=min(self._timeout, CONNECT_SECONDS)),
            max_retries=self._max_retries,
        )

    async def _in_turn(
        self, count: int, ask: Callable[[int], Awaitable[str | Failure]], keep: Keep | None
    ) -> list[str | Failure]:
        """What ``ask`` returns for each index; ``concurrency`` at once, until one cannot reach the server."""
        replies: dict[int, str | Failure] = {}
        stopped: list[InputError | Failure] = []
        waiting = iter(range(count))

        async def work() -> None:
            for index in waiting:
                if stopped:
                    return
                try:
                    replies[index] = reply = await ask(index)
                except InputError as error:
                    stopped.append(error)
                    return
                if isinstance(reply, Failure) and reply.unreachable:
                    stopped.append(reply)
                elif keep is not None:
                    keep(index, reply)

        await asyncio.gather(*(work() for _ in range(min(self.concurrency, count))))
        for reason in stopped:
            if isinstance(reason, InputError):
                raise reason
        return [replies.get(index, self._unreachable()) for index in range(count)]

    async def _reply(
        self, client: AsyncOpenAI, conversation: Conversation, seed: int | None, max_tokens: int
    ) -> str | Failure:
        messages: Any = list(conversation)
        settings: dict[str, Any] = {self.length_field: max_tokens}
        settings |= {} if self.temperature is None else {"temperature": self.temperature}
        settings |= {} if seed is None else {"seed": seed}
        try:
            completion = await client.chat.completions.create(model=self.model, messages=messages, **settings)
            reply = text_of(completion)
        except APIStatusError as error:
            reply = self._status_failure(error)
        except TooLarge:
            reply = _too_large()
        except APIConnectionError as error:
            reply = self._connection_failure(error)
        except (OpenAIError, ValueError, RecursionError):  # not JSON, or not Unicode
            reply = Failure(reason="the request or its reply is not valid JSON")
        if isinstance(reply, Failure) and not reply.unreachable:
            return replace(reply, reason=f"{reply.reason} at {self._address}")
        return reply

    def _connection_failure(self, error: APIConnectionError) -> Failure:
        cause = error.__cause__
        if isinstance(cause, TooLarge):  # releases before version 3 wrap it
            return _too_large()
        if type(cause).__name__ in ("ConnectError", "ConnectTimeout"):
            return self._unreachable()
        if isinstance(error, APITimeoutError):
            return Failure(reason=f"no whole reply within timeout={self._timeout:g} s")
        return Failure(reason="the connection broke")

    def _status_failure(self, error: APIStatusError) -> Failure:
        """What an error status, after all retries, means for its row."""
        status = error.status_code
        if declined(error.body):
            return Failure(reason=f"declined by the service (HTTP {status})", refused=True)
        if error.code == "insufficient_quota":
            status = 402
        if status in FATAL:
            problem = (
                f"model={self.model}: {self._address} {FATAL[status]} (HTTP {error.status_code}); check "
                f"model, base_url and the key (api_key_env={self.api_key_env})"
            )
            raise RunError(problem) if status == 402 else InputError(problem)
        return Failure(reason=f"the server failed (HTTP {status})")

    def _unreachable(self) -> Failure:
        return Failure(reason=f"nobody answers at {self._address}", unreachable=True)


def declined(body: object) -> bool:
    """Whether an error's body is that of a content filter, at whatever depth the services put it."""
    if not isinstance(body, dict):
        return False
    return body.get("code") in DECLINED or "flagged_input" in body or any(map(declined, body.values()))


def text_of(completion: Any) -> str | Failure:
    """The reply in what the client made of a 200: it checks no types, so anything may be anywhere."""
    try:
        choice = completion.choices[0]
        content = choice.message.content
        refusal = getattr(choice.message, "refusal", None)
        finish = getattr(choice, "finish_reason", None)
    except (AttributeError, IndexError, KeyError, TypeError):
        return Failure(reason="the reply is not a chat completion")
    if finish == "content_filter" or refusal:
        return Failure(reason="declined by the service", refused=True)
    if not isinstance(content, str):
        return Failure(reason="the reply holds no text")
    text = whole_characters(content.strip())
    return CutText(text) if finish == "length" else text


def _too_large() -> Failure:
    return Failure(reason=f"the reply is larger than {MAX_REPLY_MB} MB")
