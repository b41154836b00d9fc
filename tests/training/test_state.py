"""The state of a training, by way of checkpoints on the disk."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_protector.errors import InputError
from tests.training.continued import MODELS, Training, differing, read

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_a_resumed_training_continues_with_the_same_bits(tmp_path: Path) -> None:
    for kind in MODELS:
        for before, after in ((False, False), (True, True), (False, True), (True, False)):
            torch.manual_seed(0)
            training = Training.start(kind, fused=before).steps(3)
            stopped = training.write(tmp_path / "stopped")
            expected = training.steps(4).write(tmp_path / "expected")
            torch.manual_seed(7)
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


def test_pytorchs_random_numbers_continue_as_before(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return torch.rand(3).tolist() + torch.randn(3).tolist()

    torch.manual_seed(3)
    training = Training.start("tied").steps(1)
    training.write(tmp_path)
    expected = draw()
    torch.manual_seed(4)
    training.restore(tmp_path)
    assert draw() == expected


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
    for saved, model, name in (
        (Head(), Head(4), "head.bias"),
        (Head(), Head(dtype=torch.float64), "head.bias"),
        (Head(), Head(name="score"), "head.bias"),
        (Head(), Head().freeze_bias(), "body.bias"),
        (Head().freeze_bias(), Head(), "body.bias"),
    ):
        folder = of(saved).write(tmp_path / str(id(model)))
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(InputError, match=rf"another model or tuning \({name}\); choose another out"):
            of(model).restore(folder)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), name


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
