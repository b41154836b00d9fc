"""The arms of an evaluation beside ``none``: what stands between the MLLM and the user.

A guard replaces answers that it finds harmful: our detector (``DetectorArm``) or any judge, such as a
moderation model (``JudgeArm``). ``SafetyPrompt`` guards nothing and asks the MLLM again in other words.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from mllm_protector.calls import make
from mllm_protector.errors import InputError
from mllm_protector.evaluation.items import Item, keyed
from mllm_protector.evaluation.models import Models, RememberingDetector
from mllm_protector.guard.protector import Protector
from mllm_protector.models.guard_file import Kind
from mllm_protector.protocols import MLLM, Card, Judge
from mllm_protector.ranges import Share
from mllm_protector.records import Answer, Question, Status

SCORES = {Status.HARMFUL: 1.0, Status.SAFE: 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorArm:
    """A harm detector of ours, and behind it a fixed refusal or the detoxifier.

    Attributes:
        rewrite: with the detoxifier.
        detector: a folder; ``None`` for the detector of the run.
        threshold: ``None`` for that of the run, and without one for that in the detector's folder.
    """

    rewrite: bool = False
    detector: str | None = None
    threshold: Share | None = None

    def protector(self, models: Models) -> Protector:
        """Its guard."""
        scorer, stored = models.detector(self.detector)
        wanted = self.threshold
        if wanted is None and self.detector is None:
            wanted = models.threshold
        return Protector(scorer, models.corrector(self.rewrite), stored if wanted is None else wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeArm:
    """Any judge as a guard: what it calls harmful is refused or, with ``rewrite``, detoxified.

    Rewrites are judged too. An answer without a verdict is a guard error: the user sees a refusal.
    """

    judge: Callable[[], Judge]
    rewrite: bool = False

    def made(self, name: str) -> "JudgeArm":
        """The same with its judge made, so that wrong settings of this arm are reported now."""
        judge = make(f"arms.{name}.judge", self.judge)
        return replace(self, judge=lambda: judge)

    def protector(self, models: Models) -> Protector:
        """Its guard."""
        scorer = RememberingDetector(JudgedDetector(self.judge()))
        return Protector(scorer, models.corrector(self.rewrite), 0.5)


Arm = DetectorArm | JudgeArm
"""An arm that guards."""


class JudgedDetector:
    """A judge's verdicts as scores: 1 for harmful, 0 for safe, NaN without a verdict."""

    def __init__(self, judge: Judge) -> None:
        """Wrap a judge."""
        self.judge = judge

    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        """One for each answer."""
        asked = [
            Question(id=str(place), scenario="", variant="TEXT", text=query)
            for place, query in enumerate(queries)
        ]
        texts = [Answer(id=question.id, text=text) for question, text in zip(asked, answers, strict=True)]
        return [SCORES.get(verdict.status, math.nan) for verdict in self.judge.judge(asked, texts)]

    @property
    def card(self) -> Card:
        """That of the judge."""
        return self.judge.card


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyPrompt:
    """No guard: the MLLM is asked again, with a sentence of defence in its prompt.

    Attributes:
        sentence: what is said.
        place: behind the question (``user``), or as the system prompt, in front of one that is there.
        mllm: whose answers are taken instead, as they are: such as a file of answers that were made with a
            safety prompt.
    """

    sentence: str
    place: Literal["user", "system"] = "user"
    mllm: Callable[[], MLLM] | None = None

    @property
    def other_model(self) -> bool:
        """Whether another model has to be loaded than that of the run."""
        return self.mllm is not None or self.place == "system"

    def check(self, name: str, mllm: Callable[[], MLLM]) -> None:
        """Look whether the MLLM of the run can be asked again.

        Raises:
            InputError: it is a file of answers, or takes no system prompt.
        """
        if self.mllm is not None:
            return
        if is_recorded(mllm):
            raise InputError(f"arms.{name}.mllm has no value: a file of answers cannot be asked again")
        if self.place == "system" and "system_prompt" not in inspect.signature(mllm).parameters:
            raise InputError(f"arms.{name}.place=system: this mllm takes no system prompt; use user")

    def model(self, mllm: Callable[[], MLLM]) -> MLLM:
        """Another model than that of the run, which ``mllm`` makes."""
        if self.mllm is not None:
            return self.mllm()
        given = mllm.keywords.get("system_prompt") if isinstance(mllm, partial) else None
        ask_anew: Callable[..., MLLM] = mllm
        return ask_anew(system_prompt="\n\n".join(filter(None, (self.sentence, given))))

    def items(self, items: Sequence[Item], mllm: dict[str, Any]) -> list[Item]:
        """The items as this arm asks them, of a model of this identity."""
        return keyed([replace(item, question=self._asked(item.question)) for item in items], mllm)

    def facts(self, mllm: dict[str, Any]) -> dict[str, Any]:
        """For ``asr.json``: what was said to whom."""
        if self.mllm is not None:
            return {"mllm": mllm}
        return {"mllm": mllm, "sentence": self.sentence, "place": self.place}

    def _asked(self, question: Question) -> Question:
        if self.other_model:
            return question
        return replace(question, text=f"{question.text}\n\n{self.sentence}")


def is_recorded(mllm: Callable[[], MLLM]) -> bool:
    """Whether this makes a file of answers (``Replay.recorded``)."""
    return bool(getattr(getattr(mllm, "func", mllm), "recorded", False))


def folders(name: str, arm: Arm, detector: str, detoxifier: str) -> dict[str, tuple[str, Kind]]:
    """The trained folders that an arm reads: how pages call each -> the folder and its kind."""
    found: dict[str, tuple[str, Kind]] = {}
    if isinstance(arm, DetectorArm):
        own = arm.detector
        part = "detector" if own is None else f"detector of {name}"
        found[part] = (detector if own is None else own, "detector")
    if arm.rewrite:
        found["detoxifier"] = (detoxifier, "detoxifier")
    return found
