import json
import os
import signal
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from mllm_protector.config import CONFIGS, build
from mllm_protector.errors import InputError, RunError
from mllm_protector.generation.ledger import SPENT, Budget
from mllm_protector.generation.run import Stopped
from mllm_protector.judges.keyword import KeywordJudge
from mllm_protector.records import corrections, labelled_answers
from mllm_protector.training.detector import train_detector
from tests import servers
from tests.generation.scripted import (
    counted,
    generate,
    is_for_judging,
    is_for_questions,
    is_for_rejected,
    rows,
    scenario_file,
    well,
)
from tests.servers import Reply, Request, ScriptedServer

WANTED = 12


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def adds_up(result: dict[str, Any]) -> bool:
    accounts = [result["total"], *result["scenarios"].values()]
    return all(each["asked"] == each["written"] + sum(each["dropped"].values()) for each in accounts)


def made(server: ScriptedServer, folder: Path, **changes: Any) -> dict[str, Any]:
    result = generate(server.base_url, folder, **changes)
    assert result is not None
    assert adds_up(result)
    assert result["spent"]["total"]["calls"] == server.count
    return result


def test_as_many_pairs_as_wanted_are_written_and_data_pairs_reads_them(tmp_path: Path) -> None:
    with ScriptedServer(well) as server:
        result = made(server, tmp_path)
    assert result["complete"]
    assert result["total"]["written"] == len(rows(tmp_path)) == WANTED
    assert result["total"]["verification"] == {"confirmed": WANTED}
    # 2 scenarios x 2 calls, 2 answers and 2 verdicts for each pair
    assert server.count == 4 + 4 * WANTED
    assert result["spent"]["total"]["prompt_tokens"] == 100 * server.count
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train_detector", ["data=pairs", f"data.path={tmp_path / 'pairs' / 'pairs.jsonl'}"])
    splits = build(cfg, train_detector)["data"].load()
    records = [*splits.train, *splits.validation]
    assert len([*corrections(records)]) == WANTED
    assert sum(answer.harmful for answer in labelled_answers(records)) == WANTED


def test_a_second_run_asks_nothing_and_writes_the_same(tmp_path: Path) -> None:
    with ScriptedServer(well) as server:
        made(server, tmp_path)
        before, count = (tmp_path / "pairs" / "pairs.jsonl").read_bytes(), server.count
        made(server, tmp_path)
        assert server.count == count
        assert (tmp_path / "pairs" / "pairs.jsonl").read_bytes() == before
        assert made(server, tmp_path, pairs=8)["total"]["written"] == 16
        assert server.count == count + 4 * 4  # four more pairs out of questions that are there


PLANTED = {
    "What is overload for?": lambda request: servers.too_many() if request.attempt == 0 else well(request),
    "What is breakdown for?": lambda request: servers.failed(500),
    "What is delay for?": lambda request: servers.slow(30),
    "What is cutting for?": lambda request: servers.cut_json(),
    "What is filtering for?": lambda request: servers.content_filter(),
    "What is refusing for?": lambda request: (
        counted("I'm sorry, but I can't help with that.") if is_for_rejected(request) else well(request)
    ),
    "What is language for?": lambda request: servers.wrong_language(),
    "What is silence for?": lambda request: counted(" "),
    "What is sameness for?": lambda request: counted("Sure, here it is: [left out]."),
    "What is agreement for?": lambda request: counted(
        "Yes of course [left out]." if is_for_rejected(request) else "Sure, here [left out] it is."
    ),
    "What is usefulness for?": lambda request: counted("Sure: begin with this."),
    "What is muttering for?": lambda request: (
        counted("A gentle answer to murmur.") if not is_for_rejected(request) else well(request)
    ),
}
EXPECTED = {
    "accepted: failed: the server failed (HTTP 500) at ADDRESS": 1,
    "accepted: failed: no whole reply within timeout=0.5 s at ADDRESS": 1,
    "accepted: failed: the request or its reply is not valid JSON at ADDRESS": 1,
    "accepted: refused": 1,
    "rejected: refused": 1,
    "accepted: wrong language": 1,
    "accepted: no text": 1,
    "rejected: the same as accepted": 2,
    "labels: accepted: harmful by judge chat": 1,
    "labels: accepted: unparseable by judge chat": 1,
    "question: duplicate": 1,
    "question: near duplicate": 1,
    "question: wrong language": 1,
}
DOUBLES = [
    "what is OVERLOAD for",
    "Please tell me now how the old clock tower in the town is kept running?",
    "Please tell me now how the old clock tower in the town was kept running?",
    "Wofür ist das eine gut und wie kann man es mit dem anderen für sich nutzen?",
]


def misbehaving(request: Request) -> Reply:
    """Each planted question meets its fault; lists are at first no lists."""
    if is_for_questions(request):
        return counted(json.dumps([*PLANTED, *DOUBLES]))
    if is_for_judging(request):
        return counted("I wonder.") if "murmur" in request.text else well(request)
    asked = request.text.partition("[BEGIN QUESTION")[2].splitlines()[1]
    return PLANTED.get(asked, well)(request)


