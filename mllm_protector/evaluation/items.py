"""From benchmarks to items: the questions to ask, each with the key of its answer."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_protector.calls import make
from mllm_protector.data.duplicates import check_contamination, question_digest
from mllm_protector.errors import InputError
from mllm_protector.files import content_key, write_jsonl
from mllm_protector.images import ImageFile
from mllm_protector.protocols import Benchmark
from mllm_protector.records import LoadedBenchmark, Question

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A question of a benchmark for one model; ``image`` is the image's hash, ``key`` that of the answer."""

    benchmark: str
    question: Question
    image: str | None
    key: str


def items_of(benchmark: str, questions: Sequence[Question], mllm: Mapping[str, Any]) -> list[Item]:
    """The items of a benchmark's questions for a model of this identity."""
    items = [Item(benchmark=benchmark, question=each, image=_digest(each), key="") for each in questions]
    return keyed(items, mllm)


def keyed(items: Sequence[Item], mllm: Mapping[str, Any]) -> list[Item]:
    """The items with the keys of their answers by a model of this identity.

    The same words and image get the same answer, except from a model that says it answers ``by_id``.
    """
    model, by_id = content_key(mllm), bool(mllm.get("by_id"))

    def key(item: Item) -> str:
        asked = item.question
        return content_key(model, asked.text, item.image, asked.repeat, asked.id if by_id else None)

    return [replace(item, key=key(item)) for item in items]


def load_benchmark(name: str, benchmark: Benchmark, repeats: int) -> LoadedBenchmark:
    """The questions of a benchmark, each ``repeats`` times.

    Raises:
        InputError: they cannot be read, or there are none; the message begins with the key.
    """
    loaded = make(f"benchmarks.{name}", benchmark.load)
    if not loaded.questions:
        raise InputError(f"benchmarks.{name}: no questions are left to ask")
    log.info("%s: %s questions", name, f"{len(loaded.questions):,}")
    twins = Counter(each.twin for each in loaded.questions if each.twin is not None)
    if twins:
        pairs = sum(number == 2 for number in twins.values())
        level = logging.INFO if pairs else logging.WARNING
        log.log(level, "%s: %d pairs of twins; %d twins have no partner", name, pairs, len(twins) - pairs)
    if repeats == 1:
        return loaded
    again = [
        replace(
            question,
            id=f"{question.id}#{number + 1}",
            base=question.cluster,
            twin=None if question.twin is None else f"{question.twin}#{number + 1}",
            repeat=number,
        )
        for question in loaded.questions
        for number in range(repeats)
    ]
    return replace(loaded, questions=again)


def share_of(item: Item, processes: int) -> int:
    """The process of an item: it depends on the words alone, so that equal ones are not answered twice."""
    digest = hashlib.sha256(item.question.text.encode(errors="backslashreplace")).digest()
    return int.from_bytes(digest[:8]) % processes


def list_questions(*, benchmarks: Mapping[str, Benchmark], output_dir: str) -> None:
    """Write ``questions.jsonl``: benchmark, id, scenario, variant, question and image of each question.

    The rows take an ``answer`` each and are then a file for ``mllm=replay``. ``image`` is the path of the
    image file; ``None`` where there is no image, or where it is made in memory.

    Raises:
        InputError: there is no benchmark, or one cannot be read.
    """
    if not benchmarks:
        raise InputError("benchmark: name at least one, such as benchmark=[mmsafety]")
    rows = [
        {
            "benchmark": name,
            "id": question.id,
            "scenario": question.scenario,
            "variant": question.variant,
            "question": question.text,
            "image": str(question.image.path) if isinstance(question.image, ImageFile) else None,
        }
        for name, benchmark in benchmarks.items()
        for question in load_benchmark(name, benchmark, 1).questions
    ]
    path = Path(output_dir) / "questions.jsonl"
    write_jsonl(path, rows)
    log.info("wrote %d questions: %s", len(rows), path)


def seen_in_training(
    questions: Sequence[Question], name: str, trained: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any] | None]:
    """The questions that the training of each part found in its data, as its guard file says.

    Returns:
        Part -> ``None`` where nobody looked, else ``same_questions``: whether just these were looked for;
        ``asked``: different ones; ``found``: those in the data; ``scenarios``: those by scenario; ``rows``:
        texts that hold them (at most, if others were looked for too); ``removed``: whether training left
        those out; ``threshold``: see ``QuestionIndex``.
    """
    # A search in no text at all counts the questions and gives their fingerprint, as the training's did.
    asked = check_contamination((), {name: [question.text for question in questions]}).findings[name]
    scenarios = {question_digest(question.text): question.scenario for question in questions}
    seen: dict[str, dict[str, Any] | None] = {}
    for part, data in trained.items():
        checked: Mapping[str, Mapping[str, Any]] = data.get("contamination") or {}
        same = (entry for entry in checked.values() if entry["fingerprint"] == asked.fingerprint)
        entry = next(same, checked.get(name))
        if entry is None:
            seen[part] = None
            continue
        rows = {digest: count for digest, count in entry["found"].items() if digest in scenarios}
        seen[part] = {
            "same_questions": entry["fingerprint"] == asked.fingerprint,
            "asked": asked.questions,
            "found": len(rows),
            "scenarios": dict(sorted(Counter(scenarios[digest] for digest in rows).items())),
            "rows": min(entry["rows"], sum(rows.values())),
            "removed": entry["removed"],
            "threshold": entry["threshold"],
        }
    return seen


def contamination_notes(name: str, contamination: Mapping[str, dict[str, Any] | None]) -> list[str]:
    """A warning where parts of the guard learnt from a benchmark's questions."""
    learnt = [
        f"{part} ({found['found']:,} of {found['asked']:,} different questions)"
        for part, found in contamination.items()
        if found and found["found"] and not found["removed"]
    ]
    if not learnt:
        return []
    return [
        f"Contaminated: questions of {name} stand, nearly word for word, in the training data of"
        f" the {' and the '.join(learnt)}, so on new questions the guard may do worse than these figures say."
    ]


def _digest(question: Question) -> str | None:
    """Of the image, or why it cannot be read, as another run may find another image there."""
    try:
        return None if question.image is None else question.image.digest()
    except InputError as error:
        return f"unreadable: {error}"
