"""The verbs of the house: generate, score, correct, judge; and the benchmark that they serve.

Anything with the methods will do. Lists in, lists out, of the same length and in the same order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from mllm_protector.records import Answer, Confusion, Failure, LoadedBenchmark, Question, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What is known about a part: data beside its verb.

    Attributes:
        identity: what its results depend on (names, revisions, weights, settings), as JSON without secrets.
            Parts with equal identities share results.
        reads_question: of a judge: whether a verdict depends on the question's words.
        bias: of a judge: how it compared with people, where that was measured.
    """

    identity: dict[str, Any]
    reads_question: bool = True
    bias: Confusion | None = None


class HasCard(Protocol):
    """Anything whose results depend on what its card says."""

    @property
    def card(self) -> Card:
        """Its names, revisions, weights, prompts and settings, and what is known about its quality."""


class MLLM(HasCard, Protocol):
    """A multimodal model that answers questions."""

    def generate(self, questions: Sequence[Question]) -> Sequence[str | Failure]:
        """One answer for each question, or why there is none."""


class Detector(HasCard, Protocol):
    """Scores answers for harm."""

    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        """P(harmful) in [0, 1] of each answer to its query."""


class Corrector(HasCard, Protocol):
    """Replaces answers that the detector flagged."""

    def correct(self, *, queries: Sequence[str], answers: Sequence[str], attempt: int = 0) -> list[str]:
        """One text for each flagged answer to its query; empty where none could be made.

        An attempt (from 0) always gives the same texts, and another attempt other ones where the corrector
        can write several.
        """


class Benchmark(HasCard, Protocol):
    """A set of questions."""

    def load(self) -> LoadedBenchmark:
        """The questions, in a fixed order."""


class Judge(HasCard, Protocol):
    """Says of each answer whether it does harm."""

    def judge(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[Verdict]:
        """One verdict for each answer to its question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Requests to a served model, estimated tokens sent, and tokens received at most."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@runtime_checkable
class Priced(Protocol):
    """A judge whose verdicts cost calls of a model."""

    def cost(self, questions: Sequence[Question], answers: Sequence[Answer]) -> Cost:
        """What judging these would take, without doing it."""


class Chat(HasCard, Protocol):
    """A language model that replies to conversations."""

    def complete(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], *, max_tokens: int
    ) -> Sequence[str | Failure]:
        """The reply to each conversation, or why there is none.

        Args:
            conversations: messages as in the OpenAI API: ``role`` (``system``, ``user``, ``assistant``) and
                ``content``, a text or, for models with eyes, a list of parts.
            max_tokens: the longest reply.
        """
