"""The state of a training, by way of checkpoints on the disk."""

import logging
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import get_scheduler

from mllm_protector.errors import InputError
from mllm_protector.processes import Processes
from tests.training.continued import MODELS, Training, differing, read, seed_all

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_a_resumed_training_continues_with_the_same_bits(tmp_path: Path) -> None:
    for kind in MODELS:
        for before, after in ((False, False), (True, True), (False, True), (True, False)):
            seed_all(0)
            training = Training.start(kind, fused=before).steps(3)
            stopped = training.write(tmp_path / "stopped")
            expected = training.steps(4).write(tmp_path / "expected")
            seed_all(7)
            other = Training.start(kind, seed=9, fused=after).steps(1).restore(stopped)
            again = other.write(tmp_path / "again")
            assert differing(stopped, again) == [], (kind, before, after)
            if before == after:
                assert differing(expected, other.steps(4).write(again)) == [], (kind, before)


def test_each_trained_parameter_is_kept_once_and_no_frozen_one(tmp_path: Path) -> None:
    for kind in MODELS:
        training = Training.start(kind).steps(1)
        tensors, _ = read(training.write(tmp_path / kind))
        trained = [p for p in training.model.parameters() if p.requires_grad]
        assert len(tensors["model"]) == len(trained), kind
        assert sum(t.numel() for t in tensors["model"].values()) == sum(p.numel() for p in trained), kind
        assert tensors["optimizer"].keys() == {
            f"{name}/{what}" for name in tensors["model"] for what in ("step", "exp_avg", "exp_avg_sq")
        }, kind


def test_tied_weights_are_still_tied_after_a_restore(tmp_path: Path) -> None:
    folder = Training.start("tied").steps(1).write(tmp_path)
    model: Any = Training.start("tied", seed=1).restore(folder).model
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, read(folder)[0]["model"]["embedding.weight"])


def test_schedules_continue_where_they_were(tmp_path: Path) -> None:
    for name in ("linear", "cosine", "constant_with_warmup"):

        def scheduled(name: str = name) -> Training:
            training = Training.start("tied")
            training.scheduler = get_scheduler(
                name, training.optimizer, num_warmup_steps=2, num_training_steps=9
            )
            return training

        training = scheduled().steps(3)
        other = scheduled().restore(training.write(tmp_path / name))
        for _ in range(6):
            rates = [[group["lr"] for group in each.optimizer.param_groups] for each in (training, other)]
            assert rates[0] == rates[1] == training.scheduler.get_last_lr(), name
            training.steps(1)
            other.steps(1)


def test_every_kind_of_random_number_continues_as_before(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [
            random.random(),
            random.gauss(),
            numpy.random.normal(),
            float(torch.rand(())),
            float(torch.randn(())),
        ]

    seed_all(3)
    draw()
    training = Training.start("tied").steps(1)
    training.write(tmp_path)
    expected = [draw(), draw()]
    seed_all(4)
    training.restore(tmp_path)
    assert [draw(), draw()] == expected


class Head(torch.nn.Module):
    def __init__(self, outputs: int = 3, name: str = "head", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = torch.nn.Linear(2, 2)
        self.add_module(name, torch.nn.Linear(2, outputs, dtype=dtype))

    def freeze_bias(self) -> "Head":
        self.body.bias.requires_grad_(False)
        return self


def of(model: torch.nn.Module) -> Training:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return Training(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))


def test_the_state_of_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    for saved, model, message in (
        (Head(), Head(4), r"head\.bias is float32 \(4,\) in the model and float32 \(3,\) in the"),
        (Head(), Head(dtype=torch.float64), r"head\.bias is float64 \(3,\) in the model"),
        (Head(), Head(name="score"), r"head\.bias is not trained in the model and float32 \(3,\) in the"),
        (Head(), Head().freeze_bias(), r"body\.bias is not trained in the model"),
        (Head().freeze_bias(), Head(), r"body\.bias is float32 \(2,\) in the model and not trained in the"),
    ):
        folder = of(saved).write(tmp_path)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(InputError, match=rf"another model or tuning: {message}.*; choose another out"):
            of(model).restore(folder)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), message


def test_with_another_number_of_processes_all_but_the_random_numbers_is_restored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Training.start("tied").steps(2).write(tmp_path / "one")
    other = Training.start("tied", seed=1).steps(1)
    before = read(other.write(tmp_path / "other"))[1]["random"]
    other.processes = Processes(1, 4)
    with caplog.at_level(logging.INFO):
        other.restore(folder)
    assert caplog.messages == ["resumed on 4 process(es) instead of 1"]
    other.processes = Processes(0, 1)
    after = other.write(tmp_path / "after")
    assert read(after)[1]["random"] == before
    assert differing(folder, after) == ["random"]


@pytest.mark.parametrize("kind", ["tied", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_training_resumes_on_other_numbers_of_processes_and_shards(tmp_path: Path, kind: str) -> None:
    Training.start(kind).steps(3).write(tmp_path / "one")
    subprocess.run(
        [*TORCHRUN, "-m", "tests.training.continued", "sharded", tmp_path, kind],
        check=True,
        cwd=REPOSITORY,
        timeout=120,
    )
    assert differing(tmp_path / "one", tmp_path / "same") == ["random"]
    assert differing(tmp_path / "on", tmp_path / "resumed") == []
    assert differing(tmp_path / "two", tmp_path / "on") != []
    one, two = read(tmp_path / "two")[1]["random"]
    assert one["torch"] != two["torch"]
    alone = Training.start(kind, seed=1).restore(tmp_path / "two")
    assert differing(tmp_path / "two", alone.write(tmp_path / "alone")) == ["random"]
