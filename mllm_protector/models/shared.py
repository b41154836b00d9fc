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
from transformers import PreTrainedModel

from mllm_protector.errors import InputError
from mllm_protector.models.backbone import Float32Linear, pick_device
from mllm_protector.models.detector import HarmDetector, detector_encoder, load_detector
from mllm_protector.models.detoxifier import Detoxifier, detoxifier_encoder, load_detoxifier
from mllm_protector.models.guard_file import GuardFile, read_guard_file
from mllm_protector.models.parts import adapter_weights, bases_of, fitting, part_backbone

DETECTOR, DETOXIFIER = "detector", "detoxifier"
HEAD = "score"


class SharedBackbone:
    """A causal LM with two adapters, of which one is active at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model  # PEFT puts its layers into it
        self._adapted: Any = None
        self._lock = threading.RLock()

    def add(self, name: str, folder: Path) -> dict[str, torch.Tensor]:
        """Put a folder's adapter on the base; the weights that have no place there, a head's, are returned.

        Raises:
            InputError: not a LoRA adapter in safetensors format, or one for another base.
        """
        from peft import LoraConfig, PeftModel, set_peft_model_state_dict

        weights = adapter_weights(folder)
        adapter = {key: value for key, value in weights.items() if "lora_" in key}
        config = LoraConfig.from_pretrained(str(folder))
        # A plain adapter: a causal LM has no module for the head of a classifier.
        config.task_type, config.modules_to_save, config.inference_mode = None, None, True
        with fitting(folder):
            if self._adapted is None:
                self._adapted = PeftModel(self.model, config, adapter_name=name)
            else:
                self._adapted.add_adapter(name, config)
            report = set_peft_model_state_dict(self._adapted, adapter, adapter_name=name)
            untrained = [key for key in report.missing_keys if f".{name}." in key]
            for key in (*report.unexpected_keys, *untrained):
                raise ValueError(key)
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
        super().__init__()
        self.shared = shared
        self.causal_lm = shared.model
        self.generation_config = shared.model.generation_config

    def generate(self, **arguments: Any) -> torch.Tensor:
        """Ids (B, T) int64, the prompt's first, as by ``transformers``' ``generate``."""
        with self.shared.using(DETOXIFIER) as model:
            model.generation_config = self.generation_config
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
    """Load a LoRA detector and a LoRA detoxifier on one base: half the memory of loading them apart.

    The parts cannot be saved again; they are in their folders. Arguments as in ``load_detoxifier``; ``base``
    is where the base of both is now.

    Raises:
        InputError: a folder does not hold what it should, a part is a whole model, or the two were trained
            on different bases.
    """
    scorer, writer = Path(detector), Path(detoxifier)
    scoring, writing = read_guard_file(scorer, "detector"), read_guard_file(writer, "detoxifier")
    if problem := _why_not(scorer, scoring, writer, writing, moved=base is not None):
        raise InputError(f"{problem}; load the parts apart, or train them on one base")
    where = pick_device(device)
    backbone = part_backbone(writing, writer, base, trust_remote_code=trust_remote_code)
    shared = SharedBackbone(backbone.load_causal_lm())
    head = _head(scorer, shared.add(DETECTOR, scorer))
    for key in sorted(shared.add(DETOXIFIER, writer)):
        raise InputError(f"{writer}: more than an adapter ({key}), so the base cannot be shared")
    reader = detector_encoder(scorer, scoring, trust_remote_code=trust_remote_code)
    encoder = detoxifier_encoder(writer, writing, trust_remote_code=trust_remote_code)
    scores, writes = (
        each.to(where).eval() for each in (SharedDetector(shared, head), SharedDetoxifier(shared))
    )
    return (
        HarmDetector(scores, reader, scoring),
        Detoxifier(writes, encoder, writing, max_new_tokens=max_new_tokens),
    )


def load_parts(
    detector: str | Path,
    detoxifier: str | Path,
    *,
    base: str | None = None,
    device: str | None = None,
    max_new_tokens: int | None = None,
) -> tuple[HarmDetector, Detoxifier]:
    """Load both parts, on one base where they can share it. Arguments as in ``load_shared``.

    Raises:
        InputError: a folder does not hold what it should, or ``base`` is the base of neither.
    """
    if can_share(detector, detoxifier):
        return load_shared(detector, detoxifier, base=base, device=device, max_new_tokens=max_new_tokens)
    one, other = bases_of(base, (detector, "detector"), (detoxifier, "detoxifier"))
    return (
        load_detector(detector, base=one, device=device),
        load_detoxifier(detoxifier, base=other, device=device, max_new_tokens=max_new_tokens),
    )


def can_share(detector: str | Path, detoxifier: str | Path) -> bool:
    """Whether ``load_shared`` takes the two folders: adapters on the same base, loaded alike.

    Raises:
        InputError: a folder does not hold what it should.
    """
    scorer, writer = Path(detector), Path(detoxifier)
    scoring, writing = read_guard_file(scorer, "detector"), read_guard_file(writer, "detoxifier")
    return _why_not(scorer, scoring, writer, writing, moved=False) is None


def _why_not(
    scorer: Path, scoring: GuardFile, writer: Path, writing: GuardFile, *, moved: bool
) -> str | None:
    """Why two parts cannot share a base; ``None`` if they can. The name tells nothing of a moved base."""
    for folder, guard in ((scorer, scoring), (writer, writing)):
        if guard.tuning != "lora":
            return f"{folder}: tuning={guard.tuning}; only adapters (tuning=lora) share a base"
    one, other = ({**guard.base, "fingerprint": guard.base_fingerprint} for guard in (scoring, writing))
    known = None not in (one["fingerprint"], other["fingerprint"])
    may_differ = {"trust_remote_code"} | ({"name", "revision"} if moved or known else set())
    may_differ |= set() if known else {"fingerprint"}
    for field in sorted(one.keys() | other.keys()):
        if field not in may_differ and one.get(field) != other.get(field):
            return (
                f"the base is not the same: {scorer} has {field}={one.get(field)} and {writer} has "
                f"{field}={other.get(field)}"
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
