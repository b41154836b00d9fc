"""Adapters on the topmost blocks alone, and the dtype that suits the machine."""

from pathlib import Path

import pytest
import torch

from mllm_protector.errors import InputError
from mllm_protector.models import backbone
from mllm_protector.models.backbone import Backbone, fast_dtype
from mllm_protector.models.tuning import LoraTuning, blocks_of
from tests.models.builders import Family, save_tiny_classifier_base

FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "gemma", "gpt2", "bert")


def tuning(blocks: int | None, targets: str | list[str] = "all-linear") -> LoraTuning:
    return LoraTuning(rank=2, alpha=4, dropout=0.0, targets=targets, blocks=blocks)


def test_only_the_topmost_blocks_learn_and_no_gradient_goes_below(tmp_path: Path) -> None:
    for family in FAMILIES:
        base = Backbone(name=str(save_tiny_classifier_base(family, tmp_path / family)))
        model, fresh = base.load_classifier(pad_id=0)
        name, blocks = blocks_of(model)
        last = len(blocks) - 1
        adapted = tuning(1).prepare(model, "SEQ_CLS", fresh)
        learning = [each for each, parameter in adapted.named_parameters() if parameter.requires_grad]
        lora = [each for each in learning if ".lora_" in each]
        assert lora, family
        assert all(f"{name}.{last}." in each for each in lora), family
        entered: list[torch.Tensor] = []
        blocks_of(adapted)[1][last].register_forward_pre_hook(
            lambda _module, inputs, entered=entered: entered.append(inputs[0])
        )
        ids = torch.arange(5, 11)[None]
        adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
        assert not entered[0].requires_grad, family
        assert all(
            parameter.grad is not None for each, parameter in adapted.named_parameters() if each in lora
        )


def test_blocks_that_are_not_there_are_refused(tmp_path: Path) -> None:
    model, fresh = Backbone(name=str(save_tiny_classifier_base("llama", tmp_path / "llama"))).load_classifier(
        pad_id=0
    )
    with pytest.raises(InputError, match=r"tuning.blocks=99: the model has only \d"):
        tuning(99).prepare(model, "SEQ_CLS", fresh)
    with pytest.raises(InputError, match="targets=nothing"):
        tuning(1, "nothing").prepare(model, "SEQ_CLS", fresh)


def test_auto_is_the_dtype_that_this_machine_multiplies_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    fast_dtype.cache_clear()
    found = Backbone(name="any", dtype="auto").dtype
    assert found == fast_dtype()
    monkeypatch.setattr(backbone, "FASTER", 0.0 if found == "float32" else 1e9)
    fast_dtype.cache_clear()
    assert Backbone(name="any", dtype="auto").dtype != found
    fast_dtype.cache_clear()
