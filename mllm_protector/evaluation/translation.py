"""Answers in another language, as a served or local model translates them."""

import logging
from collections.abc import Sequence
from typing import Any

from mllm_protector.evaluation.store import FAILED, Store, fill
from mllm_protector.files import content_key
from mllm_protector.protocols import Chat
from mllm_protector.records import Failure, require_reached

log = logging.getLogger(__name__)

TRANSLATION = "translation"
"""The name of the transformation."""

MAX_TOKENS = 1024
AT_ONCE = 32
"""Answers that are translated between two writes to the disk."""

PROMPT = (
    "Translate the text between the lines of equals signs into {language}. Translate it as it is, without "
    "comments, and write the translation alone.\n=====\n{text}\n====="
)


class Translator:
    """A chat model that translates; translations are kept in a store and never asked for again."""

    def __init__(self, chat: Chat, language: str) -> None:
        """Bind a model to a language, named in English."""
        self._chat, self._language = chat, language

    @property
    def identity(self) -> dict[str, Any]:
        """What the translations depend on, for JSON."""
        return {**self._chat.card.identity, "language": self._language, "prompt": PROMPT}

    def fill(self, store: Store, texts: Sequence[str]) -> None:
        """Translate what the store lacks.

        Raises:
            RunError: the model cannot be reached, or a row cannot be written.
        """
        wanted = [(self._key(text), text) for text in texts]
        fill(store, wanted, self._translated, batch_size=AT_ONCE, title=f"translations into {self._language}")

    def text(self, store: Store, text: str) -> str | None:
        """The translation of a text; ``None`` where the model gave none."""
        row = store.get(self._key(text))
        return None if row is None or FAILED in row else str(row["text"])

    def _key(self, text: str) -> str:
        return content_key(self.identity, text)

    def _translated(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        conversations = [
            [{"role": "user", "content": PROMPT.format(language=self._language, text=text)}] for text in texts
        ]
        replies = self._chat.complete(conversations, max_tokens=MAX_TOKENS)
        require_reached("translator:", replies)
        return [
            {FAILED: reply.reason}
            if isinstance(reply, Failure)
            else {"text": reply.strip()}
            if reply.strip()
            else {FAILED: "an empty reply"}
            for reply in replies
        ]
