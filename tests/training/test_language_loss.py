from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from mllm_protector.data.batching import MicroBatchLimit, pack_corrections
from mllm_protector.data.encoding import IGNORED, Batch, EncodedCorrection, collate_targets
from mllm_protector.models.packing import use_packed_attention
from mllm_protector.models.tuning import LoraTuning
from mllm_protector.processes import Processes
from mllm_protector.training.losses import LanguageLoss, has_linear_head, mean_loss

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64)),
    "llama, tied": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, intermediate_size=64, tie_word_embeddings=True)
    ),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(**SIZES, intermediate_size=64, logits_scaling=4.0, num_key_value_heads=2)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=16)),
}
ROWS = [
    EncodedCorrection(prompt=[1, 2, 3], target=[4, 9]),
    EncodedCorrection(prompt=[5], target=[6, 7, 8, 9]),
    EncodedCorrection(prompt=[2, 2, 11, 12, 13, 14, 15], target=[9]),
]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def in_full(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Through the logits of all positions, as transformers does it."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=IGNORED, reduction="sum"
    )


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_those_of_the_full_logits(model: PreTrainedModel, packed: bool) -> None:
    batch = collate_targets(ROWS, pad_id=0)
    reference = in_full(model, batch)
    expected = gradients(model, reference)
    if packed:
        use_packed_attention(model)
    loss = LanguageLoss(model)(model, pack_corrections(ROWS) if packed else batch)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    found = gradients(model, loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


def test_the_loss_of_a_row_does_not_depend_on_its_batch(model: PreTrainedModel) -> None:
    loss = LanguageLoss(model)
    together = loss.of_rows(model, collate_targets(ROWS, pad_id=0)).tolist()
    alone = [loss.of_rows(model, collate_targets([row], pad_id=0)).item() for row in ROWS]
    assert together == pytest.approx(alone, rel=1e-5)
    assert sum(alone) == pytest.approx(in_full(model, collate_targets(ROWS, pad_id=0)).item(), rel=1e-5)


@pytest.mark.parametrize("examples", [1, 2, 3])
def test_the_mean_loss_weighs_each_token_the_same_in_any_batches(examples: int) -> None:
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    loss = mean_loss(
        model,
        LanguageLoss(model),
        ROWS,
        lambda rows: collate_targets(rows, 0),
        Processes(0, 1),
        limit=MicroBatchLimit(examples=examples),
    )
    assert loss == pytest.approx(in_full(model, collate_targets(ROWS, pad_id=0)).item() / 7, rel=1e-5)


def test_a_head_that_scales_or_projects_is_not_taken_for_a_linear_one() -> None:
    linear = {name: has_linear_head(make()) for name, make in MODELS.items()}
    assert linear == {"llama": True, "llama, tied": True, "granite": False, "opt": False}


def test_an_adapter_on_the_head_is_trained_too() -> None:
    torch.manual_seed(0)
    tuning = LoraTuning(rank=2, alpha=4, dropout=0.0, targets=["q_proj", "lm_head"])
    model = tuning.prepare(MODELS["llama"](), "CAUSAL_LM", [])
    assert not has_linear_head(model)
    batch = collate_targets(ROWS, pad_id=0)
    found = gradients(model, LanguageLoss(model)(model, batch))
    expected = gradients(model, in_full(model, batch))
    assert any("lm_head" in name for name in found)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5)
