"""Who takes part in the benchmark."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch

from mllm_protector.benchmarking import trl_peers
from mllm_protector.benchmarking.inference import Rewriting, Scoring
from mllm_protector.benchmarking.meter import Meter, Reading
from mllm_protector.benchmarking.official import OfficialDetector, OfficialDetoxifier
from mllm_protector.benchmarking.ours import Ours
from mllm_protector.benchmarking.shape import Kind, Precision, Shape, copier, round_frozen
from mllm_protector.benchmarking.workload import Texts, Workload
from mllm_protector.data.batching import MicroBatchLimit
from mllm_protector.errors import InputError

Task = Literal["detector", "detoxifier", "scoring", "generation"]
TASKS: tuple[Task, ...] = ("detector", "detoxifier", "scoring", "generation")


class Arm(Protocol):
    """One way to do a task."""

    def step(self, rows: Any) -> tuple[float | None, Reading]:
        """Do it on the rows of a round; the mean loss if it is a training, and what it took."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all arms are told.

    Attributes:
        max_length: longest row in tokens.
        micro_batch_tokens: positions in one forward pass, where an arm goes by tokens.
        slots: answers written at once.
        new_tokens: the longest answer that is written.
        learning_rate: constant.
        seed: of the weights.
    """

    max_length: int
    micro_batch_tokens: int
    slots: int
    new_tokens: int
    learning_rate: float
    seed: int

    def __post_init__(self) -> None:
        """Refuse what would make the arms do different things.

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
    """Models and texts for the arms; the frozen weights of each kind are there once."""

    def __init__(self, shape: Shape, texts: Texts, settings: Settings) -> None:
        """Build nothing yet."""
        self.shape, self.texts, self.settings = shape, texts, settings

    def model(self, kind: Kind) -> torch.nn.Module:
        """A model with adapters of its own."""
        return self._detector() if kind == "detector" else self._detoxifier()

    def meter(self, model: torch.nn.Module) -> Meter:
        """Listens to a model."""
        return Meter(model, padding=[self.texts.pad_id])

    def workload(self, task: Task) -> Workload[Any]:
        """The rows of a task."""
        if task == "generation":
            return self.texts.pairs
        return self.texts.detoxifier if task == "detoxifier" else self.texts.detector

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An arm before it is made.

    Attributes:
        task: what it does.
        name: of the arm.
        make: the arm itself.
        precision: it computes in, where the weights are float32.
        ours: compared with all arms before it.
        needs_trl: left out where TRL is not installed.
        off_cuda: says something off CUDA only.
        pairwise: its loss is another one, so its curve is not drawn beside the others.
    """

    task: Task
    name: str
    make: Callable[[Bench, "Entry", Precision], Arm]
    precision: Precision = "fp32"
    ours: bool = False
    needs_trl: bool = False
    off_cuda: bool = False
    pairwise: bool = False

    def build(self, bench: Bench) -> Arm:
        """Make the arm."""
        return self.make(bench, self, self.computes_in(bench.shape))

    def computes_in(self, shape: Shape) -> Precision:
        """The precision with this model: bfloat16 weights compute in bfloat16."""
        return "bf16" if shape.dtype == "bfloat16" else self.precision


def _official_detector(bench: Bench, entry: Entry, precision: Precision) -> Arm:
    model = bench.model("detector")
    rate = bench.settings.learning_rate
    encoder = bench.texts.detector_encoder
    return OfficialDetector(model, encoder, bench.meter(model), precision=precision, learning_rate=rate)


def _official_detoxifier(bench: Bench, entry: Entry, precision: Precision) -> Arm:
    model = bench.model("detoxifier")
    rate = bench.settings.learning_rate
    encoder = bench.texts.detoxifier_encoder
    return OfficialDetoxifier(model, encoder, bench.meter(model), precision=precision, learning_rate=rate)


def _trl_reward(bench: Bench, entry: Entry, precision: Precision) -> Arm:
    model = bench.model("detector")
    rate = bench.settings.learning_rate
    return trl_peers.TrlReward(
        model,
        bench.texts.tokenizer,
        bench.meter(model),
        precision=precision,
        learning_rate=rate,
        by_length="by_length" in entry.name,
    )


def _trl_sft(bench: Bench, entry: Entry, precision: Precision) -> Arm:
    model = bench.model("detoxifier")
    return trl_peers.TrlSft(
        model,
        bench.texts.tokenizer,
        bench.meter(model),
        precision=precision,
        learning_rate=bench.settings.learning_rate,
        by_length="by_length" in entry.name,
        packed_tokens=bench.settings.micro_batch_tokens if "packing" in entry.name else None,
        compact="compact" in entry.name,
    )


def _ours(bench: Bench, entry: Entry, precision: Precision) -> Arm:
    kind: Kind = "detector" if entry.task == "detector" else "detoxifier"
    model = bench.model(kind)
    return Ours(
        model,
        bench.texts.detector_encoder if kind == "detector" else bench.texts.detoxifier_encoder,
        bench.meter(model),
        precision=precision,
        learning_rate=bench.settings.learning_rate,
        micro_batch_tokens=bench.settings.micro_batch_tokens,
        packed=entry.name.startswith("packed"),
        seed=bench.settings.seed,
    )


def _scoring(bench: Bench, entry: Entry, precision: Precision) -> Arm:
    model = bench.model("detector")
    if precision == "bf16":
        round_frozen(model)
    one = MicroBatchLimit(examples=1)
    many = MicroBatchLimit(tokens=bench.settings.micro_batch_tokens)
    limit = one if entry.name == "one_at_a_time" else many
    return Scoring(model, bench.texts.detector_encoder, bench.meter(model), limit=limit)


def _rewriting(bench: Bench, entry: Entry, precision: Precision) -> Arm:
    model = bench.model("detoxifier")
    slots = 1 if entry.name == "one_at_a_time" else bench.settings.slots
    new_tokens = bench.settings.new_tokens
    encoder = bench.texts.detoxifier_encoder
    # In a batch the end token of a finished answer is read, but it is no work.
    meter = Meter(model, padding=[bench.texts.pad_id, encoder.end_id])
    return Rewriting(model, encoder, meter, batch_size=slots, new_tokens=new_tokens)


ENTRIES = (
    Entry(task="detector", name="official_loop", make=_official_detector),
    Entry(task="detector", name="trl_reward", make=_trl_reward, needs_trl=True, pairwise=True),
    Entry(task="detector", name="trl_reward_by_length", make=_trl_reward, needs_trl=True, pairwise=True),
    Entry(
        task="detector",
        name="trl_reward_bf16",
        make=_trl_reward,
        precision="bf16",
        needs_trl=True,
        pairwise=True,
    ),
    Entry(task="detector", name="padded", make=_ours, ours=True),
    Entry(task="detector", name="packed", make=_ours, ours=True),
    Entry(task="detector", name="packed_bf16", make=_ours, precision="bf16", ours=True),
    Entry(task="detoxifier", name="official_loop", make=_official_detoxifier),
    Entry(task="detoxifier", name="trl_sft_as_shipped", make=_trl_sft, needs_trl=True),
    Entry(task="detoxifier", name="trl_sft_packing_as_shipped", make=_trl_sft, needs_trl=True),
    Entry(task="detoxifier", name="trl_sft_compact", make=_trl_sft, needs_trl=True, off_cuda=True),
    Entry(task="detoxifier", name="trl_sft_by_length_compact", make=_trl_sft, needs_trl=True, off_cuda=True),
    Entry(task="detoxifier", name="trl_sft_packing_compact", make=_trl_sft, needs_trl=True, off_cuda=True),
    Entry(task="detoxifier", name="padded", make=_ours, ours=True),
    Entry(task="detoxifier", name="packed", make=_ours, ours=True),
    Entry(task="detoxifier", name="packed_bf16", make=_ours, precision="bf16", ours=True),
    Entry(task="scoring", name="one_at_a_time", make=_scoring),
    Entry(task="scoring", name="ours", make=_scoring, ours=True),
    Entry(task="scoring", name="ours_bf16", make=_scoring, precision="bf16", ours=True),
    Entry(task="generation", name="one_at_a_time", make=_rewriting),
    Entry(task="generation", name="ours", make=_rewriting, ours=True),
)
"""All arms, the peers of each task before our own."""


def choose(tasks: Sequence[Task], names: Sequence[str] | None, shape: Shape) -> list[Entry]:
    """The arms that are asked for and can be had here.

    Args:
        tasks: some of ``TASKS``.
        names: arms by name; ``None`` for all.
        shape: with bfloat16 weights there is nothing to compare with float32.

    Raises:
        InputError: an unknown name, or none is left.
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
        and not (entry.off_cuda and torch.cuda.is_available())
        and not (entry.precision == "bf16" and shape.dtype == "bfloat16")
        and (not entry.needs_trl or trl_peers.available())
    ]
    if not chosen:
        raise InputError("arms: none is left to measure; see docs/recipes.md")
    return chosen
