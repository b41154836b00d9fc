"""Ctrl-C and SIGTERM while a server never answers."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mllm_protector.benchmarks.questions import QuestionFile
from mllm_protector.config import clear_errors
from mllm_protector.judges.chat import ChatJudge
from mllm_protector.judges.guard_model import GuardModelJudge
from mllm_protector.models.chat import ServedChat
from mllm_protector.models.served import ServedMLLM
from tests.evaluation.builders import evaluated
from tests.generation.scripted import generate, scenario_file, well
from tests.servers import Reply, Request, ScriptedServer, silent

REPOSITORY = Path(__file__).parents[2]
SECONDS = 30.0
QUIET: dict[str, Any] = {
    "concurrency": 2, "timeout": 600.0, "max_retries": 5, "temperature": 0.0, "api_key_env": None
}  # fmt: skip


def questions(folder: Path, count: int = 6) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is number {n}?"}) + "\n" for n in range(count)))
    return path


def measure(folder: Path, **changes: Any) -> None:
    benchmarks = {"made_up": QuestionFile(path=str(folder / "questions.jsonl"))}
    given: dict[str, Any] = {"benchmarks": benchmarks, "arms": {}, "batch_size": 2}
    evaluated(folder / "out", **given | changes)


def kept(folder: Path, stage: str) -> int:
    return sum(1 for path in (folder / "out" / "cache" / stage).glob("*.jsonl") for _ in path.open())


class Command:
    """Work in a process of its own, as a script does it."""

    def __init__(self, work: Callable[[], object], errors: Path) -> None:
        def command() -> None:
            sys.stderr = errors.open("w", buffering=1)
            os.dup2(sys.stderr.fileno(), 2)
            with clear_errors():
                work()

        self.errors = errors
        self.process = multiprocessing.get_context("fork").Process(target=command)
        self.process.start()

    def signalled(self, number: signal.Signals) -> tuple[int | None, str]:
        """The exit code and what it said, at most ``SECONDS`` after the signal."""
        os.kill(self.process.pid or 0, number)
        self.process.join(SECONDS)
        code = self.process.exitcode
        self.process.kill()
        self.process.join()
        return code, self.errors.read_text()


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert time.monotonic() < deadline, "never reached"
        time.sleep(0.01)


def silent_after(count: int) -> Callable[[Request], Reply | str]:
    return lambda request: silent() if request.index >= count else "fine"


def mllm(server: ScriptedServer) -> ServedMLLM:
    return ServedMLLM(model="m", base_url=server.base_url, max_new_tokens=8, **QUIET)


def test_an_evaluation_ends_at_the_first_signal_with_finished_rows_kept(tmp_path: Path) -> None:
    questions(tmp_path)
    for number in (signal.SIGINT, signal.SIGTERM):
        with ScriptedServer(silent_after(2)) as server:
            command = Command(lambda: measure(tmp_path, mllm=lambda: mllm(server)), tmp_path / number.name)
            until(lambda: server.count > 2)
            code, said = command.signalled(number)
        assert code == 128 + number
        assert said == (
            f"error: stopped by {number.name}; finished work is kept, and the same command continues from"
            " there\n"
        )
    assert kept(tmp_path, "answers") == 4  # two of each run


def test_judging_ends_at_a_signal_with_finished_verdicts_kept(tmp_path: Path) -> None:
    questions(tmp_path)

    def judged(request: Request) -> Reply | str:
        if request.body["model"] == "m":
            return f"An answer to {request.text}"
        return silent() if judge_calls(server) > 2 else "safe"

    def judge_calls(server: ScriptedServer) -> int:
        return sum(request.body["model"] == "judge" for request in server.requests)

    def chat() -> ServedChat:
        return ServedChat(model="judge", base_url=server.base_url, **QUIET)

    judges: dict[str, Callable[[], Any]] = {
        "guard_model": lambda: GuardModelJudge(chat=chat, family="llama_guard", controversial="harmful"),
        "chat": lambda: ChatJudge(chat=chat, max_tokens=8, show_question=False),
    }
    for name, make in judges.items():
        folder = tmp_path / name
        folder.mkdir()
        questions(folder)
        with ScriptedServer(judged) as server:
            command = Command(
                lambda folder=folder, server=server, name=name, make=make: measure(  # type: ignore[misc]
                    folder, mllm=lambda: mllm(server), judges={name: make}
                ),
                folder / "said",
            )
            until(lambda server=server: judge_calls(server) > 2)  # type: ignore[misc]
            code, said = command.signalled(signal.SIGINT)
        assert (code, said.count("\n")) == (130, 1), name
        assert kept(folder, "answers") == 6, name


def test_a_generation_ends_at_a_signal_and_writes_what_is_complete(tmp_path: Path) -> None:
    scenarios = scenario_file(tmp_path)
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / number.name
        folder.mkdir()
        with ScriptedServer(lambda request: silent() if request.index >= 6 else well(request)) as server:
            command = Command(
                lambda folder=folder, server=server: generate(  # type: ignore[misc]
                    server.base_url, folder, scenarios=scenarios, chat={"timeout": 600.0}
                ),
                folder / "said",
            )
            until(lambda server=server: server.count > 6)  # type: ignore[misc]
            code, said = command.signalled(number)
        assert (code, said.count("error: ")) == (128 + number, 1), said
        written = json.loads((folder / "pairs" / "generation.json").read_text())
        assert written["ended_by"].startswith(f"stopped by {number.name};")


def test_a_second_signal_ends_at_once_what_a_first_one_cannot(tmp_path: Path) -> None:
    def stubborn() -> None:
        try:
            (tmp_path / "begun").touch()
            time.sleep(60)
        finally:
            (tmp_path / "unwinding").touch()
            time.sleep(60)

    command = Command(stubborn, tmp_path / "said")
    until((tmp_path / "begun").exists)
    os.kill(command.process.pid or 0, signal.SIGINT)
    until((tmp_path / "unwinding").exists)
    code, said = command.signalled(signal.SIGINT)
    assert (code, said) == (130, "error: stopped at once by a second SIGINT\n")


def test_ctrl_c_ends_the_script_while_a_server_is_silent(tmp_path: Path) -> None:
    with ScriptedServer([silent()]) as server:
        script = subprocess.Popen(
            [
                sys.executable,
                str(REPOSITORY / "scripts" / "eval_mmsafety.py"),
                "benchmark=questions",
                f"benchmarks.questions.path={questions(tmp_path)}",
                "mllm=served",
                "mllm.model=m",
                f"mllm.base_url={server.base_url}",
                "judge=[keyword]",
                "arm=[]",
            ],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        until(lambda: server.count > 0)
        asked = time.monotonic()
        script.send_signal(signal.SIGINT)
        assert script.stderr is not None
        first = script.stderr.readline()
        assert (
            time.monotonic() - asked < SECONDS
        )  # what follows is Python's own end, a second on a quiet machine
        rest = script.communicate(timeout=300)[1]
    assert script.returncode == 130
    assert first.startswith("error: stopped by SIGINT; ")
    assert rest == ""
