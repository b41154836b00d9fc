"""Dropout that does not depend on how a step is divided.

PyTorch's dropout draws from one stream, in the order in which examples are computed: another micro-batch size
or another number of processes gives other masks. Here a mask is a function of seed, step, example, position,
layer and channel, so that it is the same wherever and whenever an example is computed: packed or padded, on
any process, after a resume, and again in the backward pass under gradient checkpointing.

A channel is dropped where ``key * factor``, modulo 2 ** 32, is among the lowest ``p * 2 ** 32`` values. The
key belongs to the position and the factor to the channel of a layer; both are hashes, and odd.
"""

import math
import zlib
from collections.abc import Sequence

import torch

from mllm_protector.data.batching import BORDERS, is_packed
from mllm_protector.data.encoding import Batch
from mllm_protector.models.packing import pretrained

KEYS = "dropout_keys"

ON_ATTENTION = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""What models call dropout of attention weights, which happens inside the attention kernel."""


class Keys:
    """The keys of the current forward pass, which all dropout layers of a model read.

    They stay until the next one: a backward pass may compute layers again.

    Attributes:
        current: (B, T) int32, or ``None`` where the examples are not known.
    """

    current: torch.Tensor | None = None

    def of(self, shape: torch.Size) -> torch.Tensor | None:
        """The keys of the rows of a tensor (..., channels); ``None`` if its rows are not positions."""
        if self.current is None:
            return None
        if math.prod(shape[:-1]) == self.current.numel():
            return self.current.view(shape[:-1])
        return self.current[:, 0] if shape[:-1] == self.current.shape[:1] else None


class KeyedDropout(torch.nn.Dropout):
    """Dropout by keys; PyTorch's own where there are none."""

    def __init__(self, p: float, name: str, keys: Keys) -> None:
        """``name`` tells this layer's masks from another's; all layers of a model share ``keys``."""
        super().__init__(p)
        self._layer = zlib.crc32(name.encode())
        self._keys = keys
        self._threshold = round(p * 2**32) - 2**31
        self._factors: torch.Tensor | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        """Map (..., channels) to the same, with some channels of each position zero and the others larger."""
        keys = self._keys.of(input.shape) if self.training else None
        if keys is None:
            return super().forward(input)
        if (
            self._factors is None
            or len(self._factors) != input.shape[-1]
            or self._factors.device != input.device
        ):
            channels = torch.arange(input.shape[-1], device=input.device)
            self._factors = _odd(_mixed(channels ^ self._layer))
        dropped = keys[..., None] * self._factors < self._threshold
        return torch.where(dropped, 0.0, input * (1 / (1 - self.p)))


def use_keyed_dropout(model: torch.nn.Module) -> Keys:
    """Replace a model's dropout layers in place; returns the keys that they read.

    Dropout that a model computes without such a layer stays as it is: of attention weights, and in the few
    models that call a function (OPT, BLOOM).
    """
    keys = Keys()
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, torch.nn.Dropout)]
    for name, layer in layers:
        if 0 < layer.p < 1:
            model.set_submodule(name, KeyedDropout(layer.p, name, keys).train(layer.training))
    return keys


def attention_dropout(model: torch.nn.Module) -> float:
    """The share of attention weights that a model drops in training, without keys."""
    config = getattr(pretrained(model), "config", None)
    return max(float(getattr(config, name, None) or 0.0) for name in ON_ATTENTION)


def dropout_keys(batch: Batch, examples: Sequence[int], *, seed: int, step: int) -> torch.Tensor:
    """The key of each position; (B, T) int32, the shape of ``input_ids``.

    The batch is packed or padded on the right; ``examples`` are the numbers of its rows among all examples.
    """
    numbers = torch.tensor(examples)
    if is_packed(batch):
        numbers = numbers.repeat_interleave(batch[BORDERS].diff().long())[None]
        positions = batch["position_ids"]
    else:
        numbers = numbers[:, None]
        positions = torch.arange(batch["input_ids"].shape[1])[None]
    run = zlib.crc32(f"{seed}/{step}".encode())
    return _odd(_mixed(_mixed(numbers ^ run) ^ positions))


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """A hash of 32 bits of each number; int64 in [0, 2 ** 32)."""
    numbers = numbers & 0xFFFFFFFF
    for _ in range(2):
        numbers = ((numbers ^ (numbers >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return numbers ^ (numbers >> 16)


def _odd(numbers: torch.Tensor) -> torch.Tensor:
    """As int32, whose products wrap around."""
    return ((numbers | 1) - 2**31).to(torch.int32)
