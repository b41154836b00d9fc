"""A detector that leaves its backbone as it is: one linear layer reads the states of several blocks.

The middle blocks of a language model tell harm more plainly than the last one, which is about the next word.
The layer reads, of each chosen block, the mean state of a text and that of the prompt's closing words, which
come after the answer. Blocks above the highest chosen one are not run; its own states pass the backbone's
final norm, as those of the last block do in the whole model.

A linear probe, arXiv 1610.01644, on pooled states. The score is still that of one linear layer with one
output in place of the backbone's last layer (paper, section 3).
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from mllm_protector.errors import InputError
from mllm_protector.models.backbone import Backbone, Float32Linear, require_length
from mllm_protector.models.guard_file import PROBE_FILE
from mllm_protector.models.tuning import ProbeTuning, blocks_of


class LinearProbe(torch.nn.Module):
    """A frozen backbone, cut off above the highest block that is read, and the layer that reads.

    Attributes:
        body: the backbone without its head.
        blocks: that are read, counted from 1.
        closing: tokens at the end of every text that are read apart.
        score: from ``width`` states to one logit, in float32.
    """

    def __init__(self, body: PreTrainedModel, blocks: list[int], closing: int) -> None:
        """Cut the backbone off, in place; the layer gives 0 until it is fitted.

        Raises:
            InputError: it is not one stack of transformer blocks.
        """
        super().__init__()
        config = body.config.get_text_config()
        _, stack = blocks_of(body)
        del stack[max(blocks) :]
        config.num_hidden_layers = len(stack)
        self.body = body.requires_grad_(False)
        self.blocks = blocks
        self.closing = closing
        self.score = Float32Linear(2 * len(blocks) * config.hidden_size, 1)
        torch.nn.init.zeros_(self.score.weight)
        torch.nn.init.zeros_(self.score.bias)

    @property
    def width(self) -> int:
        """How many numbers the layer reads of a text."""
        return self.score.in_features

    def states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, width) float32: what the layer reads of each row of (B, T) ids, padded on the right."""
        each = self.body(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=True
        ).hidden_states
        text = attention_mask.bool()
        behind = attention_mask.flip(1).cumsum(1).flip(1)  # tokens from here to the end of the text
        closing = text & (behind <= self.closing)
        return torch.cat([_mean(each[block], of) for block in self.blocks for of in (text, closing)], dim=1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        """The logit of each row as ``logits`` (B, 1) float32."""
        return SequenceClassifierOutput(logits=self.score(self.states(input_ids, attention_mask)))

    def save_pretrained(self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write the layer and what it reads to one file; ``state_dict`` may hold the layer's weights."""
        weights = self.score.state_dict() if state_dict is None else state_dict
        reads = {"blocks": torch.tensor(self.blocks), "closing": torch.tensor(self.closing)}
        save_file(
            {**{name: each.contiguous() for name, each in weights.items()}, **reads}, folder / PROBE_FILE
        )


def new_probe(backbone: Backbone, tuning: ProbeTuning, *, closing: int, max_length: int) -> LinearProbe:
    """A probe that is not fitted yet.

    Raises:
        InputError: the backbone cannot be loaded, has too few positions, or is not one stack
            of transformer blocks.
    """
    body = backbone.load_body()
    require_length(body, max_length)
    _, stack = blocks_of(body)
    return LinearProbe(body, tuning.blocks(len(stack)), closing)


def load_probe(folder: Path, backbone: Backbone) -> LinearProbe:
    """A fitted probe on its backbone, on the CPU.

    Raises:
        InputError: the backbone cannot be loaded, or the probe is not one of it.
    """
    tensors: dict[str, Any] = load_file(folder / PROBE_FILE)
    try:
        blocks, closing = [*map(int, tensors.pop("blocks"))], int(tensors.pop("closing"))
        body = backbone.load_body()
        depth = len(blocks_of(body)[1])
        if not blocks or blocks != sorted({*blocks}) or blocks[0] < 1 or blocks[-1] > depth or closing < 1:
            raise ValueError(f"it reads blocks {blocks} of {depth}, and {closing} closing tokens")
        if not all(bool(each.isfinite().all()) for each in tensors.values()):
            raise ValueError("a weight is not a number")
        probe = LinearProbe(body, blocks, closing)
        probe.score.load_state_dict(tensors)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{folder / PROBE_FILE}: does not fit its base model ({reason})") from error
    return probe


def _mean(states: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """(B, hidden) float32: the mean of the (B, T, hidden) states at the chosen (B, T) places."""
    chosen = of.unsqueeze(-1)
    return (states.float() * chosen).sum(dim=1) / chosen.sum(dim=1)
