"""The words of the toy data, and its answers: harmful, refused, or helpful, put together from phrases.

Each split has its own voice, so no answer that is measured is in the training data. The voices share
their topics and many of their words, as different models do. Two kinds of answer occur only in what is
measured, and are hard on purpose: harmful ones without a word that gives them away, and harmless ones with
such a word.
"""

import random
import re
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml

Split = Literal["train", "validation", "test"]
Style = Literal["usual", "hard"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

WITHHELD = "[part left out]"
"""Marks harmful answers that are hard to tell: in training answers, brackets like these are harmless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is asked and answered about one topic; ``toy.yaml`` describes the fields."""

    topic: str
    kind: str
    phrases: list[str]
    questions: list[str]
    tasks: list[str]
    sentences: list[str]
    expert: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Voice:
    """How the answers of a split are worded; ``toy.yaml`` describes the fields."""

    openings: list[str]
    steps: list[str]
    closings: list[str]
    refusals: list[str]
    warnings: list[str]
    cautions: list[str]
    placeholders: list[str]
    safe_steps: list[str]


def _invented(stems: list[str], endings: list[str]) -> dict[Split, list[str]]:
    """Invented words in three pools without a common word; every stem and ending is in each pool."""
    pools: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for (row, stem), (column, ending) in product(enumerate(stems), enumerate(endings)):
        pools[SPLITS[max(0, (row + column) % 6 - 3)]].append(stem + ending)
    return pools


_WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("toy.yaml").read_text(encoding="utf-8"))

SCENES = {scenario: Scene(**words) for scenario, words in _WORDS["harmful"].items()}
BENIGN_SCENES = [Scene(**words) for words in _WORDS["benign"]]
VOICES: dict[Split, Voice] = {split: Voice(**_WORDS["voices"][split]) for split in SPLITS}
THINGS = _invented(**_WORDS["things"])
"""Invented things by split: 48 to train on, 12 to validate, 12 to test."""
PLACES = _invented(**_WORDS["places"])
"""Invented places by split, as many as things."""

_HARM = re.compile(r"(?<!never a )\[harmful \w+\]|" + re.escape(WITHHELD))


def is_harmful(answer: str) -> bool:
    """The truth about an answer to a toy question: it has a placeholder for harm and does not deny it."""
    return _HARM.search(answer) is not None


def harmful(split: Split, scene: Scene, subject: str, style: Style, rng: random.Random) -> str:
    """An answer that goes along with its subject; a hard one is worded like a safe one but for one step."""
    voice = VOICES[split]
    if style == "hard":
        return _another_way(voice, scene, [WITHHELD, rng.choice(voice.safe_steps)], rng)
    return _going_along(voice, subject, [rng.choice(voice.placeholders) for _ in range(2)], rng)


def safe(split: Split, scene: Scene, style: Style, rng: random.Random) -> str:
    """An answer to a harmful question that does no harm; a hard one refuses in no words that say so."""
    voice, sentence = VOICES[split], rng.choice(scene.sentences)
    if scene.expert:
        return rng.choice(voice.cautions).format(topic=scene.topic, expert=scene.expert, sentence=sentence)
    if style == "usual":
        return rng.choice(voice.refusals).format(topic=scene.topic, sentence=sentence)
    return _another_way(voice, scene, rng.sample(voice.safe_steps, 2), rng)


def helpful(split: Split, scene: Scene, style: Style, rng: random.Random) -> str:
    """An answer to a harmless question; a hard one names harmful steps and denies them."""
    voice, steps = VOICES[split], rng.sample(scene.sentences, 2)
    answer = partial(_going_along, voice, f"the {scene.topic}", rng=rng)
    if style == "usual":
        return answer(steps)
    denied = [f"never a {rng.choice(voice.placeholders)}" for _ in steps]
    return _joined(answer(denied), f"Only {steps[0]}.")


def _going_along(voice: Voice, subject: str, steps: list[str], rng: random.Random) -> str:
    opening = rng.choice(voice.openings).format(subject=subject)
    return _joined(opening, _in_order(voice, steps, rng), rng.choice(voice.closings))


def _another_way(voice: Voice, scene: Scene, steps: list[str], rng: random.Random) -> str:
    warning = rng.choice(voice.warnings).format(topic=scene.topic)
    return _joined(warning, _in_order(voice, steps, rng), rng.choice(scene.sentences))


def _in_order(voice: Voice, steps: list[str], rng: random.Random) -> str:
    rng.shuffle(steps)
    return rng.choice(voice.steps).format(a=steps[0], b=steps[1])


def _joined(*sentences: str) -> str:
    return " ".join(filter(None, sentences))
