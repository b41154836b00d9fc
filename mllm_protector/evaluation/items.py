"""From benchmarks to items: the questions to ask, each with the key of its answer."""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mllm_protector.errors import InputError, RecordError
from mllm_protector.files import content_key
from mllm_protector.protocols import Benchmark
from mllm_protector.records import LoadedBenchmark, Question

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A question of a benchmark, to be answered by one model.

    Attributes:
        benchmark: its name.
        question: what is asked.
        image: a hash of the image; ``None`` without one.
        key: of its answer.
    """

    benchmark: str
    question: Question
    image: str | None
    key: str


def items_of(benchmark: str, questions: Sequence[Question], mllm: Mapping[str, Any]) -> list[Item]:
    """The items of a benchmark's questions for a model of this identity.

    The same words and image get the same answer, but from a model that says it answers ``by_id``.
    """
    model, by_id = content_key(mllm), bool(mllm.get("by_id"))
    items = []
    for question in questions:
        image = _digest(question)
        key = content_key(model, question.text, image, question.repeat, question.id if by_id else None)
        items.append(Item(benchmark=benchmark, question=question, image=image, key=key))
    return items


def load_benchmark(name: str, benchmark: Benchmark, repeats: int) -> LoadedBenchmark:
    """The questions of a benchmark, each as often as it is to be asked.

    Raises:
        InputError: they cannot be read, or there are none; the message begins with the key.
    """
    try:
        loaded = benchmark.load()
    except RecordError:
        raise  # it begins with the file and the line
    except InputError as error:
        key = re.split("[=:. ]", str(error), maxsplit=1)[0]
        raise InputError(f"benchmarks.{name}{'.' if hasattr(benchmark, key) else ': '}{error}") from error
    if not loaded.questions:
        raise InputError(f"benchmarks.{name}: no questions are left to ask")
    log.info("%s: %s questions", name, f"{len(loaded.questions):,}")
    if repeats == 1:
        return loaded
    again = [
        replace(question, id=f"{question.id}#{number + 1}", base=question.cluster, repeat=number)
        for question in loaded.questions
        for number in range(repeats)
    ]
    return replace(loaded, questions=again)


def share_of(item: Item, processes: int) -> int:
    """Which process does an item: it depends on the words alone, so equal ones are not done twice."""
    digest = hashlib.sha256(item.question.text.encode(errors="backslashreplace")).digest()
    return int.from_bytes(digest[:8]) % processes


def _digest(question: Question) -> str | None:
    """Of the image, or what is wrong with it, which may be another image tomorrow."""
    try:
        return None if question.image is None else question.image.digest()
    except InputError as error:
        return f"unreadable: {error}"
