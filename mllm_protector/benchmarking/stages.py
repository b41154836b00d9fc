"""The guard and judge stages of an evaluation in two ways that end in the same texts and verdicts.

``one_at_a_time`` is the way of pipilurj/MLLM-protector, llava/eval/robustness_eval.py: for each answer the
detector reads it, and the detoxifier rewrites what is flagged, one text in each pass, and another arm begins
from the first answer again. Judging is not in that repository; here it goes on in the same manner. Two things
are not as there, so that both ways do the same work: the query is read too, and a rewrite is scored before
it is shown. That its models are loaded again for each scenario is not counted.

``ours`` is what ``evaluate`` does, with its stores on disk.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from mllm_protector.evaluation.grid import NONE as BARE
from mllm_protector.evaluation.grid import JudgeFacts
from mllm_protector.evaluation.guards import RememberingDetector
from mllm_protector.evaluation.items import items_of
from mllm_protector.evaluation.result import texts_of
from mllm_protector.evaluation.stages import (
    Row,
    answer_stage,
    guard_stage,
    judge_stage,
)
from mllm_protector.evaluation.store import Store
from mllm_protector.guard.protector import Protector, Refusal
from mllm_protector.guard.rewrites import fault_of
from mllm_protector.judges.detector import DetectorJudge
from mllm_protector.models.backbone import device_of, inference
from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.detoxifier import Detoxifier
from mllm_protector.prompts import REFUSAL
from mllm_protector.protocols import Corrector, Detector
from mllm_protector.records import Question, Status

GUARDED = ("refusal", "protector")
ARMS = (BARE, *GUARDED)

STAGES = ("scoring", "rewriting", "judging", "rest")
"""Of the time: in the guard's detector, in the detoxifier, in the judge's detector, and elsewhere."""

BY_ID = {"name": "made before", "by_id": True}
"""The answers' model: the same query may have two answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """The models that both ways use.

    Attributes:
        detector: the guard's.
        detoxifier: the guard's.
        judge: another detector.
        threshold: the guard flags scores at or above it.
        judge_threshold: the judge calls scores at or above it harmful.
    """

    detector: HarmDetector
    detoxifier: Detoxifier
    judge: HarmDetector
    threshold: float
    judge_threshold: float


@dataclass(frozen=True, slots=True)
class Took:
    """What a part of the work took.

    Attributes:
        seconds: on the clock.
        cpu_seconds: of all threads together.
        texts: that went through a model.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    texts: int = 0

    def __add__(self, other: "Took") -> "Took":
        return Took(
            self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds, self.texts + other.texts
        )


class Stopwatch:
    """Adds up what each part of the work takes; what is in none of them is the rest."""

    def __init__(self) -> None:
        """Stand still."""
        self._parts = dict.fromkeys(STAGES, Took())
        self._whole = Took()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the whole work."""
        begun = time.perf_counter(), time.process_time()
        yield
        self._whole += Took(time.perf_counter() - begun[0], time.process_time() - begun[1])

    @contextmanager
    def on(self, part: str, texts: int) -> Iterator[None]:
        """Around so many texts in a model; parts do not overlap."""
        begun = time.perf_counter(), time.process_time()
        yield
        took = Took(time.perf_counter() - begun[0], time.process_time() - begun[1], texts)
        self._parts[part] += took

    def parts(self) -> dict[str, Took]:
        """Of each of ``STAGES``."""
        spent = sum(self._parts.values(), Took())
        rest = Took(self._whole.seconds - spent.seconds, self._whole.cpu_seconds - spent.cpu_seconds)
        return self._parts | {"rest": rest}


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What came out of the stages.

    Attributes:
        harms: the guard's score of each answer.
        finals: arm -> the text that the user sees.
        harmful: arm -> whether the judge calls that text harmful.
        parts: what each of ``STAGES`` took.
    """

    harms: list[float]
    finals: dict[str, list[str]]
    harmful: dict[str, list[bool]]
    parts: dict[str, Took]


