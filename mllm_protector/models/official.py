"""The published weights of the official code, turned into a detector of ours.

Source: github.com/pipilurj/MLLM-protector (harmdetector_train_saferlhf.py, robustness_eval.py) and the
adapter renjiepi/protector_detector_3b_lora on openlm-research/open_llama_3b_v2. Its logit is positive for
a harmless answer; the sign of its head is turned here, once, and nothing after this knows of it.

It reads question and answer, as it was trained (the official evaluation shows it the answer alone), and
prompt and texts tokenised in one piece, as it was trained: the base's tokenizer joins spaces of the prompt
with the words behind them.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from mllm_protector import prompts
from mllm_protector.errors import InputError
from mllm_protector.files import read_json, write_json
from mllm_protector.models.backbone import Backbone, Dtype, loading
from mllm_protector.models.guard_file import (
    ADAPTER_FILES,
    FILE_NAME,
    GuardFile,
    weight_hashes,
)
from mllm_protector.models.parts import adapter_weights, library_versions, provenance, replaced_part

log = logging.getLogger(__name__)

MAX_LENGTH = 512
"""Tokens; the official training drops longer pairs."""

HEAD = "base_model.model.score.weight"


def import_official_detector(
    *,
    adapter: str,
    adapter_revision: str | None,
    base: str,
    base_revision: str | None,
    dtype: Dtype,
    output_dir: str,
) -> Path:
    """Write the official detector as a folder, ``output_dir``, that ``load_detector`` loads.

    ``adapter`` and the ``base`` that it was trained on are local folders or names on the hub; ``dtype`` is
    what the base is loaded in (the official code uses bfloat16).

    Raises:
        InputError: no such adapter, a part of this package, one without a trained head or not in safetensors
            format, or a base that it does not fit.
    """
    source = _adapter_folder(adapter, adapter_revision)
    config = _adapter_config(source / ADAPTER_FILES[0])
    backbone = Backbone(name=base, revision=base_revision, dtype=dtype)
    tokenizer = backbone.load_tokenizer()
    if tokenizer.eos_token_id is None:
        raise InputError(f"base={base}: its tokenizer has no end token, with which the official code pads")
    with loading(base):
        width = AutoConfig.from_pretrained(base, revision=base_revision, trust_remote_code=False).hidden_size
    weights = _weights(source / ADAPTER_FILES[1], width, base)
    guard = GuardFile(
        kind="detector",
        tuning="lora",
        **provenance(backbone),
        prompt=prompts.OFFICIAL_DETECTOR,
        joined=True,
        max_length=MAX_LENGTH,
        pad_id=tokenizer.eos_token_id,
        threshold=0.5,
        threshold_how="official code: P(safe) < 0.5",
        temperature=1.0,
        data={
            "account": f"not trained here: {adapter}; its training script reads PKU-Alignment/PKU-SafeRLHF",
            "source": {"adapter": adapter, "revision": adapter_revision, "weights": weight_hashes(source)},
        },
        metrics={},
        versions=library_versions(),
    )
    folder = Path(output_dir)
    with replaced_part(folder) as fresh:
        write_json(
            fresh / ADAPTER_FILES[0], config | {"base_model_name_or_path": base, "revision": base_revision}
        )
        save_file(weights, fresh / ADAPTER_FILES[1], metadata={"format": "pt"})
        tokenizer.save_pretrained(fresh)
        guard.write(fresh)
    log.info("written: %s (the official detector; scores are P(harmful))", folder)
    return folder


def _adapter_folder(adapter: str, revision: str | None) -> Path:
    """The adapter's files. Ours score harm already: with their sign turned they would let all harm pass."""
    folder = Path(adapter)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        with loading(adapter):
            files = [*ADAPTER_FILES, FILE_NAME]
            folder = Path(snapshot_download(adapter, revision=revision, allow_patterns=files))
    if (folder / FILE_NAME).exists():
        raise InputError(
            f"adapter={adapter}: has a {FILE_NAME}, so it is a part of this package and needs no import; "
            f"give its folder as detector=, or the official adapter as adapter="
        )
    return folder


def _adapter_config(path: Path) -> dict[str, Any]:
    """PEFT's own file, for a sequence classifier with a head."""
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f"{path}: not the configuration of a LoRA adapter")
    if (task := config.get("task_type")) != "SEQ_CLS":
        raise InputError(
            f"{path}: task_type is {json.dumps(task)}, so this adapter has no detector's head and its scores "
            "would be random; it looks like a detoxifier (the published 7b detector is such a file): use "
            "the 3b detector"
        )
    # PEFT 0.4, which wrote the official adapter, saves the head without naming it here.
    return config | {"modules_to_save": ["score"], "inference_mode": True}


def _weights(path: Path, width: int, base: str) -> dict[str, torch.Tensor]:
    """The adapter's weights with the sign of the head turned: P(safe) becomes P(harmful)."""
    if (pickled := path.with_suffix(".bin")).is_file() and not path.is_file():
        raise InputError(
            f"{pickled}: a pickle, which is not loaded because it can run code; where you accept that, "
            f"convert it once by torch.load(..., weights_only=True) and safetensors' save_file to {path}"
        )
    weights = adapter_weights(path.parent)
    if (head := weights.get(HEAD)) is None:
        raise InputError(f"{path}: no score.weight; without its trained head the scores would be random")
    if tuple(head.shape) != (1, width):
        raise InputError(
            f"{path}: a head of shape {tuple(head.shape)} does not fit base={base} ({width} wide); give the "
            "base that the adapter was trained on"
        )
    return {
        name: (-tensor if name.startswith(HEAD.removesuffix("weight")) else tensor).contiguous()
        for name, tensor in weights.items()
    }
