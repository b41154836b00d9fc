import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mllm_protector.data.batching import pack
from mllm_protector.errors import InputError
from mllm_protector.models import packing
from mllm_protector.models.packing import hidden_states, use_packed_attention
from mllm_protector.models.tuning import LoraTuning

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
FEW_KEYS: dict[str, Any] = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32}

DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**FEW_KEYS)),
    "mistral, sliding": lambda: MistralForCausalLM(MistralConfig(**FEW_KEYS, sliding_window=4)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**FEW_KEYS)),
    "gemma3, sliding": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**FEW_KEYS, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, **OPT)),
}

TEXTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21], [30], [31, 5, 32, 6, 33, 7, 34]]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> PreTrainedModel:
    return DECODERS[request.param]().eval()


def padded(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, texts))
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids in texts]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts]),
    }


def test_each_packed_text_is_read_as_if_it_were_alone(decoder: PreTrainedModel) -> None:
    with torch.no_grad():
        alone = [hidden_states(decoder, padded([ids]))[0] for ids in TEXTS]
        use_packed_attention(decoder)
        together = hidden_states(decoder, pack(TEXTS))[0]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_padded_rows_are_read_as_before(decoder: PreTrainedModel) -> None:
    real = padded(TEXTS)["attention_mask"].bool()
    with torch.no_grad():
        before = hidden_states(decoder, padded(TEXTS))[real]
        use_packed_attention(decoder)
        after = hidden_states(decoder, padded(TEXTS))[real]
    assert torch.allclose(before, after, atol=1e-6)


def test_the_gradients_are_those_of_the_texts_alone(decoder: PreTrainedModel) -> None:
    use_packed_attention(decoder)
    gradients = []
    slopes = torch.randn(sum(map(len, TEXTS)), 32)
    for batches in ([pack([ids]) for ids in TEXTS], [pack(TEXTS)]):
        decoder.zero_grad()
        states = torch.cat([hidden_states(decoder, batch)[0] for batch in batches])
        (states * slopes).sum().backward()
        gradients.append({n: p.grad for n, p in decoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-5 * gradient.norm() + 1e-5, name


def test_adapters_take_part() -> None:
    model = LoraTuning(rank=2, alpha=4, dropout=0.0, targets="all-linear").prepare(
        DECODERS["llama"](), "CAUSAL_LM", []
    )
    before = hidden_states(model, padded([TEXTS[0]])).detach().clone()
    use_packed_attention(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert not torch.allclose(hidden_states(model, pack([TEXTS[0]])), before, atol=1e-2)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: FalconForCausalLM(
                FalconConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
            ),
            "falcon cannot read packed texts",
        ),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**FEW_KEYS)), "attention has softcap"),
    ],
    ids=["falcon", "gemma2"],
)
def test_a_model_that_cannot_is_refused_with_the_key_to_change(
    make: Callable[[], PreTrainedModel], reason: str
) -> None:
    with pytest.raises(InputError, match=rf"^fit.packing=true: .*{reason}.*; use fit.packing=false"):
        use_packed_attention(make())


@pytest.fixture
def attention_across_texts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def across(module: torch.nn.Module, *tensors: Any, **settings: Any) -> Any:
        settings.pop("cu_seq_lens_q", None)
        return true_one(module, *tensors, **settings)

    true_one = packing.attend_within_texts
    monkeypatch.setattr(packing, "attend_within_texts", across)
    yield
    monkeypatch.undo()
    AttentionInterface.register(packing.NAME, packing.attend_within_texts)


@pytest.mark.usefixtures("attention_across_texts")
def test_a_model_that_lets_texts_see_each_other_is_refused() -> None:
    with pytest.raises(InputError, match="llama lets packed texts see each other"):
        use_packed_attention(DECODERS["llama"]())


def test_a_saved_model_does_not_ask_for_our_attention(tmp_path: Path) -> None:
    model = DECODERS["llama"]()
    use_packed_attention(model)
    model.save_pretrained(tmp_path)
    assert packing.NAME not in (tmp_path / "config.json").read_text()
    assert copy.deepcopy(model).config._attn_implementation == packing.NAME


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel runs on GPUs")
@pytest.mark.parametrize("name", ["llama", "mistral, sliding"])
def test_the_kernel_on_a_gpu_gives_the_same(name: str) -> None:
    model = DECODERS[name]().eval().cuda().bfloat16()
    with torch.no_grad():
        alone = [hidden_states(model, {k: v.cuda() for k, v in padded([ids]).items()})[0] for ids in TEXTS]
        use_packed_attention(model)
        together = hidden_states(model, {k: v.cuda() for k, v in pack(TEXTS).items()})[0]
    assert torch.allclose(together, torch.cat(alone), atol=5e-2)
