"""All processes of a server: one for the models, and those that answer clients."""

import asyncio
import ipaddress
import logging
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from mllm_protector.errors import InputError
from mllm_protector.serving.front import Setup
from mllm_protector.serving.fronts import Fronts, bound
from mllm_protector.serving.reloading import changed, front_settings
from mllm_protector.serving.settings import FrontSettings
from mllm_protector.serving.supervisor import Supervisor

log = logging.getLogger(__name__)

Arguments = Mapping[str, Any]
"""Of ``serve``."""


async def run(settings: FrontSettings, arguments: Arguments, reread: Callable[[], Arguments]) -> None:
    """Run all processes until SIGINT or SIGTERM cancels this; a second signal cuts off what is under way.

    Args:
        settings: of the fronts.
        arguments: what else is needed.
        reread: gives the arguments as they are now; called at SIGHUP.

    Raises:
        InputError: the address cannot be used.
        RunError: a process does not start.
    """
    loop, this = asyncio.get_running_loop(), asyncio.current_task()
    assert this is not None  # noqa: S101 - it runs
    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) is not signal.SIG_IGN:  # as in a background job
            loop.add_signal_handler(each, this.cancel)
    host, port, queue, restart = (arguments[name] for name in ("host", "port", "queue", "restart"))
    _warn(settings, host)
    with bound(host, port) as listening:
        async with Supervisor(arguments["guard"], queue, restart) as supervisor:
            setup = Setup(path=str(supervisor.path), queue=queue, settings=settings)
            async with Fronts(arguments["fronts"], listening, setup, restart) as fronts:
                loop.add_signal_handler(signal.SIGHUP, _reload, fronts, setup, arguments, reread)
                log.info("http://%s:%d/v1 is guarded, which is %s", host, port, settings.upstream.url)
                await asyncio.Event().wait()


def _reload(fronts: Fronts, setup: Setup, before: Arguments, reread: Callable[[], Arguments]) -> None:
    """Give the fronts what has changed; of a config that cannot be used nothing is taken over."""
    try:
        after = reread()
        settings = front_settings(setup.settings.upstream.url, after)
    except InputError as error:
        log.error("the config cannot be used, so nothing changes: %s", error)
        return
    if names := changed(before, after):
        log.warning("%s: the change takes a restart", ", ".join(names))
    settings = replace(settings, upstream=setup.settings.upstream)
    fronts.tell(replace(setup, settings=settings))
    log.info("the config was read again; policy, keys, limits and score_decimals are as it says")
    _warn(settings, before["host"])


def _warn(settings: FrontSettings, host: str) -> None:
    policy = settings.policy
    if policy.shadow:
        log.warning("shadow mode: every answer passes, whatever the guard says")
    if policy.streaming == "off":
        log.warning("policy.streaming=off: streamed answers pass without the guard")
    with suppress(ValueError):
        if not settings.keys and not ipaddress.ip_address(host).is_loopback:
            log.warning("host=%s: everyone who reaches this machine can use it; give keys", host)
