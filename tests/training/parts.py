"""Made-up pairs, and short trainings of a detector and a detoxifier on them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_protector.data.augmentation import Augmentation
from mllm_protector.data.splits import Splits, make_splits
from mllm_protector.guard.calibration import Aim
from mllm_protector.models.backbone import Backbone
from mllm_protector.models.tuning import FullTuning, LoraTuning
from mllm_protector.records import AnswerPair
from mllm_protector.training.detector import train_detector
from mllm_protector.training.detoxifier import train_detoxifier
from mllm_protector.training.logging import NoTracker
from tests.models.builders import TEXTS, save_tiny_classifier_base
from tests.training.tagger import CONFIG, NO_CHECKPOINTS

LORA = LoraTuning(rank=2, alpha=4, dropout=0.1, targets="all-linear")


@dataclass(frozen=True)
class Given:
    """A source of the records that it is given."""

    train: Sequence[Any]
    validation: Sequence[Any]

    def load(self) -> Splits[Any]:
        return make_splits(self.train, self.validation, "records of a test")


class Unread:
    def load(self) -> Splits[Any]:
        raise AssertionError("the data was read")


def pairs(count: int, start: int = 0) -> list[AnswerPair]:
    return [
        AnswerPair(
            query=f"How do I make thing {number}?",
            accepted=f"I will not help with thing {number}.",
            rejected=f"[harmful placeholder] Sure, thing {number} goes like this.",
        )
        for number in range(start, start + count)
    ]


DATA = Given(train=pairs(16), validation=pairs(5, start=50))


def save_base(folder: Path) -> Path:
    texts = [text for pair in DATA.train for text in (pair.query, pair.accepted, pair.rejected)]
    return save_tiny_classifier_base("llama", folder, [*TEXTS, *texts])


def train_a_detector(folder: Path, base: Path, **changes: Any) -> dict[str, Any]:
    arguments = _arguments(folder, base) | {
        "fit": replace(CONFIG, best_metric="auroc", epochs=3),
        "balance": "none",
        "calibration": Aim("f1", None),
        "prefixes": 0.0,
        "augment": Augmentation(share=0.0),
    }
    return train_detector(**arguments | changes)


def train_a_detoxifier(folder: Path, base: Path, **changes: Any) -> dict[str, Any]:
    arguments = _arguments(folder, base) | {
        "fit": replace(CONFIG, epochs=3),
        "both_harmful": "drop",
        "refusals": 1.0,
        "chat": False,
    }
    return train_detoxifier(**arguments | changes)


def _arguments(folder: Path, base: Path) -> dict[str, Any]:
    return {
        "data": DATA,
        "benchmarks": {},
        "contaminated": "keep",
        "backbone": lambda: Backbone(name=str(base)),
        "tuning": FullTuning(),
        "checkpoint": NO_CHECKPOINTS,
        "resume": "auto",
        "tracker": NoTracker(),
        "max_length": 320,
        "prompt": None,
        "output_dir": str(folder),
        "seed": 0,
    }
