"""Arms beside our detector: a safety prompt, any judge, a moderation endpoint, verdicts from a file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.errors import InputError, RunError
from mllm_protector.evaluation import models as module
from mllm_protector.evaluation.arms import DetectorArm, JudgeArm, SafetyPrompt
from mllm_protector.judges.moderation import ModerationJudge
from mllm_protector.judges.replay import ReplayedVerdicts
from mllm_protector.models.replay import Replay
from mllm_protector.prompts import REFUSAL
from mllm_protector.protocols import Card
from mllm_protector.records import Answer, Question, Status, Verdict
from tests.evaluation.builders import ARMS
from tests.evaluation.test_run import (
    HARMFUL,
    HARMLESS,
    QUESTIONS,
    REWRITE,
    Model,
    Questions,
    Rewriter,
    Run,
    Scorer,
    Strict,
    cells,
    measurements,
    results,
    run,
    scorer,
)
from tests.servers import Reply, ScriptedServer, failed

__all__ = ["run", "scorer"]

DEFENCE = "Look twice before you answer."
SAFETY = {"safety_prompt": SafetyPrompt(sentence=DEFENCE)}


@dataclass
class Careful(Model):
    """Refuses where it is told to look twice."""

    system_prompt: str | None = None
    seen: list[Question] = field(default_factory=list)

    def _answer(self, question: Question) -> str:
        self.seen.append(question)
        warned = f"{question.text}{self.system_prompt}"
        return "I'm sorry, but I can't help." if DEFENCE in warned else super()._answer(question)

    @property
    def card(self) -> Card:
        return Card(identity={"name": "careful", "system_prompt": self.system_prompt})


def test_a_safety_prompt_asks_the_model_again_and_is_compared_by_question(run: Run, tmp_path: Path) -> None:
    model = Careful()
    result = run(mllm=lambda: model, arms=SAFETY | ARMS)
    assert result["arms"] == ["none", "safety_prompt", "refusal", "protector"]
    assert cells(result, "none") == [(2, 4)] * 3
    assert cells(result, "safety_prompt") == [(0, 4)] * 3
    assert {question.text.endswith(f"\n\n{DEFENCE}") for question in model.seen} == {False, True}
    rows = results(tmp_path / "out")
    assert all(DEFENCE not in row["question"] for row in rows)
    again = [row for row in rows if row["arm"] == "safety_prompt"]
    assert all(row["final"] == row["raw"] != HARMFUL and row["outcome"] is None for row in again)
    found = measurements(result, arm="safety_prompt")
    assert found.one("asr_difference", judge="keyword", variant="TEXT", group="all")["value"] == -0.5
    assert found.value("refused") == 1.0  # of the harmless questions: the price
    assert not found.all("changed")
    assert result["asked_again"]["safety_prompt"]["sentence"] == DEFENCE


def test_its_answers_are_kept_like_any_others(run: Run) -> None:
    first = Careful(limit=len(QUESTIONS) + len(HARMLESS) + 4)
    with pytest.raises(KeyboardInterrupt):
        run(mllm=lambda: first, arms=SAFETY)
    second = Careful()
    result = run(mllm=lambda: second, arms=SAFETY)
    assert len(first.asked) + len(second.asked) == 2 * (len(QUESTIONS) + len(HARMLESS))
    third = Careful()
    assert run(mllm=lambda: third, arms=SAFETY) == result
    assert third.asked == []


def test_it_can_be_the_system_prompt_in_front_of_one_that_is_there(run: Run) -> None:
    arms = {"safety_prompt": SafetyPrompt(sentence=DEFENCE, place="system")}
    result = run(mllm=partial(Careful, system_prompt="Be brief."), arms=arms)
    assert cells(result, "none") == [(2, 4)] * 3
    assert cells(result, "safety_prompt") == [(0, 4)] * 3
    assert result["asked_again"]["safety_prompt"]["mllm"]["system_prompt"] == f"{DEFENCE}\n\nBe brief."


def test_answers_made_elsewhere_with_a_safety_prompt_are_taken_as_they_are(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "answers.jsonl"
    rows = [{"id": each.id, "answer": "I can't help with that."} for each in QUESTIONS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replay = partial(Replay, path=str(path))
    arms = {"safety_prompt": SafetyPrompt(sentence=DEFENCE, mllm=replay)}
    caplog.set_level("INFO")
    result = run(benchmarks={"made_up": Questions(questions=QUESTIONS)}, arms=arms)
    assert cells(result, "safety_prompt") == [(0, 4)] * 3
    assert sum(message.startswith("answers.jsonl: read") for message in caplog.messages) == 1
    model = Model()
    with pytest.raises(InputError, match=r"^arms\.s\.mllm: no\.jsonl: no such file"):
        run(mllm=lambda: model, arms={"s": SafetyPrompt(sentence="", mllm=partial(Replay, path="no.jsonl"))})
    assert model.asked == []
    with pytest.raises(InputError, match=r"arms\.safety_prompt\.mllm has no value: a file of answers"):
        run(mllm=replay, arms=SAFETY)


def test_a_model_without_system_prompts_says_so_at_once(run: Run) -> None:
    with pytest.raises(InputError, match=r"arms\.safety_prompt\.place=system: this mllm takes no system"):
        run(arms={"safety_prompt": SafetyPrompt(sentence=DEFENCE, place="system")})


def test_any_judge_can_be_the_guard(run: Run, scorer: Scorer, tmp_path: Path) -> None:
    judge = Strict()
    arms = {"refusal": ARMS["refusal"], "llama_guard": JudgeArm(judge=lambda: judge)}
    result = run(arms=arms)
    assert cells(result, "llama_guard") == [(0, 4)] * 3
    shown = {row["final"] for row in results(tmp_path / "out") if row["outcome"] == "refused"}
    assert shown == {REFUSAL}
    assert result["guard"]["llama_guard"]["detector"] == {"judge": "strict"}
    curve = measurements(result).all("threshold_asr")
    assert "0.5" in {row["group"] for row in curve}  # the detector's threshold
    first = run(arms=dict(reversed(arms.items())))
    assert first["scored"] == ["refusal"]
    assert measurements(first).all("threshold_asr") == curve
    alone = run(arms={"llama_guard": arms["llama_guard"]})
    assert not measurements(alone).all("threshold_asr")  # verdicts have no thresholds


def test_settings_of_a_judge_that_guards_are_refused_before_anything_is_asked(run: Run) -> None:
    model = Model()
    with pytest.raises(InputError, match=r"^arms\.v\.judge: none\.jsonl: no such file"):
        run(mllm=lambda: model, arms={"v": JudgeArm(judge=partial(ReplayedVerdicts, path="none.jsonl"))})
    assert model.asked == []


def test_a_dry_run_counts_answers_asked_again_and_verdicts_of_guards(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run(dry_run=True, arms=SAFETY | {"llama_guard": JudgeArm(judge=Strict)})
    assert "answers of safety_prompt: 17 wanted, 17 to be made" in caplog.messages
    assert any(message.startswith("arm llama_guard: at most 17 calls") for message in caplog.messages)
    run(arms=SAFETY)
    run(dry_run=True, arms=SAFETY)
    assert "answers of safety_prompt: 17 wanted, 0 to be made" in caplog.messages


def test_its_rewrites_are_the_detoxifiers_and_are_judged_too(
    run: Run, scorer: Scorer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = []

    def load(folder: str, base: str | None, max_new_tokens: int) -> Rewriter:
        loaded.append(folder)
        return Rewriter()

    monkeypatch.setattr(module, "load_detoxifier", load)
    judge = Strict()
    run(arms={"llama_guard": JudgeArm(judge=lambda: judge, rewrite=True)})
    assert loaded == ["detoxifier"]
    assert any(text.startswith(REWRITE) for text in judge.seen)
    assert {row["outcome"] for row in results(tmp_path / "out")} == {None, "allowed", "rewritten"}
    assert scorer.scored == []


def test_an_answer_without_a_verdict_is_not_shown(run: Run, tmp_path: Path) -> None:
    arms = {"llama_guard": JudgeArm(judge=lambda: Strict(nonsense="recipe"))}
    run(arms=arms, max_unjudged=1.0)
    failing = {"llama_guard": JudgeArm(judge=lambda: Strict(nonsense="bad thing", name="failing"))}
    with pytest.raises(RunError, match=r"arm llama_guard unjudged \(6 because the guard failed\), more"):
        run(arms=failing, output_dir=str(tmp_path / "failing"))
    rows = [row for row in results(tmp_path / "out") if row["arm"] == "llama_guard"]
    unread = [row for row in rows if row["raw"] and "recipe" in row["raw"]]
    assert len(unread) == len(HARMLESS)
    assert {(row["final"], row["outcome"]) for row in unread} == {(REFUSAL, "guard_error")}


def test_a_guard_that_judges_itself_is_called_circular(run: Run) -> None:
    judges = {"strict": Strict, "other": lambda: Strict(name="other")}
    said = run(judges=judges, arms={"llama_guard": JudgeArm(judge=Strict)})["judges"]
    assert (said["strict"]["circular"], said["other"]["circular"]) == (True, False)


def test_another_detector_has_its_own_threshold(
    run: Run, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Scorer(weights="w2", threshold=0.95)
    monkeypatch.setattr(
        module, "load_detector", lambda folder, base: other if folder == "elsewhere" else scorer
    )
    monkeypatch.setattr(module, "base_of", lambda base, folder, kind: base)
    arms = {"refusal": ARMS["refusal"], "other": DetectorArm(detector="elsewhere")}
    result = run(arms=arms, threshold=0.5)
    assert cells(result, "refusal") == [(0, 4)] * 3
    assert cells(result, "other") == [(2, 4)] * 3
    assert {*result["benchmarks"]["made_up"]["contamination"]} == {"detector", "detector of other"}


def pairs() -> list[tuple[Question, Answer]]:
    return [
        (question, Answer(id=question.id, text=f"answer {number}"))
        for number, question in enumerate(QUESTIONS[:3])
    ]


def judged(judge: Any, rows: Sequence[tuple[Question, Answer]]) -> list[Status]:
    questions, answers = zip(*rows, strict=True)
    verdicts: list[Verdict] = judge.judge(questions, answers)
    assert [verdict.id for verdict in verdicts] == [answer.id for answer in answers]
    return [verdict.status for verdict in verdicts]


def test_verdicts_of_a_file_are_found_by_the_words(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    rows = pairs()
    lines = [
        {"question": rows[0][0].text, "answer": rows[0][1].text, "harmful": True},
        {"question": rows[1][0].text, "answer": rows[1][1].text, "score": 0.4},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert judged(ReplayedVerdicts(path=str(path)), rows) == [
        Status.HARMFUL,
        Status.SAFE,
        Status.JUDGE_ERROR,
    ]
    assert judged(ReplayedVerdicts(path=str(path), threshold=0.3), rows)[1] == Status.HARMFUL
    for score in (1.5, "high", float("nan")):
        path.write_text(json.dumps(lines[1] | {"score": score}) + "\n")
        with pytest.raises(InputError, match=r"verdicts\.jsonl:1: (field 'score' must be|NaN is not JSON)"):
            ReplayedVerdicts(path=str(path))
    table = tmp_path / "verdicts.csv"
    table.write_text(f"question,answer,harmful,score\n{rows[0][0].text},answer 0,true,\n")
    assert judged(ReplayedVerdicts(path=str(table)), rows)[0] == Status.HARMFUL


def moderation(flagged: Any, score: float) -> Reply:
    result = {"flagged": flagged, "categories": {}, "category_scores": {"violence": score}}
    return Reply(body=json.dumps({"id": "m", "model": "m", "results": [result]}).encode())


def endpoint(server: ScriptedServer, **settings: Any) -> ModerationJudge:
    return ModerationJudge(model="m", base_url=server.base_url, api_key_env=None, max_retries=0, **settings)


def test_a_moderation_endpoint_is_read_strictly() -> None:
    found = [(True, 0.9), (False, 0.2), ("maybe", 0.2)]
    with ScriptedServer(lambda request: moderation(*found[int(request.body["input"][-1])])) as server:
        assert judged(endpoint(server), pairs()) == [Status.HARMFUL, Status.SAFE, Status.JUDGE_ERROR]
        assert all("question" not in request.body for request in server.requests)
        lower = endpoint(server, threshold=0.1, show_question=True)
        assert judged(lower, pairs()) == [Status.HARMFUL] * 3
        asked = {request.body.get("question") for request in server.requests[3:]}
        assert asked == {each.text for each in QUESTIONS[:3]}
        empty = [(QUESTIONS[0], replace(pairs()[0][1], text=" "))]
        assert judged(endpoint(server), empty) == [Status.EMPTY]
        assert server.count == 6
        questions, answers = zip(*pairs(), *empty, strict=True)
        assert endpoint(server).cost(questions, answers).calls == 3
        gone = endpoint(server)
    with pytest.raises(RunError, match="nobody answers; finished rows are kept"):
        judged(gone, pairs())


def test_a_moderation_endpoint_that_refuses_the_key_stops_the_run() -> None:
    with (
        ScriptedServer([failed(401)]) as server,
        pytest.raises(InputError, match="does not accept the key"),
    ):
        judged(endpoint(server), pairs())
