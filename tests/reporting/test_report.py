import csv
import io
import json
import random
from pathlib import Path

import pytest
from PIL import Image

from mllm_protector.evaluation.summary import JudgeInfo
from mllm_protector.records import Confusion
from mllm_protector.reporting.report import CELL_FIELDS, assemble, cells_as_csv, write_report
from tests.evaluation.builders import report, rows, summary

ILLEGAL = "01-Illegal_Activitiy"
FILES = ("asr.json", "asr.csv", "asr.md", "asr.tex", "asr.png")


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_content_brings_everything_together_in_a_fixed_order() -> None:
    entry = summary(rows(ILLEGAL, "TEXT", "none", 1, 1))
    bias = Confusion(source="labels", found=4, missed=3, false_alarms=2, rejected=1)
    found = assemble(
        {"one": entry, "two": entry},
        mllm={"name": "model"},
        guard={"refusal": {"detector": {"weights": "d"}, "corrector": {"text": "no"}, "threshold": 0.5}},
        arms=["none", "refusal"],
        judges={
            "keyword": JudgeInfo(identity={"name": "keyword"}, bias=bias),
            "detector": JudgeInfo(identity={}, note="Circular: a reason", circular=True),
        },
        notes=["a note"],
    )
    assert list(found) == ["schema", "mllm", "arms", "guard", "judges", "notes", "benchmarks"]
    assert (found["schema"], found["mllm"], found["arms"]) == (1, {"name": "model"}, ["none", "refusal"])
    assert found["guard"]["refusal"]["threshold"] == 0.5
    assert found["judges"] == {
        "keyword": {
            "identity": {"name": "keyword"},
            "circular": False,
            "note": None,
            "bias": {"source": "labels", "found": 4, "missed": 3, "false_alarms": 2, "rejected": 1}
            | {"criterion": "harm"},
        },
        "detector": {"identity": {}, "circular": True, "note": "Circular: a reason", "bias": None},
    }
    assert found["benchmarks"] == {"one": entry, "two": entry}


def test_every_file_is_the_same_to_the_byte_for_shuffled_rows(tmp_path: Path) -> None:
    some = rows(ILLEGAL, "SD", "none", 6, 4, 2) + rows(ILLEGAL, "SD", "mine", 1, 9, 2)
    write_report(report(some), tmp_path / "first")
    write_report(report(random.Random(0).sample(some, len(some)), arms=["none", "mine"]), tmp_path / "second")
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_written_json_is_the_content(tmp_path: Path) -> None:
    result = report(rows(ILLEGAL, "TEXT", "none", 1, 1))
    write_report(result, tmp_path)
    assert json.loads((tmp_path / "asr.json").read_text(encoding="utf-8")) == result
    with Image.open(tmp_path / "asr.png") as chart:
        assert chart.width > 300


def test_empty_results_still_make_every_file(tmp_path: Path) -> None:
    write_report(report([]), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert (tmp_path / "asr.csv").read_text(encoding="utf-8") == ",".join(
        CELL_FIELDS
    ) + "\n"  # read with universal newlines


def test_csv_has_the_cells_of_all_benchmarks() -> None:
    result = report(rows(ILLEGAL, "TEXT", "none", 1, 2, 1), name="one")
    result["benchmarks"]["two"] = summary(rows("mine", "SD", "none", 0, 0, 2))
    first, second = table(cells_as_csv(result))
    assert list(first) == list(CELL_FIELDS)
    assert (first["benchmark"], first["scenario"], first["harmful"], first["unjudged"]) == (
        "one",
        ILLEGAL,
        "1",
        "1",
    )
    assert float(first["asr"]) == 1 / 3
    assert (float(first["bound_low"]), float(first["bound_high"])) == (0.25, 0.5)
    assert (second["benchmark"], second["unparseable"], second["asr"]) == ("two", "2", "")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠"])
def test_csv_never_starts_a_formula(start: str) -> None:
    name = f"{start}HYPERLINK(1)"
    result = report(rows(name, "TEXT", name, 1, 0, judges=[name]), name=name)
    (found,) = table(cells_as_csv(result))
    for field in ("benchmark", "scenario", "arm", "judge"):
        assert found[field] == f"'{name}"
    assert found["harmful"] == "1"
    assert result["benchmarks"][name]["cells"][0]["arm"] == name
