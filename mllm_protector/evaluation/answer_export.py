"""The answers of a finished run as files of other evaluation tools, which ``models.answer_files`` reads back.

- ``vlmevalkit``: ``<arm>_<benchmark>.tsv`` with ``index``, ``question``, ``category``, ``prediction`` and
  more (open-compass/VLMEvalKit, ``vlmeval/dataset/mmsafetybench.py``).
- ``lmms_eval``: ``<arm>_samples_<benchmark>.jsonl`` with ``doc_id``, ``doc``, ``input``, ``target``,
  ``resps`` and ``filtered_resps`` (EvolvingLMMs-Lab/lmms-eval, ``lmms_eval/loggers/evaluation_tracker.py``).
"""

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mllm_protector.errors import InputError
from mllm_protector.files import expand, read_json, write_jsonl, write_text
from mllm_protector.reading import Unwanted, read_records, required, text_field

log = logging.getLogger(__name__)

_FIELDS = ("id", "scenario", "variant", "question")


def export_answers(
    *,
    run: str,
    output_dir: str,
    arm_name: str = "protector",
    format: Literal["vlmevalkit", "lmms_eval"] = "vlmevalkit",  # noqa: A002 - the key that users type
) -> list[Path]:
    """Write what the user saw in one arm of a run, a file for each benchmark; questions keep their ids.

    Questions without an answer are left out, and their number is logged.

    Args:
        run: a folder that ``eval_mmsafety.py`` wrote.
        output_dir: of the files.
        arm_name: ``none`` for the MLLM's own answers.
        format: see the module.

    Returns:
        The files.

    Raises:
        RecordError: a broken row; the message is ``file:line: reason``.
        InputError: the run has no results, or none of this arm.
    """
    folder = expand(run)
    if not (folder / "asr.json").is_file():
        raise InputError(f"run={run}: holds no asr.json; give the output_dir of a run")
    benchmarks = sorted(read_json(folder / "asr.json")["benchmarks"])  # others are of an earlier run there
    rows = {name: _answers(folder / name / "results.jsonl", arm_name) for name in benchmarks}
    return [_WRITERS[format](Path(output_dir), arm_name, name, found) for name, found in rows.items()]


def _answers(path: Path, arm: str) -> list[dict[str, str]]:
    arms: set[str] = set()

    def parse(row: Mapping[str, Any]) -> dict[str, str]:
        arms.add(text_field(row, "arm"))
        if row["arm"] != arm:
            raise Unwanted("other arm")
        if required(row, "final") is None:
            raise Unwanted("no answer")
        return {name: text_field(row, name, allow_empty=name == "question") for name in _FIELDS} | {
            "answer": text_field(row, "final", allow_empty=True)
        }

    reading = read_records(path, parse)
    if arm not in arms:
        raise InputError(f"arm_name={arm}: {path} has the arms {', '.join(sorted(arms))}")
    log.info("%s: %s", path.parent.name, reading.summary())
    return reading.records


def _vlmevalkit(folder: Path, arm: str, benchmark: str, rows: Sequence[Mapping[str, str]]) -> Path:
    import pandas as pd

    names = {"id": "index", "scenario": "category", "answer": "prediction"}
    table = pd.DataFrame(rows, columns=[*_FIELDS, "answer"]).rename(columns=names)
    path = folder / f"{arm}_{benchmark}.tsv"
    write_text(path, table.to_csv(sep="\t", index=False, quoting=csv.QUOTE_ALL, lineterminator="\n"))
    return path


def _lmms_eval(folder: Path, arm: str, benchmark: str, rows: Sequence[Mapping[str, str]]) -> Path:
    path = folder / f"{arm}_samples_{benchmark}.jsonl"
    samples = (
        {
            "doc_id": number,
            "doc": {name: row[name] for name in _FIELDS},
            "input": row["question"],
            "target": "",
            "resps": [[row["answer"]]],
            "filtered_resps": [row["answer"]],
        }
        for number, row in enumerate(rows)
    )
    write_jsonl(path, samples)
    return path


_WRITERS = {"vlmevalkit": _vlmevalkit, "lmms_eval": _lmms_eval}
