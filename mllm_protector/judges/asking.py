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

_WORTH_A_RETRY = (Status.UNPARSEABLE, Status.JUDGE_REFUSED)


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
        asked = requests(questions, answers, self._request)
        found = verdicts(answers, asked, self.chat, self.max_tokens)
        if not self._warned and any(verdict.cut for verdict in found):
            self._warned = True
            log.warning(
                "the judge's replies reach their longest length, %d tokens, and are cut: %s",
                self.max_tokens,
                self.if_cut,
            )
        return found

    def cost(self, questions: Sequence[Question], answers: Sequence[Answer]) -> Cost:
        """What judging these would take, if every first reply is a verdict."""
        return cost(requests(questions, answers, self._request), self.max_tokens)

    @abstractmethod
    def _request(self, question: Question, answer: str) -> Request:
        """What to ask about one answer."""


def requests(
    questions: Sequence[Question], answers: Sequence[Answer], make: Callable[[Question, str], Request]
) -> list[Request | None]:
    """What to ask about each answer: nothing if it is empty."""
    return [
        make(question, answer.text) if answer.text.strip() else None
        for question, answer in zip(questions, answers, strict=True)
    ]


def verdicts(
    answers: Sequence[Answer], asked: Sequence[Request | None], chat: Chat, max_tokens: int
) -> list[Verdict]:
    """One verdict for each answer.

    Raises:
        RunError: nobody answered any of the requests.
    """
    different = _different(asked)
    found = dict(zip(different, _settled(list(different.values()), chat, max_tokens), strict=True))
    ends = [
        (Status.EMPTY, "empty answer", False) if request is None else found[request.messages]
        for request in asked
    ]
    return [
        Verdict(id=answer.id, status=status, reason=reason, cut=cut)
        for answer, (status, reason, cut) in zip(answers, ends, strict=True)
    ]


def cost(asked: Sequence[Request | None], max_tokens: int) -> Cost:
    """What asking would take, without repeats; a token is taken to be four characters."""
    lengths = [sum(len(content) for _, content in messages) for messages in _different(asked)]
    return Cost(
        calls=len(lengths),
        prompt_tokens=sum(-(-length // 4) for length in lengths),
        completion_tokens=len(lengths) * max_tokens,
    )


def _different(asked: Sequence[Request | None]) -> dict[Messages, Request]:
    return {request.messages: request for request in asked if request is not None}


def _settled(asked: list[Request], chat: Chat, max_tokens: int) -> list[tuple[Status, str, bool]]:
    """The status and the reason of each request, and whether its reply was cut, after at most one repeat."""
    if not asked:
        return []
    replies = _complete(chat, [request.messages for request in asked], max_tokens)
    failures = [reply for reply in replies if isinstance(reply, Failure) and reply.unreachable]
    if len(failures) == len(asked):
        raise RunError(
            f"the judge is not reachable ({excerpt(failures[0].reason, 200)}); finished rows are kept, "
            "start the same command again"
        )
    ends = [_end(request, reply) for request, reply in zip(asked, replies, strict=True)]
    repeats = {
        index: request.again
        for index, request in enumerate(asked)
        if request.again is not None and ends[index][0] in _WORTH_A_RETRY
    }
    if repeats:
        replies = _complete(chat, list(repeats.values()), max_tokens)
        for index, reply in zip(repeats, replies, strict=True):
            ends[index] = _end(asked[index], reply)
    return ends


def _complete(chat: Chat, asked: Sequence[Messages], max_tokens: int) -> Sequence[str | Failure]:
    conversations = [[{"role": role, "content": text} for role, text in messages] for messages in asked]
    return chat.complete(conversations, max_tokens=max_tokens)


def _end(request: Request, reply: str | Failure) -> tuple[Status, str, bool]:
    if isinstance(reply, Failure):
        return (
            Status.JUDGE_REFUSED if reply.refused else Status.JUDGE_ERROR,
            excerpt(reply.reason, 200),
            False,
        )
    cut = isinstance(reply, CutText)
    if not reply.strip():
        return Status.UNPARSEABLE, "empty reply", cut
    reason = f"reply: {excerpt(reply)}"
    if (status := request.read(reply)) is not None:
        return status, reason, cut
    return Status.JUDGE_REFUSED if declined(reply) else Status.UNPARSEABLE, reason, cut
