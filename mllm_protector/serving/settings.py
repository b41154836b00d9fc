"""What ``configs/serve.yaml`` fills. Single values are checked against these annotations when it is read."""

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
    """The guard that the model worker loads; keys as in ``Protector.from_pretrained``.

    Attributes:
        detector_urls: the servers of the exported detector; empty: it is computed here.
        detoxifier_url: the server of the detoxifier; ``None``: it is computed here.
        detoxifier_model: its name there; without ``detoxifier``, the name of a chat model.
        api_key_env: the environment variable with the key of these servers.
        detector_timeout_s: the longest that one request to the detector may take.
        detoxifier_timeout_s: the longest that one rewrite may take.
        tolerance: by how much a server's logits of known answers may differ from the export's.
    """

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

    Attributes:
        batch_tokens: a batch is computed when it holds as many tokens (bytes / 4), or after the patience.
        patience_ms: the longest that a request waits for others to join its batch.
        waiting: most requests that wait; more are answered "overloaded" at once.
        waiting_mb: most megabytes of texts that wait.
        request_mb: the longest question and answer together; longer ones are refused unread.
        deadline_s: of one guarded answer, rewrites included.
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
    """How the supervisor treats the model worker.

    Attributes:
        start_s: the longest that loading the models may take.
        hang_s: a worker that computes one batch for longer is ended, and started again.
        stop_s: the longest that a worker may finish what is under way when it is told to stop.
        after_s: wait before a dead worker is started again; doubled each time it dies soon after.
        at_most_s: the longest wait; a worker that lived for longer than this starts over at ``after_s``.
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
    """The OpenAI-compatible server that is guarded.

    Attributes:
        url: such as ``http://127.0.0.1:8000/v1``.
        api_key_env: the environment variable with the upstream's key; ``None`` passes the client's key on.
        connect_s: the longest that connecting may take.
        read_s: the longest silence of the upstream.
        total_s: the longest that one answer may take.
        connections: most connections to the upstream of one front worker.
    """

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
    """What a client may ask for.

    Attributes:
        body_mb: of a request's body, images included.
        body_s: the longest that its body may take to arrive.
        answer_mb: of an upstream's answer, all choices together.
        choices: the largest ``n``.
        requests: most requests under way in one front worker; more get 503.
    """

    body_mb: Megabytes
    body_s: Seconds
    answer_mb: Megabytes
    choices: Count
    requests: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    """What happens to an answer.

    Attributes:
        streaming: ``buffer`` releases a stream when all of it is judged; ``window`` releases what is behind
            a judged prefix; ``off`` releases everything without a verdict.
        window_tokens: of ``window``: how many more tokens (bytes / 4) are judged at a time.
        window_hits: of ``window``: how many prefixes in a row must be flagged before the stream is cut.
        ping_s: between two comments that keep a silent stream open.
        on_flag: what replaces a flagged answer.
        on_error: what a client gets if the guard fails: a refusal in place of the answer, or an error.
        refused_finish_reason: of a refused choice. The official client's ``parse`` raises at
            ``content_filter``.
        shadow: everything passes unchanged; what would have happened is only counted and logged.
        threshold: scores at or above it are flagged; ``None`` for the detector's own.
        model_thresholds: instead of ``threshold``, by the name of the upstream's model.
        key_thresholds: instead of both, by the name of the client's API key.
        answer_only_threshold: instead of all three where another gateway does not tell the question.
    """

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
    """Where each judged choice is recorded.

    Attributes:
        folder: of the files; each front has its own.
        texts: whether question, answer and shown text stand in it, or only their hashes.
        hash_key_env: the environment variable with the secret key of the hashes; ``None`` for plain sha256.
        max_mb: of one file.
        files: older files that are kept of each.
        on_failure: what happens to an answer that cannot be recorded; ``refuse`` is a 503.
    """

    folder: str
    texts: bool
    hash_key_env: str | None
    max_mb: Megabytes
    files: Count
    on_failure: Literal["refuse", "continue"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSettings:
    """All that a front worker needs beside the guard.

    Attributes:
        keys: of the clients that are let in; empty lets everyone in.
        audit: ``None`` for no record.
        reconnect_s: the longest wait between two tries to reach the model worker.
        grace_s: the longest that requests under way may take when the front is told to stop.
        score_decimals: of scores in extension fields; 0 shows none.
    """

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
