import html
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mllm_protector.data.duplicates import check_contamination
from mllm_protector.errors import InputError, RunError
from mllm_protector.evaluation import models as module
from mllm_protector.judges.detector import DetectorJudge
from mllm_protector.judges.keyword import KeywordJudge
from mllm_protector.models.guard_file import read_guard_file
from mllm_protector.prompts import REFUSAL
from mllm_protector.protocols import Card, Cost
from mllm_protector.records import BENIGN, Answer, Failure, LoadedBenchmark, Question, Status, Verdict
from mllm_protector.scenarios import SCENARIOS
from tests.evaluation.builders import ARMS, Measured, evaluated

Run = Callable[..., dict[str, Any]]

HARMFUL = "Sure, do the bad thing."
REWRITE = "I'm sorry, but I can't help with this."


def question(scenario: str, number: int) -> Question:
    return Question(
        id=f"{scenario}/TEXT/{number}", scenario=scenario, variant="TEXT", text=f"{scenario} {number}?"
    )


QUESTIONS = [question(scenario, number) for scenario in SCENARIOS[:3] for number in range(4)]
HARMLESS = [question(BENIGN, number) for number in range(5)]


@dataclass
class Questions:
    questions: list[Question] = field(default_factory=lambda: [*QUESTIONS, *HARMLESS])

    def load(self) -> LoadedBenchmark:
        return LoadedBenchmark(
            questions=self.questions,
            missing=[],
            groups={"first": SCENARIOS[:2]},
            truth=lambda text: "bad thing" in text,
            score=lambda question, text: float("recipe" in text),
            metrics=lambda texts: {"recipes": sum("recipe" in text for text in texts.values()), "none": None},
        )

    @property
    def card(self) -> Card:
        return Card(identity={"name": "made up"})


@dataclass
class Model:
    """Complies with even numbers and refuses the others; stops after ``limit`` questions."""

    name: str = "model"
    limit: float = float("inf")
    asked: list[str] = field(default_factory=list)

    def generate(self, questions: Sequence[Question]) -> Sequence[str | Failure]:
        if len(self.asked) + len(questions) > self.limit:
            raise KeyboardInterrupt
        self.asked += [question.id for question in questions]
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> str:
        if question.scenario == BENIGN:
            return "Sure, here is a recipe."
        return HARMFUL if int(question.id[-1]) % 2 == 0 else "I'm sorry, but I can't help with that."

    @property
    def card(self) -> Card:
        return Card(identity={"name": self.name})


@dataclass
class Scorer:
    """Knows harm when it sees it, and flags one harmless answer in error."""

    weights: str = "w1"
    threshold: float = 0.5
    scored: list[str] = field(default_factory=list)

    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        self.scored += answers
        return [
            0.9 if "bad thing" in answer or query == f"{BENIGN} 3?" else 0.1
            for query, answer in zip(queries, answers, strict=True)
        ]

    @property
    def card(self) -> Card:
        return Card(identity={"weights": self.weights})


class Rewriter:
    def correct(self, *, queries: Sequence[str], answers: Sequence[str], attempt: int = 0) -> list[str]:
        return [f"{REWRITE} ({query})" if BENIGN not in query else "" for query in queries]

    @property
    def card(self) -> Card:
        return Card(identity={"weights": "r1"})


@dataclass
class Strict:
    """Finds harm, but replies nonsense to some answers and declines others; costs calls."""

    nonsense: str = "☠"
    declined: str = "☠"
    name: str = "strict"
    reads_question: bool = True
    seen: list[str] = field(default_factory=list)

    def judge(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[Verdict]:
        self.seen += [answer.text for answer in answers]
        return [
            Verdict(id=answer.id, status=self._status(answer.text), reason="said so") for answer in answers
        ]

    def _status(self, text: str) -> Status:
        if self.nonsense in text:
            return Status.UNPARSEABLE
        if self.declined in text:
            return Status.JUDGE_REFUSED
        return Status.HARMFUL if "bad thing" in text else Status.SAFE

    @property
    def card(self) -> Card:
        return Card(identity={"judge": self.name}, reads_question=self.reads_question)

    def cost(self, questions: Sequence[Question], answers: Sequence[Answer]) -> Cost:
        return Cost(calls=len(answers), prompt_tokens=10 * len(answers), completion_tokens=len(answers))


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> Scorer:
    scorer = Scorer()
    guard_file = SimpleNamespace(data={"fingerprint": "of an older release"})
    monkeypatch.setattr("mllm_protector.evaluation.run.read_guard_file", lambda folder, kind: guard_file)
    monkeypatch.setattr("mllm_protector.evaluation.run.require_bases", lambda base, *parts: None)
    monkeypatch.setattr(module, "load_detector", lambda folder, base: scorer)
    monkeypatch.setattr(module, "load_parts", lambda *folders, base, max_new_tokens: (scorer, Rewriter()))
    return scorer


@pytest.fixture
def run(scorer: Scorer, tmp_path: Path) -> Run:
    """An evaluation with its reports; gives the content of ``asr.json``."""

    def run(**changes: Any) -> Any:
        given = {"benchmarks": {"made_up": Questions()}, "mllm": Model, "output_dir": tmp_path / "out"}
        return evaluated(**given | changes)

    return run


def results(folder: Path, benchmark: str = "made_up") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / benchmark / "results.jsonl").open()]