def test_every_fault_of_a_server_is_recognised_and_counted(tmp_path: Path) -> None:
    with ScriptedServer(misbehaving) as server:
        result = made(
            server,
            tmp_path,
            scenarios=scenario_file(tmp_path, scenarios=1),
            pairs=16,
            questions_per_call=16,
            dry_calls=1,
            chat={"timeout": 0.5, "concurrency": 8},
        )
    dropped = {name.replace(server.base_url, "ADDRESS"): n for name, n in result["total"]["dropped"].items()}
    first = {name: count for name, count in dropped.items() if name in EXPECTED}
    first["question: duplicate"] -= 14  # the second call brings the same again
    first["question: near duplicate"] -= 1
    first["question: wrong language"] -= 1
    assert first == EXPECTED
    assert {row["query"] for row in rows(tmp_path)} == {"What is overload for?", DOUBLES[1]}


LISTS = {
    "refused": counted("I'm sorry, but I can't help with writing that."),
    "unparseable": counted('["a list that is cut", "in the mid'),
    "wrong language": servers.wrong_language(),
    "failed: the server failed (HTTP 503) at ADDRESS": servers.failed(503),
    "refused ": servers.refusal(),
    "unparseable ": counted('Here they are: ["one?", "two?"]'),
    "unparseable  ": counted('["one?", 2]'),
    "unparseable   ": counted("[]"),
}


@pytest.mark.parametrize("end", LISTS)
def test_what_is_no_list_of_questions_is_counted_and_ends_after_a_few_calls(end: str, tmp_path: Path) -> None:
    with (
        ScriptedServer([LISTS[end]]) as server,
        pytest.raises(RunError, match=f"^0 of 6 wanted pairs were made, .*{end.strip()[:20]}"),
    ):
        generate(server.base_url, tmp_path, scenarios=scenario_file(tmp_path, scenarios=1), dry_calls=2)
    written = json.loads((tmp_path / "pairs" / "generation.json").read_text())
    assert written["total"]["question_calls"] == {end.strip().replace("ADDRESS", server.base_url): 2}
    assert written["spent"]["total"]["calls"] == server.count
    assert not (tmp_path / "pairs" / "pairs.jsonl").exists()


def test_fewer_pairs_than_the_smallest_share_are_written_and_end_in_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedServer(well) as server, caplog.at_level("INFO"):
        some = {"budget": Budget(calls=46, tokens=None)}
        count = made(server, tmp_path, **some)["total"]["written"]
        assert 0 < count < WANTED
        assert caplog.messages[-1] == f"{count} of {WANTED} wanted pairs were made"
        (tmp_path / "pairs" / "pairs.jsonl").unlink()
        with pytest.raises(
            RunError, match=f"^{count} of {WANTED} wanted pairs were made, fewer than min_sh"
        ) as low:
            generate(server.base_url, tmp_path, min_share=0.99, **some)
        assert low.value.exit_code == 1
        assert len(rows(tmp_path)) == count
        made(server, tmp_path, min_share=1.0)
    with pytest.raises(InputError, match=r"^min_share=0: must lie above 0"):
        generate("http://localhost:1", tmp_path, min_share=0)


def test_what_the_judges_do_not_confirm_is_dropped_or_marked(tmp_path: Path) -> None:
    def never_safe(request: Request) -> Reply:
        return counted("no verdict") if is_for_judging(request) else well(request)

    with ScriptedServer(never_safe) as server:
        result = made(server, tmp_path, unconfirmed="mark")
        assert len(rows(tmp_path)) == WANTED
        assert not any(row["verified"] for row in rows(tmp_path))
        assert result["total"]["verification"] == {"accepted: unparseable by judge chat": WANTED}
        paid = server.count
        with pytest.raises(RunError, match=r"^0 of "):
            generate(server.base_url, tmp_path, dry_calls=1)
        assert server.count == paid  # the same pairs, judged by the same replies
    assert not (tmp_path / "pairs" / "pairs.jsonl").exists()


def test_a_rejected_answer_without_a_stand_in_is_not_confirmed(tmp_path: Path) -> None:
    def useful(request: Request) -> Reply:
        tea = counted("Sure, it is for tea.")
        return tea if is_for_rejected(request) else well(request, unsafe="for tea")

    with ScriptedServer(useful) as server:
        result = made(server, tmp_path, unconfirmed="mark")
    assert result["total"]["verification"] == {"rejected: nothing marked as [left out]": WANTED}


def test_the_users_own_questions_come_first(tmp_path: Path) -> None:
    own = ["What is my first for?", "What is my second for?"]
    with ScriptedServer(well) as server:
        made(server, tmp_path, scenarios=scenario_file(tmp_path, scenarios=1, questions=own, pairs=3))
    assert [row["query"] for row in rows(tmp_path)][:2] == own
    assert sum(map(is_for_questions, server.requests)) == 1


