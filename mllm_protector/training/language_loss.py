"""The loss of a causal language model, computed only at the positions that carry a label.

The logits of all positions are the largest tensor of a training step and mostly go unused.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from mllm_protector.data.batching import MicroBatchLimit, by_length
from mllm_protector.data.encoding import IGNORED, Batch, EncodedCorrection
from mllm_protector.data.tokenized import lengths_of
from mllm_protector.models.backbone import device_of, inference, to_device
from mllm_protector.models.packing import hidden_states, model_inputs, pretrained
from mllm_protector.processes import Processes
from mllm_protector.training.cross_entropy import cross_entropies, summed_cross_entropy

R = TypeVar("R", bound=EncodedCorrection)


class LanguageLoss:
    """Cross-entropy of the target's tokens (its end token included).

    Source: paper section 3, the autoregressive loss on a_acc given the query and a_rej. The paper divides
    the sum by the number of examples; the optimisation loop does what ``fit.normalise`` says.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """See how the model's head works; the model is not kept.

        Args:
            model: a causal language model, or one wrapped by PEFT.
        """
        self.linear_head = has_linear_head(model)

    def __call__(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The losses of a batch, summed; a scalar in nats.

        Args:
            model: the model it was made for.
            batch: padded or packed, with ``labels`` (B, T) int64, ``IGNORED`` outside the target.
        """
        rows, columns, targets = _targets(batch)
        if self.linear_head:
            return summed_cross_entropy(*_into_head(model, batch, rows, columns), targets)
        logits = _own_logits(model, batch, rows, columns)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    @torch.no_grad()
    def of_rows(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The summed loss of each row of a padded batch, without a gradient; (B,) float32 in nats."""
        rows, columns, targets = _targets(batch)
        if self.linear_head:
            losses = cross_entropies(*_into_head(model, batch, rows, columns), targets)
        else:
            logits = _own_logits(model, batch, rows, columns)
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return losses.new_zeros(len(batch["labels"])).index_add(0, rows, losses)


def mean_loss(
    model: torch.nn.Module,
    loss: LanguageLoss,
    rows: Sequence[R],
    collate: Callable[[Sequence[R]], Batch],
    processes: Processes[tuple[float, int]],
    *,
    limit: MicroBatchLimit,
) -> float:
    """Nats per target token over all rows, in padded batches of like length."""
    mine = processes.mine(rows)
    results = [(0.0, 0)] * len(mine)
    with inference(model):
        for chosen in by_length(lengths_of(mine), limit):
            some = [mine[i] for i in chosen]
            losses = loss.of_rows(model, to_device(collate(some), model))
            for i, row, value in zip(chosen, some, losses.tolist(), strict=True):
                results[i] = (value, len(row.target))
    everything = processes.gather(results, len(rows))
    return sum(value for value, _ in everything) / sum(tokens for _, tokens in everything)


def has_linear_head(model: torch.nn.Module) -> bool:
    """Whether a model's logits are its last hidden state through one plain linear layer.

    Some models scale or cap their logits, and an adapter may sit on the head. So the model itself is asked:
    its body's answer is replaced by a random one, large enough for a cap to show.
    """
    inner = pretrained(model)
    head, body = inner.get_output_embeddings(), inner.base_model
    if type(head) is not torch.nn.Linear or body is inner:
        return False
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1, head.in_features, generator=generator).to(head.weight)

    def replace(module: torch.nn.Module, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = hidden
        return output

    with inference(model):
        hidden *= 100 / head(hidden).float().std()
        expected = head(hidden)
        handle = body.register_forward_hook(replace)
        try:
            logits = inner(input_ids=torch.tensor([[5]], device=device_of(model)), use_cache=False).logits
        finally:
            handle.remove()
    return bool(torch.allclose(logits.float(), expected.float(), rtol=1e-2, atol=1e-2))


def _targets(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where a next token is to be learnt, row and column, and that token; each (N,) int64."""
    following = batch["labels"][:, 1:]
    rows, columns = (following != IGNORED).nonzero(as_tuple=True)
    return rows, columns, following[rows, columns]


def _into_head(
    model: torch.nn.Module, batch: Batch, rows: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The hidden states (N, H) at some positions, and the weight and bias of the linear head behind them."""
    head: Any = pretrained(model).get_output_embeddings()
    return hidden_states(model, batch)[rows, columns], head.weight, head.bias


def _own_logits(
    model: torch.nn.Module, batch: Batch, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """(N, V) float32 by the model's own head, which is asked for no more columns than are needed."""
    needed, places = torch.unique(columns, return_inverse=True)
    logits = model(**model_inputs(batch), use_cache=False, logits_to_keep=needed).logits
    return logits[rows, places].float()  # type: ignore[no-any-return]