def measurements(result: dict[str, Any], **where: Any) -> Measured:
    rows = result["measurements"]
    return Measured(row for row in rows if all(row[name] == value for name, value in where.items()))


def cells(result: dict[str, Any], arm: str, judge: str = "keyword") -> list[tuple[int, int]]:
    """(harmful, judged) of each scenario."""
    found = measurements(result, benchmark="made_up", arm=arm, judge=judge, variant="TEXT").all("asr")
    rates = [row for row in found if row["group"] in SCENARIOS]
    return [(round(row["value"] * row["n"]), row["n"]) for row in rates]


def test_every_arm_guards_the_same_answers(run: Run, tmp_path: Path) -> None:
    result = run()
    assert cells(result, "none") == [(2, 4)] * 3
    assert cells(result, "refusal") == cells(result, "protector") == [(0, 4)] * 3
    rows = results(tmp_path / "out")
    assert [row["arm"] for row in rows[:3]] == ["none", "refusal", "protector"]
    assert all(len({row["raw"] for row in rows[i : i + 3]}) == 1 for i in range(0, len(rows), 3))
    assert {row["final"] for row in rows if row["arm"] == "refusal" and row["outcome"] == "refused"} == {
        REFUSAL
    }
    found = measurements(result, arm="protector")
    assert [found.value(f"outcome_{name}") for name in ("allowed", "rewritten", "refused")] == [10, 6, 1]


def test_everything_that_is_promised_is_written(run: Run, tmp_path: Path) -> None:
    result = run(latency_rows=3)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir() if path.is_file()} == {
        *(f"asr.{ending}" for ending in ("json", "md", "tex", "png")),
        "measurements.csv",
        "report.html",
        "run.json",
    }
    assert json.loads((out / "asr.json").read_text()) == result
    manifest = json.loads((out / "run.json").read_text())
    latency = Measured(manifest["measurements"]).one("latency_median_ms", arm="protector")
    assert (latency["n"], latency["value"] > 0) == (3, True)
    assert manifest["stages"]["answers"]["new"] == len(QUESTIONS) + len(HARMLESS)


def test_harmless_answers_are_not_judged_but_compared_and_scored(run: Run, tmp_path: Path) -> None:
    result = run()
    assert {row["group"] for row in measurements(result).all("asr")} == {*SCENARIOS[:3], "first", "all"}
    for arm, count in (("none", 0), ("refusal", 1), ("protector", 1)):
        found = measurements(result, arm=arm)
        assert [found.value(name) for name in ("changed", "lost")] == [count / 5] * 2, arm
    benign = [row for row in results(tmp_path / "out") if row["scenario"] == BENIGN]
    assert all(row["verdicts"] == {} for row in benign)
    assert sum(row["refused"] for row in benign) == 2


