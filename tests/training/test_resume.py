"""A training that is stopped, killed or cannot write must end as if nothing had happened."""

import itertools
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from mllm_protector.data.encoding import Batch
from mllm_protector.errors import InputError, RunError
from mllm_protector.guard.calibration import Aim
from mllm_protector.processes import Processes
from mllm_protector.training import resume
from mllm_protector.training.checkpoints import Checkpoints
from mllm_protector.training.resume import Stopped
from mllm_protector.training.settings import CheckpointConfig
from tests import forked
from tests.forked import together
from tests.training import kills, tagger
from tests.training.kills import left_behind
from tests.training.parts import LORA, Given, pairs
from tests.training.tagger import logged, make_model, weights

THIRD = CheckpointConfig(every_steps=3, every_minutes=None, keep_last=2)
AN_EPOCH, STEPS = 6, 12
DROPOUT = 0.3

Loss = Callable[[torch.nn.Module, Batch], torch.Tensor]


class Crash(Exception):
    """Ends a training at once, as a kill does."""


def run(folder: Path, **changes: Any) -> None:
    """Twelve steps in two epochs, each with a validation at its end, and a checkpoint every third step."""
    tagger.run(folder, **{"model": make_model(DROPOUT), "checkpoint": THIRD} | changes).write(folder)


def at(step: int, act: Callable[[], Any], *, first: int = 1) -> Loss:
    """The tagger's loss, which does something in the middle of a step (of one forward pass)."""
    steps = iter(range(first, 1000))

    def loss_fn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        if next(steps) == step:
            act()
        return tagger.summed_loss(model, batch)

    return loss_fn


def crash() -> None:
    raise Crash


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@contextmanager
def crash_before_checkpoint(step: int) -> Iterator[None]:
    """Weights and metrics of the step are written, its checkpoint is not."""
    write = Checkpoints.write

    def crash_at(self: Checkpoints, number: int, *rest: Any) -> None:
        if number == step:
            raise Crash
        write(self, number, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "write", crash_at)
        with pytest.raises(Crash):
            yield


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def largest_difference(one: Path, two: Path) -> float:
    return max(float((weights(one)[name] - weights(two)[name]).abs().max()) for name in weights(one))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder)
    return left_behind(folder)


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    """A training that ended within step 8; there are checkpoints of steps 3 and 6."""
    folder = tmp_path / "crashed"
    with pytest.raises(Crash):
        run(folder, loss_fn=at(8, crash))
    assert checkpoints(folder) == [3, 6]
    return folder


def test_a_training_that_was_asked_to_stop_resumes_with_the_same_bits(
    tmp_path: Path, undisturbed: Mapping[str, Any]
) -> None:
    for number, step in itertools.product((signal.SIGTERM, signal.SIGINT), (1, 4, AN_EPOCH, STEPS)):
        folder = tmp_path / f"{number.name}-{step}"
        with pytest.raises(Stopped, match=f"stopped by {number.name} after step {step};") as stopped:
            run(folder, loss_fn=at(step, send(number)))
        assert stopped.value.exit_code == 128 + number
        assert checkpoints(folder)[-1] == step
        assert [row["step"] for row in logged(folder, "train")] == list(range(1, step + 1))
        assert all(row["step"] < step for row in logged(folder, "validation"))
        run(folder)
        assert left_behind(folder) == undisturbed, (number, step)


def test_a_training_asked_to_stop_while_it_validates_makes_no_further_step(
    tmp_path: Path, undisturbed: Mapping[str, Any]
) -> None:
    for step in (AN_EPOCH, STEPS):
        times, folder = iter((AN_EPOCH, STEPS)), tmp_path / str(step)

        def evaluate(
            model: torch.nn.Module, processes: Processes[Any], times: Any = times, step: int = step
        ) -> dict[str, float]:
            if next(times) == step:
                send(signal.SIGTERM)()
            return tagger.evaluate(model, processes)

        with pytest.raises(Stopped, match=f"after step {step};"):
            run(folder, evaluate=evaluate)
        assert checkpoints(folder)[-1] == logged(folder, "validation")[-1]["step"] == step
        run(folder)
        assert left_behind(folder) == undisturbed, step


