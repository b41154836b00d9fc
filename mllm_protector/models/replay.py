"""Answers that were made before: an MLLM that never generates.

How a question finds its answer, the first that applies:

1. By an ``id`` (or VLMEvalKit's ``index``) that is the question's own.
2. By the scenario and the question's words, compared by ``query_key``. Scenarios are compared without their
   number, case and punctuation; a row without scenario fits any. Never for rows of format ``records`` that
   have an ``id``, and never for a second asking (``repeat``).

Words alone do not say which image was shown: MM-SafetyBench asks TYPO and SD_TYPO with the same words, and
words repeat within a scenario. So a row that does not name its variant (``variant``, ``split``) answers a
question with an image only if ``variants`` says that the file is of that variant; and where several different
answers fit, none is taken: that is an error or, with ``ambiguous="skip"``, a question without answer.
"""

import logging
import re
import weakref
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import ClassVar, Literal

from mllm_protector.arguments import Asked, as_questions
from mllm_protector.data.queries import query_key
from mllm_protector.errors import InputError
from mllm_protector.models.answer_files import Format, digest_of, read_answers
from mllm_protector.protocols import Card
from mllm_protector.records import VARIANTS, Failure, Question, Variant

log = logging.getLogger(__name__)

MATCHING = 2
"""Version of the rules above; answers found by other rules are not reused."""


class Replay:
    """The answers of a file; implements ``protocols.MLLM``. The module says how questions find them."""

    recorded: ClassVar = True
    """It cannot be asked again in other words, and is read in seconds."""

    def __init__(
        self,
        *,
        path: str,
        format: Format = "auto",  # noqa: A002 - the key that users type
        model: str | None = None,
        name: str | None = None,
        variants: Sequence[Variant] | None = None,
        ambiguous: Literal["refuse", "skip"] = "refuse",
    ) -> None:
        """Read the answers, each text once.

        Args:
            path: a file, or the folder ``questions_with_answers``; see ``answer_files``.
            format: of the file; ``auto`` looks at the fields.
            model: whose answers these are; it chooses where a file has those of several.
            name: what the results call it; ``None`` for ``replay``.
            variants: those of the questions, for rows that do not say.
            ambiguous: what to do with a question that several different answers fit.

        Raises:
            RecordError: a row cannot be used; the message is ``file:line: reason``.
            InputError: the file cannot be used, or does not say enough.
        """
        for unknown in {*(variants or ())} - {*VARIANTS}:
            raise InputError(f"variants={unknown}: use {', '.join(VARIANTS)}")
        self._path = Path(path)
        self._name = name or "replay"
        self._variants = None if variants is None else list(variants)
        self._ambiguous = ambiguous
        reading, self._model = read_answers(self._path, format, self._variants, model)
        log.info("%s: %s", self._path.name, reading.summary())
        self._stored = reading.records
        self._by_id: dict[str, list[int]] = {}
        self._by_words: dict[tuple[str | None, str], list[int]] = {}
        for place, stored in enumerate(self._stored):
            if stored.id is not None:
                self._by_id.setdefault(stored.id, []).append(place)
            if stored.question is not None:
                words = _scenario(stored.scenario), query_key(stored.question)
                self._by_words.setdefault(words, []).append(place)
        self._fitting: dict[tuple[str | None, str, Variant, bool], list[int]] = {}
        self._asked: set[int] = set()
        self._reports = False

    def generate(self, questions: Sequence[Asked]) -> list[str | Failure]:
        """The stored answer to each question, or that there is none.

        Raises:
            InputError: not a list of questions, several different answers fit one, or its answer depends on
                an image of which the file does not say the variant.
        """
        if not self._reports:  # of a run that asks nothing there is nothing to say
            weakref.finalize(self, _report_unasked, self._path.name, self._asked, len(self._stored))
            self._reports = True
        return [self._answer(question) for question in as_questions(questions)]

    @property
    def card(self) -> Card:
        """The answers themselves, by a hash of their files, and how they are chosen."""
        return Card(
            identity={
                "name": self._name,
                "answers": digest_of(self._path),
                "model": self._model,
                "kinds": self._variants,
                "ambiguous": self._ambiguous,
                "by_id": True,
                "matching": MATCHING,
            }
        )

    def _answer(self, question: Question) -> str | Failure:
        same_id = self._two_that_differ(self._by_id.get(question.id, []))
        places = same_id or self._with_the_words_of(question)
        if not places:
            return Failure(reason=f"no answer in {self._path.name}")
        first, *others = [self._stored[place] for place in places]
        if not others:
            return first.answer
        if self._ambiguous == "skip":
            return Failure(reason=f"several different answers in {self._path.name}")
        raise InputError(
            f"{self._path}: rows {first.row} and {others[0].row} have different answers and both fit"
            f" {question.id}; give rows the questions' ids (scripts/list_questions.py lists them) or their"
            " variant, or leave such questions unanswered with mllm.ambiguous=skip"
        )

    def _with_the_words_of(self, question: Question) -> list[int]:
        scenario, words = _scenario(question.scenario), query_key(question.text)
        found = self._by_words.get((scenario, words)) or self._by_words.get((None, words), [])
        if not found or question.repeat > 0:
            return []
        shown = question.image is not None
        case = scenario, words, question.variant, shown
        if case not in self._fitting:  # many questions may share their words
            rows = [self._stored[place] for place in found]
            unknown = next((row.row for row in rows if row.variant is None), None)
            if shown and self._variants is None and unknown is not None:
                raise InputError(
                    f"{self._path}: row {unknown} does not say which variant was asked; if it was that of"
                    f" {question.id}, give mllm.variants=[{question.variant}]"
                )
            others = self._variants or VARIANTS
            fits = [question.variant in ([row.variant] if row.variant else others) for row in rows]
            self._fitting[case] = self._two_that_differ([*compress(found, fits)])
        return self._fitting[case]

    def _two_that_differ(self, places: Sequence[int]) -> list[int]:
        """The first place, and the first one with another answer if there is any."""
        self._asked.update(places)
        answers = {self._stored[place].answer: place for place in reversed(places)}
        return sorted(answers.values())[:2]


def _report_unasked(name: str, asked: set[int], total: int) -> None:
    log.info("%s: %d of its %d answers fit no question that was asked here", name, total - len(asked), total)


def _scenario(name: str | None) -> str | None:
    """A scenario's name without number, case and punctuation; ``None`` if nothing is left."""
    return re.sub(r"^\d+|[\W_]+", "", name or "").casefold() or None
