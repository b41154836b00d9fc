import pytest
import torch
from torch.nn.functional import cross_entropy

from mllm_protector.training import losses as module
from mllm_protector.training.losses import summed_cross_entropy

ROWS, WIDTH, VOCABULARY = 23, 16, 37


@pytest.fixture(params=[1, 5 * VOCABULARY, 10**6], ids=["row by row", "5 rows", "all at once"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param)


def make(biased: bool, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    bias = torch.randn(VOCABULARY, generator=generator).to(dtype) if biased else None
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return hidden, weight, bias, targets  # type: ignore[return-value]


def in_full(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    return cross_entropy(torch.nn.functional.linear(hidden, weight, bias).float(), targets, reduction="sum")


def gradients(loss_of: object, tensors: tuple[torch.Tensor, ...], scale: float) -> list[torch.Tensor]:
    *trained, targets = tensors
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in trained]
    loss = loss_of(*leaves, targets)  # type: ignore[operator]
    (loss * scale).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("biased", [False, True])
def test_loss_and_gradients_are_those_of_the_full_logits(biased: bool) -> None:
    tensors = make(biased)
    ours = gradients(summed_cross_entropy, tensors, scale=0.25)
    reference = gradients(in_full, tensors, scale=0.25)
    for one, other in zip(ours, reference, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, _, targets = make(biased=False)
    hidden.requires_grad_()
    summed_cross_entropy(hidden, weight, None, targets).backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_gradients_have_the_dtype_of_what_they_belong_to() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = make(biased=True, dtype=dtype)
        _, *parts = gradients(summed_cross_entropy, tensors, scale=1.0)
        assert {part.dtype for part in parts} == {dtype}


def test_under_autocast_it_rounds_as_the_full_logits_do() -> None:
    tensors = make(biased=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(summed_cross_entropy, tensors, scale=1.0)
        reference = gradients(in_full, tensors, scale=1.0)
    exact = gradients(in_full, tensors, scale=1.0)
    for one, other, best in zip(ours, reference, exact, strict=True):
        assert not torch.equal(one, best)
        assert (one - other).norm() < 0.01 * best.norm()


def test_the_matrix_of_all_logits_never_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * VOCABULARY)
    hidden, weight, _, targets = make(biased=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        sizes: list[int] = []
        summed_cross_entropy(hidden.requires_grad_(), weight, None, targets)
    assert max(sizes) < ROWS * VOCABULARY


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernel runs on GPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_on_a_gpu_gives_the_same(dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    hidden, weight, bias, targets = make(biased=True, dtype=dtype)
    tensors = (hidden.cuda(), weight.cuda(), bias.cuda(), targets.cuda())
    ours = gradients(summed_cross_entropy, tensors, scale=0.25)
    for one, other in zip(ours, gradients(in_full, tensors, scale=0.25), strict=True):
        assert (one - other).norm() < 0.02 * other.norm()
