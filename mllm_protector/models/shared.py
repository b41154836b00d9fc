"""Detector and detoxifier on one base model in memory, where both are adapters on the same one.

The base is loaded once, as a causal LM with two LoRA adapters. The detector runs its body with its own
adapter and puts its own head on the last token; the detoxifier generates with the other adapter. Which
one is active is set for every call, under a lock, so the two may be used in any order and from threads.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from mllm_protector.errors import InputError
from mllm_protector.models.backbone import Float32Linear, pick_device
from mllm_protector.models.bases import part_backbone
from mllm_protector.models.detector import HarmDetector, detector_encoder
from mllm_protector.models.detoxifier import Detoxifier, detoxifier_encoder
from mllm_protector.models.guard_file import ADAPTER_FILES, GuardFile, read_guard_file
from mllm_protector.models.parts import not_in_adapter

DETECTOR, DETOXIFIER = "detector", "detoxifier"
HEAD = "score"

_Parts = tuple[tuple[Path, GuardFile], tuple[Path, GuardFile]]


class SharedBackbone:
    """A causal LM with two adapters, of which one is active at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Bind the base.

        Args:
            model: as loaded; PEFT puts its layers into it.
        """
        self.model = model
        self._adapted: Any = None
        self._lock = threading.RLock()

    def add(self, name: str, folder: Path) -> dict[str, torch.Tensor]:
        """Put a folder's adapter on the base.

        Returns:
            The weights that belong to no layer of the base: a head, by its PEFT names.

        Raises:
            InputError: not a LoRA adapter in safetensors format, or one for another base.
        """
        from peft import LoraConfig, PeftModel, set_peft_model_state_dict
        from safetensors.torch import load_file

        not_in_adapter(folder, [])  # refuses what is not in safetensors format
        config = LoraConfig.from_pretrained(str(folder))
        # A plain adapter: the head of a classifier is no module of a causal LM.
        config.task_type, config.modules_to_save, config.inference_mode = None, None, True
        weights = load_file(folder / ADAPTER_FILES[1])
        adapter = {key: value for key, value in weights.items() if "lora_" in key}
        try:
            if self._adapted is None:
                self._adapted = PeftModel(self.model, config, adapter_name=name)
            else:
                self._adapted.add_adapter(name, config)
            report = set_peft_model_state_dict(self._adapted, adapter, adapter_name=name)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"{folder}: the adapter does not fit its base model ({reason})") from error
        untrained = [key for key in report.missing_keys if f".{name}." in key]
        for key in (*report.unexpected_keys, *untrained):
            raise InputError(f"{folder}: the adapter does not fit its base model ({key})")
        return {key: value for key, value in weights.items() if key not in adapter}

    @contextmanager
    def using(self, name: str) -> Iterator[PreTrainedModel]:
        """The causal LM with one adapter active; other threads wait until it is given back."""
        with self._lock:
            if self._adapted.active_adapter != name:
                self._adapted.set_adapter(name, inference_mode=True)
            yield self.model


class SharedDetector(torch.nn.Module):
    """A sequence classifier that borrows the body of the shared model."""

    def __init__(self, shared: SharedBackbone, head: torch.nn.Linear) -> None:
        """Join the shared body and a head."""
        super().__init__()
        self.shared = shared
        self.body = shared.model.base_model
        self.head = Float32Linear.of(head)

    def forward(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        """Map ids and mask (B, T) to an object with ``logits`` (B, 1) float32, of each last real token."""
        with self.shared.using(DETECTOR):
            output = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (positions * attention_mask).argmax(dim=1)
        rows = torch.arange(len(last), device=last.device)
        return SimpleNamespace(logits=self.head(output.last_hidden_state[rows, last]))


class SharedDetoxifier(torch.nn.Module):
    """The shared causal LM with the detoxifier's adapter."""

    def __init__(self, shared: SharedBackbone) -> None:
        """Bind the shared model."""
        super().__init__()
        self.shared = shared
        self.causal_lm = shared.model

    @property
    def generation_config(self) -> GenerationConfig | None:
        """Of the causal LM."""
        return self.causal_lm.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        """Set the causal LM's."""
        self.causal_lm.generation_config = value

    def generate(self, **arguments: Any) -> torch.Tensor:
        """Ids (B, T) int64, the prompt's first, as by ``transformers``' ``generate``."""
        with self.shared.using(DETOXIFIER) as model:
            return model.generate(**arguments)  # type: ignore[no-any-return]


