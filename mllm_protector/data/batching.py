"""Which examples go where: the plan of one epoch, the same on every process; and texts packed end to end.

The plan is a pure function of its arguments. No sampler has a state, so a run can be resumed at any step,
and the number of processes changes where an example is computed but not which step it belongs to.

A packed batch has all its texts in one row, so that no position is padding. It says where they begin
(``BORDERS``) and counts positions from 0 in each; attention must stay within them (``models.packing``).
"""

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from mllm_protector.data.encoding import IGNORED, Batch, EncodedAnswer, EncodedCorrection
from mllm_protector.errors import InputError

BORDERS = "cu_seq_lens"
"""The key of a packed batch that says where its texts begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchLimit:
    """The most that one forward pass of one process may hold: a matter of memory and speed.

    An example that alone exceeds ``tokens`` gets a separate pass.

    Attributes:
        tokens: positions, padding included; ``None`` for no limit.
        examples: ``None`` for no limit.
        packed: the texts stand end to end in one row, so that nothing is padded.
    """

    tokens: int | None = None
    examples: int | None = None
    packed: bool = False

    def __post_init__(self) -> None:
        """Refuse limits under which nothing fits."""
        for name in ("tokens", "examples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name}={value}: must be at least 1")

    def positions(self, count: int, *, longest: int, total: int) -> int:
        """The positions of ``count`` examples of ``total`` tokens, padding included if there is any."""
        return total if self.packed else longest * count

    def allows(self, count: int, *, longest: int, total: int) -> bool:
        """Whether ``count`` examples of ``total`` tokens fit into one forward pass."""
        if count <= 1:
            return True
        if self.examples is not None and count > self.examples:
            return False
        return self.tokens is None or self.positions(count, longest=longest, total=total) <= self.tokens


@dataclass(frozen=True, slots=True)
class GlobalStep:
    """One optimisation step over all processes.

    Attributes:
        shards: ``shards[process][slot]`` are the example indices of one forward pass. Every process has the
            same number of slots, so that all wait for each other equally often; a slot may be empty.
    """

    shards: tuple[tuple[tuple[int, ...], ...], ...]


def plan_epoch(
    lengths: Sequence[int],
    *,
    batch_size: int,
    limit: MicroBatchLimit,
    processes: int,
    seed: int,
    epoch: int,
    done: int = 0,
) -> Iterator[GlobalStep]:
    """Shuffle the examples and deal them to steps, processes and forward passes, a step when it is asked for.

    Each example occurs exactly once; the last step is smaller where the numbers do not divide. The examples
    of a step are random ones, and the same for every limit and every number of processes: only *within* a
    step examples of like length go through the model together, so that little is padded and no step is all
    long, or all of one label. (Losses are summed over the step, so how it is divided changes no gradient.)

    Args:
        lengths: of the examples, in tokens.
        batch_size: examples in one step, over all processes.
        limit: of one forward pass of one process.
        processes: how many work together.
        seed: of the run; each ``epoch`` has another order.
        epoch: from 0.
        done: how many steps at the beginning are left out.
    """
    order = array("q", range(len(lengths)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    for start in range(done * batch_size, len(order), batch_size):
        yield _deal(_longest_first(order[start : start + batch_size], lengths), lengths, limit, processes)


def steps_per_epoch(count: int, *, batch_size: int) -> int:
    """The number of steps in a plan for ``count`` examples."""
    return -(-count // batch_size)


def by_length(lengths: Sequence[int], limit: MicroBatchLimit) -> Iterator[list[int]]:
    """Indices in batches of like length, the longest first: what does not fit into memory shows at once."""
    yield from _fill(_longest_first(range(len(lengths)), lengths), lengths, limit)


def _longest_first(indices: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda index: lengths[index], reverse=True)


def _fill(indices: Sequence[int], lengths: Sequence[int], limit: MicroBatchLimit) -> Iterator[list[int]]:
    """Neighbours together, the longest first, as many as the limit allows."""
    chunk: list[int] = []
    total = 0
    for index in indices:
        total += lengths[index]
        if chunk and not limit.allows(len(chunk) + 1, longest=lengths[chunk[0]], total=total):
            yield chunk
            chunk, total = [], lengths[index]
        chunk.append(index)
    if chunk:
        yield chunk


def _deal(
    indices: Sequence[int], lengths: Sequence[int], limit: MicroBatchLimit, processes: int
) -> GlobalStep:
    """Divide a step's examples, the longest first, into passes that the processes make side by side."""
    divide = _pack if limit.packed else _partition
    chunks = divide(indices, lengths, limit, processes)
    sizes = [_size(chunk, lengths, limit) for chunk in chunks]
    order = _longest_first(range(len(chunks)), sizes)
    hands = [tuple(chunks[i]) for i in order] + [()] * (-len(chunks) % processes)
    # Neighbours in size go to the processes in turn, so that none waits long for another.
    return GlobalStep(tuple(tuple(hands[process::processes]) for process in range(processes)))


