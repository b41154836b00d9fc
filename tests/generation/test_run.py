import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from mllm_protector.config import CONFIGS, build
from mllm_protector.errors import InputError, RunError
from mllm_protector.judges.keyword import KeywordJudge
from mllm_protector.records import corrections, labelled_answers
from mllm_protector.training.detector import train_detector
from tests import servers
from tests.generation.scripted import (
    asked,
    generate,
    is_for_judging,
    is_for_questions,
    is_for_rejected,
    rows,
    scenario_file,
    well,
)
from tests.servers import Reply, Request, ScriptedServer, text

WANTED = 12
ALL_CALLS = 4 + 4 * WANTED
"""2 scenarios x 2 calls for questions, 2 answers and 2 verdicts for each pair."""


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def made(server: ScriptedServer, folder: Path, **changes: Any) -> dict[str, Any]:
    """The result of a run, whose counts add up."""
    result = generate(server.base_url, folder, **changes)
    assert result is not None
    for account in (result["total"], *result["scenarios"].values()):
        assert account["asked"] == sum(account["outcomes"].values())
        assert account["written"] <= account["wanted"]
    return result


def test_as_many_pairs_as_wanted_are_written_and_data_pairs_reads_them(tmp_path: Path) -> None:
    with ScriptedServer(well) as server:
        result = made(server, tmp_path)
    assert result["complete"]
    assert result["total"]["written"] == len(rows(tmp_path)) == WANTED
    assert result["total"]["outcomes"]["confirmed"] == WANTED
    assert server.count == result["calls"] == ALL_CALLS
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train_detector", ["data=pairs", f"data.path={tmp_path / 'pairs' / 'pairs.jsonl'}"])
    splits = build(cfg, train_detector)["data"].load()
    records = [*splits.train, *splits.validation]
    assert len([*corrections(records)]) == WANTED
    assert sum(answer.harmful for answer in labelled_answers(records)) == WANTED


def test_a_second_run_asks_nothing_and_writes_the_same(tmp_path: Path) -> None:
    with ScriptedServer(well) as server:
        made(server, tmp_path)
        before = (tmp_path / "pairs" / "pairs.jsonl").read_bytes()
        made(server, tmp_path)
        assert server.count == ALL_CALLS
        assert (tmp_path / "pairs" / "pairs.jsonl").read_bytes() == before
        assert made(server, tmp_path, pairs=8)["total"]["written"] == 16
        assert server.count == ALL_CALLS + 4 * 4  # four more pairs out of questions that are there


PLANTED = {
    "What is overload for?": lambda request: servers.too_many() if request.attempt == 0 else well(request),
    "What is breakdown for?": lambda request: servers.failed(500),
    "What is delay for?": lambda request: servers.slow(30),
    "What is cutting for?": lambda request: servers.cut_json(),
    "What is filtering for?": lambda request: servers.content_filter(),
    "What is refusing for?": lambda request: (
        text("I'm sorry, but I can't help with that.") if is_for_rejected(request) else well(request)
    ),
    "What is silence for?": lambda request: text(" "),
    "What is sameness for?": lambda request: text("Sure, here it is: [left out]."),
    "What is agreement for?": lambda request: text(
        "Yes of course [left out]." if is_for_rejected(request) else "Sure, here [left out] it is."
    ),
    "What is usefulness for?": lambda request: text("Sure: begin with this."),
    "What is muttering for?": lambda request: (
        well(request) if is_for_rejected(request) else text("A gentle answer to murmur.")
    ),
}
EXPECTED = {
    "confirmed": 2,
    "accepted: failed: the server failed (HTTP 500) at ADDRESS": 1,
    "accepted: failed: no whole reply within timeout=2 s at ADDRESS": 1,
    "accepted: failed: the request or its reply is not valid JSON at ADDRESS": 1,
    "accepted: refused": 1,
    "rejected: refused": 1,
    "accepted: no text": 1,
    "rejected: the same as accepted": 2,
    "labels: accepted: harmful by judge chat": 1,
    "labels: accepted: unparseable by judge chat": 1,
    "question: duplicate": 2 + len(PLANTED) + 3,  # the second call repeats the first
}
DOUBLES = [
    "what is OVERLOAD for",
    "Please tell me now how the old clock tower in the town is kept running?",
    "Please tell me now how the old clock tower in the town was kept running?",
]


