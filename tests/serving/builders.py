"""Settings with the values of a test, each of which can be changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mllm_protector.calls import check_call
from mllm_protector.serving.settings import (
    AuditSettings,
    FrontSettings,
    GuardSettings,
    LimitSettings,
    PolicySettings,
    QueueSettings,
    RestartSettings,
    UpstreamSettings,
)

S = TypeVar("S")


def _made(kind: Callable[..., S], values: dict[str, Any]) -> S:
    """As from a config: the values are checked against the signature."""
    check_call("", kind, values)
    return kind(**values)


def guard_settings(**changes: Any) -> GuardSettings:
    values: dict[str, Any] = {"detector": "d", "detoxifier": None, "base": None, "device": "cpu"}
    values |= {"detector_urls": [], "detoxifier_url": None, "detoxifier_model": None, "api_key_env": None}
    values |= {"detector_timeout_s": 10, "detoxifier_timeout_s": 60, "tolerance": 0.02}
    return _made(GuardSettings, values | {"max_answer_tokens": 32_768} | changes)


def queue_settings(**changes: Any) -> QueueSettings:
    values: dict[str, Any] = {"batch_tokens": 4096, "patience_ms": 5, "waiting": 1000, "waiting_mb": 64}
    return _made(QueueSettings, values | {"request_mb": 4, "deadline_s": 20} | changes)


def restart_settings(**changes: Any) -> RestartSettings:
    values = {"start_s": 300, "hang_s": 60, "stop_s": 60, "after_s": 0.1, "at_most_s": 5}
    return _made(RestartSettings, values | changes)


def upstream_settings(**changes: Any) -> UpstreamSettings:
    values: dict[str, Any] = {"url": "http://127.0.0.1:1/v1", "api_key_env": None, "connections": 256}
    return _made(UpstreamSettings, values | {"connect_s": 10, "read_s": 10, "total_s": 30} | changes)


def limit_settings(**changes: Any) -> LimitSettings:
    values = {"body_mb": 20, "body_s": 10, "answer_mb": 4, "choices": 8, "requests": 512}
    return _made(LimitSettings, values | changes)


def policy_settings(**changes: Any) -> PolicySettings:
    values: dict[str, Any] = {
        "streaming": "buffer",
        "window_tokens": 16,
        "window_hits": 2,
        "ping_s": 5,
        "on_flag": "rewrite",
        "on_error": "refuse",
        "refused_finish_reason": "content_filter",
        "shadow": False,
        "threshold": None,
        "model_thresholds": {},
        "key_thresholds": {},
        "answer_only_threshold": None,
    }
    return _made(PolicySettings, values | changes)


def audit_settings(folder: Path, **changes: Any) -> AuditSettings:
    values: dict[str, Any] = {"folder": str(folder), "texts": False, "hash_key_env": None, "max_mb": 10}
    return _made(AuditSettings, values | {"files": 3, "on_failure": "refuse"} | changes)


def front_settings(**changes: Any) -> FrontSettings:
    values: dict[str, Any] = {
        "upstream": upstream_settings(),
        "limits": limit_settings(),
        "policy": policy_settings(),
        "keys": [],
        "audit": None,
        "reconnect_s": 1,
        "grace_s": 5,
        "score_decimals": 4,
    }
    return FrontSettings(**values | changes)