def test_the_benchmark_s_own_metrics_stand_in_every_file(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(repeats=2)
    for arm, count in {"none": 5, "refusal": 4, "protector": 4}.items():
        found = measurements(result, arm=arm)
        assert (found.value("own_recipes"), found.value("own_none")) == (count, None)
    assert "own_recipes" in capsys.readouterr().out
    for name in ("report.html", "measurements.csv"):
        assert "own_recipes" in (tmp_path / "out" / name).read_text(), name


def test_a_second_arm_scores_only_its_rewrites(run: Run, scorer: Scorer) -> None:
    run()
    assert len(scorer.scored) == len(QUESTIONS) + len(HARMLESS) + 6


def test_an_interrupted_run_goes_on_and_asks_nothing_twice(run: Run, tmp_path: Path) -> None:
    first = Model(limit=9)
    with pytest.raises(KeyboardInterrupt):
        run(mllm=lambda: first)
    second = Model()
    resumed = run(mllm=lambda: second)
    assert len(first.asked) == 8
    assert not set(first.asked) & set(second.asked)
    assert len(first.asked) + len(second.asked) == len(QUESTIONS) + len(HARMLESS)
    assert resumed == run(output_dir=tmp_path / "in one go")


def test_a_larger_selection_extends_the_same_folder(run: Run) -> None:
    run(benchmarks={"made_up": Questions(questions=QUESTIONS[:4])})
    model = Model()
    result = run(mllm=lambda: model)
    assert set(model.asked) == {each.id for each in [*QUESTIONS[4:], *HARMLESS]}
    assert len(cells(result, "none")) == 3


def test_another_guard_uses_the_answers_again_and_another_model_does_not(run: Run, scorer: Scorer) -> None:
    first = run()
    same, other = Model(), Model(name="another")
    assert cells(run(mllm=lambda: same, threshold=0.95), "refusal") == [(2, 4)] * 3
    assert same.asked == []
    run(mllm=lambda: other)
    assert len(other.asked) == len(QUESTIONS) + len(HARMLESS)
    assert run() == first


def test_two_benchmarks_are_measured_together_and_kept_apart(run: Run, tmp_path: Path) -> None:
    model = Model()
    alone = run()
    benchmarks = {"made_up": Questions(), "small": Questions(questions=QUESTIONS[:4])}
    both = run(mllm=lambda: model, benchmarks=benchmarks)
    assert both["benchmarks"]["made_up"] == alone["benchmarks"]["made_up"]
    assert measurements(both, benchmark="made_up") == measurements(alone)
    assert [*both["benchmarks"]] == ["made_up", "small"]
    assert model.asked == []  # the same words and no picture: the same answers
    assert len(results(tmp_path / "out", "small")) == 12


def test_changed_words_of_a_question_are_asked_anew(run: Run) -> None:
    run()
    model = Model()
    other = Question(id=QUESTIONS[0].id, scenario=SCENARIOS[0], variant="TEXT", text="other words")
    run(mllm=lambda: model, benchmarks={"made_up": Questions(questions=[other])})
    assert model.asked == [other.id]


def test_repeats_are_answered_each_and_share_a_cluster(run: Run, tmp_path: Path) -> None:
    model = Model()
    few = {"made_up": Questions(questions=QUESTIONS[:2])}
    run(mllm=lambda: model, repeats=2, benchmarks=few, arms={})
    assert len(model.asked) == 4
    rows = results(tmp_path / "out")
    assert [row["id"][-3:] for row in rows] == ["0#1", "0#2", "1#1", "1#2"]
    assert [row["repeat"] for row in rows] == [0, 1, 0, 1]
    assert len({row["base"] for row in rows}) == 2


def test_the_guards_own_detector_as_judge_is_called_circular(run: Run, scorer: Scorer) -> None:
    judges = {
        "own": lambda: DetectorJudge(scorer, 0.5),
        "other": lambda: DetectorJudge(Scorer(weights="w2"), 0.5),
    }
    said = run(judges=judges, ensemble=["own", "other"])["judges"]
    assert "Circular" in said["own"]["note"]
    assert said["own"]["circular"]
    assert said["other"]["note"] is None
    assert said["ensemble"]["circular"]


def test_a_judge_is_checked_against_the_truth_where_it_is_known(run: Run) -> None:
    accuracy = measurements(run()).one("accuracy", judge="keyword")
    assert (accuracy["value"], accuracy["n"]) == (1.0, 24)  # each text once
    assert accuracy["method"] == "what is known of these answers by construction"


def test_peoples_labels_are_used_and_strange_ones_refused(run: Run, tmp_path: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    rows = [{"id": each.id, "harmful": int(each.id[-1]) < 3} for each in QUESTIONS]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    missed = measurements(run(labels=str(labels))).one("fn", judge="keyword")
    assert (missed["value"], missed["n"], missed["method"]) == (3, 12, "the labels of this run, by people")
    labels.write_text('{"id": "nobody asked", "harmful": true}\n')
    with pytest.raises(InputError, match=r"labels\.jsonl:1: this run has no question 'nobody asked'"):
        run(labels=str(labels))


def test_what_cannot_be_run_is_refused_before_anything_is_asked(run: Run) -> None:
    model = Model()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"arms": {"none": ARMS["refusal"]}}, "'none' cannot name an arm"),
        ({"arms": {"../up": ARMS["refusal"]}}, "'../up' cannot name an arm"),
        ({"judges": {}}, "at least one judge"),
        ({"ensemble": ["keyword", "no"]}, "no judge 'no'"),
        ({"ensemble": ["keyword"]}, "two different judges"),
        ({"benchmarks": {}}, "at least one benchmark"),
        ({"benchmarks": {"../up": Questions()}}, "cannot name a folder"),
        ({"benchmarks": {"made_up": Questions(questions=[])}}, "no questions are left"),
    ]
    cases += [
        ({"threshold": wrong}, f"threshold={wrong}: must be a number from 0 to 1")
        for wrong in (2, -0.5, math.nan, True)
    ]
    for change, reason in cases:
        with pytest.raises(InputError, match=reason):
            run(mllm=lambda: model, **change)
    assert model.asked == []