def _partition(
    indices: Sequence[int], lengths: Sequence[int], limit: MicroBatchLimit, processes: int
) -> list[list[int]]:
    """Runs of neighbours: no more than the processes can share evenly, the largest as small as can be."""
    hands = _round_up(len(list(_fill(indices, lengths, limit))), processes)
    high = limit.tokens or _size(indices, lengths, limit)
    low = min(lengths[indices[0]], high)
    while low < high:
        middle = (low + high) // 2
        if len(list(_fill(indices, lengths, replace(limit, tokens=middle)))) <= hands:
            high = middle
        else:
            low = middle + 1
    return list(_fill(indices, lengths, replace(limit, tokens=low)))


def _pack(
    indices: Sequence[int], lengths: Sequence[int], limit: MicroBatchLimit, processes: int
) -> list[list[int]]:
    """The longest first, each to the emptiest bin: bins of like size, as few as the limit allows."""
    by_tokens = -(-_size(indices, lengths, limit) // limit.tokens) if limit.tokens else 1
    by_examples = -(-len(indices) // limit.examples) if limit.examples else 1
    count = _round_up(max(by_tokens, by_examples), processes)
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        sizes = [0] * count
        for index in indices:
            emptiest = min(range(count), key=sizes.__getitem__)
            bins[emptiest].append(index)
            sizes[emptiest] += lengths[index]
        if all(
            limit.allows(len(chosen), longest=size, total=size)
            for chosen, size in zip(bins, sizes, strict=True)
        ):
            return bins
        count += processes  # ends at one example a bin, which is always allowed


def _size(indices: Sequence[int], lengths: Sequence[int], limit: MicroBatchLimit) -> int:
    return limit.positions(
        len(indices),
        longest=max(lengths[i] for i in indices) if indices else 0,
        total=sum(lengths[i] for i in indices),
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def pack(texts: Sequence[list[int]]) -> Batch:
    """``input_ids`` and ``position_ids``, both (1, T) int64, and ``cu_seq_lens`` (S + 1,) int32: 0, then the
    end of each text.
    """
    return {
        "input_ids": torch.tensor([[token for ids in texts for token in ids]]),
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in texts])[None],
        BORDERS: torch.tensor([0, *accumulate(map(len, texts))], dtype=torch.int32),
    }


def pack_answers(rows: Sequence[EncodedAnswer]) -> Batch:
    """The detector's rows: ``pack`` plus ``labels`` (S,) float32, one for each text."""
    batch = pack([row.ids for row in rows])
    batch["labels"] = torch.tensor([row.label for row in rows], dtype=torch.float32)
    return batch


def pack_corrections(rows: Sequence[EncodedCorrection]) -> Batch:
    """The detoxifier's rows: ``pack`` plus ``labels`` (1, T) int64, the target's ids at the target's
    positions, ``IGNORED`` elsewhere (so also at the first position of each text).
    """
    batch = pack([row.prompt + row.target for row in rows])
    labels = [label for row in rows for label in [IGNORED] * len(row.prompt) + row.target]
    batch["labels"] = torch.tensor([labels])
    return batch


def is_packed(batch: Batch) -> bool:
    """Whether the texts stand end to end."""
    return BORDERS in batch


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; the borders stay on the CPU, where their values are looked at."""
    return {name: tensor if name == BORDERS else tensor.to(device) for name, tensor in batch.items()}


def count_tokens(batch: Batch) -> tuple[int, int]:
    """The real tokens of a batch, and all its positions."""
    positions = batch["input_ids"].numel()
    return (positions if is_packed(batch) else int(batch["attention_mask"].sum())), positions
