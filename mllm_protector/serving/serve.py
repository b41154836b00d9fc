"""``python scripts/serve.py``: the guard in front of a served model."""

import asyncio
import functools
import ipaddress
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Annotated

from annotated_types import Interval

from mllm_protector.errors import InputError, Stop
from mllm_protector.protocols import MLLM
from mllm_protector.ranges import Amount, Count
from mllm_protector.serving import logs
from mllm_protector.serving.settings import (
    ApiKey,
    AuditSettings,
    FrontSettings,
    GuardSettings,
    LimitSettings,
    PolicySettings,
    QueueSettings,
    RestartSettings,
    Seconds,
    UpstreamSettings,
)

log = logging.getLogger(__name__)

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

    ``keys`` are hashes by name; the rest is as in ``settings``.

    Raises:
        InputError: a library is missing, or a setting cannot be used.
        RunError: the model worker does not start.
    """
    try:
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{error}; install what serving needs: pip install 'mllm-protector[serve]'"
        ) from None
    logs.configure("front")
    with ExitStack() as stack:
        if url is None:
            from mllm_protector.serving.demo import demo_server

            url = stack.enter_context(demo_server(mllm()))
        settings = FrontSettings(
            upstream=upstream(url=url),
            limits=limits,
            policy=policy,
            keys=[ApiKey(name=name, sha256=digest) for name, digest in keys.items()],
            reconnect_s=reconnect_s,
            grace_s=grace_s,
            score_decimals=score_decimals,
            audit=audit,
        )
        _warn(settings, host)
        asyncio.run(_serve(settings, guard, queue, restart, host, port))


async def _serve(
    settings: FrontSettings,
    guard: GuardSettings,
    queue: QueueSettings,
    restart: RestartSettings,
    host: str,
    port: int,
) -> None:
    import uvicorn

    from mllm_protector.serving.client import GuardClient
    from mllm_protector.serving.proxy import Front
    from mllm_protector.serving.supervisor import Supervisor

    async with (
        Supervisor(guard, queue, restart) as supervisor,
        GuardClient(supervisor.path, queue, reconnect_s=settings.reconnect_s) as client,
    ):
        config = uvicorn.Config(
            Front(settings, client).app(),
            host=host,
            port=port,
            log_config=None,
            access_log=False,  # its lines hold paths and queries
            server_header=False,
            timeout_graceful_shutdown=max(1, round(settings.grace_s)),
        )
        log.info("http://%s:%d/v1 is guarded; its answers come from %s", host, port, settings.upstream.url)
        with suppress(Stop):  # after what was under way has ended
            await uvicorn.Server(config).serve()


def _warn(settings: FrontSettings, host: str) -> None:
    policy = settings.policy
    if policy.shadow:
        log.warning("shadow mode: every answer passes, whatever the guard says")
    if policy.streaming == "off":
        log.warning("policy.streaming=off: streamed answers pass without the guard")
    with suppress(ValueError):
        if not settings.keys and not ipaddress.ip_address(host).is_loopback:
            log.warning("host=%s: everyone who reaches this machine can use it; give keys", host)
