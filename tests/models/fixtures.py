"""Detectors and detoxifiers of random weights, for every test that needs one."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from mllm_protector.data.detoxifier_encoding import DetoxifierEncoder
from mllm_protector.data.encoding import DetectorEncoder
from mllm_protector.data.tokens import choose_pad_id
from mllm_protector.models.backbone import Backbone
from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.detoxifier import Detoxifier
from mllm_protector.models.guard_file import GuardFile
from mllm_protector.models.tuning import FullTuning, LoraTuning, Tuning
from tests.models.builders import FAMILIES, Family, save_tiny_classifier_base

FULL = FullTuning()
LORA = LoraTuning(rank=4, alpha=8, dropout=0.0, targets="all-linear")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    """One language model of each family; not to be changed."""
    root = tmp_path_factory.mktemp("bases")
    return {family: save_tiny_classifier_base(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session", params=[FULL, LORA], ids=["full", "lora"])
def tuning(request: pytest.FixtureRequest) -> Tuning:
    return request.param


def random_detector(base: Path, tuning: Tuning = FULL, dtype: str = "float32") -> HarmDetector:
    """A detector of random weights: wherever one learns, it has moved away from its start."""
    torch.manual_seed(0)
    backbone = Backbone(name=str(base), dtype=dtype)
    tokenizer = backbone.load_tokenizer()
    encoder = DetectorEncoder(tokenizer, pad_id=choose_pad_id(tokenizer), max_length=256)
    pretrained, fresh = backbone.load_classifier(pad_id=encoder.pad_id)
    model = tuning.prepare(pretrained, "SEQ_CLS", fresh)
    _move(model)
    return HarmDetector(model, encoder, _guard(backbone, tuning, encoder, "detector"))


def random_detoxifier(base: Path, tuning: Tuning = FULL, max_new_tokens: int = 8) -> Detoxifier:
    """A detoxifier of random weights with a short prompt."""
    torch.manual_seed(0)
    backbone = Backbone(name=str(base))
    tokenizer = backbone.load_tokenizer()
    encoder = DetoxifierEncoder(
        tokenizer, pad_id=choose_pad_id(tokenizer), max_length=96, prompt="{query}|{answer}>"
    )
    model = tuning.prepare(backbone.load_causal_lm(), "CAUSAL_LM", [])
    _move(model)
    guard = _guard(backbone, tuning, encoder, "detoxifier")
    return Detoxifier(model, encoder, guard, max_new_tokens=max_new_tokens, batch_size=4)


@pytest.fixture(scope="session")
def make_detector(bases: dict[Family, Path]) -> Callable[..., HarmDetector]:
    """Makes a detector of a family; see ``random_detector``."""

    def make(family: Family = "llama", tuning: Tuning = FULL, dtype: str = "float32") -> HarmDetector:
        return random_detector(bases[family], tuning, dtype)

    return make


@pytest.fixture(scope="session")
def make_detoxifier(bases: dict[Family, Path]) -> Callable[..., Detoxifier]:
    """Makes a detoxifier of a family; see ``random_detoxifier``."""

    def make(family: Family = "llama", tuning: Tuning = FULL, max_new_tokens: int = 8) -> Detoxifier:
        return random_detoxifier(bases[family], tuning, max_new_tokens)

    return make


def _move(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def _guard(
    backbone: Backbone, tuning: Tuning, encoder: DetectorEncoder | DetoxifierEncoder, kind: str
) -> GuardFile:
    scores = kind == "detector"
    return GuardFile(
        kind=kind,
        tuning=tuning.kind,
        base=asdict(backbone),
        prompt=encoder.prompt,
        max_length=encoder.max_length,
        pad_id=encoder.pad_id,
        threshold=0.4 if scores else None,
        temperature=1.5 if scores else None,
        data={"account": "none"},
        metrics={},
        versions={},
    )
