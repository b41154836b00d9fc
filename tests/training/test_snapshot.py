import json
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
from mllm_protector.training.checkpoint import Checkpoints
from mllm_protector.training.snapshot import Snapshot, restore
from tests.training.continued import ALONE, MODELS, Training, differing, read, seed_all, write

REPOSITORY = Path(__file__).parents[2]
MODULE = ("-m", "tests.training.continued")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_resumed_training_goes_on_with_the_same_bits(tmp_path: Path, kind: str, fused: bool) -> None:
    seed_all(0)
    training = Training.start(kind, fused=fused).steps(3)
    write(Checkpoints(tmp_path, 1), 3, training)
    expected = training.steps(4).capture()
    seed_all(7)
    other = Training.start(kind, seed=9, fused=fused).steps(1)
    step, snapshot = read(Checkpoints(tmp_path, 1))
    assert step == 3
    assert differing(expected, other.restore(snapshot).steps(4).capture()) == []


@pytest.mark.parametrize("fused", [False, True], ids=["to fused", "from fused"])
def test_the_optimizer_may_be_fused_from_now_on_or_no_longer(fused: bool) -> None:
    snapshot = Training.start("tied", fused=not fused).steps(2).capture()
    assert differing(snapshot, Training.start("tied", seed=1, fused=fused).restore(snapshot).capture()) == []


def test_before_the_first_step_there_is_no_optimizer_state_to_keep() -> None:
    snapshot = Training.start("tied").capture()
    assert snapshot.tensors["optimizer"] == {}
    later = Training.start("tied", seed=1).steps(2)
    assert differing(snapshot, later.restore(snapshot).capture()) == []


@pytest.mark.parametrize("kind", MODELS)
def test_each_trained_parameter_is_kept_once_and_no_frozen_one(kind: str) -> None:
    training = Training.start(kind).steps(1)
    tensors, _ = training.capture()
    trained = [p for p in training.model.parameters() if p.requires_grad]
    assert len(tensors["model"]) == len(trained)
    assert sum(tensor.numel() for tensor in tensors["model"].values()) == sum(p.numel() for p in trained)
    assert tensors["optimizer"].keys() == {
        f"{name}/{key}" for name in tensors["model"] for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_tied_weights_are_still_tied_after_a_restore() -> None:
    snapshot = Training.start("tied").steps(1).capture()
    model: Any = Training.start("tied", seed=1).restore(snapshot).model
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, snapshot.tensors["model"]["embedding.weight"])


def test_a_snapshot_does_not_change_with_the_training() -> None:
    training = Training.start("tied").steps(1)
    snapshot = training.capture()
    before = {stem: {k: v.clone() for k, v in named.items()} for stem, named in snapshot.tensors.items()}
    unchanged = Snapshot(before, json.loads(json.dumps(snapshot.state)))
    training.steps(2)
    assert differing(snapshot, unchanged) == []
    Training.start("tied", seed=1).restore(snapshot).steps(2)
    assert differing(snapshot, unchanged) == []


def test_the_learning_rate_is_that_of_the_snapshot() -> None:
    training = Training.start("tied").steps(5)
    other = Training.start("tied").restore(training.capture())
    rates = [[group["lr"] for group in each.optimizer.param_groups] for each in (training, other)]
    assert rates[0] == rates[1] == training.scheduler.get_last_lr()


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
def test_schedules_go_on_where_they_were(name: str) -> None:
    def scheduled() -> Training:
        training = Training.start("tied")
        training.scheduler = get_scheduler(name, training.optimizer, num_warmup_steps=2, num_training_steps=9)
        return training

    training = scheduled().steps(3)
    tensors, state = training.capture()
    other = scheduled().restore(Snapshot(tensors, json.loads(json.dumps(state))))
    for _ in range(6):
        assert other.scheduler.get_last_lr() == training.scheduler.get_last_lr()
        training.step()
        other.step()


def test_every_kind_of_random_number_goes_on_as_before() -> None:
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
    training = Training.start("tied")
    snapshot = training.capture()
    expected = [draw(), draw()]
    seed_all(4)
    training.restore(Snapshot(snapshot.tensors, json.loads(json.dumps(snapshot.state))))
    assert [draw(), draw()] == expected


class OtherHead(torch.nn.Module):
    def __init__(self, outputs: int, name: str = "head", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = torch.nn.Linear(2, 2)
        self.add_module(name, torch.nn.Linear(2, outputs, dtype=dtype))


def of(model: torch.nn.Module) -> Training:
    optimizer = torch.optim.AdamW(model.parameters())
    return Training(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0), ALONE)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (OtherHead(4), r"head\.weight is float32 \(4, 2\) in the model and float32 \(3, 2\) saved"),
        (OtherHead(3, dtype=torch.float64), r"head\.weight is float64 \(3, 2\) in the model"),
        (OtherHead(3, name="score"), r"head\.bias is trained in the checkpoint, but not in the model"),
        (
            OtherHead(3).requires_grad_(False),
            r"body\.bias is trained in the checkpoint, but not in the model",
        ),
    ],
)
def test_a_snapshot_of_another_model_is_refused_and_changes_nothing(
    model: torch.nn.Module, message: str
) -> None:
    snapshot = of(OtherHead(3)).capture()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=rf"another model or tuning: {message}.*; choose another output_dir"):
        of(model).restore(snapshot)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_trained_now_but_was_not_saved_is_named() -> None:
    small = OtherHead(3)
    small.head.bias.requires_grad_(False)
    with pytest.raises(InputError, match=r"head\.bias is trained in the model, but not saved"):
        of(OtherHead(3)).restore(of(small).capture())


@pytest.mark.parametrize("key", ["gone.weight/exp_avg", "head.weight/exp_avg"])
def test_optimizer_state_that_fits_no_parameter_is_refused(key: str) -> None:
    training = of(OtherHead(3))
    tensors, state = training.capture()
    with pytest.raises(InputError, match=f"the optimizer's {key} fits no trained parameter"):
        training.restore(Snapshot({**tensors, "optimizer": {key: torch.zeros(7)}}, state))


def test_with_another_number_of_processes_all_but_the_random_numbers_is_restored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    snapshot = Training.start("tied").steps(2).capture()
    other = Training.start("tied", seed=1)
    before = other.capture().state["random"]
    with caplog.at_level(logging.INFO):
        restore(snapshot, other.model, other.optimizer, other.scheduler, Processes(1, 4))
    assert caplog.messages == ["resumed on 4 process(es) instead of 1"]
    after = other.capture()
    assert after.state["random"] == before
    assert differing(snapshot, after) == ["random"]


@pytest.mark.parametrize("kind", ["tied", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_training_goes_on_with_other_numbers_of_processes_and_shards(tmp_path: Path, kind: str) -> None:
    write(Checkpoints(tmp_path / "one", 1), 3, Training.start(kind).steps(3))
    subprocess.run(
        [sys.executable, *TORCHRUN, *MODULE, "sharded", tmp_path, kind],
        check=True,
        cwd=REPOSITORY,
        timeout=120,
    )
    found = {path.name: read(Checkpoints(path, 1))[1] for path in tmp_path.iterdir()}
    assert differing(found["one"], found["same"]) == ["random"]
    assert differing(found["on"], found["resumed"]) == []
    assert differing(found["two"], found["on"]) != []
    one, two = found["two"].state["random"]
    assert one["torch"] != two["torch"]
    alone = Training.start(kind, seed=1).restore(found["two"])
    assert differing(found["two"], alone.capture()) == ["random"]
    alone.step()
