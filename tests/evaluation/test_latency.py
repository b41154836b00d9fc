"""What a guard adds to the time of an answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.errors import InputError
from mllm_protector.evaluation import latency
from mllm_protector.evaluation.latency import measure_latency
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.models.detoxifier import Detoxifier
from mllm_protector.records import LabelledAnswer
from mllm_protector.reporting.latency import report_latency
from tests.training.parts import DATA, Given


@pytest.fixture
def guard(
    tmp_path: Path, make_detector: Callable[..., HarmDetector], make_detoxifier: Callable[..., Detoxifier]
) -> dict[str, Any]:
    make_detector().save(tmp_path / "detector")
    make_detoxifier().save(tmp_path / "detoxifier")
    return {
        "data": DATA,
        "detector": str(tmp_path / "detector"),
        "detoxifier": str(tmp_path / "detoxifier"),
        "base": None,
        "lengths": [5, 70],
        "answers": 3,
        "rewrite_tokens": 4,
        "threads": None,
        "output_dir": str(tmp_path / "out"),
        "seed": 0,
    }


def test_every_length_has_a_row_for_the_score_and_for_the_rewrite(
    guard: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = measure_latency(**guard)
    rows = measured[0]["measurements"]
    assert [(row["arm"], row["group"], row["metric"], row["n"]) for row in rows] == [
        (arm, length, metric, 3)
        for length in ("5", "70")
        for arm in ("detector", "rewriting")
        for metric in ("median_ms", "p95_ms")
    ]
    values = {(row["arm"], row["group"], row["metric"]): row["value"] for row in rows}
    assert all(values[arm, group, "median_ms"] <= values[arm, group, "p95_ms"] for arm, group, _ in values)
    assert json.loads((tmp_path / "out" / "latency.json").read_text()) == measured[0]
    report_latency(measured)
    shown = (tmp_path / "out" / "latency.md").read_text()
    assert "score (every answer)" in shown
    assert "score (every answer)" in capsys.readouterr().out
    alone = measure_latency(**guard | {"detoxifier": None})[0]["measurements"]
    assert {row["arm"] for row in alone} == {"detector"}


def test_answers_have_exactly_the_length_and_differ(guard: dict[str, Any]) -> None:
    detector = load_detector(guard["detector"])
    records = [(pair.query, pair.rejected) for pair in DATA.train]
    found = list(latency._of_length(detector, records, 70, 4))
    tokenizer = detector.encoder.tokenizer
    assert len({answer for _, answer in found}) == 4
    for query, answer in found:
        assert query in {record[0] for record in records}
        assert abs(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) - 70) <= 1


def test_data_without_answers_are_refused(guard: dict[str, Any]) -> None:
    empty = LabelledAnswer(query="Why?", answer=" \n", harmful=False)
    for records in ([], [empty]):
        with pytest.raises(InputError, match="data: has no answers with words"):
            measure_latency(**guard | {"data": Given(train=records, validation=[])})
    with pytest.raises(InputError, match=r"lengths=\[\]: give at least one"):
        measure_latency(**guard | {"lengths": []})
