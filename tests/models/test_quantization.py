import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_protector.calls import check_call
from mllm_protector.data.encoding import DetectorEncoder
from mllm_protector.data.tokens import choose_pad_id
from mllm_protector.errors import InputError
from mllm_protector.models.backbone import Backbone, inference
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.models.guard_file import GuardFile
from mllm_protector.models.parts import save_part
from mllm_protector.models.tuning import FullTuning, LoraTuning, is_quantized
from tests.models.builders import FAMILIES, Family

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason='needs the extra "quantize"'
)
each_way = pytest.mark.parametrize("quantization", ["8bit", "4bit"])

LORA = LoraTuning(rank=4, alpha=8, dropout=0.0, targets="all-linear")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def backbone(folder: Path, quantization: Any, dtype: str = "bfloat16") -> Backbone:
    return Backbone(name=str(folder), dtype=dtype, quantization=quantization)


def classifier(base: Backbone) -> torch.nn.Module:
    torch.manual_seed(0)
    model, fresh = base.load_classifier(pad_id=2)
    tuned = LORA.prepare(model, "SEQ_CLS", fresh)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return tuned


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=IDS).logits[:, 0]
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor([1.0, 0.0]))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@needs_bitsandbytes
@each_way
@pytest.mark.parametrize("family", FAMILIES)
def test_training_on_quantised_layers_moves_only_float32_adapters_and_head_and_lowers_the_loss(
    bases: dict[Family, Path], family: Family, quantization: str
):
    model = classifier(backbone(bases[family], quantization))
    assert sum(is_quantized(layer) for layer in model.modules() if isinstance(layer, torch.nn.Linear)) >= 8
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert any("modules_to_save" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert gradients(model).keys() == trained.keys()
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = loss_of(model)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@needs_bitsandbytes
@pytest.mark.parametrize(("quantization", "most"), [("8bit", 0.6), ("4bit", 0.35)])
def test_the_quantised_layers_are_smaller_than_in_bfloat16(
    bases: dict[Family, Path], quantization: str, most: float
):
    def layer_bytes(chosen: str | None) -> int:
        layers = backbone(bases["llama"], chosen).load_causal_lm().model.layers
        return sum(p.numel() * p.element_size() for p in layers.parameters())

    assert layer_bytes(quantization) < most * layer_bytes(None)


@needs_bitsandbytes
@each_way
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_after_an_evaluation_are_those_of_before(
    bases: dict[Family, Path], dtype: str, quantization: str
):
    base = backbone(bases["qwen2"], quantization, dtype)
    expected = gradients(classifier(base))
    model = classifier(base)
    with inference(model):
        model(input_ids=IDS)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@needs_bitsandbytes
@each_way
def test_the_quantised_logits_are_near_the_whole_ones(bases: dict[Family, Path], quantization: str):
    def logits(chosen: str | None) -> torch.Tensor:
        model = backbone(bases["llama"], chosen, "float32").load_causal_lm()
        with inference(model):
            return model(input_ids=IDS).logits

    whole, quantised = logits(None), logits(quantization)
    assert not torch.equal(whole, quantised)
    assert torch.cosine_similarity(whole, quantised, dim=-1).min() > (
        0.999 if quantization == "8bit" else 0.9
    )


@needs_bitsandbytes
@each_way
def test_training_a_whole_quantised_model_is_refused(bases: dict[Family, Path], quantization: str):
    model = backbone(bases["llama"], quantization).load_causal_lm()
    with pytest.raises(InputError, match=r"tuning=full: .* use tuning=lora"):
        FullTuning().prepare(model, "CAUSAL_LM", [])


@needs_bitsandbytes
@each_way
def test_a_trained_adapter_comes_back_on_the_same_quantised_base(
    bases: dict[Family, Path], tmp_path: Path, quantization: str
):
    base = backbone(bases["llama"], quantization)
    tokenizer = base.load_tokenizer()
    encoder = DetectorEncoder(tokenizer, pad_id=choose_pad_id(tokenizer), max_length=256)
    guard = GuardFile(
        kind="detector",
        tuning="lora",
        base=asdict(base),
        prompt=encoder.prompt,
        max_length=256,
        pad_id=encoder.pad_id,
        threshold=0.5,
        data={},
        metrics={},
        versions={},
    )
    detector = HarmDetector(classifier(base), encoder, guard)
    save_part(detector.model, tokenizer, guard, tmp_path, detector.model.state_dict())
    loaded = load_detector(tmp_path, device="cpu")
    assert loaded.guard.backbone().quantization == quantization
    assert is_quantized(loaded.model)
    texts = {"queries": ["How do I bake bread?"], "answers": ["Mix flour, water and salt."]}
    assert loaded.score(**texts) == pytest.approx(detector.score(**texts), abs=1e-6)


@needs_bitsandbytes
@each_way
def test_a_head_of_unknown_name_is_refused_rather_than_quantised(
    bases: dict[Family, Path], monkeypatch: pytest.MonkeyPatch, quantization: str
):
    monkeypatch.setattr("mllm_protector.models.tuning.HEADS", ("classifier",))
    with pytest.raises(InputError, match=r"new layer bert\.pooler\.dense cannot be kept out"):
        backbone(bases["bert"], quantization).load_classifier(pad_id=0)


@each_way
def test_without_bitsandbytes_one_line_says_what_to_install(
    bases: dict[Family, Path], monkeypatch: pytest.MonkeyPatch, quantization: str
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    base = backbone(bases["llama"], quantization)
    for load in (base.load_causal_lm, lambda: base.load_classifier(pad_id=2)):
        with pytest.raises(
            InputError, match=r'quantization=.bit: .* pip install -e "\.\[quantize\]"'
        ) as caught:
            load()
        assert "\n" not in str(caught.value)


def test_a_quantisation_that_is_none_of_ours_is_refused():
    for quantization in ("4", "int8", "8 bit", "", 4):
        with pytest.raises(InputError, match=r"quantization=.*: must be '8bit' or '4bit' or null"):
            check_call("backbone", Backbone, {"name": "anything", "quantization": quantization})
