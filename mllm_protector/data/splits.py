"""The parts that records are divided into, and the account of each source."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from mllm_protector.data.queries import digest, opening_key
from mllm_protector.errors import InputError
from mllm_protector.reading import tally
from mllm_protector.records import AnswerPair, LabelledAnswer

T = TypeVar("T", bound=AnswerPair | LabelledAnswer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a set comes from.

    Attributes:
        name: of the set, as its publishers write it, or of the file.
        licence: as the set states it, or that it states none.
        revision: the commit on the hub; ``None`` for local files.
        files: the sha256 of each local file, by name.
    """

    name: str
    licence: str
    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The origin for a file; ``set`` is its name."""
        facts = asdict(self)
        return {"set": facts.pop("name"), **facts}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceAccount:
    """Where every row of a source went: read = kept + quarantined + dropped.

    With a weight of 1, kept = train + validation + contaminated.

    Attributes:
        name: of the source in a mixture; else the set's name.
        weight: how often its training records are used.
        quarantined: bad rows.
        dropped: rows that were not wanted, by reason.
        train: records to train on, as often as they are used.
        contaminated: records that are not trained on because they hold a benchmark's question.
    """

    name: str
    origin: Origin
    weight: float = 1.0
    read: int
    kept: int
    quarantined: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    train: int
    validation: int
    contaminated: int = 0

    def as_json(self) -> dict[str, Any]:
        """The account for a file, its origin beside it."""
        facts = asdict(self)
        del facts["origin"]
        return {**facts, **self.origin.as_json()}

    def summary(self) -> str:
        """One line, such as ``read 10 = kept 8 + dropped 2 (empty answer: 2)``, with the weight if not 1."""
        account = tally(self.read, self.kept, self.quarantined, self.dropped)
        return account if self.weight == 1 else f"{account}, weight {self.weight:g}"

    def without(self, reason: str, *, train: int, validation: int) -> "SourceAccount":
        """The account after records of both parts were dropped for a reason."""
        gone = train + validation
        return replace(
            self,
            kept=self.kept - gone,
            dropped={**self.dropped, reason: self.dropped.get(reason, 0) + gone},
            train=self.train - train,
            validation=self.validation - validation,
        )


@dataclass(frozen=True, slots=True)
class Splits(Generic[T]):
    """Records to train on and to validate with.

    Attributes:
        train: in the order of the source.
        validation: likewise; none of its queries is in ``train``.
        account: where every row went, in one line for the log.
        fingerprint: sha256 over all records, their order and the split.
        sources: the same account in numbers, with where each source comes from.
    """

    train: Sequence[T]
    validation: Sequence[T]
    account: str
    fingerprint: str
    sources: Sequence[SourceAccount] = ()


def shares_a_source(facts: Mapping[str, Any], splits: Splits[Any]) -> bool:
    """Whether any source of these splits is one that a part was trained on, however that was split.

    ``facts`` are the ``data`` of its ``guard.json``.
    """
    keys = ("set", "revision", "files")
    learnt = [{key: source.get(key) for key in keys} for source in facts.get("sources") or []]
    return any({key: each.origin.as_json()[key] for key in keys} in learnt for each in splits.sources)


def make_splits(
    train: Sequence[T], validation: Sequence[T], account: str, sources: Sequence[SourceAccount] = ()
) -> Splits[T]:
    """Splits with their fingerprint."""
    whole = hashlib.sha256()
    for name, records in (("train", train), ("validation", validation)):
        for record in records:
            whole.update(f"{name} {as_json(record)}\n".encode())
    return Splits(train, validation, account, whole.hexdigest(), sources)


def held_out(records: Iterable[T], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which records validate, so that no query is in both parts.

    Queries are the same by ``opening_key``, so dialogues that begin alike stay together. They are ordered by
    a hash (of several spellings by the lowest), so the split depends neither on the order of the records nor
    on the platform. The share of the records that validates is the possible one nearest to ``fraction``.

    Raises:
        InputError: fewer than two different queries.
    """
    asked = np.fromiter(
        (
            (digest(0, opening_key(record.query)), digest(seed, " ".join(record.query.casefold().split())))
            for record in records
        ),
        np.dtype([("query", np.uint64), ("place", np.uint64)]),
    )
    different, query = np.unique(asked["query"], return_inverse=True)
    if len(different) < 2:
        raise InputError(f"{len(different)} different queries cannot be split; at least two are needed")
    lowest = np.full(len(different), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(lowest, query, asked["place"])
    places, sizes = np.unique(lowest[query], return_counts=True)
    cut = np.argmin(np.abs(np.cumsum(sizes[:-1]) - fraction * len(asked)))
    validates: NDArray[np.bool_] = lowest[query] <= places[cut]
    return validates


def as_json(record: AnswerPair | LabelledAnswer) -> str:
    """A record as text, equal for equal records."""
    values = {each.name: getattr(record, each.name) for each in fields(record) if each.compare}
    return json.dumps(values, sort_keys=True)
