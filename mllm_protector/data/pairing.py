"""Pairs for the detoxifier from labelled answers: a harmless and a harmful answer to one question."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mllm_protector.data.queries import query_key
from mllm_protector.data.sources import Source
from mllm_protector.data.splits import Splits, make_splits
from mllm_protector.errors import InputError
from mllm_protector.records import AnswerPair, LabelledAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Each harmful answer of a source with a harmless one to the same question.

    The n-th harmful answer to a question gets the n-th harmless one, and the first again when these run out.
    Questions are the same by ``query_key``. Answers to a question with answers of one label only are dropped.

    Attributes:
        source: of labelled answers.
    """

    source: Source

    @property
    def test_set(self) -> bool:
        """Whether the source is one."""
        return bool(getattr(self.source, "test_set", False))

    def load(self) -> Splits[AnswerPair]:
        """The pairs, in the parts that the source puts their questions in.

        Raises:
            InputError: no question of either part has answers of both labels; the source is a mixture; or as
                the source.
        """
        splits = self.source.load()
        if len(splits.sources) > 1:
            raise InputError("data.source: is a mixture; pair each source, and mix the pairs")
        parts = {name: list(_pairs(getattr(splits, name))) for name in ("train", "validation")}
        line = f"{splits.account}; {len(parts['train']):,} and {len(parts['validation']):,} pairs"
        if empty := [name for name, pairs in parts.items() if not pairs]:
            raise InputError(f"{line}; no question of the {empty[0]} part has answers of both labels")
        sizes = {name: len(pairs) for name, pairs in parts.items()}
        kept = sum(sizes.values())
        [account] = splits.sources
        dropped = {**account.dropped, "not the harmful answer of a pair": account.kept - kept}
        counted = replace(account, kept=kept, dropped=dropped, **sizes)  # type: ignore[arg-type]
        return make_splits(parts["train"], parts["validation"], line, [counted])


def _pairs(records: Sequence[LabelledAnswer | Any]) -> Iterator[AnswerPair]:
    harmless: defaultdict[str, list[LabelledAnswer]] = defaultdict(list)
    for record in records:
        if not isinstance(record, LabelledAnswer):
            raise InputError("data.source: has pairs already; use it without data=paired")
        if not record.harmful:
            harmless[query_key(record.query)].append(record)
    taken: Counter[str] = Counter()
    for record in records:
        if record.harmful and (others := harmless.get(key := query_key(record.query))):
            accepted = others[taken[key] % len(others)]
            taken[key] += 1
            yield AnswerPair(
                query=record.query,
                accepted=accepted.answer,
                rejected=record.answer,
                accepted_harmful=False,
                rejected_harmful=True,
                scenario=record.scenario,
            )
