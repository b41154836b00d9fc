import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mllm_protector.models.backbone import Backbone
from mllm_protector.models.packing import pretrained
from mllm_protector.models.tuning import FullTuning, LoraTuning
from mllm_protector.training import estimate as module
from mllm_protector.training.estimate import Estimate, estimate, largest_pass, matmul_speed
from mllm_protector.training.footprint import activation_bytes, cast_bytes, flops_per_token, loss_bytes
from tests.models.builders import FAMILIES, Family
from tests.training.tagger import CONFIG

LENGTHS = [10, 20, 30, 40, 50, 60, 70, 80]
LIMITED = replace(
    CONFIG, batch_size=8, micro_batch_tokens=160, precision="fp32", gradient_checkpointing=False
)


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "matmul_speed", lambda *_: 1e11)


def llama(tuning: str = "full", layers: int = 2, dropout: float = 0.0, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=layers,
        intermediate_size=176,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=300,
        **changes,
    )
    whole = LlamaForCausalLM(config)
    if tuning == "full":
        return FullTuning().prepare(whole, "CAUSAL_LM", [])
    targets = "all-linear" if tuning == "lora" else ["q_proj", "v_proj"]
    return LoraTuning(rank=4, alpha=8, dropout=dropout, targets=targets).prepare(whole, "CAUSAL_LM", [])