def misbehaving(request: Request) -> Reply:
    """Each planted question meets its fault."""
    if is_for_questions(request):
        return text(json.dumps([*PLANTED, *DOUBLES]))
    if is_for_judging(request):
        return text("I wonder.") if "murmur" in request.text else well(request)
    return PLANTED.get(asked(request), well)(request)


def test_every_fault_of_a_server_is_recognised_and_counted(tmp_path: Path) -> None:
    with ScriptedServer(misbehaving) as server:
        result = made(
            server,
            tmp_path,
            scenarios=scenario_file(tmp_path, scenarios=1),
            pairs=16,
            questions_per_call=16,
            dry_calls=1,
            chat={"timeout": 2.0, "concurrency": 8},
        )
    outcomes = result["total"]["outcomes"]
    assert {name.replace(server.base_url, "ADDRESS"): n for name, n in outcomes.items()} == EXPECTED
    assert {row["query"] for row in rows(tmp_path)} == {"What is overload for?", DOUBLES[1]}


def test_a_reply_that_is_not_a_list_of_questions_is_counted_and_a_scenario_is_given_up(
    tmp_path: Path,
) -> None:
    for number, (outcome, reply) in enumerate(
        (
            ("refused", text("I'm sorry, but I can't help with writing that.")),
            ("unparseable", text('["a list that is cut", "in the mid')),
            ("failed: the server failed (HTTP 503) at ADDRESS", servers.failed(503)),
            ("refused", servers.refusal()),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with (
            ScriptedServer([reply]) as server,
            pytest.raises(RunError, match=r"^0 of 6 wanted pairs were made, fewer than min_share"),
        ):
            generate(server.base_url, folder, scenarios=scenario_file(folder, scenarios=1), dry_calls=2)
        written = json.loads((folder / "pairs" / "generation.json").read_text())
        expected = {outcome.replace("ADDRESS", server.base_url): 2}
        assert written["total"]["question_calls"] == expected, outcome
        assert not (folder / "pairs" / "pairs.jsonl").exists(), outcome


def test_max_calls_holds_for_all_runs_together_and_a_larger_one_continues(tmp_path: Path) -> None:
    answered: Counter[str] = Counter()

    def counting(request: Request) -> Reply:
        answered[json.dumps(request.body)] += 1
        return well(request)

    for calls in (1, 17, 46):
        folder = tmp_path / str(calls)
        folder.mkdir()
        answered.clear()
        with ScriptedServer(counting) as server:
            for _ in range(2):
                try:
                    result = made(server, folder, max_calls=calls)
                    assert 0 < result["total"]["written"] < WANTED, calls
                except RunError:
                    result = json.loads((folder / "pairs" / "generation.json").read_text())
                    assert result["total"]["written"] == 0, calls
                assert server.count == result["calls"] == calls
                assert result["ended_by"] == "max_calls is reached"
            made(server, folder)
        assert len(rows(folder)) == WANTED, calls
        assert set(answered.values()) == {1}, calls


def test_fewer_pairs_than_min_share_are_written_and_end_in_an_error(tmp_path: Path) -> None:
    with ScriptedServer(well) as server:
        count = made(server, tmp_path, max_calls=46)["total"]["written"]
        with pytest.raises(RunError, match=f"^{count} of {WANTED} wanted pairs were made, fewer") as low:
            generate(server.base_url, tmp_path, min_share=0.99, max_calls=46)
        assert low.value.exit_code == 1
        assert len(rows(tmp_path)) == count
        assert made(server, tmp_path, min_share=1.0)["complete"]


def test_pairs_that_a_judge_does_not_confirm_are_dropped_or_marked(tmp_path: Path) -> None:
    def undecided(request: Request) -> Reply:
        return text("no verdict") if is_for_judging(request) else well(request)

    with ScriptedServer(undecided) as server:
        result = made(server, tmp_path, unconfirmed="mark")
        assert len(rows(tmp_path)) == WANTED
        assert not any(row["verified"] for row in rows(tmp_path))
        assert result["total"]["outcomes"]["labels: accepted: unparseable by judge chat"] == WANTED
        paid = server.count
        with pytest.raises(RunError, match=r"^0 of "):
            generate(server.base_url, tmp_path, dry_calls=1)
        assert server.count == paid  # the same pairs, judged by the same replies
    assert not (tmp_path / "pairs" / "pairs.jsonl").exists()


def test_every_judge_has_to_confirm_both_labels(tmp_path: Path) -> None:
    with ScriptedServer(lambda request: well(request, unsafe="begin")) as server:
        chat = made(server, tmp_path, unconfirmed="mark")
        judges = {"keyword": KeywordJudge}
        alone = made(server, tmp_path, unconfirmed="mark", judges=judges)
    assert chat["total"]["outcomes"]["labels: rejected: safe by judge chat"] == WANTED
    assert alone["total"]["outcomes"]["labels: accepted: harmful by judge keyword"] == WANTED


def test_a_rejected_answer_without_a_stand_in_is_not_confirmed(tmp_path: Path) -> None:
    def useful(request: Request) -> Reply:
        tea = text(f"Sure, {asked(request)} for tea.") if is_for_rejected(request) else None
        return tea or well(request, unsafe="for tea")

    with ScriptedServer(useful) as server:
        result = made(server, tmp_path, unconfirmed="mark")
    outcome = "labels: rejected: nothing marked as [left out]"
    assert result["total"]["outcomes"][outcome] == WANTED


def test_the_users_own_questions_come_first(tmp_path: Path) -> None:
    own = ["What is my first for?", "What is my second for?"]
    with ScriptedServer(well) as server:
        made(server, tmp_path, scenarios=scenario_file(tmp_path, scenarios=1, questions=own, pairs=3))
        assert sum(map(is_for_questions, server.requests)) == 1
    assert [row["query"] for row in rows(tmp_path)][:2] == own


def test_a_judge_without_a_model_makes_no_calls(tmp_path: Path) -> None:
    def declining(request: Request) -> Reply:
        if is_for_questions(request) or is_for_rejected(request):
            return well(request)
        return text(f"I'm sorry, but I can't help with that. {request.body['seed']}")

    with ScriptedServer(declining) as server:
        result = made(server, tmp_path, judges={"keyword": KeywordJudge})
    assert result["calls"] == 4 + 2 * WANTED
    assert result["total"]["written"] == result["total"]["declining_accepted_answers"] == WANTED


def test_a_dry_run_asks_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ScriptedServer(well) as server, caplog.at_level("INFO"):
        assert generate(server.base_url, tmp_path, dry_run=True) is None
        assert server.count == 0
    for line in ("questions: 4 calls", "answers: 24 calls", "judge chat: 24 calls", "all: 52 calls"):
        assert line in caplog.messages
    assert not (tmp_path / "pairs").exists()


def test_an_unreachable_server_is_one_line_and_leaves_an_earlier_file_alone(tmp_path: Path) -> None:
    with ScriptedServer(well) as server:
        made(server, tmp_path)
        before = (tmp_path / "pairs" / "pairs.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"nobody answers at .*repeat the command to continue"):
        generate(server.base_url, tmp_path, pairs=9)
    assert (tmp_path / "pairs" / "pairs.jsonl").read_bytes() == before


def test_a_mistake_is_found_before_anything_is_asked(tmp_path: Path) -> None:
    with ScriptedServer(well) as server:
        for changes, message in (
            ({"judges": {}}, "judges: at least one judge"),
            ({"prompts": {"answer": "x"}}, "prompts.answer: unknown prompt; choose one of questions"),
            ({"prompts": {"accepted": "none"}}, r"prompts.accepted: must have the fields \['question'\]"),
            ({"scenarios": "nowhere.yaml"}, "scenario_file=nowhere.yaml: no such file"),
            ({"scenarios": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ):
            with pytest.raises(InputError, match=message):
                generate(server.base_url, tmp_path, **changes)
        assert server.count == 0
