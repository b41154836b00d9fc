import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from mllm_protector.errors import RunError
from mllm_protector.judges.chat import ChatJudge
from mllm_protector.models.chat import ServedChat
from mllm_protector.records import Status
from tests import servers
from tests.judges.scripted import judged, nonce_of, within
from tests.judges.test_chat import by_word, chat_judge

XSTEST = Path(__file__).resolve().parents[3] / "shared" / "data" / "xstest"


def served(server: servers.ScriptedServer) -> ChatJudge:
    chat = ServedChat(
        model="m",
        base_url=server.base_url,
        concurrency=2,
        timeout=2.0,
        max_retries=1,
        temperature=0,
        api_key_env=None,
    )
    return ChatJudge(chat=lambda: chat, max_tokens=16, show_question=False)


FAULTS: dict[str, tuple[Callable[[], servers.Reply], Status]] = {
    "too many": (lambda: servers.too_many(retry_after=0), Status.JUDGE_ERROR),
    "failed": (lambda: servers.failed(500, retry_after_ms="1"), Status.JUDGE_ERROR),
    "late": (lambda: servers.slow(30, "safe"), Status.JUDGE_ERROR),
    "reset": (servers.reset, Status.JUDGE_ERROR),
    "cut": (servers.cut_json, Status.JUDGE_ERROR),
    "nothing": (servers.empty_body, Status.JUDGE_ERROR),
    "no choices": (servers.no_choices, Status.JUDGE_ERROR),
    "empty": (lambda: servers.text(""), Status.UNPARSEABLE),
    "language": (servers.wrong_language, Status.UNPARSEABLE),
    "both": (lambda: servers.text("safe and unsafe"), Status.UNPARSEABLE),
    "refusal": (servers.refusal, Status.JUDGE_REFUSED),
    "filter": (servers.content_filter, Status.JUDGE_REFUSED),
    "in words": (lambda: servers.text("I can't assess this content."), Status.JUDGE_REFUSED),
}


def test_no_fault_of_a_server_is_a_silent_verdict() -> None:
    def script(request: servers.Request) -> servers.Reply | str:
        name = within(request.text).removeprefix("answer: ")
        return FAULTS[name][0]() if name in FAULTS else by_word(request.text)

    names = [*FAULTS, "fine", "[harmful placeholder]"]
    with servers.ScriptedServer(script) as server:
        verdicts = judged(served(server), *[f"answer: {name}" for name in names])
        busiest = max(request.attempt for request in server.requests)
    expected = {name: status for name, (_, status) in FAULTS.items()}
    expected |= {"fine": Status.SAFE, "[harmful placeholder]": Status.HARMFUL}
    assert {name: verdict.status for name, verdict in zip(names, verdicts, strict=True)} == expected
    assert busiest <= 1, "retries are bounded"


def test_a_server_that_is_not_there_stops_the_run() -> None:
    with servers.ScriptedServer(["unused"]) as server:
        judge = served(server)
    with pytest.raises(RunError, match="cannot be reached"):
        judged(judge, "a", "b")


def test_a_judge_that_fails_on_the_worst_rows_only_is_seen_in_the_counts() -> None:
    # GPT-4's own replies on XSTest: 11 of 2,250 are no verdict, all on answers that people saw as harmful.
    files = sorted(XSTEST.glob("xstest_v2_completions_*.csv"))
    if not files:
        pytest.skip(f"no XSTest completions in {XSTEST}")
    rows = []
    for file in files:
        with file.open(encoding="utf-8", newline="") as lines:
            rows += list(csv.DictReader(lines))
    harmful = {
        row["completion"]
        for row in rows
        if row["type"].startswith("contrast_") and row["final_label"] == "1_full_compliance"
    }
    unreadable = {f"{text} [{number}]" for number, text in enumerate(sorted(harmful)[:11])}
    answers = [*unreadable, *(row["completion"] for row in rows if row["completion"] not in harmful)]

    def reply(prompt: str) -> str:
        worst = any(within(prompt).endswith(f"[{number}]") for number in range(11))
        return "I'm sorry, but I can't." if worst else f"VERDICT {nonce_of(prompt)}: safe"

    judge, _ = chat_judge(reply)
    statuses = [verdict.status for verdict in judged(judge, *answers)]
    assert statuses.count(Status.JUDGE_REFUSED) == 11
    assert statuses.count(Status.SAFE) == len(answers) - 11
    assert statuses.count(Status.HARMFUL) == 0
