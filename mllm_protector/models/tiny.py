"""Tiny models built from a config: what real models do, offline and in seconds.

The folders are in the standard format, so they are loaded by the code that loads real checkpoints. The
weights are random: a tiny LM is a backbone to train, a tiny LLaVA an MLLM whose answers mean nothing.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mllm_protector.data.sources import Source
from mllm_protector.errors import InputError
from mllm_protector.files import fresh_folder, read_json, write_json, writing
from mllm_protector.models.backbone import Backbone
from mllm_protector.ranges import Count, Seed, Width
from mllm_protector.records import labelled_answers

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
IMAGE = "<image>"
SETTINGS = "tiny.json"
"""Beside the weights: what the folder was made from, which identifies it."""

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- message['role'] | capitalize + ': ' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{- '<image>\\n' if part['type'] == 'image' else part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {{- eos_token if message['role'] == 'assistant' else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Assistant: ' -}}
{%- endif -%}
"""
"""The role in front of each turn; a turn is a text, or a list of images and texts."""


class Sizes(TypedDict):
    """Of a tiny language model, and the seed of its weights."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    max_positions: int
    seed: int


def byte_level_bpe(texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
    """Byte-level BPE trained on the texts: any text can be encoded, and comes back the same.

    There are at most ``vocab_size`` tokens; few texts give fewer. Special tokens get the ids from 0 on.

    Raises:
        InputError: a vocabulary that does not hold the 256 bytes and the special tokens.
    """
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise InputError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens "
            f"need at least {least}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tiny_tokenizer(
    texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A ``byte_level_bpe`` tokenizer that puts ``<s>`` in front of a text, with a chat template.

    It has ``<s>``, ``</s>`` and ``<pad>`` beside ``special_tokens``.

    Raises:
        InputError: ``vocab_size`` is too small.
    """
    tokenizer = byte_level_bpe(texts, vocab_size=vocab_size, special_tokens=[BOS, EOS, PAD, *special_tokens])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny_lm(folder: Path, texts: Iterable[str], **sizes: Unpack[Sizes]) -> Path:
    """A Llama causal LM of random weights and its tokenizer, saved to a folder.

    A folder that already holds the same settings is left alone, one with other settings is replaced.

    Raises:
        InputError: the folder holds something else, or the vocabulary is too small.
    """

    def make(texts: list[str]) -> tuple[Any, Any]:
        tokenizer = tiny_tokenizer(texts, vocab_size=sizes["vocab_size"])
        return LlamaForCausalLM(_llama(tokenizer, sizes)), tokenizer

    return _save_once(Path(folder), "llama", texts, {**sizes}, make)


def tiny_backbone(
    *,
    folder: str,
    data: Source,
    vocab_size: Count,
    hidden_size: Width,
    layers: Width,
    heads: Width,
    max_positions: Count,
    seed: Seed,
) -> Backbone:
    """``save_tiny_lm`` with a tokenizer trained on a source's training texts, as a backbone.

    Raises:
        InputError: as ``save_tiny_lm``, a width that the heads cannot share (each needs an even number of
            channels, for rotary positions), or the source cannot be read.
    """
    if hidden_size % (2 * heads):
        raise InputError(
            f"backbone.heads={heads}: backbone.hidden_size={hidden_size} must be an even multiple of it"
        )
    texts = (text for row in labelled_answers(data.load().train) for text in (row.query, row.answer))
    saved = save_tiny_lm(
        Path(folder),
        texts,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        max_positions=max_positions,
        seed=seed,
    )
    return Backbone(name=str(saved))


def save_tiny_llava(
    folder: Path, texts: Iterable[str], *, image_size: int, patch_size: int, **sizes: Unpack[Sizes]
) -> Path:
    """A LLaVA (CLIP vision tower, Llama text model) of random weights and its processor.

    Images are scaled to a square of ``image_size`` pixels and become ``(image_size / patch_size) ** 2``
    tokens. A folder is reused or replaced as by ``save_tiny_lm``, with the same errors.
    """
    pixels = {"image_size": image_size, "patch_size": patch_size}

    def make(texts: list[str]) -> tuple[Any, Any]:
        tokenizer = tiny_tokenizer(texts, vocab_size=sizes["vocab_size"], special_tokens=[IMAGE])
        config = LlavaConfig(
            text_config=_llama(tokenizer, sizes),
            vision_config=CLIPVisionConfig(
                hidden_size=sizes["hidden_size"],
                intermediate_size=2 * sizes["hidden_size"],
                num_hidden_layers=sizes["layers"],
                num_attention_heads=sizes["heads"],
                projection_dim=sizes["hidden_size"],
                **pixels,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=(image_size // patch_size) ** 2,
            vision_feature_layer=-1,
        )
        model = LlavaForConditionalGeneration(config)
        model.generation_config.update(**_token_ids(tokenizer))
        square = {"height": image_size, "width": image_size}
        return model, LlavaProcessor(
            image_processor=CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False),
            tokenizer=tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
            image_token=IMAGE,
        )

    return _save_once(Path(folder), "llava", texts, pixels | {**sizes}, make)


def _llama(tokenizer: PreTrainedTokenizerFast, sizes: Sizes) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes["hidden_size"],
        intermediate_size=3 * sizes["hidden_size"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"],
        max_position_embeddings=sizes["max_positions"],
        **_token_ids(tokenizer),
    )


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}


def _save_once(
    folder: Path,
    kind: str,
    texts: Iterable[str],
    sizes: dict[str, Any],
    make: Callable[[list[str]], tuple[Any, Any]],
) -> Path:
    """Fill the folder whole or not at all with a model and what prepares its input."""
    texts = list(texts)
    settings = {"kind": kind, "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(), **sizes}
    if _holds(folder, settings):
        return folder
    if folder.exists() and not (folder / SETTINGS).is_file():
        raise InputError(f"{folder}: holds something else than a tiny model; name another folder")
    with fresh_folder(folder) as temporary:
        with torch.random.fork_rng(devices=[]):  # the caller's random state is left as it was
            # Not torch.manual_seed: that would also seed the GPUs, which are not forked here.
            torch.default_generator.manual_seed(settings["seed"])
            made = make(texts)
        with writing(str(folder)):
            for each in made:
                each.save_pretrained(temporary)
        write_json(temporary / SETTINGS, settings)
        if folder.exists():
            ours = {path.name for path in temporary.iterdir()}
            for foreign in sorted({path.name for path in folder.iterdir()} - ours):
                raise InputError(f"{folder / foreign}: not a file of a tiny model; name another folder")
            shutil.rmtree(folder)
        try:
            temporary.rename(folder)
        except OSError:
            if not _holds(folder, settings):  # another process was faster with the same model
                raise
    return folder


def _holds(folder: Path, settings: dict[str, Any]) -> bool:
    path = folder / SETTINGS
    return path.is_file() and read_json(path) == settings
