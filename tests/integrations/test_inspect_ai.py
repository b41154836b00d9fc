"""The guard in a whole evaluation of ``inspect_ai``, with its mock model."""

import asyncio
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.guard.protector import Protector, Refusal
from mllm_protector.prompts import REFUSAL
from tests.serving.stubs import StubCorrector, StubDetector

pytest.importorskip("inspect_ai")

from inspect_ai import Task
from inspect_ai import eval as run_eval
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog, EvalSample
from inspect_ai.model import (
    ChatMessageUser,
    ContentImage,
    ContentText,
    ModelName,
    ModelOutput,
    ModelUsage,
    get_model,
)
from inspect_ai.scorer import Score, Scorer, Target
from inspect_ai.solver import TaskState, chain, generate, system_message

from mllm_protector.integrations.inspect_ai import METADATA, guarded, harm_scorer

BAD, FINE = "a harmful answer", "fine"


def evaluated(tmp_path: Path, answers: list[str], **task: Any) -> EvalLog:
    outputs = [ModelOutput.from_content("mockllm/model", answer) for answer in answers]
    for output in outputs:
        output.usage = ModelUsage(total_tokens=2)  # or a tokenizer is downloaded to count them
    [log] = run_eval(
        Task(dataset=[Sample(input=f"Question {number}?") for number in range(len(answers))], **task),
        model=get_model("mockllm/model", custom_outputs=outputs),
        log_dir=str(tmp_path),
        display="none",
        max_samples=1,
    )
    assert log.status == "success", log.error
    return log


def samples(log: EvalLog) -> list[EvalSample]:
    assert log.samples is not None
    return log.samples


def test_a_score_is_the_probability_of_harm(tmp_path: Path) -> None:
    detector = StubDetector()
    log = evaluated(tmp_path, [BAD, FINE], scorer=harm_scorer(Protector(detector, Refusal(), 0.5)))
    scores = [next(iter((sample.scores or {}).values())) for sample in samples(log)]
    assert [score.value for score in scores] == [0.9, 0.1]
    assert [score.metadata for score in scores] == [
        {"threshold": 0.5, "flagged": True},
        {"threshold": 0.5, "flagged": False},
    ]
    assert log.results is not None
    assert log.results.scores[0].metrics["mean"].value == pytest.approx(0.5)
    assert detector.calls == [[BAD], [FINE]]
    assert threading.main_thread().name not in detector.threads


def test_an_answer_without_a_score_is_unscored(tmp_path: Path) -> None:
    failing = Protector(StubDetector(lambda answer: math.nan), Refusal(), 0.5)
    short = Protector(StubDetector(), Refusal(), 0.5, max_answer_tokens=1)
    for guard, reason in ((failing, "guard_error"), (short, "too_long")):
        [sample] = samples(evaluated(tmp_path, [BAD], scorer=harm_scorer(guard)))
        [score] = (sample.scores or {}).values()
        assert math.isnan(score.as_float())
        assert score.reason == reason


def test_a_guarded_solver_answers_with_the_guard_s_reply(tmp_path: Path) -> None:
    guard = Protector(StubDetector(), StubCorrector(), 0.5)
    solver = guarded(chain(system_message("Be brief."), generate()), guard)
    bad, fine = samples(evaluated(tmp_path, [BAD, FINE], solver=solver, scorer=harm_scorer(guard)))
    assert bad.output.completion == "Here is a better idea."
    assert [message.text for message in bad.messages] == ["Be brief.", "Question 0?", bad.output.completion]
    assert bad.metadata[METADATA] == {"outcome": "rewritten", "score": 0.9, "threshold": 0.5}
    state = bad.model_dump_json(include={"messages", "output", "metadata", "scores", "store"})
    assert BAD not in state
    assert fine.output.completion == fine.messages[-1].text == FINE
    assert fine.metadata[METADATA] == {"outcome": "allowed", "score": 0.1, "threshold": 0.5}
    for sample in (bad, fine):
        [score] = (sample.scores or {}).values()
        assert score.value == 0.1


def test_the_raw_answer_is_kept_only_on_request_and_a_failing_guard_refuses(tmp_path: Path) -> None:
    guard = Protector(StubDetector(lambda answer: math.nan), Refusal(), 0.5)
    [sample] = samples(evaluated(tmp_path, [BAD], solver=guarded(generate(), guard, keep_raw=True)))
    assert sample.output.completion == REFUSAL
    assert sample.metadata[METADATA] == {
        "outcome": "guard_error",
        "score": None,
        "threshold": 0.5,
        "raw": BAD,
    }


def asked(answer: str) -> TaskState:
    picture = ContentImage(image="data:image/png;base64,AAAA")
    question = ChatMessageUser(content=[picture, ContentText(text="What is this?")])
    return TaskState(
        model=ModelName("mockllm/model"),
        sample_id=1,
        epoch=1,
        input=[question],
        messages=[question],
        output=ModelOutput.from_content("mockllm/model", answer),
    )


async def scored(score: Scorer) -> Score | None:
    return await score(asked(FINE), Target(""))


def test_many_at_once_leave_the_loop_free_and_enter_the_model_one_by_one() -> None:
    inside: list[int] = []
    most: list[int] = []
    turned = threading.Event()

    def rule(answer: str) -> float:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        turned.clear()
        assert turned.wait(20)  # the loop goes on meanwhile
        inside.pop()
        return 0.1

    score = harm_scorer(Protector(StubDetector(rule), Refusal(), 0.5))

    async def run() -> None:
        scoring = asyncio.gather(*(scored(score) for _ in range(8)))
        while not scoring.done():
            turned.set()
            await asyncio.sleep(0.005)
        assert [each.value for each in await scoring if each is not None] == [0.1] * 8

    for _ in range(2):  # another loop, the same scorer
        asyncio.run(run())
    assert len(most) == 16
    assert max(most) == 1


def test_the_words_of_a_question_with_a_picture_are_read() -> None:
    seen: list[str] = []

    class Listening(StubDetector):
        def score(self, *, queries: Any, answers: Any) -> list[float]:
            seen.extend(queries)
            return super().score(queries=queries, answers=answers)

    score = harm_scorer(Protector(Listening(), Refusal(), 0.5))
    assert isinstance(asyncio.run(scored(score)), Score)
    assert seen == ["What is this?"]
