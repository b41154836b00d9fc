"""Replies of served models: kept as they come, never asked for again, and read with care."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mllm_protector.errors import InputError, RunError
from mllm_protector.files import content_key, writing
from mllm_protector.models.chat import Conversation, ServedChat
from mllm_protector.protocols import Card
from mllm_protector.records import CutText, Failure
from mllm_protector.rows import parse_json_line

Form = Literal["json", "lines"]

NOT_SENT = Failure(reason="max_calls is reached")
"""Stands for the reply of a conversation that was not sent."""

LONGEST = 1000
"""Characters of a question at most."""

_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_BROKEN = re.compile("[\0\ud800-\udfff]")
"""Characters that no data file may hold."""
_CODE = re.compile(r"```\w*\s((?:(?!```).)*)```", re.DOTALL)
_NUMBER = re.compile(r"\s*(?:\d{1,3}[.)]|[-*•])\s+")


class Replies:
    """All replies of one output folder by key, in a JSONL file that only grows; for one run at a time.

    Attributes:
        texts: key -> reply.
        calls: conversations that all runs sent, without those that a kill interrupted.
        left: how many more may be sent; ``None`` for no limit.
    """

    def __init__(self, path: Path, max_calls: int | None) -> None:
        """Read what earlier runs kept, and cut off a line that a kill left torn.

        Raises:
            InputError: the file cannot be read, or a line is damaged.
        """
        self.texts: dict[str, str] = {}
        self.calls = 0
        self._path, self._max_calls = path, max_calls
        try:
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(path, len(whole))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._take(parse_json_line(line))
            except (ValueError, KeyError) as error:
                raise InputError(f"{path}:{number}: damaged ({error}); remove the line") from None

    @property
    def left(self) -> int | None:
        """See the class."""
        return None if self._max_calls is None else max(0, self._max_calls - self.calls)

    def keep(self, key: str, reply: str | Failure) -> None:
        """Write a reply to disk. A failure counts as a call, and the next run asks again.

        Raises:
            RunError: it cannot be written.
        """
        row: dict[str, Any] = {"key": key}
        if isinstance(reply, Failure):
            row["failed"] = reply.reason
        else:
            row |= {"text": reply, "cut": isinstance(reply, CutText)}
        with writing(str(self._path)):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(json.dumps(row).encode() + b"\n")
        self._take(row)

    def _take(self, row: dict[str, Any]) -> None:
        self.calls += 1
        if "failed" not in row:
            self.texts[row["key"]] = CutText(row["text"]) if row["cut"] else row["text"]


class KeptChat:
    """A served model whose replies are kept; implements ``protocols.Chat``."""

    def __init__(self, chat: ServedChat, replies: Replies) -> None:
        """Bind a model to the replies of its output folder, which other models may share."""
        self._chat, self._replies = chat, replies

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
        missing = {k: row for k, row in zip(keys, rows, strict=True) if k not in self._replies.texts}
        asked = list(missing)[: self._replies.left]
        made = self._chat.complete(
            [missing[key][0] for key in asked],
            max_tokens=max_tokens,
            seeds=None if seeds is None else [missing[key][1] for key in asked],
            keep=lambda index, reply: self._replies.keep(asked[index], reply),
        )
        for reply in made:
            if isinstance(reply, Failure) and reply.unreachable:
                raise RunError(f"{reply.reason}; replies so far are kept, repeat the command to continue")
        found = dict(zip(asked, made, strict=True)) | self._replies.texts
        return [found.get(key, NOT_SENT) for key in keys]


def questions_in(reply: str, form: Form) -> list[str] | None:
    """The questions of a reply; ``None`` if it is not a list of questions.

    Args:
        reply: what the model said.
        form: ``json`` takes only an array of texts, alone or as the only code block; ``lines`` takes each
            line that holds more than its number.
    """
    text = answer_in(reply)
    if text is None:
        return None
    if form == "lines":
        found = [_NUMBER.sub("", line, count=1).strip() for line in text.splitlines()]
        found = [line for line in found if line]
    else:
        code = _CODE.fullmatch(text)
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
    text = _THOUGHTS.sub("", reply, count=1).strip()
    return None if _BROKEN.search(text) or not text else text
