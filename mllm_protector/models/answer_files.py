"""Files of answers that were made before, in the formats of our own runs and of others' tools.

Told apart by their fields unless one is named:

- ``records``: ``answer`` (or ``text``, or ``raw`` as in our own ``results.jsonl``) with ``id`` or
  ``question``.
- ``vlmevalkit``: ``prediction``, beside ``question`` and ``category`` (open-compass/VLMEvalKit,
  ``vlmeval/dataset/mmsafetybench.py`` and ``vlmeval/smp/file.py``).
- ``lmms_eval``: ``filtered_resps`` or ``resps``, beside ``doc``, or ``input`` where newer releases leave the
  document out (EvolvingLMMs-Lab/lmms-eval, ``lmms_eval/loggers/evaluation_tracker.py``).
- ``mm_safetybench``: the folder ``questions_with_answers``, or one file of it; for each scenario
  ``{number: {"ans": {model: {"text": ...}}}}`` (isXinLiu/MM-SafetyBench, ``evaluation.py``).

Files may be ``.jsonl``, ``.jsonl.gz``, ``.csv``, ``.parquet``, ``.tsv``, ``.json`` and ``.xlsx``.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

from mllm_protector.errors import InputError
from mllm_protector.files import file_digest, read_json
from mllm_protector.reading import (
    Reading,
    Unwanted,
    collect,
    quoted_names,
    read_records,
    stream_rows,
    text_field,
)
from mllm_protector.records import VARIANTS, Variant
from mllm_protector.rows import Row

Format = Literal["auto", "records", "vlmevalkit", "lmms_eval", "mm_safetybench"]

NOT_OBTAINED = "Failed to obtain answer"
"""How VLMEvalKit's predictions begin where its model gave none (``INFER_FAIL_MSG``)."""

_ANSWERS = ("answer", "text", "raw")
_QUESTIONS = ("question", "query", "prompt")
_SCENARIOS = ("scenario", "category", "subset")
_VARIANTS = ("variant", "kind", "image_type", "split")

