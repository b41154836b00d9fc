"""The state of a training, by way of checkpoints on the disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from mllm_protector.errors import InputError
from mllm_protector.processes import Processes
from mllm_protector.training.checkpoints import Checkpoints
from mllm_protector.training.resume import TrainingState
from tests.forked import together

VOCABULARY = 31
ALONE: Processes[Any] = Processes(0, 1)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)
        self.dropout = torch.nn.Dropout(0.3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.dropout(torch.tanh(self.linear(hidden)))


class Tied(torch.nn.Module):
    """The embedding is the head; its 31 rows and biases cannot be shared evenly by two processes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 6)
        self.blocks = torch.nn.Sequential(Block(), Block())
        self.head = torch.nn.Linear(6, VOCABULARY)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(ids)))


def tied_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return Tied()


def lora_model(seed: int) -> torch.nn.Module:
    """Adapters with dropout on a frozen model, which does not depend on the seed."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    torch.manual_seed(seed)
    adapted = get_peft_model(base, LoraConfig(r=2, lora_dropout=0.3, target_modules="all-linear"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # also the half that begins at zero
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


MODELS = {"tied": tied_model, "lora": lora_model}


@dataclass
class Training:
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    processes: Processes[Any] = ALONE

    @classmethod
    def start(
        cls, kind: str, *, seed: int = 0, fused: bool = False, processes: Processes[Any] = ALONE
    ) -> "Training":
        model = MODELS[kind](seed).train()
        if processes.count > 1:
            for module in model.modules():
                if type(module).__name__ in ("Block", "LlamaDecoderLayer"):
                    fully_shard(module)
            fully_shard(model)
        groups = [
            [p for p in model.parameters() if p.requires_grad and (p.ndim == 1) == flat] for flat in (0, 1)
        ]
        optimizer = torch.optim.AdamW(
            [{"params": group, "weight_decay": 0.1 * index} for index, group in enumerate(groups)],
            lr=0.01,
            fused=fused,
        )
        return cls(model, optimizer, LambdaLR(optimizer, lambda step: (1 + step % 7) / 7), processes)

    @property
    def state(self) -> TrainingState:
        return TrainingState(self.model, self.optimizer, self.scheduler, self.processes)

    def steps(self, count: int) -> "Training":
        """The examples are drawn from the random numbers, so those count too."""
        for _ in range(count):
            ids = torch.randint(VOCABULARY, (3, 9))
            output = self.model(ids)
            logits = getattr(output, "logits", output)
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
        return self

    def write(self, folder: Path) -> Path:
        """The state as the only checkpoint of a folder."""
        tensors, state = self.state.capture()
        if self.processes.index == 0:
            Checkpoints(folder, 1).write(1, tensors, state)
        return folder

    def restore(self, folder: Path) -> "Training":
        tensors, state = read(folder)
        self.state.restore(tensors, state)
        return self


def read(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    found = Checkpoints(folder, 1).newest()
    assert found is not None
    return {stem: found.tensors(stem) for stem in ("model", "optimizer")}, found.state


def differing(one: Path, two: Path) -> list[str]:
    """Names of what is not the same to the last bit in two checkpoints."""
    (tensors, state), (others, other_state) = read(one), read(two)
    names = [
        name
        for stem in ("model", "optimizer")
        for name in sorted(tensors[stem].keys() | others[stem].keys())
        if not ({name} <= tensors[stem].keys() & others[stem].keys())
        or not torch.equal(tensors[stem][name], others[stem][name])
    ]
    return names + [key for key in state | other_state if state.get(key) != other_state.get(key)]


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
    return Training(model, optimizer, LambdaLR(optimizer, lambda step: 1.0))


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


def run_sharded(folder: Path, kind: str) -> None:
    """Two processes take over a training of one, continue, and stop and resume themselves."""
    started = PartialState(cpu=True)
    processes: Processes[Any] = Processes(started.process_index, started.num_processes)
    assert processes.count == 2
    training = Training.start(kind, seed=1, processes=processes).restore(folder / "one")
    assert all(isinstance(parameter, DTensor) for parameter in training.model.parameters())
    training.write(folder / "same")
    torch.manual_seed(processes.index)  # other examples and other dropout on each process
    training.steps(2).write(folder / "two")
    training.steps(3).write(folder / "on")
    started.wait_for_everyone()
    resumed = Training.start(kind, seed=2, processes=processes).restore(folder / "two")
    resumed.steps(3).write(folder / "resumed")


@pytest.mark.parametrize("kind", ["tied", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_training_resumes_on_other_numbers_of_processes_and_shards(tmp_path: Path, kind: str) -> None:
    Training.start(kind).steps(3).write(tmp_path / "one")
    together(run_sharded, tmp_path, kind)
    assert differing(tmp_path / "one", tmp_path / "same") == ["random"]
    assert differing(tmp_path / "on", tmp_path / "resumed") == []
    assert differing(tmp_path / "two", tmp_path / "on") != []
    one, two = read(tmp_path / "two")[1]["random"]
    assert one["torch"] != two["torch"]
    alone = Training.start(kind, seed=1).restore(tmp_path / "two")
    assert differing(tmp_path / "two", alone.write(tmp_path / "alone")) == ["random"]
