"""An MLLM whose answers are guarded."""

from collections.abc import Sequence
from typing import Any

from mllm_protector.arguments import AnyImage, Asked, as_questions
from mllm_protector.errors import RunError
from mllm_protector.guard.protector import Protector
from mllm_protector.protocols import MLLM, Card
from mllm_protector.records import Failure


class ProtectedMLLM:
    """An MLLM with the guard behind it; itself an MLLM."""

    def __init__(self, mllm: MLLM, protector: Protector) -> None:
        self.mllm = mllm
        self.protector = protector

    def ask(self, text: str, image: AnyImage | None = None) -> str:
        """The guarded answer to one question, for the user to see.

        ``image`` is a file's path or a PIL image; nothing is fetched from an address. ``Protector.guard``
        also gives the score and the outcome.

        Raises:
            InputError: the question is not a text, or the image cannot be used.
            RunError: the MLLM made no answer; the message says why.
        """
        [answer] = self.generate([(text, image)])
        if isinstance(answer, Failure):
            raise RunError(f"the MLLM made no answer: {answer.reason}")
        return answer

    def generate(self, questions: Sequence[Asked]) -> list[str | Failure]:
        """The guarded answer to each question; where the MLLM made none, its reason.

        A question is a ``Question``, a text, or a pair of a text and an image as for ``ask``.

        Raises:
            InputError: not a list, an entry that is no question, or an image that cannot be used.
        """
        asked = as_questions(questions)
        answers = [_text_or_failure(answer) for answer in self.mllm.generate(asked)]
        pairs = zip(asked, answers, strict=True)
        made = [(question, answer) for question, answer in pairs if isinstance(answer, str)]
        replies = self.protector.guard(
            queries=[question.text for question, _ in made],
            answers=[answer for _, answer in made],
            ids=[question.id for question, _ in made],
        )
        final = (reply.final for reply in replies)
        return [next(final) if isinstance(answer, str) else answer for answer in answers]

    @property
    def card(self) -> Card:
        """The MLLM's, and the guard's."""
        return Card(identity={"mllm": self.mllm.card.identity, **self.protector.card.identity})


def _text_or_failure(answer: Any) -> str | Failure:
    """An MLLM's answer, if the guard can read it; anything else never reaches the user."""
    if isinstance(answer, str | Failure):
        return answer
    return Failure(reason=f"the MLLM gave no text, but an object of type {type(answer).__name__}")