_KNOWN: Mapping[str, Variant] = {**{variant: variant for variant in VARIANTS}, "TEXT_ONLY": "TEXT"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One answer, and what is known of its question; ``None`` where the file does not say.

    Attributes:
        id: perhaps the question's.
        question: the words that were asked, if they may be compared.
        row: its number in the file, from 1; a header does not count.
    """

    answer: str
    id: str | None = None
    question: str | None = None
    scenario: str | None = None
    variant: Variant | None = None
    row: int = 0


def read_answers(
    path: Path,
    format: Format,  # noqa: A002
    variants: Sequence[Variant] | None,
    model: str | None,
) -> tuple[Reading[Stored], str | None]:
    """The answers of a file or folder, and whose they are if that is known; arguments as in ``Replay``.

    Raises:
        RecordError: a row cannot be used; the message is ``file:line: reason``.
        InputError: the file cannot be used, holds no answers, or does not say enough.
    """
    ending = path.suffix.lower()
    if path.is_dir():
        files = {file: read_json(file) for file in sorted(path.glob("*.json"))}
        return _of_the_benchmark(path, files, variants, model)
    content = read_json(path) if ending == ".json" else None
    if format == "mm_safetybench" or (format == "auto" and isinstance(content, dict)):
        return _of_the_benchmark(path, {path: content}, variants, model)
    numbers = count(1)

    def parse(row: Mapping[str, Any]) -> Stored:
        number = next(numbers)
        return replace(_PARSERS[_format_of(row) if format == "auto" else format](row), row=number)

    if ending == ".json":
        if not isinstance(content, list):
            raise InputError(f"{path}: must be a JSON list of rows (format {format})")
        reading = collect((_row(*numbered) for numbered in enumerate(content, 1)), str(path), parse)
    elif ending in (".tsv", ".xlsx"):
        reading = collect(_table(path), str(path), parse)
    else:
        reading = read_records(path, parse)
    if not reading.records:
        raise InputError(f"{path}: holds no answers ({reading.summary()})")
    return reading, model


def _row(number: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(number, "", value=value)
    return Row(number, "", problem=f"must be a JSON object, not {type(value).__name__}")


def _table(path: Path) -> Iterator[Row]:
    """The rows of a spreadsheet or a ``.tsv`` file as texts, numbered as their editors do."""
    import pandas

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    texts: dict[str, Any] = {"dtype": str, "keep_default_na": False}
    try:
        if path.suffix.lower() == ".tsv":
            frame = pandas.read_csv(path, sep="\t", encoding="utf-8-sig", **texts)
        else:
            # What some writers take for a formula, an answer that begins with "=", is its own text here.
            frame = pandas.read_excel(path, engine="openpyxl", engine_kwargs={"data_only": False}, **texts)
    except ImportError:
        raise InputError(f"{path}: needs openpyxl; pip install 'mllm-protector[excel]'") from None
    except Exception as error:  # pandas and openpyxl raise many kinds on broken files
        raise InputError(f"{path}: not a readable table ({str(error).strip()})") from error
    names = [str(name) for name in frame.columns]
    for number, values in enumerate(frame.itertuples(index=False, name=None), start=2):
        yield Row(number, "", value=dict(zip(names, values, strict=True)))


def _format_of(row: Mapping[str, Any]) -> Format:
    if "prediction" in row:
        return "vlmevalkit"
    if "filtered_resps" in row or "resps" in row:
        return "lmms_eval"
    if any(name in row for name in _ANSWERS) and any(name in row for name in ("id", *_QUESTIONS)):
        return "records"
    raise ValueError(
        "no answer in a known format: no field prediction (VLMEvalKit), filtered_resps (lmms-eval), or answer"
        f" beside id or question (found: {quoted_names(row)})"
    )


def _record(row: Mapping[str, Any]) -> Stored:
    field = next((name for name in _ANSWERS if name in row), "answer")
    if field in row and row[field] is None:
        raise Unwanted("no answer")
    answer = text_field(row, field, allow_empty=True)
    if _first(row, ["id"]) is None and _first(row, _QUESTIONS) is not None:
        return _stored(row, answer, id=None)
    return Stored(answer=answer, id=text_field(row, "id"))


def _vlmevalkit(row: Mapping[str, Any]) -> Stored:
    return _stored(row, row.get("prediction"), id=row.get("id", row.get("index")))


def _lmms_eval(row: Mapping[str, Any]) -> Stored:
    answer = row.get("filtered_resps", row.get("resps"))
    while isinstance(answer, list):  # one list for the requests of a document, one for their repeats
        if len(answer) != 1:
            raise ValueError(f"has {len(answer)} responses; only one can be an answer")
        [answer] = answer
    document = row.get("doc")
    fields = document if isinstance(document, dict) else {}
    if _first(fields, _QUESTIONS) is None and isinstance(row.get("input"), str):
        fields = {**fields, "question": row["input"]}
    return _stored(fields, answer, id=fields.get("id", fields.get("question_id")))


def _stored(row: Mapping[str, Any], answer: Any, *, id: Any) -> Stored:  # noqa: A002
    """An answer with whatever the other fields say of its question."""
    if answer is None or answer != answer:  # NaN, as pandas writes what is missing
        raise Unwanted("no answer")
    text = text_field({"the answer": answer}, "the answer", allow_empty=True)
    if text.startswith(NOT_OBTAINED):
        raise Unwanted("no answer")
    question, scenario = _first(row, _QUESTIONS), _first(row, _SCENARIOS)
    named = (str(row[name]).strip().upper() for name in _VARIANTS if name in row)
    return Stored(
        answer=text,
        id=None if id in (None, "") else str(id),
        question=None if question is None else text_field(row, question),
        scenario=None if scenario is None else str(row[scenario]),
        variant=next((_KNOWN[name] for name in named if name in _KNOWN), None),
    )


_PARSERS = {"records": _record, "vlmevalkit": _vlmevalkit, "lmms_eval": _lmms_eval}


def _of_the_benchmark(
    path: Path, files: Mapping[Path, Any], variants: Sequence[Variant] | None, model: str | None
) -> tuple[Reading[Stored], str]:
    """The answers of one model in MM-SafetyBench's own layout, known by the ids of its questions."""
    models: set[str] = set()
    for file, rows in files.items():
        if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
            raise InputError(f"{file}: must be a JSON object of questions by number")
        models |= {name for row in rows.values() for name in row.get("ans") or ()}
    if not models:
        raise InputError(f"{path}: holds no questions with answers ('ans' by model)")
    if model is None and len(models) == 1:
        [model] = models
    if model is None or model not in models:
        said = "" if model is None else f" and none of {model}"
        raise InputError(f"{path}: has answers of {', '.join(sorted(models))}{said}; name one as mllm.model")
    if variants is None or len(variants) != 1:
        raise InputError(
            f"{path}: does not say how its questions were asked; give one of {', '.join(VARIANTS)},"
            f" such as mllm.variants=[{VARIANTS[-1]}]"
        )
    reading: Reading[Stored] = Reading()
    for file, rows in files.items():
        entries = (
            _benchmark_row(number, f"{file.stem}/{variants[0]}/{key}", (row.get("ans") or {}).get(model))
            for number, (key, row) in enumerate(rows.items(), start=1)
        )
        reading.records += stream_rows(entries, str(file), _record, reading)
    return reading, model


def _benchmark_row(number: int, name: str, said: Any) -> Row:
    if said is None or isinstance(said, dict):
        return Row(number, "", value={"id": name, "answer": (said or {}).get("text")})
    return Row(number, "", problem="a model's answer must be a JSON object with a text")


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these fields that the row has with something in it."""
    return next((name for name in names if row.get(name) not in (None, "")), None)


def digest_of(path: Path) -> str:
    """A sha256 of a file, or of all JSON files of a folder with their names."""
    if not path.is_dir():
        return file_digest(path)
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.json")):
        digest.update(f"{file.name} {file_digest(file)}\n".encode())
    return digest.hexdigest()
