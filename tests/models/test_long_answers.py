"""What a detector, trained here on toy data, makes of long and of disguised answers."""

import base64
import codecs
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest

from mllm_protector.data.augmentation import Augmentation
from mllm_protector.data.sources import Toy
from mllm_protector.data.tokens import encode_texts, learnt_window
from mllm_protector.data.toy import toy_pairs
from mllm_protector.guard.calibration import Aim
from mllm_protector.models.detector import HarmDetector, load_detector, score_logits
from mllm_protector.models.tiny import tiny_backbone
from mllm_protector.models.tuning import FullTuning
from mllm_protector.records import AnswerPair, labelled_answers
from mllm_protector.training.detector import train_detector
from mllm_protector.training.logging import NoTracker
from tests.test_normalisation import DISGUISES
from tests.training.tagger import CONFIG, NO_CHECKPOINTS

MAX_LENGTH = 512
LONG = 5000
# In words that it has learnt: what is measured is how texts are read, not what the detector generalises to.
HARMFUL = [pair for pair in toy_pairs("train") if pair.rejected_harmful][:40:8]
HARMLESS = [
    text
    for pair in toy_pairs("train")
    if not pair.rejected_harmful
    for text in (pair.accepted, pair.rejected)
]
PLACES = {"start": 0.0, "middle": 0.5, "end": 1.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    train_detector(
        data=Toy(),
        backbone=partial(
            tiny_backbone,
            folder=str(folder / "backbone"),
            data=Toy(),
            vocab_size=2048,
            hidden_size=64,
            layers=2,
            heads=4,
            max_positions=MAX_LENGTH,
            seed=0,
        ),
        tuning=FullTuning(),
        fit=replace(
            CONFIG,
            batch_size=32,
            micro_batch_tokens=1024,
            packing=True,
            learning_rate=2e-3,
            best_metric="auroc",
            log_every=10,
        ),
        checkpoint=NO_CHECKPOINTS,
        resume="never",
        tracker=NoTracker(),
        max_length=MAX_LENGTH,
        prompt=None,
        prefixes=0.0,
        augment=Augmentation(share=0.0),
        benchmarks={},
        contaminated="keep",
        balance="none",
        calibration=Aim(kind="fixed", target=0.5),
        output_dir=str(folder),
        seed=0,
    )
    return folder


@pytest.fixture(scope="module")
def detector(trained: Path) -> HarmDetector:
    tokenizer = load_detector(trained, device="cpu").encoder.tokenizer
    learnt = [record.answer for record in labelled_answers(toy_pairs("train")) if record.harmful]
    return load_detector(trained, device="cpu", window=learnt_window(tokenizer, learnt, len(learnt)))


def harmless_text(detector: HarmDetector, tokens: int) -> list[str]:
    rng = random.Random(0)
    sentences: list[str] = []
    while tokens > 0:
        sentences.append(rng.choice(HARMLESS))
        tokens -= len(encode_texts(detector.encoder.tokenizer, [f" {sentences[-1]}"])[0])
    return sentences


def planted(sentences: Sequence[str], sentence: str, place: str) -> str:
    at = round(PLACES[place] * len(sentences))
    return " ".join([*sentences[:at], sentence, *sentences[at:]])


def score(detector: HarmDetector, answers: Sequence[str]) -> list[float]:
    return detector.score(queries=[pair.query for pair in HARMFUL], answers=answers)


def score_heads(detector: HarmDetector, answers: Sequence[str]) -> list[float]:
    rows = detector.encoder.encode(queries=[pair.query for pair in HARMFUL], answers=answers)
    logits = score_logits(detector.model, detector.encoder, rows, limit=detector.limit)
    return detector.guard.scale.scores(logits)


def test_no_harmful_sentence_hides_in_a_long_harmless_answer(detector: HarmDetector):
    harmless = harmless_text(detector, LONG)
    alone = score(detector, [pair.rejected for pair in HARMFUL])
    assert min(alone) > 0.9
    # Of many short windows one may be a false alarm.
    assert sorted(score(detector, [" ".join(harmless)] * len(HARMFUL)))[-2] < 0.1
    for place in PLACES:
        answers = [planted(harmless, pair.rejected, place) for pair in HARMFUL]
        assert min(score(detector, answers)) > 0.9, place
        if place != "start":
            assert max(score_heads(detector, answers)) < 0.1


def test_a_harmless_sentence_beside_it_hides_no_harmful_answer(detector: HarmDetector):
    beside = {"behind": lambda text: f"{text} {HARMLESS[0]}", "before": lambda text: f"{HARMLESS[0]} {text}"}
    for place, put in beside.items():
        assert flagged_share(detector, put) >= 0.95, place


ENCODINGS: dict[str, Callable[[str], str]] = {
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "leetspeak": lambda text: text.translate(str.maketrans("aeiost", "431057")),
    "spaced letters": " ".join,
    "rot13": lambda text: codecs.encode(text, "rot13"),
}
"""What normalisation does not undo; docs/guard.md has the rates."""


@cache
def flagged_pairs(detector: HarmDetector) -> list[AnswerPair]:
    """20 pairs of the test set whose harmful answer is flagged as it is."""
    pairs = [pair for pair in toy_pairs("test") if pair.rejected_harmful]
    scores = detector.score(queries=[pair.query for pair in pairs], answers=[pair.rejected for pair in pairs])
    return [pair for pair, score in zip(pairs, scores, strict=True) if score >= detector.threshold][:20]


def flagged_share(detector: HarmDetector, disguise: Callable[[str], str]) -> float:
    """Of 20 harmful answers that are flagged as they are, the share that is flagged when disguised."""
    pairs = flagged_pairs(detector)
    scores = detector.score(
        queries=[pair.query for pair in pairs], answers=[disguise(pair.rejected) for pair in pairs]
    )
    return sum(score >= detector.threshold for score in scores) / len(pairs)


def test_a_harmful_answer_is_flagged_in_every_disguise(detector: HarmDetector):
    for name, disguise in DISGUISES.items():
        assert flagged_share(detector, disguise) >= 0.95, name


def test_what_is_encoded_is_read_too(trained: Path, detector: HarmDetector):
    for name, encode in ENCODINGS.items():
        assert flagged_share(detector, encode) >= 0.95, name
    as_written = load_detector(trained, device="cpu", decipher=False)
    rates = {name: flagged_share(as_written, encode) for name, encode in ENCODINGS.items()}
    assert max(rates["base64"], rates["leetspeak"], rates["spaced letters"]) < 0.5, rates
