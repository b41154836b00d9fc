"""Tiny saved models of many families, for tests: random weights, the standard format, no network."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mllm_protector.models.tiny import CHAT_TEMPLATE, byte_level_bpe, save_tiny_llava, save_tiny_lm

Family = Literal["llama", "qwen2", "gemma", "gpt2", "bert"]
FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "gemma", "gpt2", "bert")

TEXTS = ("How do I bake bread?", "Mix flour, water and salt.", "The image shows a red square.")

HIDDEN, LAYERS, HEADS, POSITIONS, VOCABULARY = 32, 2, 4, 512, 400
LAYER_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
SIZES = LAYER_SIZES | {"max_position_embeddings": POSITIONS}
TINY: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "layers": LAYERS, "heads": HEADS}
TINY |= {"max_positions": POSITIONS, "seed": 0}
VISION = LAYER_SIZES | {"image_size": 32, "patch_size": 8}


def save_tiny_classifier_base(family: Family, folder: Path, texts: Iterable[str] = TEXTS) -> Path:
    """A language model without classification head and its tokenizer.

    Each tokenizer has the special tokens of its family: Llama and Gemma begin with a BOS, Qwen2 and GPT-2
    add nothing, BERT has [CLS] and [SEP]; GPT-2 has no pad token and one token for begin and end.
    """
    if family == "llama":
        return save_tiny_lm(folder, texts, **TINY)
    return _CLASSIFIER_BASES[family](folder, list(texts))


def save_tiny_llava_for_tests(folder: Path, texts: Iterable[str] = TEXTS) -> Path:
    """A LLaVA that sees 4 x 4 patches."""
    return save_tiny_llava(folder, texts, image_size=32, patch_size=8, **TINY)


def save_tiny_idefics3(folder: Path, texts: Iterable[str] = TEXTS) -> Path:
    """An Idefics3: each picture is split into tiles, so rows differ in their number of image tokens."""
    special = ["<s>", "</s>", "<pad>", "<image>", "<fake_token_around_image>", "<end_of_utterance>"]
    special += ["<global-img>"]
    special += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = _tokenizer(texts, special, "<s> $A", bos="<s>", eos="</s>", pad="<pad>")
    config = Idefics3Config(
        vision_config=VISION,
        text_config={"model_type": "llama", **SIZES, "num_key_value_heads": HEADS, **_ids(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=CHAT_TEMPLATE,
    )
    return _save(folder, Idefics3ForConditionalGeneration, config, processor)


def save_tiny_gemma3(folder: Path, texts: Iterable[str] = TEXTS) -> Path:
    """A Gemma3: one token in the prompt stands for a picture, and image tokens see each other."""
    special = ["<pad>", "<eos>", "<bos>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    images = dict(zip(("boi_token", "eoi_token", "image_token"), special[3:], strict=True))
    tokenizer = _tokenizer(
        texts, special, "<bos> $A", bos="<bos>", eos="<eos>", pad="<pad>", extra_special_tokens=images
    )
    config = Gemma3Config(
        text_config={**SIZES, "num_key_value_heads": HEADS, "head_dim": HIDDEN // HEADS, **_ids(tokenizer)},
        vision_config=VISION,
        mm_tokens_per_image=4,
        **{f"{name}_index": tokenizer.convert_tokens_to_ids(token) for name, token in images.items()},
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE.replace("<image>", "<start_of_image>"),
    )
    return _save(folder, Gemma3ForConditionalGeneration, config, processor)


def _qwen2(folder: Path, texts: list[str]) -> Path:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _tokenizer(texts, special, "$A", eos="<|im_end|>", pad="<|endoftext|>")
    config = Qwen2Config(**SIZES, num_key_value_heads=HEADS, vocab_size=len(tokenizer), eos_token_id=2)
    return _save(folder, Qwen2ForCausalLM, config, tokenizer)


def _gemma(folder: Path, texts: list[str]) -> Path:
    tokenizer = _tokenizer(
        texts, ["<pad>", "<eos>", "<bos>"], "<bos> $A", bos="<bos>", eos="<eos>", pad="<pad>"
    )
    config = GemmaConfig(**SIZES, num_key_value_heads=HEADS, head_dim=HIDDEN // HEADS, **_ids(tokenizer))
    return _save(folder, GemmaForCausalLM, config, tokenizer)


def _gpt2(folder: Path, texts: list[str]) -> Path:
    end = "<|endoftext|>"
    tokenizer = _tokenizer(texts, [end], "$A", bos=end, eos=end)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _save(folder, GPT2LMHeadModel, config, tokenizer)


def _bert(folder: Path, texts: list[str]) -> Path:
    roles = {role: f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = _tokenizer(texts, [*roles.values()], "[CLS] $A [SEP]", **roles)
    config = BertConfig(**SIZES, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    return _save(folder, BertForMaskedLM, config, tokenizer)


_CLASSIFIER_BASES: dict[str, Callable[[Path, list[str]], Path]] = {
    "qwen2": _qwen2,
    "gemma": _gemma,
    "gpt2": _gpt2,
    "bert": _bert,
}


def _tokenizer(
    texts: Iterable[str],
    special_tokens: list[str],
    template: str,
    extra_special_tokens: dict[str, str] | None = None,
    **roles: str,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of which ``template`` says what goes around a text, and ``roles`` who is bos or pad."""
    tokenizer = byte_level_bpe(texts, vocab_size=VOCABULARY, special_tokens=special_tokens)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        pair=None,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in special_tokens],
    )
    names: dict[str, Any] = {f"{role}_token": token for role, token in roles.items()}
    if extra_special_tokens:
        names["extra_special_tokens"] = extra_special_tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE, **names
    )


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _save(folder: Path, model_class: Any, config: Any, processor: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if name.endswith("mm_input_projection_weight"):
                # Gemma3 starts it as zeros, and then no answer would depend on a picture.
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
