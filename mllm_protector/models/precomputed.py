"""What enters the trained blocks, computed once: a training then runs these blocks alone.

With ``tuning.blocks=6`` the blocks below never change, so neither do their outputs. They are computed once,
for all epochs, validations and seeds, and kept in the cache. The model stays whole: an id becomes the place
of a hidden state, the embedding looks it up, and the lower blocks pass it on, so that batches, packing,
losses and the saved adapters are the same as without.
"""

import hashlib
import logging
import shutil
from array import array
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from mllm_protector.data.batching import MicroBatchLimit, by_length
from mllm_protector.data.encoding import EncodedAnswer, padded
from mllm_protector.data.table import cached
from mllm_protector.data.tokenized import lengths_of
from mllm_protector.errors import InputError
from mllm_protector.files import content_key
from mllm_protector.models.backbone import inference, pick_device, to_device
from mllm_protector.models.packing import body, pretrained
from mllm_protector.models.tuning import blocks_of
from mllm_protector.progress import Progress

log = logging.getLogger(__name__)

FILE = "states.npy"

TOLERANCE = 1e-3
"""The largest difference of an output, relative to the largest one, that counts as rounding."""

CHECKED = 4
"""Rows on which the shortened model is compared with the whole one."""


class PlacesOfStates:
    """Hidden states of all different rows, in a file; and where each row's are.

    Attributes:
        states: (P, hidden) float32, memory-mapped.
        pad_id: an id that is not a place.
    """

    def __init__(self, states: NDArray[np.float32], rows: Sequence[tuple[int, ...]], pad_id: int) -> None:
        """Number the places of the rows, in their order; ``rows`` are all different."""
        self.states = states
        self.pad_id = pad_id
        self._starts: dict[bytes, int] = {}
        place = 0
        for row in rows:
            self._starts[_key(row)] = place
            place += len(row)

    def of(self, row: Sequence[int]) -> list[int]:
        """What stands for the ids of a row: the places of its hidden states, past ``pad_id`` one more."""
        start = self._starts[_key(row)]
        return [place + (place >= self.pad_id) for place in range(start, start + len(row))]

    def look_up(self, ids: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
        """The hidden states (..., hidden) at places (...) int64, on the same device."""
        places = ids.cpu().numpy()
        places = np.minimum(places - (places > self.pad_id), len(self.states) - 1)
        return torch.from_numpy(self.states[places]).to(ids.device, dtype)


class AtPlaces(Sequence[EncodedAnswer]):
    """Examples with the places of their hidden states instead of ids; ``lengths`` as in ``Tokenized``."""

    def __init__(self, examples: Sequence[EncodedAnswer], places: PlacesOfStates) -> None:
        """Show each example so."""
        self.lengths = lengths_of(examples)
        self._examples = examples
        self._places = places

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        example = self._examples[index]
        return EncodedAnswer(self._places.of(example.ids), example.label)


def precompute(
    model: torch.nn.Module,
    blocks: int,
    rows: Iterable[Sequence[int]],
    *,
    base: str,
    pad_id: int,
    limit: MicroBatchLimit,
) -> PlacesOfStates:
    """The hidden states that enter the topmost blocks, from the cache if they are there.

    Args:
        model: whose blocks below the topmost ``blocks`` are frozen.
        blocks: that are trained.
        rows: token ids of texts; equal ones are computed once.
        base: a fingerprint of the frozen weights.
        pad_id: the padding of rows.
        limit: of one forward pass.

    Raises:
        InputError: the disk has no room for them.
        RunError: the cache cannot be written.
    """
    different = sorted({tuple(row) for row in rows})
    tokens = sum(map(len, different))
    width = int(pretrained(model).config.get_text_config().hidden_size)
    _, stack = blocks_of(model)
    whole = hashlib.sha256(array("i", (each for row in different for each in (len(row), *row))))
    dtype = str(next(stack[0].parameters()).dtype)

    def make(folder: Path) -> None:
        free = shutil.disk_usage(folder).free
        if (needed := tokens * width * 4) > free:
            raise InputError(
                f"tuning.precompute=true: the hidden states of {tokens:,} tokens take "
                f"{needed / 2**30:.1f} GiB, and {folder} has {free / 2**30:.1f} free; use false"
            )
        states = np.lib.format.open_memmap(folder / FILE, "w+", np.float32, (tokens, width))
        starts = np.cumsum([0, *map(len, different)])
        model.to(pick_device())
        with Progress("frozen blocks", "token", tokens) as bar, inference(model):
            for chosen in by_length([len(row) for row in different], limit):
                batch = padded([different[index] for index in chosen], pad_id, side="right")
                entered = _entering(model, stack[len(stack) - blocks], to_device(batch, model))
                for index, found in zip(chosen, entered, strict=True):
                    length = len(different[index])
                    states[starts[index] : starts[index] + length] = found[:length].float().cpu().numpy()
                    bar.update(length)
        states.flush()

    made_of = [base, dtype, pick_device().type, blocks, pad_id, whole.hexdigest(), transformers.__version__]
    folder = cached("hidden_states", content_key(made_of), make)
    log.info("hidden states of the frozen blocks: %s", folder)
    return PlacesOfStates(np.load(folder / FILE, mmap_mode="r"), different, pad_id)


def run_upper_blocks_only(
    model: torch.nn.Module, blocks: int, places: PlacesOfStates, rows: Sequence[Sequence[int]]
) -> None:
    """From now on the model's ids are places of hidden states; ``rows`` are some to try it with.

    Raises:
        InputError: the model then gives other results, because it does more than pass states from its
            embedding through its blocks.
    """
    _, stack = blocks_of(model)
    lower, first = stack[: len(stack) - blocks], stack[len(stack) - blocks]
    if any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in lower.modules()):
        raise InputError("tuning.precompute=true: the frozen blocks have dropout, so they change; use false")
    some = [*dict.fromkeys(tuple(row) for row in rows[:CHECKED])]
    # Not those of the file: states of a row alone and of a padded batch may differ by rounding.
    with inference(model):
        alone = [_entering(model, first, _batch(model, row, places.pad_id))[0].float().cpu() for row in some]
    checked = PlacesOfStates(torch.cat(alone).numpy(), some, places.pad_id)
    kinds: list[type] = []
    hook = stack[0].register_forward_hook(lambda _module, _inputs, output: kinds.append(type(output)))
    before = _outputs(model, some, places.pad_id)
    hook.remove()
    for block in lower:
        block.forward = _pass_on(as_tuple=issubclass(kinds[0], tuple))
    embedding: Any = pretrained(model).get_input_embeddings()
    embedding.forward = partial(checked.look_up, dtype=embedding.weight.dtype)
    after = _outputs(model, [checked.of(row) for row in some], places.pad_id)
    embedding.forward = partial(places.look_up, dtype=embedding.weight.dtype)
    largest = max(float(one.abs().max()) for one in before)
    difference = max(float((one - other).abs().max()) for one, other in zip(before, after, strict=True))
    if not difference <= TOLERANCE * largest:
        kind = pretrained(model).config.model_type
        raise InputError(f"tuning.precompute=true: cannot be done with {kind}; use false")


