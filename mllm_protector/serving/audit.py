"""The audit log: one line of JSON for each judged choice, written before the answer is released.

Texts are hashed. A plain hash of a short text can be found by trying likely texts; with a secret key (HMAC)
it cannot, and whoever has the key can still prove which text a line is about. So a key is read from an
environment variable where one is named, and each line says which kind of hash it has.

Each front has a file of its own (``audit-1.jsonl``, ``audit-2.jsonl``, ...): the first that no other process
holds. So no lines are mixed, and a front that is started again goes on with the file of the one that died.
"""

import asyncio
import fcntl
import hashlib
import hmac
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from prometheus_client import Counter

from mllm_protector.errors import InputError
from mllm_protector.serving.api_errors import ApiError
from mllm_protector.serving.choices import Unreadable, calls_of, text_of
from mllm_protector.serving.exchange import current
from mllm_protector.serving.judging import Judged
from mllm_protector.serving.settings import MEGABYTE, AuditSettings

log = logging.getLogger(__name__)

WRITTEN_S = 5.0
"""Seconds after which a disk that does not take a line has failed."""

MOST_FILES = 1000


class AuditLog:
    """Writes lines in a thread of its own.

    Attributes:
        path: of its file.
    """

    def __init__(self, settings: AuditSettings, errors: Counter) -> None:
        """Take a file that nobody else writes; ``errors`` counts failures.

        Raises:
            InputError: the folder cannot be written, or the environment variable of the key is not set.
        """
        self._settings = settings
        self._errors = errors
        self._key = b""
        if name := settings.hash_key_env:
            self._key = os.environ.get(name, "").encode()
            if not self._key:
                raise InputError(f"audit.hash_key_env={name}: this environment variable is not set")
        try:
            folder = Path(settings.folder)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock, self.path = _own_file(folder)
            self._file = _File(self.path, int(settings.max_mb * MEGABYTE), settings.files)
        except OSError as error:
            raise InputError(f"audit.folder={settings.folder}: {error.strerror}") from None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit")

    async def write(self, judged: Judged, own_threshold: float | None) -> None:
        """Write a line for each choice.

        ``own_threshold`` is the detector's.

        Raises:
            ApiError: the disk failed, and by the settings nothing is answered that is not on record.
        """
        now, exchange = datetime.now(UTC).isoformat(timespec="milliseconds"), current()
        facts = {
            "time": now,
            "request_id": exchange.id,
            "key": exchange.key,
            "model": exchange.model,
            "mode": "shadow" if judged.shadow else "enforce",
        }
        work = asyncio.get_running_loop().run_in_executor(
            self._thread, self._write, judged, facts, own_threshold
        )
        try:
            await asyncio.wait_for(work, WRITTEN_S)
        except (OSError, TimeoutError) as error:
            self._errors.inc()
            log.error("the audit log cannot be written (%s)", type(error).__name__)
            if self._settings.on_failure == "refuse" and not judged.shadow:
                message = "the answer cannot be recorded, so it is held back"
                raise ApiError(503, message, code="audit_failed", retry_after="5") from None

    def close(self) -> None:
        """Write what waits, and let go of the file."""
        self._thread.shutdown()
        self._file.close()
        os.close(self._lock)

    def _write(self, judged: Judged, facts: Mapping[str, Any], own_threshold: float | None) -> None:
        choices = zip(judged.cases, judged.raw, judged.verdicts, judged.content["choices"], strict=True)
        for place, (case, raw, verdict, seen) in enumerate(choices):
            line = {
                **facts,
                "choice": place,
                "outcome": verdict.outcome.value,
                "score": verdict.score,
                "threshold": own_threshold if case.threshold is None else case.threshold,
                "hash": "hmac-sha256" if self._key else "sha256",
            }
            texts = {"question": case.query, "answer": _words(raw), "shown": _words(seen)}
            for name, text in texts.items():
                line |= {f"{name}_hash": self._hash(text), f"{name}_length": len(text)}
            if self._settings.texts:
                line |= texts
            self._file.write(json.dumps(line))

    def _hash(self, text: str) -> str:
        content = text.encode(errors="surrogatepass")
        if self._key:
            return hmac.digest(self._key, content, "sha256").hex()
        return hashlib.sha256(content).hexdigest()


class _File(RotatingFileHandler):
    """A file that only its owner may read, and whose failures are raised."""

    def __init__(self, path: Path, size: int, files: int) -> None:
        super().__init__(path, maxBytes=size, backupCount=files, encoding="utf-8")

    def write(self, line: str) -> None:
        """Append a line, in a new file if this one is full; ``OSError`` if the disk fails."""
        self.emit(logging.LogRecord("audit", logging.INFO, "", 0, line, None, None))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - of the standard library
        """Raise, and drop what was only written in part, so that it is not written later."""
        stream, self.stream = self.stream, None
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.close()
        raise

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        os.fchmod(descriptor, 0o600)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a line that was cut off
            os.write(descriptor, b"\n")
        return os.fdopen(descriptor, "a", encoding="utf-8")


def _own_file(folder: Path) -> tuple[int, Path]:
    """The first file of the folder that no living process holds, and the descriptor that holds it."""
    for number in range(1, MOST_FILES):
        lock = os.open(folder / f"audit-{number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            return lock, folder / f"audit-{number}.jsonl"
    raise InputError(f"audit.folder={folder}: {MOST_FILES} processes write there already")


def _words(choice: Mapping[str, Any]) -> str:
    """All that is judged of a choice; empty where it cannot be read."""
    try:
        parts: Sequence[str] = (text_of(choice["message"]), calls_of(choice["message"]))
    except Unreadable:
        return ""
    return "\n\n".join(part for part in parts if part)
