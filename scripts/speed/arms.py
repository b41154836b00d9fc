"""Who takes part in the benchmark."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch

from mllm_protector.data.batching import MicroBatchLimit
from mllm_protector.errors import InputError
from speed import trl_peers
from speed.meter import Meter, Reading
from speed.ours import Packed, Timed, rewriter, scorer
from speed.plain import OfficialLoop
from speed.shape import Kind, Precision, Shape, copier, round_frozen
from speed.workload import Texts, Workload

Task = Literal["detector", "detoxifier", "scoring", "generation"]


class Arm(Protocol):
    """One way to do a task."""

    def step(self, rows: Any) -> Reading:
        """Do it on the rows of a round."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all arms share; see the keys of ``run.run_benchmark``."""

    max_length: int
    micro_batch_tokens: int
    slots: int
    new_tokens: int
    learning_rate: float
    seed: int

    def __post_init__(self) -> None:
        """Refuse settings with which the arms would do different things.

        Raises:
            InputError: naming the key.
        """
        if self.micro_batch_tokens < self.max_length:
            raise InputError(
                f"micro_batch_tokens={self.micro_batch_tokens}: must be at least "
                f"max_length={self.max_length}, or TRL would cut texts"
            )
        for name in ("slots", "new_tokens"):
            if getattr(self, name) < 2:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 2")


class Bench:
    """Models and texts for the arms; the frozen weights of each kind exist once."""

    def __init__(self, shape: Shape, texts: Texts, settings: Settings) -> None:
        """Build nothing yet."""
        self.shape, self.texts, self.settings = shape, texts, settings

    def workload(self, task: Task) -> Workload[Any]:
        """The rows of a task."""
        if task == "generation":
            return self.texts.pairs
        return self.texts.detoxifier if task == "detoxifier" else self.texts.detector

    def model(self, kind: Kind) -> torch.nn.Module:
        """A model with its own adapters."""
        return self._detector() if kind == "detector" else self._detoxifier()

    @cached_property
    def _detector(self) -> Callable[[], torch.nn.Module]:
        return copier(self._build("detector"))

    @cached_property
    def _detoxifier(self) -> Callable[[], torch.nn.Module]:
        return copier(self._build("detoxifier"))

    def _build(self, kind: Kind) -> torch.nn.Module:
        return self.shape.build(
            kind,
            pad_id=self.texts.pad_id,
            end_id=self.texts.detoxifier_encoder.end_id,
            positions=self.settings.max_length,
            seed=self.settings.seed,
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """An arm before it is built.

    Attributes:
        task: what it does.
        name: of the arm; ``ours`` and ``packed`` arms are compared with all others before them.
        precision: it computes in, where the weights are float32.
    """

    task: Task
    name: str
    precision: Precision = "fp32"

    @property
    def is_ours(self) -> bool:
        """Whether it is the package's own way."""
        return self.name.startswith(("packed", "ours"))

    def computes_in(self, shape: Shape) -> Precision:
        """The precision with this model: bfloat16 weights compute in bfloat16."""
        return "bf16" if shape.dtype == "bfloat16" else self.precision

    def build(self, bench: Bench) -> Arm:
        """The arm itself."""
        settings, texts = bench.settings, bench.texts
        rate, tokens = settings.learning_rate, settings.micro_batch_tokens
        scores = self.task in ("detector", "scoring")
        model = bench.model("detector" if scores else "detoxifier")
        precision = self.computes_in(bench.shape)
        # In a batch the end token of a finished answer is read, but it is not work.
        ends = [texts.detoxifier_encoder.end_id] if self.task == "generation" else []
        meter = Meter(model, padding=[texts.pad_id, *ends])
        one = self.name == "one_at_a_time"
        if self.task == "scoring":
            if precision == "bf16":
                round_frozen(model)
            limit = MicroBatchLimit(examples=1) if one else MicroBatchLimit(tokens=tokens)
            return Timed(meter, scorer(model, texts.detector_encoder, limit))
        if self.task == "generation":
            size, longest = 1 if one else settings.slots, settings.new_tokens
            work = rewriter(model, texts.detoxifier_encoder, batch_size=size, new_tokens=longest)
            return Timed(meter, work)
        encoder = texts.detector_encoder if scores else texts.detoxifier_encoder
        if self.name == "official_loop":
            return OfficialLoop(model, encoder, meter, precision=precision, learning_rate=rate)
        if self.is_ours:
            return Packed(
                model, encoder, meter, precision=precision, learning_rate=rate, micro_batch_tokens=tokens
            )
        return trl_peers.TrlPeer(
            model,
            texts.tokenizer,
            meter,
            precision=precision,
            learning_rate=rate,
            by_length="by_length" in self.name,
            packed_tokens=tokens if "packing" in self.name else None,
        )


ENTRIES = (
    Entry("detector", "official_loop"),
    Entry("detector", "trl_reward"),
    Entry("detector", "trl_reward_by_length"),
    Entry("detector", "trl_reward_bf16", "bf16"),
    Entry("detector", "packed"),
    Entry("detector", "packed_bf16", "bf16"),
    Entry("detoxifier", "official_loop"),
    Entry("detoxifier", "trl_sft_compact"),
    Entry("detoxifier", "trl_sft_by_length_compact"),
    Entry("detoxifier", "trl_sft_packing_compact"),
    Entry("detoxifier", "packed"),
    Entry("detoxifier", "packed_bf16", "bf16"),
    Entry("scoring", "one_at_a_time"),
    Entry("scoring", "ours"),
    Entry("scoring", "ours_bf16", "bf16"),
    Entry("generation", "one_at_a_time"),
    Entry("generation", "ours"),
)
"""All arms, the peers of each task before our own."""


def choose(tasks: Sequence[Task], names: Sequence[str] | None, shape: Shape) -> list[Entry]:
    """The arms that are wanted and possible here.

    Args:
        tasks: what is measured.
        names: arms by name; ``None`` for all.
        shape: with bfloat16 weights there is nothing to compare with float32.

    Raises:
        InputError: an unknown name, or no arm is left.
    """
    known = [entry for entry in ENTRIES if entry.task in tasks]
    for name in names or ():
        if name not in {entry.name for entry in known}:
            choices = ", ".join(dict.fromkeys(entry.name for entry in known))
            raise InputError(f"arms: no arm {name} in these tasks; choose from {choices}")
    chosen = [
        entry
        for entry in known
        if (names is None or entry.name in names)
        and not (entry.precision == "bf16" and shape.dtype == "bfloat16")
        and (trl_peers.available() or not entry.name.startswith("trl"))
    ]
    if not chosen:
        raise InputError(
            "arms: none is left to measure" + ("" if trl_peers.available() else f"; {trl_peers.MISSING}")
        )
    return chosen
