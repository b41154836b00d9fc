import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.benchmarking import memory, trl_peers
from mllm_protector.benchmarking import run as run_module
from mllm_protector.benchmarking.arms import Bench
from mllm_protector.benchmarking.figures import figures, spread
from mllm_protector.benchmarking.meter import Meter, Reading, forget_peak, resident
from mllm_protector.benchmarking.run import run_benchmark
from mllm_protector.benchmarking.shape import Shape
from mllm_protector.data.sources import Labelled, Toy
from mllm_protector.errors import InputError
from tests.benchmarking.conftest import SETTINGS

SPREADS = (
    "real_tokens_per_second",
    "real_tokens_per_cpu_second",
    "padded_over_real",
    "forward_steps",
    "mfu",
    "peak_memory_bytes",
)


def arguments(shape: Shape, folder: Path) -> dict[str, Any]:
    return {
        "data": Toy(),
        "model": shape,
        "tasks": ["detector", "detoxifier", "scoring", "generation"],
        "arms": ["official_loop", "packed", "one_at_a_time", "ours"],
        "rounds": 2,
        "pairs": 4,
        "max_length": 256,
        "micro_batch_tokens": 300,
        "slots": 2,
        "new_tokens": 4,
        "learning_rate": 1e-3,
        "curve_steps": 3,
        "curve_pairs": 2,
        "threads": None,
        "output_dir": str(folder),
        "seed": 0,
    }


@pytest.fixture(scope="module")
def run(shape: Shape, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of a small run, whose memory is measured by another test."""
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "peaks", lambda entries, *_: [1000] * len(entries))
        patch.setattr(run_module, "matmul_speed", lambda *_: 1e15)
        run_benchmark(**arguments(shape, folder))
    return folder


def test_speeds_are_kept_where_the_memory_cannot_be_measured(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(memory, "peaks", fail)
    with pytest.raises(MemoryError):
        run_benchmark(**arguments(shape, tmp_path) | {"tasks": ["scoring"], "arms": None, "rounds": 1})
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert [result["arm"] for result in results] == ["one_at_a_time", "ours", "ours_bf16"]
    assert all(result["real_tokens_per_cpu_second"]["median"] > 0 for result in results)
    assert {result["peak_memory_bytes"] for result in results} == {None}


def test_the_figures_of_each_arm_are_spreads(run: Path) -> None:
    results = json.loads((run / "benchmark.json").read_text())
    assert [(result["task"], result["arm"]) for result in results] == [
        ("detector", "official_loop"),
        ("detector", "packed"),
        ("detoxifier", "official_loop"),
        ("detoxifier", "packed"),
        ("scoring", "one_at_a_time"),
        ("scoring", "ours"),
        ("generation", "one_at_a_time"),
        ("generation", "ours"),
    ]
    for result in results:
        assert result["repetitions"] == 2
        for name in SPREADS:
            assert 0 < result[name]["min"] <= result[name]["median"] <= result[name]["max"], name
        assert result["mfu"]["max"] < 1
        peers = [] if not result["ours"] else [results[results.index(result) - 1]["arm"]]
        assert list(result["speed_up_over"]) == list(result["steps_saved_over"]) == peers


def test_the_loss_curves_lie_on_each_other(run: Path) -> None:
    curves = json.loads((run / "loss_curves.json").read_text())
    for task in ("detector", "detoxifier"):
        assert len(curves[task]["packed"]) == 3
        assert curves[task]["packed"] == pytest.approx(curves[task]["official_loop"], rel=1e-4)
    assert (run / "loss_curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_terminal_gets_a_table(
    run: Path,
    shape: Shape,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "peaks", lambda entries, *_: [2**20] * len(entries))
    monkeypatch.setattr(run_module, "matmul_speed", lambda *_: 1e15)
    only = {"tasks": ["scoring"], "arms": None, "rounds": 1, "curve_steps": 0}
    run_benchmark(**arguments(shape, tmp_path) | only)
    said = capsys.readouterr().out
    assert "real tokens/s" in said
    assert "1 MiB" in said
    assert "ours_bf16, times as fast: " in said
    assert not (tmp_path / "loss_curves.json").exists()


def test_missing_trl_is_one_clear_line(
    shape: Shape, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trl_peers, "available", lambda: False)
    monkeypatch.setattr(memory, "peaks", lambda entries, *_: [None] * len(entries))
    only = {"tasks": ["detector"], "arms": ["packed"], "rounds": 1, "curve_steps": 0}
    with caplog.at_level(logging.WARNING):
        [result] = run_benchmark(**arguments(shape, tmp_path) | only)
    assert caplog.messages.count(trl_peers.MISSING) == 1
    assert result["peak_memory_bytes"] is None


@pytest.mark.parametrize(
    ("change", "line"),
    [({"rounds": 0}, "rounds=0: must be at least 1"), ({"pairs": 10**6}, "takes pairs=1000000")],
)
def test_rounds_that_cannot_be_are_refused(
    change: dict[str, int], line: str, shape: Shape, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=line):
        run_benchmark(**arguments(shape, tmp_path) | change)


def test_single_answers_are_refused(shape: Shape, tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "answer": "a", "harmful": n % 2 == 0} for n in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Labelled(
        path=str(path), validation_fraction=0.2, seed=0, limit=None, duplicates="exact", quarantine=None
    )
    with pytest.raises(InputError, match="only 0 pairs"):
        run_benchmark(**arguments(shape, tmp_path) | {"data": data})


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(bench: Bench) -> None:
    found = memory.peaks([("scoring", "ours")], bench.shape, bench.texts, SETTINGS, threads=1)
    assert len(found) == 1
    assert found[0] is None or 0 <= found[0] < 2**30


def test_the_highest_memory_counts_from_the_start() -> None:
    now = forget_peak()
    if now is None:
        pytest.skip("this system does not tell")
    block = bytearray(2**26)
    highest = resident("VmHWM")
    del block
    assert highest is not None
    assert highest - now >= 2**26 - 2**20
    forget_peak()
    again = resident("VmHWM")
    assert again is not None
    assert again < highest


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


def reading(seconds: float, cpu_seconds: float, on_gpu: bool) -> Reading:
    return Reading(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        real_tokens=100,
        positions=150,
        forward_steps=2,
        peak_memory_bytes=None,
        on_gpu=on_gpu,
    )


@pytest.mark.parametrize(("on_gpu", "ratios", "mfu"), [(False, [2.0, 3.0], 0.5), (True, [4.0, 5.0], 0.25)])
def test_speeds_are_compared_round_by_round(on_gpu: bool, ratios: list[float], mfu: float) -> None:
    ours = [reading(4.0, 2.0, on_gpu), reading(4.0, 2.0, on_gpu)]
    theirs = [reading(16.0, 4.0, on_gpu), reading(20.0, 6.0, on_gpu)]
    found = figures(ours, {"theirs": theirs}, flops=[10, 10], peak=10.0, memory=[3, 5])
    assert found["speed_up_over"]["theirs"] == spread(ratios)
    assert found["real_tokens_per_cpu_second"] == spread([50.0])
    assert found["real_tokens_per_second"] == spread([25.0])
    assert found["padded_over_real"]["median"] == 1.5
    assert found["mfu"]["median"] == mfu
    assert found["peak_memory_bytes"] == {"median": 4, "min": 3, "max": 5}