def test_the_same_words_are_judged_once_whatever_they_answer(run: Run) -> None:
    judge = Strict(reads_question=False)
    run(judges={"strict": lambda: judge})
    refusals = [
        f"I'm sorry, but I can't help with this. ({SCENARIOS[s]} {n}?)" for s in range(3) for n in (0, 2)
    ]
    assert sorted(judge.seen) == sorted([HARMFUL, REFUSAL, *refusals])
    again = Strict(reads_question=False)
    run(judges={"strict": lambda: again})
    assert again.seen == []


def test_what_could_not_be_judged_is_counted_named_and_tried_again(run: Run, tmp_path: Path) -> None:
    troubled = Strict(nonsense="bad thing")
    with pytest.raises(
        RunError, match=r"strict left 6 of 12 answers of the arm none unjudged.*tries those again"
    ):
        run(judges={"strict": lambda: troubled}, max_unjudged=0.4)
    asr = json.loads((tmp_path / "out/asr.json").read_text())
    found = measurements(asr, group=SCENARIOS[0], arm="none", variant="TEXT")
    assert (found.all("harmful"), found.value("safe"), found.value("unparseable")) == ([], 2, 2)
    assert found.limits("asr_bounds") == (0.0, 0.5)
    mended = Strict()
    result = run(judges={"strict": lambda: mended})
    assert {*mended.seen} == {HARMFUL}
    assert cells(result, "none", "strict") == [(2, 4)] * 3


def test_an_answer_that_was_never_made_has_a_state_of_its_own_and_is_asked_again(
    run: Run, tmp_path: Path
) -> None:
    class Broken(Model):
        def generate(self, questions: Sequence[Question]) -> Sequence[str | Failure]:
            texts = super().generate(questions)
            return [
                Failure(reason="a broken picture") if question.id.endswith("/0") else text
                for question, text in zip(questions, texts, strict=True)
            ]

    result = run(mllm=Broken, max_unjudged=1.0)
    found = measurements(result, group=SCENARIOS[0], arm="none", variant="TEXT")
    assert (found.value("generation_error"), found.one("asr")["n"]) == (1, 3)
    [row, *_] = results(tmp_path / "out")
    assert (row["raw"], row["final"], row["generation_error"]) == (None, None, "a broken picture")
    whole = Model()
    assert cells(run(mllm=lambda: whole), "none") == [(2, 4)] * 3
    assert [asked[-2:] for asked in whole.asked] == ["/0"] * 4


def test_a_server_that_is_gone_stops_the_run_and_costs_nothing_that_was_done(
    run: Run,
) -> None:
    class Gone(Model):
        def generate(self, questions: Sequence[Question]) -> Sequence[str | Failure]:
            if self.asked:
                return [Failure(reason="connection refused", unreachable=True) for _ in questions]
            return super().generate(questions)

    with pytest.raises(RunError, match="cannot be reached"):
        run(mllm=Gone)
    second = Model()
    run(mllm=lambda: second)
    assert len(second.asked) == len(QUESTIONS) + len(HARMLESS) - 4


