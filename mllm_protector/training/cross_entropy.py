"""Cross-entropy behind a linear head without the matrix of all logits.

The logits of a few rows exist at a time. Their gradient is taken as soon as they are there, so that no chunk
outlives its turn: memory is (N, hidden) instead of (N, vocabulary).
"""

from collections.abc import Iterator
from typing import Any

import torch

CHUNK_ELEMENTS = 2**24
"""Logits that exist at a time: 64 MiB in float32."""


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """The cross-entropy of ``hidden @ weight.T + bias`` against the targets, summed; a scalar in nats.

    The matrix products are made in autocast's dtype if it is on, else in that of ``hidden``; the rest in
    float32. On a GPU Liger's kernel does the same if it is installed.

    Args:
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or ``None``.
        targets: (N,) int64.
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
