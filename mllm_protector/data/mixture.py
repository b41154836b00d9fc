"""Several sources as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllm_protector.data.duplicates import first_equal, text_of
from mllm_protector.data.queries import digest, opening_key
from mllm_protector.data.sources import Duplicates, Source, near_copies
from mllm_protector.data.splits import SourceAccount, Splits, make_splits
from mllm_protector.data.table import Table, joined, records_table
from mllm_protector.errors import InputError
from mllm_protector.ranges import Seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Sources one after the other, each read, limited and split by its own options.

    A later source drops the texts of an earlier one, whatever their labels, and no record is trained on whose
    query any source validates with.

    Attributes:
        sources: by the names that the report uses; none of them a mixture.
        weights: how often a source's training records are used, 1 by default: 0.25 uses a quarter of them, 3
            each three times. Validation records are used once.
        duplicates: what is dropped from a later source: ``keep`` nothing, ``exact`` texts of an earlier one,
            ``near`` also what nearly is one of these.
        seed: of what a weight below 1 keeps.
    """

    sources: Mapping[str, Source]
    weights: Mapping[str, float] | None
    duplicates: Duplicates
    seed: Seed

    def __post_init__(self) -> None:
        """Check the options."""
        if not self.sources:
            raise InputError("sources: there are none; add one, such as +data@data.sources.mine=pairs")
        for name, source in self.sources.items():
            if isinstance(source, Mixture):
                raise InputError(f"sources.{name}: a mixture cannot be a source of another; name its sources")
        for name, weight in (self.weights or {}).items():
            if name not in self.sources:
                raise InputError(
                    f"weights.{name}: there is no such source; there are {', '.join(self.sources)}"
                )
            if not 0 < weight < np.inf:
                raise InputError(f"weights.{name}={weight}: must be a number above 0")

    def load(self) -> Splits[Any]:
        """The records of all sources (see ``Source.load``); both parts must have some."""
        loaded = {name: source.load() for name, source in self.sources.items()}
        parts = [_Part(splits, replace(splits.sources[0], name=name)) for name, splits in loaded.items()]
        if self.duplicates != "keep":
            texts = (digest(0, text_of(each)) for each in _everything(parts))
            _drop_copies(parts, first_equal(np.fromiter(texts, np.uint64)), "stands in an earlier source")
        if self.duplicates == "near":
            rows = _everything(parts)
            content = [[splits.fingerprint for splits in loaded.values()], len(rows)]
            _drop_copies(parts, near_copies(rows, content), "nearly stands in an earlier source")
        _drop_held_out(parts)
        for number, part in enumerate(parts):
            part.weigh((self.weights or {}).get(part.account.name, 1.0), seed=[self.seed, number])
        train = joined(part.train for part in parts)
        validation = joined(part.validation for part in parts)
        line = "; ".join(f"{part.account.name}: {part.account.summary()}" for part in parts)
        if not len(train) or not len(validation):
            raise InputError(f"{line}; nothing is left to {'validate with' if len(train) else 'train on'}")
        return make_splits(train, validation, line, [part.account for part in parts])


def sources_of(data: Source) -> Mapping[str | None, Source]:
    """The sources of a mixture by name, or the one source without a name."""
    return dict(data.sources.items()) if isinstance(data, Mixture) else {None: data}


class _Part:
    """The records of a source that are left."""

    def __init__(self, splits: Splits[Any], account: SourceAccount) -> None:
        self.train = records_table(splits.train)
        self.validation = records_table(splits.validation)
        self.account = account

    def keep(self, train: NDArray[np.bool_], validation: NDArray[np.bool_], reason: str) -> None:
        """Drop the other records for a reason."""
        gone = {"train": int((~train).sum()), "validation": int((~validation).sum())}
        if any(gone.values()):
            self.train = self.train.take(np.flatnonzero(train))
            self.validation = self.validation.take(np.flatnonzero(validation))
            self.account = self.account.without(reason, **gone)

    def weigh(self, weight: float, seed: Sequence[int]) -> None:
        """Use each training record ``weight`` times; of a fraction, a random share of them once more."""
        if weight == 1:
            return
        count = len(self.train)
        times = np.full(count, int(weight))
        more = np.random.default_rng(seed).permutation(count)[: round(count * (weight - int(weight)))]
        times[more] += 1
        self.train = self.train.take(np.repeat(np.arange(count), times))
        self.account = replace(self.account, weight=float(weight), train=len(self.train))


def _everything(parts: Sequence[_Part]) -> Table[Any]:
    return joined(records for part in parts for records in (part.train, part.validation))


def _drop_copies(parts: Sequence[_Part], first: NDArray[np.int64], reason: str) -> None:
    """Drop records whose words first occur in an earlier source; copies within a source stay."""
    start = 0
    for part in parts:
        middle = start + len(part.train)
        end = middle + len(part.validation)
        part.keep(first[start:middle] >= start, first[middle:end] >= start, reason)
        start = end


def _drop_held_out(parts: Sequence[_Part]) -> None:
    """Drop training records whose query is one of a validation split."""
    held = np.unique(np.concatenate([_queries(part.validation) for part in parts]))
    for part in parts:
        free = ~np.isin(_queries(part.train), held)
        part.keep(free, np.ones(len(part.validation), np.bool_), "its query validates in another source")


def _queries(records: Table[Any]) -> NDArray[np.uint64]:
    return np.fromiter((digest(0, opening_key(each.query)) for each in records), np.uint64)
