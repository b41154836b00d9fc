import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_protector.data.batching import MicroBatchLimit, plan_epoch
from mllm_protector.data.encoding import IGNORED, Batch
from mllm_protector.errors import InputError, RunError
from mllm_protector.processes import Processes
from mllm_protector.training.logging import Tracker
from tests.forked import together
from tests.training import tagger
from tests.training.tagger import CONFIG, logged, make_model, run, weights


def largest_difference(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


class Validations:
    """Gives one value after the other, and remembers the weights of each time."""

    def __init__(self, metric: str, values: list[float]) -> None:
        self.metric = metric
        self.values = values
        self.weights: list[dict[str, torch.Tensor]] = []

    def __call__(self, model: torch.nn.Module, processes: Processes[Any]) -> dict[str, float]:
        model.eval()
        self.weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {self.metric: self.values[len(self.weights) - 1]}


def test_a_step_follows_the_mean_loss_over_all_its_targets_or_its_examples(tmp_path: Path) -> None:
    for normalise in ("tokens", "examples"):
        settings: dict[str, Any] = {"schedule": "constant_with_warmup", "warmup": 0.0, "clip_norm": 3.0}
        run(tmp_path, epochs=1, micro_batch_size=2, normalise=normalise, **settings)
        model, rows = make_model(), tagger.make_rows(43)
        decay = CONFIG.weight_decay
        optimizer = torch.optim.AdamW(
            [
                {"params": [model.embedding.weight, model.output.weight], "weight_decay": decay},
                {"params": [model.output.bias], "weight_decay": 0.0},
            ],
            lr=CONFIG.learning_rate,
        )
        losses, norms = [], []
        for step in plan_epoch(
            [len(row) for row in rows], batch_size=8, limit=MicroBatchLimit(), processes=1, seed=0, epoch=1
        ):
            batch = tagger.collate([rows[index] for index in step.shards[0][0]])
            logits = model(batch["input_ids"]).transpose(1, 2)
            loss = torch.nn.functional.cross_entropy(logits, batch["labels"])  # the mean over targets
            if normalise == "examples":
                loss = loss * (batch["labels"] != IGNORED).sum() / len(batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)))
            optimizer.step()
            losses.append(loss.item())
        assert largest_difference(weights(tmp_path), model.state_dict()) < 1e-6, normalise
        made = logged(tmp_path, "train")
        assert [row["loss"] for row in made] == pytest.approx(losses, rel=1e-6), normalise
        assert [row["gradient_norm"] for row in made] == pytest.approx(norms, rel=1e-5), normalise


def test_how_a_step_is_divided_changes_no_weights(tmp_path: Path) -> None:
    divisions = ({"micro_batch_size": 4}, {"micro_batch_size": 1}, {"micro_batch_tokens": 20})
    for count in (48, 43, 33, 3):
        run(tmp_path / "whole", count=count, model=make_model(dropout=0.3))
        for division in divisions:
            run(tmp_path / "divided", count=count, model=make_model(dropout=0.3), **division)
            difference = largest_difference(weights(tmp_path / "divided"), weights(tmp_path / "whole"))
            assert difference < 1e-6, (count, division)


# 33: in the last step of an epoch the second process has nothing to do
COUNTS_AND_MEANS = list(itertools.product((43, 33, 1), ("tokens", "examples")))


def run_each(folder: Path) -> None:
    for count, normalise in COUNTS_AND_MEANS:
        target = folder / f"{count} {normalise}"
        run(target, count=count, model=make_model(dropout=0.3), normalise=normalise).write(target)


def test_two_processes_give_the_weights_and_metrics_of_one(tmp_path: Path) -> None:
    run_each(tmp_path / "one")
    together(run_each, tmp_path / "two")
    for count, normalise in COUNTS_AND_MEANS:
        one, two = (tmp_path / name / f"{count} {normalise}" for name in ("one", "two"))
        assert largest_difference(weights(one), weights(two)) < 1e-6
        fitted, written = (json.loads((folder / "metrics.json").read_text()) for folder in (one, two))
        assert written["steps"] == fitted["steps"]
        assert written["loss"] == pytest.approx(fitted["loss"], abs=1e-5)
        alone, shared = ([row["loss"] for row in logged(folder, "train")] for folder in (one, two))
        assert shared == pytest.approx(alone, abs=1e-6)


def test_only_parameters_that_require_a_gradient_are_trained(tmp_path: Path) -> None:
    model = make_model()
    model.embedding.requires_grad_(False)
    run(tmp_path, model=model)
    before = make_model().state_dict()
    assert torch.equal(weights(tmp_path)["embedding.weight"], before["embedding.weight"])
    assert not torch.equal(weights(tmp_path)["output.weight"], before["output.weight"])