def saved_bytes(model: torch.nn.Module, ids: torch.Tensor, bfloat16: bool) -> int:
    """What autograd keeps of a forward pass through the body, the model's own weights aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    body = pretrained(model).base_model
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16),
    ):
        output = body(input_ids=ids, use_cache=False)
    assert output.last_hidden_state.requires_grad  # the graph is alive, so nothing kept was freed
    return sum(kept.values())


@pytest.mark.parametrize("bfloat16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("tuning", "dropout"), [("full", 0.0), ("lora", 0.0), ("lora", 0.1), ("lora_of_two", 0.0)]
)
def test_the_activations_are_near_what_autograd_keeps(tuning: str, dropout: float, bfloat16: bool):
    layers = 4
    model = llama(tuning, layers=layers, dropout=dropout).train()
    ids = torch.randint(3, 300, (4, 64))
    kept = saved_bytes(model, ids, bfloat16)
    expected = activation_bytes(model, ids.numel(), bfloat16=bfloat16, checkpointing=False)
    expected = expected * layers // (layers + 1)  # the rest is for the layer that is going backward
    expected += cast_bytes(model, checkpointing=False) if bfloat16 else 0
    assert 0.8 < expected / kept < 1.25


def test_the_parts_of_memory_are_those_of_the_model():
    model = llama()
    count = sum(parameter.numel() for parameter in model.parameters())
    found = estimate(model, lengths=LENGTHS, config=LIMITED, processes=1, steps=1)
    assert (found.parameters, found.trainable) == (count, count)
    assert (found.weights, found.gradients, found.optimizer) == (4 * count, 4 * count, 8 * count)
    assert found.peak == 16 * count + found.activations + found.loss


def test_adapters_need_no_gradients_and_moments_of_the_base():
    found = estimate(llama("lora"), lengths=LENGTHS, config=LIMITED, processes=1, steps=1)
    assert found.trainable < 0.2 * found.parameters
    assert found.optimizer == 8 * found.trainable


def test_checkpointing_and_bfloat16_lower_the_activations():
    model = llama(layers=8)

    def activations(**changes: Any) -> int:
        config = replace(LIMITED, **changes)
        return estimate(model, lengths=LENGTHS, config=config, processes=1, steps=1).activations

    assert activations(gradient_checkpointing=True) < 0.5 * activations()
    assert activations(precision="bf16") < 0.8 * activations()
    assert activations(micro_batch_tokens=80) == pytest.approx(activations() / 2)


@pytest.mark.parametrize(
    ("changes", "processes", "expected"),
    [
        ({"micro_batch_tokens": None}, 1, 8 * 80),
        ({"micro_batch_tokens": None}, 2, 4 * 80),
        ({"micro_batch_tokens": None, "packing": True}, 1, sum(LENGTHS)),
        ({"micro_batch_tokens": None, "micro_batch_size": 3}, 1, 3 * 80),
        ({"micro_batch_tokens": None, "micro_batch_size": 3, "packing": True}, 1, 80 + 70 + 60),
        ({"micro_batch_tokens": 200}, 1, 200),
        ({"micro_batch_tokens": 10}, 1, 80),
        ({"micro_batch_tokens": 10_000, "packing": True}, 1, sum(LENGTHS)),
    ],
)
def test_the_largest_pass_is_within_every_limit(changes: dict[str, Any], processes: int, expected: int):
    assert largest_pass(LENGTHS, replace(LIMITED, **changes), processes) == expected


def test_the_flop_are_those_of_the_rule_of_thumb():
    model = llama()
    embedding = model.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2) - embedding
    assert flops_per_token(model, [1], checkpointing=False) == pytest.approx(6 * weights, rel=0.01)
    assert flops_per_token(model, [1], checkpointing=True) == pytest.approx(8 * weights, rel=0.01)
    tied = llama(tie_word_embeddings=True)
    assert flops_per_token(tied, [1], checkpointing=False) == pytest.approx(6 * weights, rel=0.01)
    adapted = flops_per_token(llama("lora_of_two"), [1], checkpointing=False)
    assert adapted == pytest.approx(4 * weights, rel=0.05)
    assert flops_per_token(model, [1000], checkpointing=False) > flops_per_token(
        model, [10], checkpointing=False
    )


def test_time_is_work_by_speed():
    one = estimate(llama(), lengths=LENGTHS, config=LIMITED, processes=1, steps=10)
    tokens = 10 * 8 * sum(LENGTHS) / len(LENGTHS)
    work = tokens * flops_per_token(llama(), LENGTHS, checkpointing=False)
    assert one.seconds == pytest.approx(work / (module.UTILISATION * 1e11))
    two = estimate(llama(), lengths=LENGTHS, config=LIMITED, processes=2, steps=10)
    assert two.seconds == pytest.approx(one.seconds / 2)


def test_a_chunk_of_logits_is_all_that_a_large_loss_takes():
    model = llama()
    assert loss_bytes(model, 10) < loss_bytes(model, 1000)
    assert loss_bytes(model, 10**6) == loss_bytes(model, 10**7)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_estimated(bases: dict[Family, Path], family: Family, checkpointing: bool):
    model, fresh = Backbone(name=str(bases[family])).load_classifier(pad_id=2)
    model = LoraTuning(rank=2, alpha=4, dropout=0.1, targets="all-linear").prepare(model, "SEQ_CLS", fresh)
    config = replace(LIMITED, gradient_checkpointing=checkpointing, precision="bf16")
    found = estimate(model, lengths=LENGTHS, config=config, processes=1, steps=3)
    assert found.activations > 0
    assert found.loss == 0
    assert found.seconds > 0


def test_a_model_without_a_config_is_estimated():
    found = estimate(torch.nn.Linear(3, 3), lengths=LENGTHS, config=LIMITED, processes=1, steps=1)
    assert found.parameters == 12
    assert found.activations > 0


def test_packed_weights_are_counted_in_full_and_weighed_as_they_are(bases: dict[Family, Path]):
    pytest.importorskip("bitsandbytes")

    def of(quantization: Any) -> Estimate:
        base = Backbone(name=str(bases["llama"]), dtype="bfloat16", quantization=quantization)
        model = LoraTuning(rank=2, alpha=4, dropout=0.0, targets="all-linear").prepare(
            base.load_causal_lm(), "CAUSAL_LM", []
        )
        return estimate(model, lengths=LENGTHS, config=LIMITED, processes=1, steps=1)

    whole, packed = of(None), of("4bit")
    assert packed.parameters == whole.parameters
    assert packed.weights < whole.weights
    assert packed.seconds == pytest.approx(whole.seconds)


def test_the_report_warns_only_of_too_little_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def warnings_with(free: int) -> list[str]:
        caplog.clear()
        monkeypatch.setattr(module, "_free", lambda _: free)
        with caplog.at_level(logging.INFO):
            estimate(llama(), lengths=LENGTHS, config=LIMITED, processes=1, steps=1).report()
        assert any("memory, estimated" in each.message for each in caplog.records)
        assert any("time, estimated" in each.message for each in caplog.records)
        return [each.message for each in caplog.records if each.levelno == logging.WARNING]

    assert warnings_with(2**50) == []
    [warning] = warnings_with(0)
    assert "fit.micro_batch_tokens=80" in warning


def test_estimating_draws_nothing_and_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "matmul_speed", matmul_speed)
    model = llama("lora").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = estimate(model, lengths=LENGTHS, config=LIMITED, processes=1, steps=1)
    assert found.speed > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
