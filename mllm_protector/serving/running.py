"""All processes of a server: one for the models, and those that answer clients."""

import asyncio
import functools
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prometheus_client import multiprocess

from mllm_protector.errors import InputError
from mllm_protector.serving.child import Child
from mllm_protector.serving.front import COUNTERS, Setup
from mllm_protector.serving.settings import (
    ApiKey,
    FrontSettings,
    GuardSettings,
    QueueSettings,
    RestartSettings,
)

log = logging.getLogger(__name__)

Arguments = Mapping[str, Any]
"""Of ``serve``."""

CHANGEABLE = ("policy", "keys", "limits", "score_decimals")
"""Arguments of ``serve`` that can change while it runs."""

WORKER = (sys.executable, "-m", "mllm_protector.serving.worker")
FRONT = (sys.executable, "-m", "mllm_protector.serving.front")

LONGEST_PATH = 100
"""Bytes of a unix socket's path; the system's limit is 104 or 108."""

SPARE_S = 5.0
"""Seconds that a front gets beyond ``grace_s`` to end what it has cut off."""


async def run(url: str, arguments: Arguments, reread: Callable[[], Arguments]) -> None:
    """Run all processes until SIGINT or SIGTERM cancels this; a second signal cuts off what is under way.

    Args:
        url: of the upstream.
        arguments: what else is needed.
        reread: gives the arguments as they are now; called at SIGHUP.

    Raises:
        InputError: the address cannot be used, or the settings do not fit together.
        RunError: a process does not start.
    """
    settings = front_settings(url, arguments)
    loop, this = asyncio.get_running_loop(), asyncio.current_task()
    assert this is not None  # noqa: S101 - it runs
    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) is not signal.SIG_IGN:  # as in a background job
            loop.add_signal_handler(each, this.cancel)
    host, port, queue, restart = (arguments[name] for name in ("host", "port", "queue", "restart"))
    _warn(settings, host)
    with bound(host, port) as listening:
        async with model_worker(arguments["guard"], queue, restart) as (path, _):
            setup = Setup(path=str(path), queue=queue, hang_s=restart.hang_s, settings=settings)
            async with _fronts(arguments["fronts"], listening, setup, restart) as fronts:
                loop.add_signal_handler(signal.SIGHUP, _reload, fronts, setup, arguments, reread)
                log.info("http://%s:%d/v1 is guarded, which is %s", host, port, settings.upstream.url)
                await asyncio.Event().wait()


@asynccontextmanager
async def model_worker(
    guard: GuardSettings, queue: QueueSettings, restart: RestartSettings, command: Sequence[str] = WORKER
) -> AsyncIterator[tuple[Path, Child]]:
    """A model worker that takes requests while the context lasts, and the path of its socket.

    ``command`` gets the socket's path and the settings as JSON. Only this user may enter the socket's folder.

    Raises:
        InputError: the path of the temporary folder is too long.
        RunError: as in ``Child.start``.
    """
    with TemporaryDirectory(prefix="mllm-protector-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "guard.sock"
        if len(os.fsencode(path)) > LONGEST_PATH:
            raise InputError(f"{path}: too long for a socket; set TMPDIR to a shorter path")
        settings = {"guard": asdict(guard), "queue": asdict(queue), "hang_s": restart.hang_s}
        given = (*command, str(path), json.dumps(settings, allow_nan=False))
        worker = Child("the model worker", given, restart, stop_s=restart.stop_s)
        await worker.start()
        try:
            yield path, worker
        finally:
            await worker.stop()


@asynccontextmanager
async def _fronts(
    count: int, listening: socket.socket, setup: Setup, restart: RestartSettings
) -> AsyncIterator[list[Child]]:
    """Front processes that answer while the context lasts; then they take no new connections.

    They accept connections from one socket, so that those of a front that dies before it accepts them go to
    another. Their counters lie in a temporary folder, where each of them finds those of all.

    Raises:
        RunError: as in ``Child.start``.
    """
    with TemporaryDirectory(prefix="mllm-protector-metrics-", ignore_cleanup_errors=True) as folder:

        def forget(pid: int) -> None:
            """Drop what a dead front counted as being under way; its other counts stay."""
            multiprocess.mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]

        fronts = [
            Child(
                f"front {number} of {count}",
                (*FRONT, str(listening.fileno())),
                restart,
                stop_s=setup.settings.grace_s + SPARE_S,
                line=setup.line,
                environment={**os.environ, COUNTERS: folder},
                descriptors=[listening.fileno()],
                ended=forget,
            )
            for number in range(1, count + 1)
        ]
        try:
            started = await asyncio.gather(*(front.start() for front in fronts), return_exceptions=True)
            for error in started:
                if error is not None:
                    raise error
            yield fronts
        finally:
            listening.close()
            await asyncio.gather(*(front.stop() for front in fronts))


def bound(host: str, port: int) -> socket.socket:
    """A socket with an address, which does not listen yet.

    Raises:
        InputError: the address cannot be used.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise InputError(f"host={host} port={port}: {error.strerror}") from None
    return listening


def front_settings(url: str, arguments: Arguments) -> FrontSettings:
    """What the arguments of ``serve`` say to a front.

    Raises:
        InputError: they do not fit together.
    """
    keys = [ApiKey(name=name, sha256=digest) for name, digest in arguments["keys"].items()]
    same = ("limits", "policy", "reconnect_s", "grace_s", "score_decimals", "audit")
    given = {name: arguments[name] for name in same}
    return FrontSettings(upstream=arguments["upstream"](url=url), keys=keys, **given)


def _reload(
    fronts: Sequence[Child], setup: Setup, before: Arguments, reread: Callable[[], Arguments]
) -> None:
    """Give the fronts what has changed; of a config that cannot be used nothing is taken over."""
    try:
        after = reread()
        settings = front_settings(setup.settings.upstream.url, after)
    except InputError as error:
        log.error("the config cannot be used, so nothing changes: %s", error)
        return
    fixed = [name for name in before if name not in CHANGEABLE]
    if names := [name for name in fixed if _comparable(before[name]) != _comparable(after[name])]:
        log.warning("%s: the change takes a restart", ", ".join(names))
    settings = replace(settings, upstream=setup.settings.upstream)
    for front in fronts:
        front.tell(replace(setup, settings=settings).line)
    log.info("the config was read again; policy, keys, limits and score_decimals are as it says")
    _warn(settings, before["host"])


def _comparable(value: Any) -> Any:
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    return value


def _warn(settings: FrontSettings, host: str) -> None:
    policy = settings.policy
    if policy.shadow:
        log.warning("shadow mode: every answer passes, whatever the guard says")
    if policy.streaming == "off":
        log.warning("policy.streaming=off: streamed answers pass without the guard")
    with suppress(ValueError):
        if not settings.keys and not ipaddress.ip_address(host).is_loopback:
            log.warning("host=%s: everyone who reaches this machine can use it; give keys", host)