class _Entered(Exception):
    """Ends a forward pass where the trained blocks begin; holds what enters them."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


def _entering(model: torch.nn.Module, block: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T, hidden) what enters a block."""

    def stop(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
        raise _Entered(inputs[0] if inputs else named["hidden_states"])

    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        body(model)(**batch, use_cache=False)
    except _Entered as entered:
        return entered.states
    finally:
        hook.remove()
    raise InputError("tuning.precompute=true: this model skips blocks; use false")


def _batch(model: torch.nn.Module, row: Sequence[int], pad_id: int) -> dict[str, torch.Tensor]:
    return to_device(padded([row], pad_id, side="right"), model)


def _outputs(model: torch.nn.Module, rows: Sequence[Sequence[int]], pad_id: int) -> list[torch.Tensor]:
    """The last hidden states of each row."""
    with inference(model):
        batches = [_batch(model, row, pad_id) for row in rows]
        return [body(model)(**batch, use_cache=False).last_hidden_state.float() for batch in batches]


def _pass_on(*, as_tuple: bool) -> Any:
    def forward(hidden_states: torch.Tensor, *_args: Any, **_named: Any) -> Any:
        return (hidden_states,) if as_tuple else hidden_states

    return forward


def _key(row: Sequence[int]) -> bytes:
    return array("i", row).tobytes()
