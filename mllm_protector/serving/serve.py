"""``python scripts/serve.py``: the guard in front of a served model."""

import asyncio
import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Annotated

from annotated_types import Interval

from mllm_protector.config import reread
from mllm_protector.errors import InputError
from mllm_protector.protocols import MLLM
from mllm_protector.ranges import Amount, Count
from mllm_protector.serving import logs
from mllm_protector.serving.settings import (
    AuditSettings,
    GuardSettings,
    LimitSettings,
    PolicySettings,
    QueueSettings,
    RestartSettings,
    Seconds,
    UpstreamSettings,
)

Port = Annotated[int, Interval(ge=1, le=65_535)]
UpstreamAt = Callable[..., UpstreamSettings]


def upstream(
    *, api_key_env: str | None, connect_s: Seconds, read_s: Seconds, total_s: Seconds, connections: Count
) -> UpstreamAt:
    """How the upstream is asked, wherever it is; see ``UpstreamSettings``."""
    return functools.partial(
        UpstreamSettings,
        api_key_env=api_key_env,
        connect_s=connect_s,
        read_s=read_s,
        total_s=total_s,
        connections=connections,
    )


def serve(
    *,
    url: str | None,
    host: str,
    port: Port,
    fronts: Count,
    guard: GuardSettings,
    policy: PolicySettings,
    keys: Mapping[str, str],
    upstream: UpstreamAt,
    limits: LimitSettings,
    queue: QueueSettings,
    restart: RestartSettings,
    reconnect_s: Seconds,
    grace_s: Seconds,
    score_decimals: Amount,
    audit: AuditSettings | None,
    mllm: Callable[[], MLLM],
) -> None:
    """Guard the model at ``url`` until SIGINT or SIGTERM; without one, serve and guard ``mllm`` itself.

    ``keys`` are hashes by name, ``fronts`` the number of processes that answer clients; the rest is as in
    ``settings``. At SIGHUP the config is read again.

    Raises:
        InputError: a library is missing, or a setting cannot be used.
        RunError: a process does not start.
    """
    arguments = dict(locals())
    try:
        from mllm_protector.serving.running import run
    except ImportError as error:
        raise InputError(
            f"{error}; install what serving needs: pip install 'mllm-protector[serve]'"
        ) from None
    logs.configure("server")
    with ExitStack() as stack:
        if url is None:
            from mllm_protector.serving.demo import demo_server

            url = stack.enter_context(demo_server(mllm()))
        with suppress(asyncio.CancelledError):
            asyncio.run(run(url, arguments, functools.partial(reread, serve)))
