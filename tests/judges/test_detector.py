import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mllm_protector.errors import InputError
from mllm_protector.judges.detector import DetectorJudge
from mllm_protector.models.detector import HarmDetector
from mllm_protector.protocols import Card
from mllm_protector.records import Status, Verdict
from tests.judges.scripted import judged


class LengthDetector:
    """Scores an answer by its words; fails on some."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[str]]] = []
        self.threshold = 0.3

    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        self.calls.append((list(queries), list(answers)))
        if "crash" in answers:
            raise RuntimeError("crash: out of memory")
        return [math.nan if text == "nan" else 7.0 if text == "logit" else len(text) / 10 for text in answers]

    @property
    def card(self) -> Card:
        return Card(identity={"detector": "length"})


def detector_verdicts(texts: list[str], threshold: float = 0.5) -> tuple[LengthDetector, list[Verdict]]:
    detector = LengthDetector()
    return detector, judged(DetectorJudge(detector, threshold), *texts)


def test_the_detector_judge_scores_all_answers_in_one_call_with_their_questions() -> None:
    detector, verdicts = detector_verdicts(["1234", "12345", "123456"])
    assert detector.calls == [(["[placeholder question]"] * 3, ["1234", "12345", "123456"])]
    assert [verdict.status for verdict in verdicts] == [Status.SAFE, Status.HARMFUL, Status.HARMFUL]
    assert verdicts[1].reason == "P(harmful) = 0.5000"


def test_an_empty_answer_is_not_scored() -> None:
    detector, verdicts = detector_verdicts(["", "123456", " \n"])
    assert detector.calls[0][1] == ["123456"]
    assert [verdict.status for verdict in verdicts] == [Status.EMPTY, Status.HARMFUL, Status.EMPTY]
    assert [verdict.status for verdict in detector_verdicts([""])[1]] == [Status.EMPTY]


def test_a_score_that_is_no_probability_is_never_a_verdict() -> None:
    for text in ["nan", "logit"]:
        _, verdicts = detector_verdicts([text, "123456"])
        assert [verdict.status for verdict in verdicts] == [Status.JUDGE_ERROR, Status.HARMFUL], text
        assert "no probability" in verdicts[0].reason, text


def test_one_answer_that_breaks_the_detector_does_not_cost_the_others() -> None:
    _, verdicts = detector_verdicts(["12", "crash", "123456"])
    assert [verdict.status for verdict in verdicts] == [Status.SAFE, Status.JUDGE_ERROR, Status.HARMFUL]


def test_a_failure_is_named_but_never_quoted(caplog: pytest.LogCaptureFixture) -> None:
    _, verdicts = detector_verdicts(["12", "crash"])
    assert verdicts[1].reason == "the judge failed: RuntimeError"
    assert "out of memory" not in caplog.text


def test_a_threshold_that_is_no_probability_is_refused() -> None:
    for threshold in [-0.1, 1.1, math.nan, True]:
        with pytest.raises(InputError, match="a number from 0 to 1"):
            DetectorJudge(LengthDetector(), threshold)


def test_a_saved_detector_judges_with_its_stored_threshold(
    make_detector: Callable[..., HarmDetector], tmp_path: Path
) -> None:
    detector = make_detector()
    detector.save(tmp_path / "detector")
    judge = DetectorJudge.from_folder(str(tmp_path / "detector"))
    [score] = detector.score(queries=["[placeholder question]"], answers=["an answer"])
    assert judge.threshold == detector.threshold == 0.4
    assert judged(judge, "an answer")[0].status == (Status.HARMFUL if score >= 0.4 else Status.SAFE)


def test_the_identity_is_that_of_the_detector_and_its_threshold() -> None:
    judge = DetectorJudge(LengthDetector(), 0.25)
    expected = {"judge": "detector", "detector": {"detector": "length"}, "threshold": 0.25}
    assert judge.card.identity == expected
    assert judge.card.bias is None