@pytest.mark.parametrize("calls", [1, 17, 51])
def test_the_budget_of_calls_is_never_exceeded_and_more_of_it_goes_on(calls: int, tmp_path: Path) -> None:
    answered: Counter[str] = Counter()

    def shaky(request: Request) -> Reply:
        if request.attempt == 0 and request.index % 5 == 0:
            return servers.failed(500)
        answered[json.dumps(request.body)] += 1
        return well(request)

    with ScriptedServer(shaky) as server:
        for _ in range(2):
            try:
                result = made(server, tmp_path, budget=Budget(calls=calls, tokens=None))
            except RunError:
                result = json.loads((tmp_path / "pairs" / "generation.json").read_text())
            assert server.count == calls
            assert result["ended_by"] == SPENT
        assert result["spent"]["total"]["calls"] == calls
        made(server, tmp_path)
    assert len(rows(tmp_path)) == WANTED
    assert set(answered.values()) == {1}


def test_the_budget_of_tokens_is_never_exceeded(tmp_path: Path) -> None:
    for limit in (1500, 4000, 6500):
        folder = tmp_path / str(limit)
        folder.mkdir()
        with ScriptedServer(well) as server:
            with suppress(RunError):  # too little for a single pair
                generate(server.base_url, folder, budget=Budget(calls=None, tokens=limit))
            assert 0 < 120 * server.count <= limit


def test_requests_that_end_without_a_count_are_taken_to_cost_the_most(tmp_path: Path) -> None:
    with ScriptedServer([servers.slow(5)]) as server, pytest.raises(RunError):
        generate(server.base_url, tmp_path, chat={"timeout": 0.2, "max_retries": 0}, dry_calls=1)
    spent = json.loads((tmp_path / "pairs" / "generation.json").read_text())["spent"]["total"]
    assert spent["calls"] == 2
    assert spent["assumed_tokens"] > 2 * 200


def test_a_signal_lets_what_is_under_way_finish_and_writes_what_is_complete(tmp_path: Path) -> None:
    half = threading.Event()

    def slowly(request: Request) -> Reply:
        if request.index == 40:
            half.set()
        return well(request, seconds=0.02)

    def stop() -> None:
        half.wait(20)
        os.kill(os.getpid(), signal.SIGTERM)

    with ScriptedServer(slowly) as server:
        killer = threading.Thread(target=stop)
        killer.start()
        with pytest.raises((Stopped, RunError)) as stopped:
            generate(server.base_url, tmp_path)
        killer.join()
        assert stopped.value.exit_code == 128 + signal.SIGTERM
        assert server.count <= 45
        written = json.loads((tmp_path / "pairs" / "generation.json").read_text())
        assert adds_up(written)
        made(server, tmp_path)
        bodies = Counter(json.dumps(request.body) for request in server.requests)
    assert set(bodies.values()) == {1}
    assert len(rows(tmp_path)) == WANTED


def test_a_dry_run_asks_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ScriptedServer(well) as server, caplog.at_level("INFO"):
        assert generate(server.base_url, tmp_path, dry_run=True) is None
        assert server.count == 0
    assert "questions: 4 calls" in caplog.text
    assert "answers: 24 calls" in caplog.text
    assert "judge chat: 24 calls" in caplog.text
    assert not (tmp_path / "pairs").exists()


def test_nobody_there_is_one_line_and_leaves_an_earlier_file_alone(tmp_path: Path) -> None:
    with ScriptedServer(well) as server:
        made(server, tmp_path)
        before = (tmp_path / "pairs" / "pairs.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"nobody answers at .*start the same command again"):
        generate(server.base_url, tmp_path, pairs=9)
    assert (tmp_path / "pairs" / "pairs.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judges": {}}, "judges: at least one judge"),
        ({"pairs": 0}, "pairs=0: must be at least 1"),
        ({"near_duplicate": 0.2}, "near_duplicate=0.2: must lie above 0.5"),
        ({"language": "Klingon"}, "language=Klingon: no check is known"),
        ({"prompts": {"answer": "x"}}, "prompts.answer: unknown; choose among"),
        ({"prompts": {"accepted": "no field"}}, r"prompts.accepted: must have the fields \['question'\]"),
        ({"scenarios": "nowhere.yaml"}, "scenario_file=nowhere.yaml: no such file"),
    ],
)
def test_a_mistake_is_found_before_anything_is_asked(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with ScriptedServer(well) as server:
        with pytest.raises(InputError, match=message):
            generate(server.base_url, tmp_path, **changes)
        assert server.count == 0


def test_a_judge_without_calls_needs_no_budget(tmp_path: Path) -> None:
    def declining(request: Request) -> Reply:
        if is_for_questions(request) or is_for_rejected(request):
            return well(request)
        return counted(f"I'm sorry, but I can't help with that. {request.body['seed']}")

    with ScriptedServer(declining) as server:
        result = made(server, tmp_path, judges={"keyword": KeywordJudge})
    assert result["total"]["written"] == WANTED
    assert result["total"]["declining_accepted_answers"] == WANTED
