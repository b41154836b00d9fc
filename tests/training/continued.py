"""Small trainings with dropout that are stopped and resumed, for the tests of states and checkpoints.

Run as a module it is one of the processes of ``torchrun``.
"""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from mllm_protector.processes import Processes, leave_processes
from mllm_protector.training.checkpoints import Checkpoints
from mllm_protector.training.resume import Stopped, TrainingState
from mllm_protector.training.settings import CheckpointConfig
from tests.training import tagger

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


def run_stopped(folder: Path) -> None:
    """Two processes train together, and only the second one is asked to stop; then they resume."""
    checkpoint = CheckpointConfig(every_steps=3, every_minutes=None, keep_last=2)

    def go(name: str, loss_fn: Any = tagger.summed_loss, dropout: float = 0.3) -> None:
        model = tagger.make_model(dropout)
        tagger.run(folder / name, model=model, checkpoint=checkpoint, loss_fn=loss_fn).write(folder / name)

    go("whole")
    state = PartialState()
    for name, dropout in (("stopped", 0.3), ("plain", 0.0)):
        passes = iter(range(1, 1000))

        def loss_fn(model: Any, batch: Any, passes: Any = passes) -> torch.Tensor:
            if next(passes) == 5 and state.process_index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return tagger.summed_loss(model, batch)

        try:
            go(name, loss_fn, dropout)
        except Stopped as stopped:
            words = f"{stopped.exit_code} {stopped}"
            (folder / f"stopped-{state.process_index}.txt").write_text(words)
    go("stopped")


if __name__ == "__main__":
    if sys.argv[1] == "sharded":
        run_sharded(Path(sys.argv[2]), sys.argv[3])
    else:
        run_stopped(Path(sys.argv[2]))
    leave_processes()
