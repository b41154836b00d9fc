"""What training learns from, with an account of every row.

A source is cheap to construct and reads nothing until ``load``. Whatever it reads,
read = kept + quarantined + dropped, and no query is in two splits. A source knows nothing of tokens,
and it trusts the labels that a set carries. The published sets are in ``published``; ``mixture`` makes one of
several.
"""

import difflib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mllm_protector.data import toy
from mllm_protector.data.selection import Selection
from mllm_protector.data.splits import Origin, SourceAccount, Splits, T, make_splits
from mllm_protector.files import expand, file_digest
from mllm_protector.reading import Account, flag_field, stream_rows, text_field
from mllm_protector.records import AnswerPair, LabelledAnswer
from mllm_protector.rows import read_rows

HARM_LABELS = ("accepted_harmful", "rejected_harmful")


class Source(Protocol):
    """Something that yields training records."""

    def load(self) -> Splits[Any]:
        """Pairs or labelled answers, read, checked and split.

        Raises:
            InputError: nothing usable is there.
            RecordError: a row is bad and no quarantine was given.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    """The embedded toy pairs, with their own training and validation things."""

    def load(self) -> Splits[AnswerPair]:
        """1,000 pairs to train on and 200 to validate with."""
        train, validation = toy.toy_pairs("train"), toy.toy_pairs("validation")
        every = len(train) + len(validation)
        counted = SourceAccount(
            name="toy data",
            origin=Origin(name="toy data", licence="Apache-2.0, as this package"),
            read=every,
            kept=every,
            quarantined=0,
            dropped={},
            train=len(train),
            validation=len(validation),
        )
        account = Account(read=every, kept=every).summary()
        return make_splits(train, validation, f"toy data: {account}", [counted])


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnFile(Selection[T]):
    """A file of your own: ``.jsonl`` (also ``.gz`` or ``.xz``), ``.json``, ``.csv`` or ``.parquet``."""

    path: str

    def origin(self) -> Origin:
        """The file."""
        file = expand(self.path)
        digest = file_digest(file) if file.is_file() else ""
        return Origin(name=file.name, licence="your own file: none is known", files={file.name: digest})

    def records(self, account: Account) -> Iterator[T]:
        """Every row of the file."""
        path = expand(self.path)
        return stream_rows(read_rows(path), str(path), self.parse, account, strict=self.strict)

    @abstractmethod
    def parse(self, row: Mapping[str, Any]) -> T:
        """A row as a record; ``ValueError`` says why it is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs(OwnFile[AnswerPair]):
    """Your own pairs, or those that ``scripts/generate_pairs.py`` wrote.

    Attributes:
        path: a file with the fields ``query``, ``accepted`` and ``rejected``, and if you like
            ``accepted_harmful`` (else false), ``rejected_harmful`` (else true) and ``scenario``, a text for
            the report. Other fields are ignored.
    """

    def parse(self, row: Mapping[str, Any]) -> AnswerPair:
        """A row as a pair."""
        _require_spelling(row, HARM_LABELS)
        pair = AnswerPair(
            query=text_field(row, "query"),
            accepted=text_field(row, "accepted"),
            rejected=text_field(row, "rejected"),
            accepted_harmful="accepted_harmful" in row and flag_field(row, "accepted_harmful"),
            rejected_harmful="rejected_harmful" not in row or flag_field(row, "rejected_harmful"),
            scenario=_scenario(row),
        )
        if pair.accepted == pair.rejected:
            raise ValueError("fields 'accepted' and 'rejected' are the same text")
        return pair


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled(OwnFile[LabelledAnswer]):
    """Your own labelled answers, for the detector alone.

    Attributes:
        path: a file with the fields ``query``, ``answer`` and ``harmful``, and if you like ``scenario``, a
            text for the report. Other fields are ignored.
    """

    def parse(self, row: Mapping[str, Any]) -> LabelledAnswer:
        """A row as a labelled answer."""
        return LabelledAnswer(
            query=text_field(row, "query"),
            answer=text_field(row, "answer"),
            harmful=flag_field(row, "harmful"),
            scenario=_scenario(row),
        )


def _scenario(row: Mapping[str, Any]) -> str | None:
    given = row.get("scenario")
    if given is None or given == "":  # an empty cell of a CSV
        return None
    return text_field(row, "scenario")


def _require_spelling(row: Mapping[str, Any], optional: Sequence[str]) -> None:
    """A misspelt optional label would otherwise be passed over, and a label turned."""
    for name in map(str, row):
        if name not in optional and (close := difflib.get_close_matches(name, optional, n=1, cutoff=0.8)):
            raise ValueError(f"unknown field '{name}': is '{close[0]}' meant?")
