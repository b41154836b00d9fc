"""From a source to the data of a training: splits without benchmark questions, and their report."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal

import numpy as np
from numpy.typing import NDArray

from mllm_protector.data import duplicates, queries
from mllm_protector.data.duplicates import check_contamination
from mllm_protector.data.report import data_report, write_data_report
from mllm_protector.data.sources import Source
from mllm_protector.data.splits import Splits, T, make_splits
from mllm_protector.data.table import cached, code_digest, records_table
from mllm_protector.errors import InputError
from mllm_protector.files import content_key, read_json, write_json, write_jsonl
from mllm_protector.processes import first_process_first, is_first_process
from mllm_protector.protocols import Benchmark
from mllm_protector.ranges import Seed

log = logging.getLogger(__name__)

Contaminated = Literal["keep", "drop"]
"""What to do with training records that hold a benchmark's question; they are counted either way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared(Generic[T]):
    """The data of a training.

    Attributes:
        splits: the records.
        loaded: the records of the source, before contaminated ones were left out.
        contamination: by benchmark the questions found in the training queries (see ``duplicates.Finding``),
            and whether these records were ``removed``; ``None`` if nobody looked.
    """

    splits: Splits[T]
    loaded: Splits[T]
    contamination: Mapping[str, Mapping[str, Any]] | None

    def facts(self) -> dict[str, Any]:
        """The facts for ``guard.json``, without a text."""
        found = {
            name: {key: value for key, value in finding.items() if key != "examples"}
            for name, finding in (self.contamination or {}).items()
        }
        return {
            "account": self.loaded.account,
            "fingerprint": self.loaded.fingerprint,
            "sources": [
                {"name": each.name, **each.origin.as_json(), "weight": each.weight}
                for each in self.splits.sources
            ],
            "contamination": found or None,
        }


def prepare(
    data: Source, benchmarks: Mapping[str, Benchmark], *, contaminated: Contaminated, folder: Path
) -> Prepared[Any]:
    """Load a source, look for benchmark questions in its training queries, and write the report.

    Args:
        data: the source.
        benchmarks: by name; with none, nobody looks.
        contaminated: whether records with such a question are trained on.
        folder: gets the report, from the first process.

    Raises:
        InputError: the source or a benchmark cannot be used, or nothing is left to train on.
        RecordError: a row is bad and no quarantine was given.
        RunError: the cache cannot be written.
    """
    with first_process_first():
        loaded = data.load()
        log.info("data: %s", loaded.account)
        rows, found = _look(loaded, benchmarks)
    splits = _without(loaded, rows) if contaminated == "drop" and len(rows) else loaded
    for name, finding in found.items():
        finding["removed"] = contaminated == "drop"
        _say(name, finding)
    if not benchmarks:
        log.info("contamination: not checked; benchmark=[mmsafety] looks for that benchmark's questions")
    if is_first_process():
        report = data_report(
            [source.as_json() for source in splits.sources],
            train=splits.train,
            validation=splits.validation,
            fingerprint=splits.fingerprint,
            contamination=found or None,
        )
        write_data_report(folder, report)
    return Prepared(splits=splits, loaded=loaded, contamination=found or None)


def prepare_data(
    *,
    data: Source,
    benchmarks: Mapping[str, Benchmark],
    contaminated: Contaminated,
    export: bool,
    output_dir: str,
    seed: Seed,
) -> None:
    """Write the report of a training's data, ``data_report.md`` and ``data_report.json``, without training.

    Args:
        data: the source.
        benchmarks: their questions are looked for in the training queries.
        contaminated: whether records with a benchmark's question would be trained on.
        export: also write the records to ``train.jsonl`` and ``validation.jsonl``, which ``data=pairs`` or
            ``data=labelled`` reads.
        output_dir: gets the files.
        seed: of the sources' splits and limits.

    Raises:
        InputError: as ``prepare``.
    """
    folder = Path(output_dir)
    splits = prepare(data, benchmarks, contaminated=contaminated, folder=folder).splits
    for name, records in (("train", splits.train), ("validation", splits.validation)) if export else ():
        write_jsonl(folder / f"{name}.jsonl", map(asdict, records))
    log.info("wrote %s", folder / "data_report.md")


def _look(
    splits: Splits[Any], benchmarks: Mapping[str, Benchmark]
) -> tuple[NDArray[np.int64], dict[str, dict[str, Any]]]:
    """The places of training records with a benchmark's question, and what was found of each benchmark."""
    if not benchmarks:
        return np.zeros(0, np.int64), {}
    asked = {
        name: sorted({question.text for question in benchmark.load().questions})
        for name, benchmark in benchmarks.items()
    }
    key = content_key(splits.fingerprint, asked, code_digest(duplicates, queries))

    def make(folder: Path) -> None:
        found = check_contamination((record.query for record in splits.train), asked)
        np.save(folder / "rows.npy", found.rows)
        write_json(folder / "found.json", found.as_json())

    folder = cached("contamination", key, make)
    return np.load(folder / "rows.npy"), read_json(folder / "found.json")


def _without(splits: Splits[Any], rows: NDArray[np.int64]) -> Splits[Any]:
    """The splits without these training records."""
    ends = np.cumsum([source.train for source in splits.sources])
    gone = np.bincount(np.searchsorted(ends, rows, side="right"), minlength=len(ends))
    sources = [
        replace(source, train=source.train - int(count), contaminated=int(count))
        for source, count in zip(splits.sources, gone, strict=True)
    ]
    left = np.setdiff1d(np.arange(len(splits.train)), rows)
    account = f"{splits.account}; {len(rows):,} training records hold a benchmark's question and are left out"
    if not len(left):
        raise InputError(f"{account}; nothing is left to train on")
    return make_splits(records_table(splits.train).take(left), splits.validation, account, sources)


def _say(name: str, finding: Mapping[str, Any]) -> None:
    if not finding["rows"]:
        log.info(
            "contamination: none of %s's %d questions is in the training data", name, finding["questions"]
        )
        return
    log.warning(
        "contamination: %d of %s's %d questions are in %d training records%s (data_report.md shows some)",
        len(finding["found"]),
        name,
        finding["questions"],
        finding["rows"],
        ", which are left out" if finding["removed"] else "; contaminated=drop leaves these out",
    )
