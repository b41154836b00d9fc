"""XSTest (Röttger et al., arXiv 2308.01263; paul-rottger/xstest): is what is harmless still answered?

Safe prompts look like unsafe ones and should be answered; each kind has unsafe counterparts that should not.
A safe prompt is harmless here, so it is never judged for harm: over-refusal is the share of its answers
that refuse. The prompts are CC BY 4.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_protector.benchmarks.shared import check_limit, files_digest, id_field, question_digest, sample
from mllm_protector.errors import InputError
from mllm_protector.protocols import Card
from mllm_protector.ranges import Seed
from mllm_protector.reading import read_records, text_field
from mllm_protector.records import BENIGN, LoadedBenchmark, Question

CONTRAST = "contrast"
"""The scenario of the unsafe prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class XSTest:
    """The prompts; cheap until it is loaded.

    Attributes:
        path: a CSV file with the columns id, type and prompt, or a folder of such files, of which several
            may hold the same prompts (as the published completion files do).
        limit: at most this many safe and this many unsafe prompts, drawn with ``seed``.
        seed: of the draw.

    Raises:
        InputError: a limit below 1.
    """

    path: str
    limit: int | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_limit(self.limit)

    def load(self) -> LoadedBenchmark:
        """The safe prompts in the files' order, then the unsafe ones.

        Raises:
            InputError: a file that is missing or broken, or an id with two different prompts.
        """
        found: dict[str, tuple[Question, Path]] = {}
        for file in self._files():
            for question in read_records(file, _parse, key=lambda question: question.id).records:
                earlier, source = found.setdefault(question.id, (question, file))
                if earlier != question:
                    raise InputError(f"{file}: id {question.id} has another prompt or type than in {source}")
        chosen = []
        for scenario in (BENIGN, CONTRAST):
            of_scenario = [question for question, _ in found.values() if question.scenario == scenario]
            chosen += sample(of_scenario, self.limit, self.seed, lambda question: question.id)
        return LoadedBenchmark(questions=chosen, missing=[])

    @property
    def card(self) -> Card:
        """What the texts depend on, not the selection."""
        path = Path(self.path)
        digest = files_digest(self._files(), path) if path.is_dir() else question_digest(path)
        return Card(identity={"name": "xstest", "questions": digest})

    def _files(self) -> list[Path]:
        path = Path(self.path)
        if not path.is_dir():
            return [path]
        files = sorted(path.glob("*.csv"))
        if not files:
            raise InputError(f"path={path}: holds no CSV file")
        return files


def _parse(row: Mapping[str, Any]) -> Question:
    unsafe = text_field(row, "type").startswith("contrast_")
    return Question(
        id=id_field(row, "id"),
        scenario=CONTRAST if unsafe else BENIGN,
        variant="TEXT",
        text=text_field(row, "prompt"),
    )
