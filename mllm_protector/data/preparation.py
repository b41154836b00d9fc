"""From a source to the data of a training: splits without benchmark questions, and their report."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal

import numpy as np
from numpy.typing import NDArray

from mllm_protector.data import duplicates, queries, test_sets
from mllm_protector.data.duplicates import check_contamination
from mllm_protector.data.report import data_report, write_data_report
from mllm_protector.data.sources import Source
from mllm_protector.data.splits import Splits, T, make_splits
from mllm_protector.data.table import cached, code_digest, records_table
from mllm_protector.errors import InputError
from mllm_protector.files import content_key, file_digest, read_json, write_json, write_jsonl
from mllm_protector.processes import first_process_first, is_first_process
from mllm_protector.protocols import Benchmark
from mllm_protector.ranges import Seed

log = logging.getLogger(__name__)

Contaminated = Literal["keep", "drop"]
"""What to do with records that hold a question of a test set; they are counted either way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared(Generic[T]):
    """The data of a training.

    Attributes:
        splits: the records.
        loaded: the records of the source, before contaminated ones were left out.
        contamination: by test set the questions found in the training queries (see ``duplicates.Finding``),
            and whether these records were ``removed``; ``None`` if there are none and no benchmark was given.
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
        benchmarks: by name; their questions are looked for within training queries, also with a few words
            changed. Those of ``test_sets`` are looked for in any case, as whole queries.
        contaminated: whether records with such a question are used.
        folder: gets the report, from the first process.

    Raises:
        InputError: the source or a benchmark cannot be used, or is a test set itself, or nothing is left to
            train on.
        RecordError: a row is bad and no quarantine was given.
        RunError: the cache cannot be written.
    """
    if contaminated == "drop":
        _refuse_test_sets(data)
    with first_process_first():
        loaded = data.load()
        log.info("data: %s", loaded.account)
        train, validation, found = _look(loaded, benchmarks)
    drop = contaminated == "drop" and len(train) + len(validation)
    splits = _without(loaded, train, validation) if drop else loaded
    for name, finding in found.items():
        finding["removed"] = contaminated == "drop"
        _say(name, finding)
    if len(validation):
        log.warning(
            "contamination: %d validation records hold a question of a test set%s",
            len(validation),
            ", and are left out" if drop else "",
        )
    if not found and not len(validation):
        log.info(
            "contamination: none; benchmark=[mmsafety] also looks for that benchmark's questions in parts"
        )
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
        contaminated: whether records with a question of a test set would be trained on.
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


def _refuse_test_sets(data: Source) -> None:
    for name, source in getattr(data, "sources", {"": data}).items():
        if getattr(source, "test_set", False):
            where = f"data.sources.{name}" if name else "data"
            raise InputError(f"{where}: is a test set; contaminated=keep trains on it all the same")


def _look(
    splits: Splits[Any], benchmarks: Mapping[str, Benchmark]
) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[str, dict[str, Any]]]:
    """The places of contaminated records in both parts, and what was found of each test set."""
    asked = {
        name: sorted({question.text for question in benchmark.load().questions})
        for name, benchmark in benchmarks.items()
    }
    code = code_digest(duplicates, queries, test_sets)
    key = content_key(splits.fingerprint, asked, code, file_digest(test_sets.FILE))

    def make(folder: Path) -> None:
        found = check_contamination((record.query for record in splits.train), asked)
        known = test_sets.find(record.query for record in splits.train)
        validating = test_sets.find(record.query for record in splits.validation)
        np.save(folder / "train.npy", np.union1d(found.rows, known.rows))
        np.save(folder / "validation.npy", validating.rows)
        write_json(folder / "found.json", known.as_json() | found.as_json())

    folder = cached("contamination", key, make)
    return np.load(folder / "train.npy"), np.load(folder / "validation.npy"), read_json(folder / "found.json")


def _without(splits: Splits[Any], train: NDArray[np.int64], validation: NDArray[np.int64]) -> Splits[Any]:
    """The splits without these records of either part."""
    gone = _by_source([source.train for source in splits.sources], train)
    gone_too = _by_source([source.validation for source in splits.sources], validation)
    sources = [
        replace(
            source,
            train=source.train - one,
            validation=source.validation - other,
            contaminated=one + other,
        )
        for source, one, other in zip(splits.sources, gone, gone_too, strict=True)
    ]
    account = (
        f"{splits.account}; {len(train):,} training and {len(validation):,} validation records hold a "
        "question of a test set and are left out"
    )
    left = np.setdiff1d(np.arange(len(splits.train)), train)
    left_too = np.setdiff1d(np.arange(len(splits.validation)), validation)
    if not len(left) or not len(left_too):
        use = "validate with" if len(left) else "train on"
        raise InputError(f"{account}; nothing is left to {use}; contaminated=keep keeps them")
    return make_splits(
        records_table(splits.train).take(left),
        records_table(splits.validation).take(left_too),
        account,
        sources,
    )


def _by_source(sizes: Sequence[int], rows: NDArray[np.int64]) -> list[int]:
    """How many of these rows each source has."""
    found = np.searchsorted(np.cumsum(sizes), rows, side="right")
    return [int(count) for count in np.bincount(found, minlength=len(sizes))]


def _say(name: str, finding: Mapping[str, Any]) -> None:
    if not finding["rows"]:
        log.info(
            "contamination: none of %s's %d questions is in the training data", name, finding["questions"]
        )
        return
    log.warning(
        "contamination: %d of %s's %d questions are in %d training records%s%s",
        len(finding["found"]),
        name,
        finding["questions"],
        finding["rows"],
        ", which are left out" if finding["removed"] else "; contaminated=drop leaves these out",
        " (data_report.md shows some)" if finding["examples"] else "",
    )
