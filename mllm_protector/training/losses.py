"""The losses: binary cross-entropy for the detector, cross-entropy of the target's tokens for the detoxifier.

Each is a *sum* over its targets; the step divides it (``fit.normalise``). The logits of all positions times
the vocabulary are the largest tensor of a language model's step and mostly go unused. So they are computed
only at the positions with a label, a few rows at a time. The gradient of a chunk is taken as soon as its
logits are there: memory is (N, hidden) instead of (N, vocabulary).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from mllm_protector.data.batching import MicroBatchLimit, by_length, is_packed
from mllm_protector.data.encoding import IGNORED, Batch, EncodedCorrection
from mllm_protector.data.tokenized import lengths_of
from mllm_protector.models.backbone import device_of, inference, to_device
from mllm_protector.models.packing import hidden_states, model_inputs, packed_logits, pretrained
from mllm_protector.processes import Processes

R = TypeVar("R", bound=EncodedCorrection)

LossFunction = Callable[[torch.nn.Module, Batch], torch.Tensor]
"""Maps a model and a batch to the *sum* of the losses over the batch's targets, a scalar."""

CHUNK_ELEMENTS = 2**24
"""Logits that exist at a time: 64 MiB in float32."""


def detector_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Binary cross-entropy of the one logit of each text, summed over the batch; a scalar.

    The batch is padded or packed, with ``labels`` (S,) float32, 1.0 for harmful.
    Source: paper section 3 (plain BCE; the official code adds it twice, and a ranking term).
    """
    logits = packed_logits(model, batch) if is_packed(batch) else model(**model_inputs(batch)).logits
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits[:, 0].float(), batch["labels"], reduction="sum"
    )


class LanguageLoss:
    """Cross-entropy of the target's tokens (its end token included).

    Source: paper section 3, the autoregressive loss on a_acc given the query and a_rej. The paper divides
    the sum by the number of examples; the training loop follows ``fit.normalise``.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """Check how the head of a causal language model works; the model is not kept."""
        self.linear_head = has_linear_head(model)

    def __call__(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The losses of a batch, summed; a scalar in nats.

        The batch is padded or packed, with ``labels`` (B, T) int64, ``IGNORED`` outside the target.
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

    Some models scale or cap their logits, and an adapter may sit on the head. So the model itself is tried:
    its body's output is replaced by a random one, large enough for a cap to show.
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
    """Row and column of each next token to learn, and that token; each (N,) int64."""
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
    """(N, V) float32 from the model's own head, for no more columns than are needed."""
    needed, places = torch.unique(columns, return_inverse=True)
    logits = model(**model_inputs(batch), use_cache=False, logits_to_keep=needed).logits
    return logits[rows, places].float()  # type: ignore[no-any-return]


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """The cross-entropy of ``hidden @ weight.T + bias`` against the targets, summed; a scalar in nats.

    Matrix products are in autocast's dtype if it is on, else in that of ``hidden``; the rest is in float32.
    On a GPU Liger's kernel does the same if it is installed. Shapes: (N, H), (V, H), (V,), (N,) int64.
    """
    kernel = _liger() if hidden.is_cuda else None
    dtype = _compute_dtype(hidden)
    if kernel is None:
        fused: torch.Tensor = _SummedCrossEntropy.apply(hidden, weight, bias, targets, dtype)  # type: ignore[no-untyped-call]
        return fused
    with torch.autocast("cuda", enabled=False):
        return kernel(weight.to(dtype), hidden.to(dtype), targets, bias)  # type: ignore[no-any-return]


@torch.no_grad()
def cross_entropies(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """The same of each row, without a gradient; (N,) float32."""
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    dtype = _compute_dtype(hidden)
    for rows, logits in _chunks(hidden.to(dtype), weight.to(dtype), bias):
        losses[rows] = torch.nn.functional.cross_entropy(logits, targets[rows], reduction="none")
    return losses


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and for_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rounded, rounded_weight = hidden.to(dtype), weight.to(dtype)
        for rows, logits in _chunks(rounded, rounded_weight, bias):
            index = targets[rows, None]
            log_normaliser = logits.logsumexp(dim=-1, keepdim=True)
            total += (log_normaliser - logits.gather(1, index)).sum()
            if not any((for_hidden, for_weight, for_bias)):
                continue
            # d loss / d logits: the probabilities, less 1 at the target
            slope = (
                logits.sub_(log_normaliser)
                .exp_()
                .scatter_add_(1, index, -torch.ones_like(index, dtype=torch.float32))
            )
            if grad_bias is not None:
                grad_bias += slope.sum(dim=0)
            slope = slope.to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ rounded_weight
            if grad_weight is not None:
                grad_weight += slope.T @ rounded[rows]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [scale] = outer
        gradients = [
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None)


def _chunks(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some rows, and their logits in float32."""
    size = max(1, CHUNK_ELEMENTS // len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = (hidden[rows] @ weight.T).float()
            yield rows, logits if bias is None else logits + bias.float()


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _liger() -> Any:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
