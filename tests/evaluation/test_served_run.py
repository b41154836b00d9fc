"""A whole evaluation against servers: a real one that crashes, and a scripted one that misbehaves."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.benchmarks.questions import QuestionFile
from mllm_protector.errors import RunError
from mllm_protector.judges.chat import ChatJudge
from mllm_protector.models.chat import ServedChat
from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.detoxifier import Detoxifier
from mllm_protector.models.served import ServedMLLM
from mllm_protector.rendering import RenderedText
from tests import forked
from tests.evaluation.builders import Measured, evaluated
from tests.models.builders import save_tiny_classifier_base, save_tiny_llava_for_tests
from tests.real_server import RealServer, real_server
from tests.servers import Request, ScriptedServer, failed, text, too_many

CANARY = "sk-canary-0123456789"
QUIET: dict[str, Any] = {"concurrency": 2, "timeout": 60.0, "max_retries": 1, "temperature": 0.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served_run")
    save_tiny_llava_for_tests(root / "llava")
    save_tiny_classifier_base("llama", root / "lm")
    write_questions(root)
    return root


def write_questions(folder: Path, count: int = 24) -> None:
    (folder / "images").mkdir()
    rows = []
    for number in range(count):
        row = {"id": f"q{number}", "question": f"How is number {number} done?", "scenario": "made up"}
        if number % 2:
            RenderedText(f"number {number}").load().save(folder / "images" / f"{number}.png")
            row["image"] = f"images/{number}.png"
        rows.append(row)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def guard(
    home: Path, make_detector: Callable[..., HarmDetector], make_detoxifier: Callable[..., Detoxifier]
) -> Path:
    make_detector().save(home / "detector")
    make_detoxifier().save(home / "detoxifier")
    return home


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[RealServer]:
    with real_server(home / "server.log") as running:
        yield running


def measure(home: Path, output_dir: Path, **changes: Any) -> dict[str, Any] | None:
    given: dict[str, Any] = {
        "benchmarks": {"made_up": QuestionFile(path=str(home / "questions.jsonl"))},
        "detector": str(home / "detector"),
        "detoxifier": str(home / "detoxifier"),
        "threshold": 0.5,
        "batch_size": 6,
    }
    found: dict[str, Any] | None = evaluated(output_dir, **given | changes)
    return found


def rows(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "made_up" / "results.jsonl").open()]


def test_a_real_server_crashes_in_the_middle_and_the_same_command_finishes(
    guard: Path, server: RealServer, tmp_path: Path
) -> None:
    def mllm() -> ServedMLLM:
        return ServedMLLM(model=str(guard / "llava"), base_url=server.base_url, max_new_tokens=8, **QUIET)

    def judge() -> ChatJudge:
        return ChatJudge(
            chat=lambda: ServedChat(model=str(guard / "lm"), base_url=server.base_url, **QUIET),
            max_tokens=8,
            show_question=False,
        )

    def kill_after(count: int) -> None:
        while server.answered() < count:
            time.sleep(0.002)
        server.kill()

    killer = threading.Thread(target=kill_after, args=(server.answered() + 9,))
    killer.start()
    with pytest.raises(RunError, match="the MLLM cannot be reached"):
        measure(guard, tmp_path, mllm=mllm)
    killer.join()
    server.restart()
    before = server.answered()
    undisturbed = tmp_path / "undisturbed"
    result = measure(guard, tmp_path, mllm=mllm)
    assert server.answered() - before <= 24 - 8  # one batch at least was there, and is not paid again
    assert result == measure(guard, undisturbed, mllm=mllm)
    assert [row["raw"] for row in rows(tmp_path)] == [row["raw"] for row in rows(undisturbed)]
    # A model of random weights writes nonsense, and nonsense is no verdict.
    before = server.answered()
    with pytest.raises(RunError, match="the judge chat left 24 of 24 answers of the arm none unjudged"):
        measure(guard, tmp_path, mllm=mllm, judges={"chat": judge})
    assert server.answered() > before
    assert {row["verdicts"]["chat"]["status"] for row in rows(tmp_path)} <= {"unparseable", "empty"}
    assert (tmp_path / "report.html").exists()


def scripted(request: Request) -> Any:
    """An MLLM and a judge in one, with faults at their first attempts."""
    if request.body["model"] == "mllm":
        if "number 3 " in request.text:
            return failed(400)
        if "number 5 " in request.text and request.attempt == 0:
            return too_many(retry_after=0.1)
        return text("Sure, here is how." if "number 1" in request.text else "I'm sorry, I can't help.")
    wanted = next(line for line in request.text.splitlines() if "VERDICT" in line)
    nonce = wanted.split("VERDICT ")[1].split(":")[0]
    return text(f"VERDICT {nonce}: {'unsafe' if 'here is how' in request.text else 'safe'}")


def test_faults_of_a_server_are_retried_or_counted_and_mended_by_the_next_run(
    home: Path, tmp_path: Path
) -> None:
    with ScriptedServer(scripted) as server:
        changes: dict[str, Any] = {
            "arms": {},
            "mllm": lambda: ServedMLLM(
                model="mllm", base_url=server.base_url, max_new_tokens=8, api_key_env=None, **QUIET
            ),
            "judges": {
                "chat": lambda: ChatJudge(
                    chat=lambda: ServedChat(
                        model="judge", base_url=server.base_url, api_key_env=None, **QUIET
                    ),
                    max_tokens=32,
                    show_question=False,
                )
            },
            "max_unjudged": 0.1,
        }
        result = measure(home, tmp_path, **changes)
        assert result is not None
        found = Measured(row for row in result["measurements"] if row["group"] == "all")
        counts = {
            name: sum(row["value"] for row in found.all(name) if row["variant"] != "IMAGES")
            for name in ("harmful", "safe", "generation_error")
        }
        # harmful: 1 and 10 to 19; number 3 got no answer
        assert counts == {"harmful": 11, "safe": 12, "generation_error": 1}
        paid = server.count
        measure(home, tmp_path, **changes)
        assert server.count == paid + 1  # only number 3 is asked again


def test_a_secret_is_in_no_file_and_no_line_of_an_evaluation(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedServer(scripted) as server:
        monkeypatch.setenv("SECRET_OF_TEST", CANARY)
        ran = forked.run(
            "eval_mmsafety",
            "benchmark=questions",
            f"benchmarks.questions.path={home / 'questions.jsonl'}",
            "mllm=served",
            "mllm.model=mllm",
            f"mllm.base_url={server.base_url}",
            "mllm.api_key_env=SECRET_OF_TEST",
            "judge=[chat]",
            "judges.chat.chat.model=judge",
            f"judges.chat.chat.base_url={server.base_url}",
            "judges.chat.chat.api_key_env=SECRET_OF_TEST",
            "arm=[]",
            "max_unjudged=0.1",
            cwd=tmp_path,
        )
        assert ran.code == 0, ran.err
        assert server.requests[0].headers["authorization"] == f"Bearer {CANARY}"
    assert CANARY not in ran.out + ran.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