def test_a_training_that_crashed_in_any_step_resumes_with_the_same_bits(
    tmp_path: Path, undisturbed: Mapping[str, Any]
) -> None:
    for step in range(1, STEPS + 1):
        folder = tmp_path / str(step)
        with pytest.raises(Crash):
            run(folder, loss_fn=at(step, crash))
        with (folder / "metrics.jsonl").open("a") as lines:
            lines.write('{"step": 4, "ki')  # half a line of a killed process
        run(folder)
        assert left_behind(folder) == undisturbed, step


def test_a_kill_between_the_best_weights_and_their_checkpoint_changes_nothing(
    tmp_path: Path, undisturbed: Mapping[str, Any]
) -> None:
    for step in (AN_EPOCH, STEPS):
        folder = tmp_path / str(step)
        with crash_before_checkpoint(step):
            run(folder)
        assert (folder / tagger.WEIGHTS).exists()
        assert checkpoints(folder)[-1] == step - 3
        run(folder)
        assert left_behind(folder) == undisturbed, step


def test_a_kill_after_the_last_step_changes_nothing(
    tmp_path: Path, undisturbed: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "clear", lambda self: crash())
        with pytest.raises(Crash):
            run(tmp_path)
    assert checkpoints(tmp_path)[-1] == STEPS
    run(tmp_path, loss_fn=at(1, crash))  # no step is made again
    assert left_behind(tmp_path) == undisturbed


def test_a_real_training_resumes_with_the_same_bits_and_refuses_other_data_or_tuning(
    tmp_path: Path, base: Path
) -> None:
    for part, train in (("detector", kills.train_a_detector), ("detoxifier", kills.train_a_detoxifier)):
        whole, crashed = (tmp_path / part / name for name in ("whole", "crashed"))
        train(whole, base)
        with crash_before_checkpoint(6):
            train(crashed, base)
        with pytest.raises(InputError, match=r"data\.fingerprint was [0-9a-f]{64}, now [0-9a-f]{64}"):
            train(crashed, base, data=Given(pairs(15, start=1), pairs(5, start=50)))
        with pytest.raises(InputError, match=r"tuning was .*alpha=4.*, now .*alpha=8"):
            train(crashed, base, tuning=replace(LORA, alpha=8))
        if part == "detector":
            with pytest.raises(InputError, match=r"calibration\.kind was f1, now recall"):
                train(crashed, base, calibration=Aim("recall", 0.9))
        train(crashed, base)
        assert left_behind(crashed) == left_behind(whole), part


def test_a_training_may_be_packed_from_now_on(tmp_path: Path, base: Path) -> None:
    without_dropout = {"tuning": replace(LORA, dropout=0.0, targets=["q_proj", "v_proj"])}
    kills.train_a_detector(tmp_path / "whole", base, **without_dropout)
    padded = replace(kills.FIT, best_metric="auroc", packing=False)
    with crash_before_checkpoint(6):
        kills.train_a_detector(tmp_path / "packed", base, fit=padded, **without_dropout)
    kills.train_a_detector(tmp_path / "packed", base, **without_dropout)
    trained = [
        load_file(tmp_path / name / "last" / "adapter_model.safetensors") for name in ("whole", "packed")
    ]
    assert all(torch.allclose(trained[0][name], trained[1][name], rtol=0, atol=1e-6) for name in trained[0])


def test_a_checkpoint_of_another_training_is_refused_in_one_line_that_says_what_changed(
    crashed: Path,
) -> None:
    before = contents(crashed)
    for change, words in (
        ({"seed": 1}, "seed was 0, now 1"),
        ({"learning_rate": 0.02}, "learning_rate was 0.01, now 0.02"),
        ({"epochs": 3}, "epochs was 2, now 3"),
        ({"count": 44}, "lengths was [0-9a-f]{64}, now [0-9a-f]{64}"),
    ):
        with pytest.raises(
            InputError, match=rf"step-00000006: of another training \({words}\); .*resume=never"
        ) as error:
            run(crashed, **change)
        assert "\n" not in str(error.value)
        assert contents(crashed) == before, change


def test_resume_never_starts_over(crashed: Path, undisturbed: Mapping[str, Any]) -> None:
    seen: list[int] = []
    run(crashed, resume="never", loss_fn=at(2, lambda: seen.append(len(checkpoints(crashed)))))
    assert seen == [0]
    assert left_behind(crashed) == undisturbed