def test_the_best_weights_are_at_the_top_and_the_last_ones_in_last(tmp_path: Path) -> None:
    for metric, values, best in (
        ("loss", [3.0, 1.0, 2.0], 2),
        ("auroc", [0.7, 0.9, 0.8], 2),
        ("loss", [2.0, 2.0, 2.0], 1),
    ):
        validations, case = Validations(metric, values), (metric, values)
        fitted = run(tmp_path, epochs=3, best_metric=metric, evaluate=validations)
        assert (fitted.step, fitted.steps) == (6 * best, 18), case
        assert (fitted.metrics, fitted.last_metrics) == ({metric: values[best - 1]}, {metric: values[-1]})
        for folder, index in ((tmp_path, best - 1), (tmp_path / "last", -1)):
            assert largest_difference(weights(folder), validations.weights[index]) == 0, case
            assert json.loads((folder / "saved.json").read_text()) == {metric: values[index]}, case
        assert largest_difference(weights(tmp_path), weights(tmp_path / "last")) > 0, case
        written = fitted.write(tmp_path, examples=43)
        assert json.loads((tmp_path / "metrics.json").read_text()) == written, case
        assert (written[metric], written["last"], written["examples"]) == (
            values[best - 1],
            {metric: values[-1]},
            43,
        )


def test_where_the_last_weights_are_the_best_they_are_saved_once(tmp_path: Path) -> None:
    fitted = run(tmp_path, evaluate=Validations("loss", [2.0, 1.0]))
    assert fitted.step == fitted.steps == 12
    assert not (tmp_path / "last").exists()


def test_max_steps_ends_the_training_with_a_validation(tmp_path: Path) -> None:
    fitted = run(tmp_path, epochs=9, max_steps=8)
    assert fitted.steps == 8
    assert [row["step"] for row in logged(tmp_path, "train")] == list(range(1, 9))
    assert [row["step"] for row in logged(tmp_path, "validation")] == [6, 8]
    assert logged(tmp_path, "train")[-1]["learning_rate"] == 0.0  # the schedule knows of it


def test_validations_come_when_they_are_asked_for_and_at_the_end(tmp_path: Path) -> None:
    for every, steps in ((None, [6, 12]), (5, [5, 10, 12]), (12, [12]), (99, [12])):
        run(tmp_path, validate_every=every)
        assert [row["step"] for row in logged(tmp_path, "validation")] == steps, every


def test_metrics_are_written_every_few_steps_and_at_the_end(tmp_path: Path) -> None:
    run(tmp_path, log_every=5)
    rows = logged(tmp_path, "train")
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert [row["epoch"] for row in rows] == [1, 2, 2]
    assert all(row["tokens_per_second"] > 0 for row in rows)


def at_call(number: int, poison: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The tagger's loss, poisoned in one forward pass."""
    calls = iter(range(1, 1000))

    def loss_fn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        loss = tagger.summed_loss(model, batch)
        return poison(loss) if next(calls) == number else loss

    return loss_fn


POISONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "the loss is nan": lambda loss: loss * math.nan,
    "the loss is inf": lambda loss: loss * math.inf,
    "the gradient norm nan": lambda loss: loss + (loss - loss.detach()).sqrt(),
}


def test_a_step_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path: Path) -> None:
    for message, poison in POISONS.items():
        model, validations = make_model(), Validations("loss", [1.0])
        with pytest.raises(RunError, match=f"step 8: .*{message}"):
            run(tmp_path, model=model, evaluate=validations, loss_fn=at_call(8, poison))
        assert [row["step"] for row in logged(tmp_path, "train")] == list(range(1, 8)), message
        assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()), message
        assert largest_difference(weights(tmp_path), validations.weights[0]) == 0, message
        assert not (tmp_path / "last").exists(), message


def test_a_validation_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"step 6: .*nan"):
        run(tmp_path, evaluate=Validations("loss", [math.nan]))
    assert not (tmp_path / tagger.WEIGHTS).exists()


def test_an_unknown_best_metric_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"fit.best_metric=auroc: choose one of loss"):
        run(tmp_path, best_metric="auroc")


def test_no_training_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="training split is empty"):
        run(tmp_path, count=0)


def test_without_a_terminal_each_tenth_and_each_validation_is_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(tmp_path, epochs=5, log_every=7)
    lines = [message for message in caplog.messages if re.match("(training: )?step ", message)]
    tokens = sum(map(len, tagger.make_rows(43)))
    assert re.fullmatch(
        rf"training 131 of 131 parameters \(100\.0 %\) on 43 examples of {tokens} tokens: 30 steps of 8 "
        r"examples, 1 process\(es\), \d+\.\d GiB of memory free",
        caplog.messages[0],
    )
    assert [line for line in lines if "validation loss" in line] == lines[2::3]
    assert len(lines) == 10 + 5
    assert re.fullmatch(
        r"training: step 3 of 30, [\d.,]+/s, 00:\d\d left: loss \d\.\d{4}, learning rate 1\.0e-02, "
        r"[\d,]+ tokens/s",
        lines[0],
    )


class RecordingTracker(Tracker):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, output_dir: str, settings: Mapping[str, Any], *, resumed: bool) -> None:
        self.calls.append(("start", output_dir, settings["seed"], resumed))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.calls.append((step, *metrics))

    def finish(self) -> None:
        self.calls.append(("finish",))


def test_the_tracker_gets_everything_in_order(tmp_path: Path) -> None:
    tracker = RecordingTracker()
    run(tmp_path, tracker=tracker, max_steps=1, seed=5)
    names = ("loss", "gradient_norm", "learning_rate", "padded_over_real", "epoch", "tokens_per_second")
    assert tracker.calls == [
        ("start", str(tmp_path), 5, False),
        (1, *(f"train/{name}" for name in names)),
        (1, "validation/loss"),
        ("finish",),
    ]
