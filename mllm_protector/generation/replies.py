"""Replies of served models: kept as they come, never asked for again, and read with care."""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from mllm_protector.errors import InputError, RunError
from mllm_protector.evaluation.store import FAILED, Store
from mllm_protector.files import content_key
from mllm_protector.judges.asking import CODE, THOUGHTS
from mllm_protector.models.chat import Conversation, ServedChat
from mllm_protector.protocols import Card
from mllm_protector.records import CutText, Failure

Form = Literal["json", "lines"]

NOT_SENT = Failure(reason="max_calls is reached")
"""Stands for the reply of a conversation that was not sent."""

LONGEST = 1000
"""Characters of a question at most."""

_BROKEN = re.compile("[\0\ud800-\udfff]")
"""Characters that no data file may hold."""
_NUMBER = re.compile(r"\s*(?:\d{1,3}[.)]|[-*•])\s+")


class KeptChat:
    """A served model whose replies are kept; implements ``protocols.Chat``.

    A failure counts as a call, and the next run asks again. Calls that a kill interrupts are not counted.
    """

    def __init__(self, chat: ServedChat, replies: Store, max_calls: int | None) -> None:
        """Bind a model to the replies of its output folder, which other models may share."""
        self._chat, self._replies, self._max_calls = chat, replies, max_calls

    @property
    def card(self) -> Card:
        """The model's own."""
        return self._chat.card

    def complete(
        self,
        conversations: Sequence[Conversation],
        *,
        max_tokens: int,
        seeds: Sequence[int | None] | None = None,
    ) -> list[str | Failure]:
        """The replies, see ``ServedChat.complete``; ``NOT_SENT`` where ``max_calls`` is reached.

        Raises:
            InputError: as ``ServedChat.complete``.
            RunError: the server cannot be reached, or a reply cannot be written.
        """
        rows = [*zip(conversations, seeds or [None] * len(conversations), strict=True)]
        keys = [content_key(self._chat.card.identity, row, max_tokens) for row in rows]
        missing = {key: row for key, row in zip(keys, rows, strict=True) if self._kept(key) is None}
        left = len(missing) if self._max_calls is None else max(0, self._max_calls - self._replies.lines)
        asked = list(missing)[:left]

        def keep(index: int, reply: str | Failure) -> None:
            row: dict[str, Any] = {"key": asked[index]}
            if isinstance(reply, Failure):
                row[FAILED] = reply.reason
            else:
                row |= {"text": reply, "cut": isinstance(reply, CutText)}
            self._replies.append([row])

        made = self._chat.complete(
            [missing[key][0] for key in asked],
            max_tokens=max_tokens,
            seeds=None if seeds is None else [missing[key][1] for key in asked],
            keep=keep,
        )
        for reply in made:
            if isinstance(reply, Failure) and reply.unreachable:
                raise RunError(f"{reply.reason}; replies so far are kept, repeat the command to continue")
        found = dict(zip(asked, made, strict=True))
        for key in keys:
            if key not in found:
                kept = self._kept(key)
                found[key] = NOT_SENT if kept is None else kept
        return [found[key] for key in keys]

    def _kept(self, key: str) -> str | None:
        row = self._replies.get(key) or {}
        text = row.get("text")
        if not row or FAILED in row:
            return None
        if not isinstance(text, str):
            raise InputError(f"a kept reply has no text; remove its line (key {key}), it will be made again")
        return CutText(text) if row.get("cut") else text


def questions_in(reply: str, form: Form) -> list[str] | None:
    """The questions of a reply; ``None`` if it is not a list of questions.

    ``json`` takes only an array of texts, alone or as the only code block; ``lines`` takes each line that
    holds more than its number.
    """
    text = answer_in(reply)
    if text is None:
        return None
    if form == "lines":
        found = [_NUMBER.sub("", line, count=1).strip() for line in text.splitlines()]
        found = [line for line in found if line]
    else:
        code = CODE.fullmatch(text)
        try:
            content = json.loads(code.group(1) if code else text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(content, list) or not all(isinstance(each, str) for each in content):
            return None
        found = [answer_in(each) or "" for each in content]
    return found if found and all(0 < len(question) <= LONGEST for question in found) else None


def answer_in(reply: str) -> str | None:
    """A reply without the thoughts before it; ``None`` if it is empty or holds broken characters."""
    text = reply.strip()
    thoughts = THOUGHTS.match(text)
    text = text[thoughts.end() :].strip() if thoughts else text
    return None if _BROKEN.search(text) or not text else text
