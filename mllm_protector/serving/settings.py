"""What ``configs/serve.yaml`` fills; its comments explain each key.

Single values are checked against these annotations when the file is read, and here whether they fit together.
"""

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from annotated_types import Interval
from pydantic import AllowInfNan

from mllm_protector.errors import InputError
from mllm_protector.ranges import Amount, Count, Share

Seconds = Annotated[float, Interval(ge=0.001, le=86_400), AllowInfNan(False)]
Milliseconds = Annotated[float, Interval(ge=0, le=10_000), AllowInfNan(False)]
Megabytes = Annotated[float, Interval(ge=0.001, le=10_000), AllowInfNan(False)]

MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardSettings:
    """The guard that the model worker loads; keys as in ``Protector.from_pretrained``."""

    detector: str
    detoxifier: str | None
    base: str | None
    device: str | None
    max_answer_tokens: Count
    detector_urls: Sequence[str]
    detoxifier_url: str | None
    detoxifier_model: str | None
    api_key_env: str | None
    detector_timeout_s: Seconds
    detoxifier_timeout_s: Seconds
    tolerance: Annotated[float, Interval(ge=0, le=100), AllowInfNan(False)]

    def __post_init__(self) -> None:
        if (self.detoxifier_url is None) != (self.detoxifier_model is None):
            raise InputError("detoxifier_model: give it with detoxifier_url, and only then")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSettings:
    """How concurrent requests become batches, and how many may wait.

    Scores and rewrites have a queue each, with the same limits.
    """

    batch_tokens: Count
    patience_ms: Milliseconds
    waiting: Count
    waiting_mb: Megabytes
    request_mb: Megabytes
    deadline_s: Seconds

    def __post_init__(self) -> None:
        if self.waiting_mb < self.request_mb:
            raise InputError(f"waiting_mb={self.waiting_mb}: must be at least request_mb={self.request_mb}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartSettings:
    """When processes are started again, and when they are ended.

    The wait of a process that lived for longer than ``at_most_s`` starts over at ``after_s``.
    """

    start_s: Seconds
    hang_s: Seconds
    stop_s: Seconds
    after_s: Seconds
    at_most_s: Seconds

    def __post_init__(self) -> None:
        if self.at_most_s < self.after_s:
            raise InputError(f"at_most_s={self.at_most_s}: must be at least after_s={self.after_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamSettings:
    """The OpenAI-compatible server that is guarded; ``connections`` are those of one front."""

    url: str
    api_key_env: str | None
    connect_s: Seconds
    read_s: Seconds
    total_s: Seconds
    connections: Count

    def __post_init__(self) -> None:
        """Check the address, which loses a slash at its end."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"url={self.url}: must be an address such as http://127.0.0.1:8000/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise InputError("url: must not hold a password, a query or a fragment")
        object.__setattr__(self, "url", self.url.rstrip("/"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """What a client may ask for; ``requests`` are of one front, ``answer_mb`` of all choices together."""

    body_mb: Megabytes
    body_s: Seconds
    answer_mb: Megabytes
    choices: Count
    requests: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    """What happens to an answer."""

    streaming: Literal["buffer", "window", "off"]
    window_tokens: Count
    window_hits: Count
    ping_s: Seconds
    on_flag: Literal["rewrite", "refuse"]
    on_error: Literal["refuse", "error"]
    refused_finish_reason: Literal["content_filter", "stop"]
    shadow: bool
    threshold: Share | None
    model_thresholds: Mapping[str, Share]
    key_thresholds: Mapping[str, Share]
    answer_only_threshold: Share | None

    def threshold_of(self, model: str, key: str | None) -> float | None:
        """The threshold for a request to ``model`` by the client with the API key named ``key``."""
        if key is not None and key in self.key_thresholds:
            return self.key_thresholds[key]
        return self.model_thresholds.get(model, self.threshold)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A client's key, of which only the hash is known: ``printf %s "$KEY" | sha256sum``."""

    name: str
    sha256: str

    def __post_init__(self) -> None:
        """Check the name and the hash, of which capitals become small."""
        if not self.name:
            raise InputError("name: must not be empty")
        object.__setattr__(self, "sha256", self.sha256.lower())
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise InputError(f"sha256: of the key {self.name} must be 64 hexadecimal digits")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSettings:
    """Where each judged choice is recorded; ``None`` in place of it for no record."""

    folder: str
    texts: bool
    hash_key_env: str | None
    max_mb: Megabytes
    files: Count
    on_failure: Literal["refuse", "continue"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSettings:
    """All that a front needs beside the guard."""

    upstream: UpstreamSettings
    limits: LimitSettings
    policy: PolicySettings
    keys: Sequence[ApiKey]
    audit: AuditSettings | None
    reconnect_s: Seconds
    grace_s: Seconds
    score_decimals: Amount

    def __post_init__(self) -> None:
        """Check that every name of a key is one key's."""
        names = [key.name for key in self.keys]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"keys: two keys have the name {name}")
        if len({key.sha256 for key in self.keys}) < len(names):
            raise InputError("keys: two names have the same key")
        for name in self.policy.key_thresholds:
            if name not in names:
                raise InputError(f"key_thresholds.{name}: no key has this name")

    def key_of(self, secret: str) -> ApiKey | None:
        """The key that a client gave; all are compared, in constant time."""
        digest = hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()
        found = [key for key in self.keys if hmac.compare_digest(key.sha256, digest)]
        return found[0] if found else None