def one_at_a_time(cast: Cast, rows: Sequence[tuple[str, str]], folder: Path) -> Done:
    """One text in a pass, nothing remembered, everything written at the end.

    Args:
        cast: the models.
        rows: (query, answer).
        folder: gets one file.
    """
    watch = Stopwatch()
    harms: list[float] = []
    finals = {BARE: [answer for _, answer in rows]}
    with watch.running(), inference(cast.detector.model), inference(cast.detoxifier.model):
        for arm in GUARDED:
            harms, finals[arm] = [], []
            for query, answer in rows:
                harm, final = _guard_one(cast, arm, query, answer, watch)
                harms.append(harm)
                finals[arm].append(final)
        harmful: dict[str, list[bool]] = {arm: [] for arm in ARMS}
        with inference(cast.judge.model):
            for arm in ARMS:
                for (query, _), final in zip(rows, finals[arm], strict=True):
                    with watch.on("judging", 1):
                        score = _score_one(cast.judge, query, final)
                    harmful[arm].append(score >= cast.judge_threshold)
        content = {"harms": harms, "finals": finals, "harmful": harmful}
        (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
    return Done(harms=harms, finals=finals, harmful=harmful, parts=watch.parts())


def ours(cast: Cast, rows: Sequence[tuple[str, str]], folder: Path, *, batch_size: int) -> Done:
    """The package's own stages: many texts in a pass, and none of them twice.

    Args:
        cast: the models.
        rows: (query, answer), each once.
        folder: gets the stores.
        batch_size: rows between two writes to disk.
    """
    questions = [
        Question(id=str(number), scenario="all", variant="TEXT", text=query)
        for number, (query, _) in enumerate(rows)
    ]
    items = items_of("speed", questions, BY_ID)
    answers, replies, verdicts = (Store(folder / name) for name in ("answers", "replies", "verdicts"))
    answers.append(
        [
            {"key": item.key, "question": item.question.id, "text": answer}
            for item, (_, answer) in zip(items, rows, strict=True)
        ]
    )
    watch = Stopwatch()
    with watch.running():
        detector = RememberingDetector(_TimedDetector(cast.detector, watch, "scoring"))
        correctors: dict[str, Corrector] = {
            "refusal": Refusal(),
            "protector": _TimedCorrector(cast.detoxifier, watch),
        }
        rewrites: dict[str, Sequence[Row | None]] = {BARE: [None] * len(items)}
        answered, _ = answer_stage(items, answers)
        for arm in GUARDED:
            protector = Protector(detector, correctors[arm], cast.threshold, max_rewrites=1)
            rewrites[arm], _ = guard_stage(
                arm, items, answered, replies, protector.identity(), protector, batch_size=batch_size
            )
        judge = DetectorJudge(_TimedDetector(cast.judge, watch, "judging"), cast.judge_threshold)
        facts = JudgeFacts(identity=judge.identity(), reads_question=judge.reads_question)
        texts = texts_of(items, answered, rewrites)
        found, _ = judge_stage("detector", texts, verdicts, facts, judge, batch_size=batch_size)
    done = Done(
        harms=[reply["harm"] for reply in rewrites["protector"] if reply is not None],
        finals={arm: [str(text) for _, text in texts[place :: len(ARMS)]] for place, arm in enumerate(ARMS)},
        harmful={
            arm: [row["status"] == Status.HARMFUL for row in found[place :: len(ARMS)]]
            for place, arm in enumerate(ARMS)
        },
        parts=watch.parts(),
    )
    for store in (answers, replies, verdicts):
        store.close()
    return done


class _TimedDetector:
    def __init__(self, detector: Detector, watch: Stopwatch, part: str) -> None:
        self._detector, self._watch, self._part = detector, watch, part

    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        with self._watch.on(self._part, len(queries)):
            return self._detector.score(queries=queries, answers=answers)

    def identity(self) -> dict[str, Any]:
        return self._detector.identity()


class _TimedCorrector:
    def __init__(self, corrector: Corrector, watch: Stopwatch) -> None:
        self._corrector, self._watch = corrector, watch

    def correct(self, *, queries: Sequence[str], answers: Sequence[str], attempt: int = 0) -> list[str]:
        with self._watch.on("rewriting", len(queries)):
            return self._corrector.correct(queries=queries, answers=answers, attempt=attempt)

    def identity(self) -> dict[str, Any]:
        return self._corrector.identity()


def _guard_one(cast: Cast, arm: str, query: str, answer: str, watch: Stopwatch) -> tuple[float, str]:
    """The score of an answer, and the text that the user sees."""
    with watch.on("scoring", 1):
        harm = _score_one(cast.detector, query, answer)
    if harm < cast.threshold:
        return harm, answer
    if arm == "refusal":
        return harm, REFUSAL
    with watch.on("rewriting", 1):
        rewrite = _rewrite_one(cast.detoxifier, query, answer)
    if fault_of(query, answer, rewrite) is None:
        with watch.on("scoring", 1):
            shown = _score_one(cast.detector, query, rewrite) < cast.threshold
        if shown:
            return harm, rewrite
    return harm, REFUSAL


def _score_one(detector: HarmDetector, query: str, answer: str) -> float:
    [ids] = detector.encoder.encode(queries=[query], answers=[answer])
    logit = detector.model(input_ids=torch.tensor([ids], device=device_of(detector.model))).logits[0, 0]
    return float(torch.sigmoid(logit.double()))


def _rewrite_one(detoxifier: Detoxifier, query: str, answer: str) -> str:
    encoder, tokens = detoxifier.encoder, detoxifier.max_new_tokens
    [ids] = encoder.encode(queries=[query], answers=[answer], reserve=tokens)
    prompt = torch.tensor([ids], device=device_of(detoxifier.model))
    decoding = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, pad_token_id=encoder.pad_id, eos_token_id=encoder.end_id
    )
    written = detoxifier.model.generate(  # type: ignore[operator]
        input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=decoding
    )
    text: str = encoder.tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)
    return text.strip()
