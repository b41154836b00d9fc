"""The trained models of an evaluation's guards, each loaded once for all arms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mllm_protector.files import content_key
from mllm_protector.guard.protector import Refusal
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.models.detoxifier import load_detoxifier
from mllm_protector.models.parts import base_of
from mllm_protector.models.shared import load_parts
from mllm_protector.protocols import Card, Corrector, Detector


@dataclass(slots=True, kw_only=True)
class Models:
    """Loads what arms need; no answer is scored twice by the same detector.

    Attributes:
        run_detector: of the run, for arms without one of their own; ``None`` where no arm needs it.
        run_detoxifier: likewise. Of both, adapters on one base share it.
        base: this and the following ones are keys of ``configs/eval_mmsafety.yaml``.
    """

    run_detector: str | None
    run_detoxifier: str | None
    base: str | None
    threshold: float | None
    rewrite_tokens: int
    _detectors: "dict[str | None, tuple[RememberingDetector, float]]" = field(default_factory=dict)
    _detoxifier: Corrector | None = None

    def detector(self, folder: str | None = None) -> "tuple[RememberingDetector, float]":
        """The detector in a folder, ``None`` for that of the run, and the threshold stored with it."""
        if folder not in self._detectors:
            loaded = self._loaded(folder)
            self._detectors[folder] = RememberingDetector(loaded), loaded.threshold
        return self._detectors[folder]

    def corrector(self, rewrite: bool) -> Corrector:
        """The detoxifier of the run, or a fixed refusal."""
        if not rewrite:
            return Refusal()
        if self.run_detector is not None:
            self.detector()  # brings the detoxifier with it
        if self._detoxifier is None:
            self._detoxifier = load_detoxifier(
                str(self.run_detoxifier), base=self.base, max_new_tokens=self.rewrite_tokens
            )
        return self._detoxifier

    def _loaded(self, folder: str | None) -> HarmDetector:
        if folder is not None:
            return load_detector(folder, base=base_of(self.base, folder, "detector"))
        if self.run_detoxifier is None:
            return load_detector(str(self.run_detector), base=self.base)
        scorer, self._detoxifier = load_parts(
            str(self.run_detector), self.run_detoxifier, base=self.base, max_new_tokens=self.rewrite_tokens
        )
        return scorer


class RememberingDetector:
    """Scores no (query, answer) twice, so that a second arm costs only its rewrites."""

    def __init__(self, detector: Detector) -> None:
        """Wrap a detector."""
        self.detector = detector
        self._scores: dict[str, float] = {}

    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        """As the detector's own; a score that is no number is asked for again the next time."""
        rows = {content_key(*row): row for row in zip(queries, answers, strict=True)}
        new = [key for key in rows if key not in self._scores]
        if new:
            scores = self.detector.score(
                queries=[rows[key][0] for key in new], answers=[rows[key][1] for key in new]
            )
            found = zip(new, scores, strict=True)
            self._scores.update((key, score) for key, score in found if math.isfinite(score))
        return [self._scores.get(content_key(*row), math.nan) for row in zip(queries, answers, strict=True)]

    @property
    def card(self) -> Card:
        """As the detector's own."""
        return self.detector.card
