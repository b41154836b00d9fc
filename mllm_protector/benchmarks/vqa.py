"""Harmless questions about pictures with known answers: does the guard leave usefulness alone?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from mllm_protector.benchmarks.selection import (
    check_limit,
    check_names,
    files_digest,
    question_digest,
    sample,
    warn_of_missing,
)
from mllm_protector.benchmarks.vqa_formats import READERS, Format, VisualItem, mme_files
from mllm_protector.benchmarks.vqa_metrics import METRICS
from mllm_protector.benchmarks.vqa_scoring import KnownAnswer
from mllm_protector.errors import InputError
from mllm_protector.ranges import Seed
from mllm_protector.records import BENIGN, LoadedBenchmark, Question, Variant

KINDS: tuple[Variant, ...] = ("TEXT", "SD")


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualQuestions:
    """A set of harmless questions, or a sample of it; cheap until it is loaded.

    A question with a picture counts as SD (a picture that is looked at), one without as TEXT.

    Attributes:
        path: the question file; of MME the folder of its categories.
        format: how the file is laid out; see ``vqa_formats``.
        images: the folder of the pictures; ``None`` takes ``images`` beside the file. MME has its own.
        split: of ScienceQA, such as ``test`` or ``minitest``.
        kinds: questions without a picture (TEXT), with one (SD), or both.
        instruction: put behind each question on a line of its own; says how to answer.
        limit: at most this many questions, drawn with ``seed``.
        seed: of the draw.

    Raises:
        InputError: an unknown format or kind, a limit below 1, or ``images`` for MME.
    """

    path: str
    format: Format = "generic"
    images: str | None = None
    split: str = "test"
    kinds: Sequence[Variant] = KINDS
    instruction: str = ""
    limit: int | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_names("format", [self.format], get_args(Format))
        check_names("kinds", self.kinds, KINDS)
        check_limit(self.limit)
        if self.format == "mme" and self.images is not None:
            raise InputError("images: those of MME lie beside its questions; leave it out")

    def load(self) -> LoadedBenchmark:
        """The questions in the file's order; one whose picture is not there is named in ``missing``.

        Raises:
            InputError: a file or folder that is missing or broken, or a picture that leads out of its folder;
                the message names the line or the id.
        """
        path, images = Path(self.path), self._images()
        items = [item for item in READERS[self.format](path, images, self.split) if self._wanted(item)]
        if self.format != "mme" and not images.is_dir() and any(item.found.missing for item in items):
            raise InputError(f"images={images}: no such folder")
        questions: list[Question] = []
        missing: list[str] = []
        known: dict[str, KnownAnswer] = {}
        for item in sample(items, self.limit, self.seed, lambda item: item.id):
            if item.found.missing is not None:
                missing.append(f"{item.id}: {item.found.missing}")
                continue
            known[item.id] = item.known
            questions.append(
                Question(
                    id=item.id,
                    scenario=BENIGN,
                    variant="TEXT" if item.found.image is None else "SD",
                    text=f"{item.text}\n{self.instruction}" if self.instruction else item.text,
                    image=item.found.image,
                    base=item.id,
                )
            )

        def score(question: Question, text: str) -> float:
            return known[question.cluster].score(text)

        metrics = METRICS.get(self.format)
        loaded = LoadedBenchmark(
            questions=questions,
            missing=missing,
            score=score,
            metrics=None if metrics is None else partial(metrics, known),
        )
        return warn_of_missing(path, loaded)

    def identity(self) -> dict[str, Any]:
        """What the questions depend on, not the selection."""
        path = Path(self.path)
        digest = files_digest(mme_files(path), path) if self.format == "mme" else question_digest(path)
        return {
            "name": self.format,
            "format": self.format,
            "questions": digest,
            "instruction": self.instruction,
        }

    def _images(self) -> Path:
        return Path(self.path).parent / "images" if self.images is None else Path(self.images)

    def _wanted(self, item: VisualItem) -> bool:
        without_picture = item.found.image is None and item.found.missing is None
        return ("TEXT" if without_picture else "SD") in self.kinds
