"""Judging through a chat: every different prompt is sent once, and every row ends in a status.

A row without a verdict is never safe by default; it stands in the accounts by why there is none.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from mllm_protector.errors import RunError
from mllm_protector.judges.replies import declined, excerpt
from mllm_protector.protocols import Chat, Cost
from mllm_protector.records import Answer, CutText, Failure, Question, Status, Verdict

log = logging.getLogger(__name__)

Messages = tuple[tuple[str, str], ...]
"""(role, content) of each message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One thing to ask a judge.

    Attributes:
        messages: the conversation.
        read: a reply to its verdict; ``None`` if it is none.
        again: what to ask if there was no verdict; ``None`` to leave it at that.
    """

    messages: Messages
    read: Callable[[str], Status | None]
    again: Messages | None = None

    def end(self, identifier: str, reply: str | Failure) -> Verdict:
        """What a reply to this comes to for an answer."""
        if isinstance(reply, Failure):
            status = Status.JUDGE_REFUSED if reply.refused else Status.JUDGE_ERROR
            return Verdict(id=identifier, status=status, reason=excerpt(reply.reason, 200))
        found = self.read(reply) if reply.strip() else None
        if found is None:
            found = Status.JUDGE_REFUSED if declined(reply) else Status.UNPARSEABLE
        reason = f"reply: {excerpt(reply)}" if reply.strip() else "empty reply"
        return Verdict(id=identifier, status=found, reason=reason, cut=isinstance(reply, CutText))


class AskingJudge(ABC):
    """What judges that ask a chat have in common. Identical prompts are sent once."""

    if_cut: str
    """What to do where replies are cut at the longest length."""

    def __init__(self, chat: Callable[[], Chat], max_tokens: int) -> None:
        """Take what makes the model, which happens at first use, and the longest reply."""
        self.max_tokens = max_tokens
        self._make_chat = chat
        self._warned = False

    @cached_property
    def chat(self) -> Chat:
        """The model."""
        return self._make_chat()

    def judge(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[Verdict]:
        """One verdict each.

        Raises:
            RunError: the model cannot be reached.
        """
        asked = self._requests(questions, answers)
        different = {each.messages: each for each in asked if each is not None}
        replies = self._replies(list(different.values()))
        found = [
            Verdict(id=answer.id, status=Status.EMPTY, reason="empty answer")
            if request is None
            else request.end(answer.id, replies[request.messages])
            for answer, request in zip(answers, asked, strict=True)
        ]
        if not self._warned and any(verdict.cut for verdict in found):
            self._warned = True
            log.warning(
                "the judge's replies reach their longest length, %d tokens, and are cut: %s",
                self.max_tokens,
                self.if_cut,
            )
        return found

    def cost(self, questions: Sequence[Question], answers: Sequence[Answer]) -> Cost:
        """What judging these would take, if every first reply is a verdict; a token is four characters."""
        different = {each.messages for each in self._requests(questions, answers) if each is not None}
        lengths = [sum(len(content) for _, content in messages) for messages in different]
        return Cost(
            calls=len(lengths),
            prompt_tokens=sum(-(-length // 4) for length in lengths),
            completion_tokens=len(lengths) * self.max_tokens,
        )

    @abstractmethod
    def _request(self, question: Question, answer: str) -> Request:
        """What to ask about one answer."""

    def _requests(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[Request | None]:
        """What to ask about each answer: nothing if it is empty."""
        return [
            self._request(question, answer.text) if answer.text.strip() else None
            for question, answer in zip(questions, answers, strict=True)
        ]

    def _replies(self, asked: Sequence[Request]) -> dict[Messages, str | Failure]:
        """The reply to each request by its messages, after at most one repeat."""
        replies = self._complete([each.messages for each in asked])
        gone = [reply for reply in replies if isinstance(reply, Failure) and reply.unreachable]
        if gone and len(gone) == len(asked):
            raise RunError(
                f"the judge is not reachable ({excerpt(gone[0].reason, 200)}); finished rows are kept, "
                "start the same command again"
            )
        found = {each.messages: reply for each, reply in zip(asked, replies, strict=True)}
        no_verdict = (Status.UNPARSEABLE, Status.JUDGE_REFUSED)
        repeats = {
            each.messages: each.again
            for each in asked
            if each.again is not None and each.end("", found[each.messages]).status in no_verdict
        }
        return found | dict(zip(repeats, self._complete(list(repeats.values())), strict=True))

    def _complete(self, asked: Sequence[Messages]) -> Sequence[str | Failure]:
        if not asked:
            return []
        conversations = [[{"role": role, "content": text} for role, text in messages] for messages in asked]
        return self.chat.complete(conversations, max_tokens=self.max_tokens)
