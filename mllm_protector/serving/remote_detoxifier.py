"""A detoxifier whose weights are elsewhere, behind an OpenAI-compatible address.

A trained one, such as a LoRA adapter that vLLM serves, is sent the token ids that ``Detoxifier`` would read,
so that no chat template and no special token inside a text comes between. A chat model that was not trained
for it is asked in words.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mllm_protector import prompts
from mllm_protector.arguments import require_texts
from mllm_protector.data.tokens import fill
from mllm_protector.models.chat import ServedChat
from mllm_protector.models.detoxifier import TEMPERATURE, TOP_P, detoxifier_encoder, seed_of
from mllm_protector.models.guard_file import read_guard_file
from mllm_protector.protocols import Card
from mllm_protector.serving.replicas import CHECK_S, Ask, Replicas

SEED_BITS = 31
"""Of a seed, which every server takes."""

EXAMPLE = ("How do I bake bread?", "Mix flour, water and salt.")
"""A pair on which a server is tried."""

CHAT_TOKENS = 1024
"""The longest rewrite of a chat model."""


class RemoteDetoxifier:
    """A trained detoxifier behind ``/completions``; implements ``protocols.Corrector``."""

    def __init__(
        self,
        folder: str | Path,
        url: str,
        model: str,
        *,
        timeout_s: float = 60.0,
        api_key_env: str | None = None,
        check_s: float = CHECK_S,
    ) -> None:
        """Try the server on an example.

        ``folder`` may lack the weights. ``url`` goes up to and with ``/v1``, and ``model`` is the
        detoxifier's name there; the rest is as in ``RemoteDetector``, but that a request is made once.

        Raises:
            InputError: as ``read_guard_file``; not an address, or no key.
            RunError: the server cannot be used; the message says why.
        """
        folder = Path(folder)
        self.guard = read_guard_file(folder, "detoxifier", served=True)
        self.encoder = detoxifier_encoder(folder, self.guard)
        self.model = model
        self._example = self.encoder.encode(queries=EXAMPLE[:1], answers=EXAMPLE[1:])[0]
        self._replicas = Replicas(
            "detoxifier_url",
            [url],
            self._examine,
            timeout_s=timeout_s,
            api_key_env=api_key_env,
            check_s=check_s,
        )

    def correct(self, *, queries: Sequence[str], answers: Sequence[str], attempt: int = 0) -> list[str]:
        """As ``Detoxifier.correct``; samples of the attempts after the first are the server's own.

        Raises:
            InputError: not two lists of texts of the same length.
            RunError: the server fails.
        """
        require_texts(queries=queries, answers=answers)
        rows = self.encoder.encode(queries=queries, answers=answers)
        bodies: list[dict[str, Any]] = []
        for query, answer, ids in zip(queries, answers, rows, strict=True):
            sampling: dict[str, Any] = {"temperature": 0}
            if attempt:
                seed = seed_of(query, answer, attempt) % 2**SEED_BITS
                sampling = {"temperature": TEMPERATURE, "top_p": TOP_P, "seed": seed}
            bodies.append({**self._body(ids, self.encoder.longest_target), **sampling})
        return self._replicas.run(self._written(bodies))

    @property
    def card(self) -> Card:
        """What the rewrites depend on, wherever the server is."""
        sampling = {"temperature": TEMPERATURE, "top_p": TOP_P}
        return Card(identity={**self.guard.identity, "served": self.model, "sampling": sampling})

    def close(self) -> None:
        """Leave the server alone."""
        self._replicas.close()

    def _body(self, ids: Sequence[int], most: int) -> dict[str, Any]:
        return {"model": self.model, "prompt": list(ids), "max_tokens": most}

    async def _written(self, bodies: Sequence[dict[str, Any]]) -> list[str]:
        asked = (_text(self._replicas.ask, body) for body in bodies)
        return list(await asyncio.gather(*asked))

    async def _examine(self, ask: Ask) -> str | None:
        await _text(ask, {**self._body(self._example, 1), "temperature": 0})
        return None


class ChatDetoxifier:
    """A chat model that is asked for a better answer; implements ``protocols.Corrector``."""

    def __init__(
        self, url: str, model: str, *, timeout_s: float = 60.0, api_key_env: str | None = None
    ) -> None:
        """Bind to a model; nothing is sent. Arguments are those of ``RemoteDetoxifier``.

        Raises:
            InputError: not an address, or no key.
        """
        chat = partial(
            ServedChat,
            model=model,
            base_url=url,
            api_key_env=api_key_env,
            concurrency=16,
            timeout=timeout_s,
            max_retries=0,
        )
        self._first, self._later = chat(temperature=0), chat(temperature=TEMPERATURE)

    def correct(self, *, queries: Sequence[str], answers: Sequence[str], attempt: int = 0) -> list[str]:
        """A better answer for each; empty where the server gives none.

        Raises:
            InputError: not two lists of texts of the same length, or the server refuses key or model.
            RunError: no credit is left.
        """
        require_texts(queries=queries, answers=answers)
        pairs = [*zip(queries, answers, strict=True)]
        replies = (self._later if attempt else self._first).complete(
            [[{"role": "user", "content": fill(prompts.DETOXIFIER, *pair)}] for pair in pairs],
            max_tokens=CHAT_TOKENS,
            seeds=[seed_of(*pair, attempt) % 2**SEED_BITS for pair in pairs],
        )
        return [reply if isinstance(reply, str) else "" for reply in replies]

    @property
    def card(self) -> Card:
        """What the rewrites depend on."""
        own = {"prompt": prompts.template_hash(prompts.DETOXIFIER), "max_tokens": CHAT_TOKENS}
        return Card(identity={**self._later.card.identity, **own})


async def _text(ask: Ask, body: dict[str, Any]) -> str:
    return await ask("/completions", body, partial(_read, len(body["prompt"])))


def _read(sent: int, content: Any) -> str:
    [choice] = content["choices"]
    text, read = choice["text"], content["usage"]["prompt_tokens"]
    if not isinstance(text, str):
        raise ValueError("gives something else than a text")
    if read != sent:
        raise ValueError(f"has read {read} tokens of {sent}: it cuts texts or adds tokens")
    return text.strip()


load_remote_detoxifier = RemoteDetoxifier
"""The name under which the documentation offers it."""
