"""The whole server as processes, with tiny models: the tests of this file share one and go in this order."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.detoxifier import Detoxifier
from mllm_protector.prompts import REFUSAL
from tests.models.builders import save_tiny_llava_for_tests
from tests.serving.fakes import Asked, Said, Upstream, completion, message
from tests.serving.processes import Server, started, until

OUTCOME = "x-mllm-protector"


def echo(asked: Asked) -> Said:
    """The question as the answer; after a second, if it says so."""
    [said] = [turn["content"] for turn in asked.body["messages"]]
    answer = completion(message(said))
    return Said([1.5, *answer.pieces]) if "slow" in said else answer


@dataclass
class Running:
    server: Server
    upstream: Upstream
    config: Path

    def policy(self, text: str) -> None:
        """Write the config and have it read."""
        before = self.server.log.count("\n")
        self.config.write_text(f"# @package _global_\n{text}\n")
        self.server.process.send_signal(signal.SIGHUP)
        until(lambda: "the config" in "\n".join(self.server.log.split("\n")[before:]))


@pytest.fixture(scope="module")
def parts(
    make_detector: Callable[..., HarmDetector],
    make_detoxifier: Callable[..., Detoxifier],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[str]:
    """The keys of a guard that allows everything until its threshold is set."""
    folder = tmp_path_factory.mktemp("parts")
    make_detector().save(folder / "detector")
    make_detoxifier().save(folder / "detoxifier")
    return [f"guard.detector={folder}/detector", f"guard.detoxifier={folder}/detoxifier", "guard.device=cpu"]


@pytest.fixture(scope="module")
def running(parts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    config = folder / "local" / "mine.yaml"
    config.parent.mkdir()
    config.write_text("# @package _global_\npolicy: {threshold: 1.0, on_flag: refuse}\n")
    given = ["+local=mine", "fronts=2", *parts]
    with (
        Upstream(echo) as upstream,
        started(folder, *given, f"url={upstream.url}", f"--config-dir={folder}") as server,
    ):
        yield Running(server, upstream, config)


def test_every_front_answers_and_tells_the_counts_of_all(running: Running) -> None:
    server = running.server
    first, second = server.fronts
    with server.only(first):
        for number in range(3):
            answer = server.ask(f"question {number}")
            assert answer.json()["choices"][0]["message"]["content"] == f"question {number}"
            assert answer.headers[OUTCOME] == "allowed"
    with server.only(second):
        for number in range(4):
            assert server.ask(f"question {number}").headers[OUTCOME] == "allowed"
    until(lambda: server.count("requests_under_way") == 0)  # counted behind the answer
    for front in (first, second):
        with server.only(front):
            until(lambda: server.count("guard_ready") == 1)  # it has stood still for a while
            assert server.count("outcomes_total") == server.count("score_count") == 7
            assert server.count("requests_under_way") == 0
    assert server.count("unscanned_bytes_total") == 0


def test_at_sighup_all_fronts_take_over_a_threshold_and_none_a_bad_config(running: Running) -> None:
    server = running.server

    def outcomes() -> list[str]:
        found = []
        for front in server.fronts:
            with server.only(front):
                found.append(server.ask("question").headers[OUTCOME])
        return found

    running.policy("policy: {threshold: 0.0, on_flag: refuse}")
    until(lambda: outcomes() == ["refused", "refused"])
    for bad, words in (
        ("policy: {threshold: 2.0}", "policy.threshold=2.0: must be at most 1"),
        ("policy: {treshold: 0.5}", "policy.treshold: unknown"),
        ("policy: [", "expected the node content"),
    ):
        running.policy(bad)
        [line] = [line for line in server.log.split("\n") if "nothing changes" in line][-1:]
        assert words in line
        assert outcomes() == ["refused", "refused"], bad
    running.policy("grace_s: 9\nqueue: {waiting: 9}\npolicy: {threshold: 1.0, on_flag: refuse}")
    until(lambda: outcomes() == ["allowed", "allowed"])
    assert "queue, grace_s: the change takes a restart" in server.log
    server.fronts[0].kill()  # its successor has the newest settings
    running.policy("policy: {threshold: 0.0, on_flag: refuse}")
    server.wait_for("front 1 of 2 is ready", 2)
    until(lambda: outcomes() == ["refused", "refused"])
    running.policy("policy: {threshold: 1.0, on_flag: refuse}")
    until(lambda: outcomes() == ["allowed", "allowed"])


def test_a_front_that_is_killed_is_replaced_and_its_counts_stay(running: Running) -> None:
    server = running.server
    first, second = server.fronts
    with server.only(first):
        assert server.ask("question").headers[OUTCOME] == "allowed"
    count = server.count("outcomes_total")
    first.kill()
    until(lambda: not first.is_running() or first.status() == psutil.STATUS_ZOMBIE)
    for number in range(5):
        assert server.ask(f"question {number}").headers[OUTCOME] == "allowed"
    until(lambda: len(server.fronts) == 2 and first not in server.fronts)
    assert second in server.fronts
    assert server.count("outcomes_total") == count + 5
    until(lambda: server.count("requests_under_way") == 0)


def test_a_model_worker_that_is_killed_under_load_lets_nothing_pass_and_comes_back(running: Running) -> None:
    server, ends = running.server, threading.Event()
    killed = server.worker

    def ask(number: int) -> Counter[str]:
        seen: Counter[str] = Counter()
        while not ends.is_set():
            answer = server.ask(f"token {number}.")
            if answer.status_code == 503:
                seen["503"] += 1
                continue
            text = answer.json()["choices"][0]["message"]["content"]
            expected = f"token {number}." if answer.headers[OUTCOME] == "allowed" else REFUSAL
            assert (answer.status_code, text) == (200, expected)
            seen[answer.headers[OUTCOME]] += 1
        return seen

    with ThreadPoolExecutor(32) as pool:
        asking = [pool.submit(ask, number) for number in range(32)]
        time.sleep(1)
        killed.kill()
        server.wait_for("the model worker is ready", 2)
        until(lambda: server.ask("question").headers.get(OUTCOME) == "allowed")
        ends.set()
        seen = sum((each.result() for each in asking), Counter())
    assert seen.keys() <= {"allowed", "guard_error", "503"}
    assert seen["allowed"]
    assert seen["guard_error"]
    assert server.worker != killed
    assert server.count("unscanned_bytes_total") == 0


def test_sigterm_finishes_what_is_under_way_and_leaves_nothing(running: Running) -> None:
    server = running.server
    family = [*server.fronts, server.worker]
    with ThreadPoolExecutor(8) as pool:
        running.upstream.asked.clear()
        asking = [pool.submit(server.ask, f"a slow question {number}") for number in range(8)]
        until(lambda: len(running.upstream.asked) == 8)
        assert server.end() == 0
        answers = [each.result() for each in asking]
    assert [each.headers[OUTCOME] for each in answers] == 8 * ["allowed"]
    assert [each.json()["choices"][0]["message"]["content"][-1] for each in answers] == [*"01234567"]
    assert not [each for each in family if each.is_running()]
    assert not [*server.temporary.iterdir()]
    with pytest.raises(httpx.ConnectError):
        server.ask("question")


def test_without_an_address_a_model_of_ours_is_served_and_guarded(parts: list[str], tmp_path: Path) -> None:
    llava = save_tiny_llava_for_tests(tmp_path / "llava")
    given = ["mllm=llava_1_5_7b", f"mllm.name={llava}", "mllm.revision=null", "mllm.dtype=float32"]
    given += ["mllm.max_new_tokens=8", "policy.threshold=0.0", "policy.on_flag=refuse", *parts]
    with started(tmp_path, *given) as server:
        answer: Any = server.ask("How do I bake bread?")
        assert answer.json()["choices"][0]["message"]["content"] == REFUSAL
        assert answer.json()["model"] == "demo"
        assert answer.headers[OUTCOME] == "refused"
        assert server.end() == 0
        assert not [*server.temporary.iterdir()]
