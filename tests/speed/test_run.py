import json
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.data.sources import Labelled, Toy
from mllm_protector.errors import InputError
from speed import run as benchmark
from speed.arms import Bench
from speed.meter import Meter, Reading
from speed.run import run_benchmark
from tests.data.builders import OPTIONS, write_rows

MODEL = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 48, "vocab": 600}


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "data": Toy(),
        "model": MODEL | {"dtype": "float32"},
        "tasks": ["detector", "detoxifier", "scoring", "generation"],
        "arms": ["official_loop", "packed", "one_at_a_time", "ours"],
        "rounds": 2,
        "pairs": 4,
        "max_length": 256,
        "micro_batch_tokens": 300,
        "slots": 2,
        "new_tokens": 4,
        "learning_rate": 1e-3,
        "threads": None,
        "output_dir": str(folder),
        "seed": 0,
    } | changes


def test_each_arm_has_its_speed_and_ours_are_compared_with_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "matmul_speed", lambda *_: 1e15)
    run_benchmark(**arguments(tmp_path))
    results = json.loads((tmp_path / "benchmark.json").read_text())
    peers = {"packed": ["official_loop"], "ours": ["one_at_a_time"]}
    assert [(result["task"], result["arm"]) for result in results] == [
        *((task, arm) for task in ("detector", "detoxifier") for arm in ("official_loop", "packed")),
        *((task, arm) for task in ("scoring", "generation") for arm in ("one_at_a_time", "ours")),
    ]
    for result in results:
        for name in ("real_tokens_per_second", "padded_over_real", "forward_steps", "mfu"):
            assert 0 < result[name]["min"] <= result[name]["median"] <= result[name]["max"], name
        assert list(result["speed_up_over"]) == peers.get(result["arm"], [])
    for theirs, ours in (results[:2], results[2:4]):
        assert len(ours["losses"]) == 2
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    said = capsys.readouterr().out
    assert "tokens/s" in said
    assert "times as fast as one_at_a_time" in said


def test_settings_that_no_benchmark_can_have_are_refused_in_one_line(tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "answer": "a", "harmful": n % 2 == 0} for n in range(40)]
    single = Labelled(path=write_rows(tmp_path / "rows.jsonl", rows), **OPTIONS)

    def model(**changes: Any) -> dict[str, Any]:
        return {"model": MODEL | {"dtype": "float32"} | changes}

    for changes, line in (
        ({"pairs": 10**6}, "takes pairs=1000000"),
        ({"data": single}, "only 0 pairs"),
        ({"micro_batch_tokens": 255}, "micro_batch_tokens=255: must be at least max_length=256"),
        ({"slots": 1}, "slots=1: must be at least 2"),
        (model(layers=0), "model.layers=0: must be a whole number of at least 1"),
        (model(heads=3), "model.heads=3: must divide hidden=32"),
        (model(kv_heads=3), "model.kv_heads=3: must divide heads=4"),
        (model(dtype="int8"), "model.dtype=int8: use float32 or bfloat16"),
        (model(width=3), "model: .*unexpected keyword argument 'width'"),
    ):
        with pytest.raises(InputError, match=line):
            run_benchmark(**arguments(tmp_path, **changes))


def test_a_meter_counts_only_between_start_and_stop(bench: Bench) -> None:
    model = bench.model("detector")
    meter = Meter(model, padding=[bench.texts.pad_id])
    [rows] = bench.texts.detector.rounds(1)
    batch = bench.texts.detector_encoder.pad([row.ids for row in rows])
    model(**batch)
    meter.start()
    model(**batch)
    model(**batch)
    reading = meter.stop()
    model(**batch)
    assert reading.forward_steps == 2
    assert reading.positions == 2 * batch["input_ids"].numel()
    assert reading.real_tokens == 2 * sum(map(len, rows))


def test_speeds_are_compared_round_by_round(bench: Bench) -> None:
    def reading(cost: float) -> Reading:
        return Reading(
            cost=cost, real_tokens=100, positions=150, forward_steps=2, peak_memory_bytes=None, loss=None
        )

    theirs, ours = benchmark.choose(["scoring"], ["one_at_a_time", "ours"], bench.shape)
    measured = {theirs: [reading(4.0), reading(6.0)], ours: [reading(2.0), reading(2.0)]}
    found = benchmark._result(bench, ours, measured, peak=1e12)
    assert found["speed_up_over"] == {"one_at_a_time": {"median": 2.5, "min": 2.0, "max": 3.0}}
    assert found["real_tokens_per_second"]["median"] == 50.0
    assert found["padded_over_real"]["median"] == 1.5