def load_shared(
    detector: str | Path,
    detoxifier: str | Path,
    *,
    base: str | None = None,
    device: str | None = None,
    max_new_tokens: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[HarmDetector, Detoxifier]:
    """Load both parts on one base: half the memory of ``load_detector`` and ``load_detoxifier``.

    The parts cannot be saved again; they are in their folders.

    Args:
        detector: a LoRA detector's folder.
        detoxifier: a LoRA detoxifier's folder.
        base: where the base of both is now; ``None`` to look where it was, and near the detoxifier.
        device: ``None`` takes the GPU if there is one.
        max_new_tokens: the longest rewrite; ``None`` for the longest that was learnt.
        trust_remote_code: run code that comes with the model. Leave it off unless you have read that code.

    Raises:
        InputError: a folder does not hold what it should, a part is a whole model, or the two were trained
            on different bases.
    """
    (scorer, scoring), (writer, writing) = parts = _read(detector, detoxifier)
    if problem := _why_not(parts, moved=base is not None):
        raise InputError(problem)
    where = pick_device(device)
    backbone = part_backbone(writing, writer, base, trust_remote_code=trust_remote_code)
    shared = SharedBackbone(backbone.load_causal_lm())
    head = _head(scorer, shared.add(DETECTOR, scorer))
    for key in sorted(shared.add(DETOXIFIER, writer)):
        raise InputError(f"{writer}: more than an adapter ({key}), so the base cannot be shared")
    reader = detector_encoder(scorer, scoring, trust_remote_code=trust_remote_code)
    corrections = detoxifier_encoder(writer, writing, trust_remote_code=trust_remote_code)
    return (
        HarmDetector(SharedDetector(shared, head).to(where).eval(), reader, scoring),
        Detoxifier(
            SharedDetoxifier(shared).to(where).eval(), corrections, writing, max_new_tokens=max_new_tokens
        ),
    )


def can_share(detector: str | Path, detoxifier: str | Path) -> bool:
    """Whether ``load_shared`` takes the two folders: adapters on the same base, loaded alike.

    Raises:
        InputError: a folder does not hold what it should.
    """
    return _why_not(_read(detector, detoxifier), moved=False) is None


def _read(detector: str | Path, detoxifier: str | Path) -> _Parts:
    scorer, writer = Path(detector), Path(detoxifier)
    return (scorer, read_guard_file(scorer, "detector")), (writer, read_guard_file(writer, "detoxifier"))


def _why_not(parts: _Parts, *, moved: bool) -> str | None:
    """Why two parts cannot share a base; ``None`` if they can."""
    for folder, guard in parts:
        if guard.tuning != "lora":
            return f"{folder}: tuning={guard.tuning}, a whole model; only adapters (tuning=lora) share a base"
    (scorer, scoring), (writer, writing) = parts
    advice = "load the parts apart, or train them on one base"
    prints = scoring.base_fingerprint, writing.base_fingerprint
    if None not in prints and prints[0] != prints[1]:
        return (
            f"the base is not the same: {scorer} is on {scoring.base['name']} and {writer} on "
            f"{writing.base['name']}, with other weights; {advice}"
        )
    may_differ = {"trust_remote_code"} | ({"name", "revision"} if moved or None not in prints else set())
    for field in sorted((scoring.base.keys() | writing.base.keys()) - may_differ):
        one, other = scoring.base.get(field), writing.base.get(field)
        if one != other:
            return (
                f"the base is not the same: {scorer} has {field}={one} and {writer} has {field}={other}; "
                f"{advice}"
            )
    return None


def _head(folder: Path, weights: dict[str, torch.Tensor]) -> torch.nn.Linear:
    """The detector's head from what its adapter has beside LoRA weights."""
    tensors = {key.removeprefix(f"base_model.model.{HEAD}."): value for key, value in weights.items()}
    if "weight" not in tensors:
        raise InputError(f"{folder}: the trained head ({HEAD}) is missing; scores would be random")
    for key in sorted(tensors.keys() - {"weight", "bias"}):
        raise InputError(f"{folder}: more than an adapter ({key}), so the base cannot be shared")
    outputs, width = tensors["weight"].shape
    head = torch.nn.Linear(width, outputs, bias="bias" in tensors).requires_grad_(False)
    head.load_state_dict(tensors, assign=True)
    return head
