import asyncio
import json
import os
import signal
import stat
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from mllm_protector.errors import InputError, RunError
from mllm_protector.records import Outcome
from mllm_protector.serving import client as clients
from mllm_protector.serving.child import Child
from mllm_protector.serving.client import GuardClient
from mllm_protector.serving.guarding import Guarded, GuardUnavailable
from mllm_protector.serving.running import model_worker
from tests.serving.builders import guard_settings, queue_settings, restart_settings
from tests.serving.stub_worker import COMMAND
from tests.serving.stubs import PATIENCE, connected, socket_folder, until

HARMFUL = "placeholder of a harmful answer"


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the sockets' folders are made."""
    tmp_path_factory.getbasetemp()  # made now, so not in the folder that is removed again
    with socket_folder() as folder:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        yield folder


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client asks so often for the worker's state that it sees what lasts a second."""
    monkeypatch.setattr(clients, "PING_EVERY", 0.05)


@asynccontextmanager
async def supervised(**changes: Any) -> AsyncIterator[tuple[Child, GuardClient]]:
    settings = restart_settings(**changes)
    async with (
        model_worker(guard_settings(), queue_settings(deadline_s=60), settings, COMMAND) as (path, worker),
        connected(path, deadline_s=60) as client,
    ):
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        yield worker, client


def worker_of(*code: str, **changes: Any) -> AbstractAsyncContextManager[tuple[Path, Child]]:
    """A worker that is a line of Python."""
    command = (sys.executable, "-c", "; ".join(code))
    return model_worker(guard_settings(), queue_settings(), restart_settings(**changes), command)


def test_a_worker_that_is_killed_under_load_lets_nothing_pass_and_is_soon_back() -> None:
    async def test() -> None:
        async with supervised() as (worker, client):
            assert (await client.guard("q", "an answer")).outcome == Outcome.ALLOWED
            pid = worker.pid
            assert pid is not None
            load = [asyncio.create_task(client.guard("q", f"slow {HARMFUL} {n}")) for n in range(64)]
            await asyncio.sleep(0.5)
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            found = await asyncio.gather(*load, return_exceptions=True)
            assert time.monotonic() - killed < 30  # and not only when their deadline is over
            assert [type(each) for each in found] == 64 * [GuardUnavailable]
            assert not client.ready
            with pytest.raises(GuardUnavailable):
                await client.guard("q", "while it is down")
            await until(lambda: client.ready)
            results = await asyncio.gather(*(client.guard("q", f"an answer {n}") for n in range(20)))
            assert [each.text for each in results] == [f"an answer {n}" for n in range(20)]
            assert (await client.guard("q", HARMFUL)).outcome == Outcome.REWRITTEN
            assert worker.restarts == 1
            assert worker.pid not in (None, pid)

    asyncio.run(test())


def test_a_text_that_kills_the_worker_kills_it_once() -> None:
    async def test() -> None:
        async with supervised() as (worker, client):
            texts = ["an answer", "kill the worker", "another answer"]
            found = await asyncio.gather(*(client.guard("q", text) for text in texts), return_exceptions=True)
            assert [type(each) for each in found] == 3 * [GuardUnavailable]
            await until(lambda: client.ready)
            assert (await client.guard("q", "an answer")).outcome == Outcome.ALLOWED
            assert worker.restarts == 1

    asyncio.run(test())