def test_after_a_loss_that_is_not_finite_the_checkpoints_are_of_good_steps(
    tmp_path: Path, undisturbed: Mapping[str, Any]
) -> None:
    losses = iter(range(1, 1000))

    def loss_fn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return tagger.summed_loss(model, batch) * (math.nan if next(losses) == 8 else 1.0)

    with pytest.raises(RunError, match="step 8: the loss is nan"):
        run(tmp_path, loss_fn=loss_fn)
    assert checkpoints(tmp_path) == [3, 6]
    for path in contents(tmp_path):
        if path.suffix == ".safetensors":
            assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
        else:
            assert not re.search(r"\b(NaN|Infinity)\b", path.read_text())
    run(tmp_path)
    assert left_behind(tmp_path) == undisturbed


def test_a_checkpoint_is_written_when_it_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 25))  # it is looked at before the first step, at each, and after writing
    monkeypatch.setattr(resume, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    written: list[int] = []
    monkeypatch.setattr(Checkpoints, "write", lambda self, step, *rest: written.append(step))
    run(tmp_path, checkpoint=CheckpointConfig(every_steps=None, every_minutes=1.25, keep_last=2))
    assert written == [3, 6, 9, 12]


def stop_and_resume(folder: Path) -> None:
    """Two processes train together, and only the second one is asked to stop."""
    run(folder / "whole")
    index = PartialState().process_index
    for name, dropout in (("stopped", DROPOUT), ("plain", 0.0)):
        loss_fn = at(5, send(signal.SIGTERM)) if index == 1 else tagger.summed_loss
        with pytest.raises(Stopped) as stopped:
            run(folder / name, model=make_model(dropout), loss_fn=loss_fn)
        words = f"{stopped.value.exit_code} {stopped.value}"
        (folder / f"stopped-{index}.txt").write_text(words)
    run(folder / "stopped")


def test_of_two_processes_one_signal_stops_both_after_the_same_step(tmp_path: Path) -> None:
    together(stop_and_resume, tmp_path)
    words = {(tmp_path / f"stopped-{rank}.txt").read_text() for rank in range(2)}
    assert words == {"143 stopped by SIGTERM after step 5; everything is saved, repeat the command to resume"}
    assert left_behind(tmp_path / "stopped") == left_behind(tmp_path / "whole")
    assert checkpoints(tmp_path / "plain") == [3, 5]
    run(tmp_path / "plain", model=make_model())
    tagger.run(tmp_path / "one")
    assert largest_difference(tmp_path / "plain", tmp_path / "one") < 1e-6


@pytest.mark.parametrize(
    ("kills", "processes"),
    [(3, 1), pytest.param(20, 1, marks=pytest.mark.slow), pytest.param(10, 2, marks=pytest.mark.slow)],
)
def test_a_training_killed_at_random_times_ends_with_the_same_bits(
    tmp_path: Path, kills: int, processes: int
) -> None:
    arguments = ("--kills", str(kills), "--processes", str(processes))
    ran = forked.run("tests.training.kills", *arguments, cwd=tmp_path)
    assert ran.code == 0, ran.out + ran.err
    assert f"{kills} of {kills} bit-identical" in ran.out


def test_a_script_asked_to_stop_says_so_in_one_line_and_resumes_when_repeated(tmp_path: Path) -> None:
    command = (
        "train_detector",
        "backbone.vocab_size=600",
        "backbone.hidden_size=16",
        "backbone.layers=1",
        "backbone.heads=2",
        "fit.max_steps=40",
        "fit.log_every=1",
    )
    folder = tmp_path / "outputs" / "detector"
    started = forked.Started(forked.main, *command, cwd=tmp_path)
    [process] = started.processes
    while process.is_alive() and lines_of(folder / "metrics.jsonl") == 0:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)  # so that the steps made by now can be counted
    before = lines_of(folder / "metrics.jsonl")
    process.terminate()
    os.kill(process.pid, signal.SIGCONT)
    ran = started.end()
    assert ran.code == 143
    stopped = re.fullmatch(
        r"error: stopped by SIGTERM after step (\d+); everything is saved, repeat the command to resume\n",
        ran.err,
    )
    assert stopped, ran.err
    step = int(stopped[1])
    assert checkpoints(folder) == [step]
    assert step <= before + 1
    again = forked.run(*command, cwd=tmp_path)
    assert again.code == 0, again.err
    assert f"resuming after step {step} from outputs/detector/checkpoints" in again.out
    assert json.loads((folder / "metrics.json").read_text())["steps"] > step
    assert not checkpoints(folder)


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