def test_a_guard_that_fails_leaves_no_verdict_and_shows_nothing(
    run: Run, scorer: Scorer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(**_: Any) -> list[float]:
        raise ValueError("no")

    with monkeypatch.context() as patch:
        patch.setattr(scorer, "score", fail)
        result = run(max_unjudged=1.0)
    errors = [row for row in measurements(result).all("guard_error") if row["group"] in SCENARIOS]
    assert [row["value"] for row in errors] == [4] * 6
    assert {row["final"] for row in results(tmp_path / "out") if row["arm"] == "protector"} == {REFUSAL}
    assert cells(run(), "protector") == [(0, 4)] * 3


def test_everything_says_what_the_guard_learnt_of_the_questions(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = [question.text for question in QUESTIONS + HARMLESS]
    learnt = ["A talk", QUESTIONS[1].text.upper()]
    found = check_contamination(learnt, {"made_up": asked}).as_json()["made_up"]
    data = {"detector": {"contamination": {"made_up": found | {"removed": False}}}, "detoxifier": {}}
    monkeypatch.setattr(
        "mllm_protector.evaluation.run.read_guard_file", lambda _, kind: SimpleNamespace(data=data[kind])
    )
    result = run(arms={"protector": ARMS["protector"]})
    folder = tmp_path / "out"
    written = (folder / "asr.json").read_bytes()
    seen = result["benchmarks"]["made_up"]["contamination"]
    assert seen["detector"] == {
        "same_questions": True,
        "asked": len(asked),
        "found": 1,
        "scenarios": {QUESTIONS[1].scenario: 1},
        "rows": 1,
        "removed": False,
        "threshold": found["threshold"],
    }
    assert seen["detoxifier"] is None
    pages = [capsys.readouterr().out, *((folder / name).read_text() for name in ("asr.md", "report.html"))]
    for text in (" ".join(html.unescape(page).replace("\\", "").split()) for page in pages):
        assert "Contaminated: questions of made_up stand, nearly word for word, in the training" in text
        assert "Not checked: whether these questions stand in the training data of the detoxifier" in text
    run(arms={"protector": ARMS["protector"]})
    assert (folder / "asr.json").read_bytes() == written
    assert run(arms={"refusal": ARMS["refusal"]})["benchmarks"]["made_up"]["contamination"].keys() == {
        "detector"
    }
    assert run(arms={})["benchmarks"]["made_up"]["contamination"] == {}


def test_the_majority_is_one_more_judge(run: Run, tmp_path: Path) -> None:
    judges = {"keyword": KeywordJudge, "strict": Strict, "blind": lambda: Strict(nonsense="", name="blind")}
    result = run(judges=judges, ensemble=[*judges], max_unjudged=1.0)
    assert cells(result, "none", "ensemble") == [(2, 4)] * 3
    assert results(tmp_path / "out")[0]["verdicts"]["ensemble"] == {
        "status": "harmful",
        "reason": "keyword: harmful, strict: harmful, blind: unparseable",
    }


def test_questions_of_the_same_words_and_picture_are_one_to_the_statistics(run: Run, tmp_path: Path) -> None:
    same = [replace(QUESTIONS[0], id=f"same-{number}", base=None) for number in range(40)]
    result = run(benchmarks={"made_up": Questions([*same, *QUESTIONS[1:]])}, arms={})
    assert {row["base"] for row in results(tmp_path / "out") if row["id"].startswith("same-")} == {"same-0"}
    mean = measurements(result).one("macro_asr", variant=same[0].variant, group="all", judge="keyword")
    assert mean["high"] - mean["low"] > 0.2  # 40 independent answers would give less


def test_a_dry_run_says_what_it_would_cost_and_judges_nothing(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    judge = Strict()
    assert run(judges={"keyword": KeywordJudge, "strict": lambda: judge}, dry_run=True) is None
    assert "answers: 17 wanted, 17 to be made" in caplog.messages
    assert "judge keyword: costs no calls" in caplog.messages
    assert any(message.startswith("judge strict: at most 36 calls") for message in caplog.messages)
    assert judge.seen == []
    assert not (tmp_path / "out/asr.json").exists()


def test_a_wrong_guard_is_refused_before_anything_is_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_protector.evaluation.run.read_guard_file", read_guard_file)
    model = Model()
    with pytest.raises(InputError, match="no such folder; train the detector first"):
        run(mllm=lambda: model)
    assert model.asked == []


def test_a_missing_base_is_refused_before_anything_is_asked(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(base: str | None, *parts: tuple[str, str]) -> None:
        raise InputError(f"base={base} of {parts}")

    model = Model()
    monkeypatch.setattr("mllm_protector.evaluation.run.require_bases", missing)
    expected = "base=x of (('detector', 'detector'), ('detoxifier', 'detoxifier'))"
    with pytest.raises(InputError, match=re.escape(expected)):
        run(mllm=lambda: model, base="x")
    assert model.asked == []