def test_a_worker_that_hangs_is_ended_and_started_again(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with supervised(hang_s=3) as (worker, client):
            with pytest.raises(GuardUnavailable, match="lost"):
                await client.guard("q", "hang")
            await until(lambda: client.ready)
            assert (await client.guard("q", "an answer")).outcome == Outcome.ALLOWED
            assert worker.restarts == 1

    asyncio.run(test())
    assert "the model worker ended (70: it hung for 3 s)" in caplog.text


def test_a_process_whose_event_loop_hangs_is_ended_and_started_again_and_one_that_is_busy_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    code = """
import asyncio, sys, time
from mllm_protector.serving.child import end_if_hung
async def run():
    end_if_hung(asyncio.get_running_loop(), 1.5)
    print("ready", flush=True)
    for _ in range(20):
        await asyncio.sleep(0)
        time.sleep(0.1)
    open(sys.argv[1], "w").close()
    time.sleep(1000)
asyncio.run(run())
"""

    async def test() -> None:
        async with worker_of(code, hang_s=1.5) as (path, worker):
            await until(lambda: worker.restarts == 1)
            assert path.exists()  # it got through the time in which it was busy

    asyncio.run(test())
    assert "ended (70: it hung for 1.5 s)" in caplog.text


@pytest.mark.usefixtures("often")
def test_sigterm_lets_the_worker_finish_and_end_with_0() -> None:
    async def test() -> None:
        async with supervised(after_s=60, at_most_s=60) as (worker, client):
            process = worker._process
            assert process is not None
            under_way = asyncio.create_task(client.guard("q", "a slow answer"))
            await until(lambda: client.state.get("busy_seconds", 0) > 0)
            process.send_signal(signal.SIGTERM)
            await until(lambda: not client.ready)
            with pytest.raises(GuardUnavailable):
                await client.guard("q", "a new request")
            found = await under_way
            assert (found.outcome, found.text) == (Outcome.ALLOWED, "a slow answer")
            assert await process.wait() == 0

    asyncio.run(test())


@pytest.mark.usefixtures("often")
def test_the_worker_ends_with_its_supervisor_and_leaves_nothing_behind(own_folder: Path) -> None:
    async def test() -> Guarded:
        async with supervised() as (worker, client):
            process = worker._process
            assert process is not None
            under_way = asyncio.create_task(client.guard("q", "a slow answer"))
            await until(lambda: client.state.get("busy_seconds", 0) > 0)
            await worker.stop()
            assert process.returncode == 0
            assert worker.pid is None
            return await under_way

    assert asyncio.run(test()).outcome == Outcome.ALLOWED
    assert not [*own_folder.iterdir()]


def test_a_worker_whose_supervisor_was_killed_ends_by_itself(own_folder: Path) -> None:
    async def test() -> None:
        content = {"guard": asdict(guard_settings()), "queue": asdict(queue_settings()), "hang_s": 60}
        path = str(own_folder / "guard.sock")
        process = await asyncio.create_subprocess_exec(
            *COMMAND, path, json.dumps(content), stdin=PIPE, stdout=PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)  # of a terminal: the supervisor decides
        await asyncio.sleep(0.3)
        assert process.returncode is None
        process.stdin.close()
        assert await asyncio.wait_for(process.wait(), PATIENCE) == 0

    asyncio.run(test())


def test_a_worker_that_cannot_start_is_an_error_and_no_loop(own_folder: Path) -> None:
    async def start(worker: AbstractAsyncContextManager[Any]) -> None:
        async with worker:
            pytest.fail("it started")

    before = psutil.Process().children()  # other tests in this process may have some
    settings = queue_settings(), restart_settings()
    missing = model_worker(guard_settings(detector="missing"), *settings, COMMAND)
    silent = worker_of("import time", "time.sleep(100)", start_s=0.5)
    for worker, words in (
        (missing, "exit code 2 before it was ready"),
        (worker_of("print('hello')"), "exit code 0 before it was ready"),
        (silent, "not ready within start_s=0.5"),
    ):
        with pytest.raises(RunError, match=words):
            asyncio.run(start(worker))
    assert not {*psutil.Process().children()} - {*before}
    assert not [*own_folder.iterdir()]


def test_a_path_too_long_for_a_socket_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / (100 * "x")
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))

    async def start() -> None:
        async with worker_of("pass"):
            pytest.fail("it started")

    with pytest.raises(InputError, match="set TMPDIR to a shorter path"):
        asyncio.run(start())


def test_waits_between_restarts_grow(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        code = ("print('ready', flush=True)", "import time", "time.sleep(0.05)", "exit(3)")
        async with worker_of(*code, after_s=0.1, at_most_s=60) as (_, worker):
            await until(lambda: worker.restarts == 3)

    asyncio.run(test())
    for seconds in (0.1, 0.2, 0.4):
        assert f"ended (3); it starts again in {seconds} s" in caplog.text


def test_a_system_that_cannot_start_a_process_now_is_asked_again(own_folder: Path) -> None:
    python = own_folder / "python"
    python.symlink_to(sys.executable)
    code = "print('ready', flush=True); import sys; sys.stdin.read(1)"
    command = (str(python), "-c", code)
    settings = guard_settings(), queue_settings(), restart_settings()

    async def test() -> None:
        async with model_worker(*settings, command) as (_, worker):
            python.unlink()
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            await until(lambda: worker.restarts == 2)
            assert worker.pid is None
            python.symlink_to(sys.executable)
            await until(lambda: worker.pid is not None)

    asyncio.run(test())


def test_the_worker_counts_its_batches_and_how_often_it_was_started_again() -> None:
    def value(client: GuardClient, sample: str) -> float:
        found = [line for line in client.state["metrics"].splitlines() if line.startswith(f"{sample} ")]
        return float(found[0].split()[-1]) if found else -1.0

    restarts, rows = "mllm_protector_model_worker_restarts_total", "mllm_protector_batch_rows_sum"

    async def test() -> None:
        async with supervised() as (worker, client):
            assert value(client, restarts) == 0
            await asyncio.gather(*(client.guard("q", f"an answer {n}") for n in range(5)))
            await client.guard("q", HARMFUL)
            await until(lambda: value(client, f'{rows}{{queue="rewriting"}}') == 1)
            assert value(client, f'{rows}{{queue="scoring"}}') == 7  # the rewrite is scored too
            assert value(client, 'mllm_protector_queue_length{queue="scoring"}') == 0
            for name in ("batch_seconds", "queue_wait_seconds"):
                assert value(client, f'mllm_protector_{name}_sum{{queue="scoring"}}') > 0, name
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            await until(lambda: worker.restarts == 1 and client.ready)
            assert value(client, restarts) == 1

    asyncio.run(test())
