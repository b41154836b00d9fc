"""The audit log: what a line holds, that it is there before the answer, and what a failing disk does."""

import asyncio
import errno
import hashlib
import hmac
import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Counter

from mllm_protector.errors import InputError
from mllm_protector.prompts import REFUSAL
from mllm_protector.records import Outcome
from mllm_protector.serving import audit
from mllm_protector.serving.api_errors import ApiError
from mllm_protector.serving.audit import AuditLog
from mllm_protector.serving.guarding import Guarded
from mllm_protector.serving.judging import Case, Judged
from mllm_protector.serving.settings import ApiKey, AuditSettings, FrontSettings
from tests.serving.builders import audit_settings
from tests.serving.fakes import SAFE, completion, message, served
from tests.serving.test_proxy import CANARY, QUESTION, ask, saying, to

WANTED = {
    "key": "ann",
    "model": "other",
    "choice": 0,
    "outcome": "allowed",
    "mode": "enforce",
    "score": 0.1,
    "threshold": 0.5,
}


def recording(settings: AuditSettings, **changes: Any) -> Callable[[str], FrontSettings]:
    return lambda url: to(url, audit=settings, **changes)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def judged(text: str = "words", shadow: bool = False) -> Judged:
    choice = message(text)
    return Judged(
        content={"choices": [choice]},
        verdicts=[Guarded(Outcome.ALLOWED, text, 0.1, 0.0)],
        cases=[Case(query="Why?", structured=False, threshold=None)],
        raw=[choice],
        shadow=shadow,
    )


def log_in(folder: Path, **changes: Any) -> AuditLog:
    return AuditLog(audit_settings(folder, **changes), Counter("failures", "", registry=None))


def test_each_judged_choice_is_a_line_without_its_texts(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    key = ApiKey(name="ann", sha256=sha256("secret"))
    said = completion(message(f"fine {CANARY}"), message("FORBIDDEN", 1), message("HOPELESS", 2))
    question = {"model": CANARY, "messages": [{"role": "user", "content": f"Why {CANARY}?"}]}
    with served(saying(said), recording(audit_settings(folder), keys=[key])) as on:
        answer = ask(on, question, authorization="Bearer secret")
        first, second, third = lines_of(folder / "audit-1.jsonl")
        ask(on, {**question, "stream": True}, authorization="Bearer secret")
        assert len(lines_of(folder / "audit-1.jsonl")) == 6
    assert CANARY not in (folder / "audit-1.jsonl").read_text()
    assert first["time"].endswith("+00:00")
    assert first["request_id"] == answer.headers["x-request-id"]
    assert {name: first[name] for name in WANTED} == WANTED
    assert first["hash"] == "sha256"
    assert first["question_hash"] == sha256(f"Why {CANARY}?")
    assert first["answer_hash"] == first["shown_hash"] == sha256(f"fine {CANARY}")
    assert first["answer_length"] == len(f"fine {CANARY}")
    assert (second["outcome"], third["outcome"]) == ("rewritten", "refused")
    assert (second["answer_hash"], second["shown_hash"]) == (sha256("FORBIDDEN"), sha256(SAFE))
    assert third["shown_hash"] == sha256(REFUSAL)
    assert stat.S_IMODE((folder / "audit-1.jsonl").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_secret_makes_the_hashes_and_texts_are_in_the_clear_only_by_wish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUDIT_KEY", "pepper")
    settings = audit_settings(tmp_path, texts=True, hash_key_env="AUDIT_KEY")
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
    with served(saying(completion(message("fine", tool_calls=[call]))), recording(settings)) as on:
        ask(on)
    [line] = lines_of(tmp_path / "audit-1.jsonl")
    assert line["hash"] == "hmac-sha256"
    assert line["question_hash"] == hmac.digest(b"pepper", b"Why?", "sha256").hex()
    assert line["question"] == "Why?"
    assert line["answer"] == line["shown"]
    assert line["answer"].splitlines()[0] == "fine"
    assert "a: b" in line["answer"]


def test_in_shadow_mode_the_line_says_what_was_shown(tmp_path: Path) -> None:
    settings = recording(audit_settings(tmp_path), policy={"shadow": True, "threshold": 0.7})
    with served(saying(completion(message("FORBIDDEN"))), settings) as on:
        ask(on)
    [line] = lines_of(tmp_path / "audit-1.jsonl")
    assert (line["mode"], line["outcome"], line["threshold"]) == ("shadow", "rewritten", 0.7)
    assert line["shown_hash"] == sha256("FORBIDDEN")


def test_a_disk_that_fails_holds_answers_back_or_is_counted_by_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(audit._File, "write", full)
    said = saying(completion(message("fine")))
    with served(said, recording(audit_settings(tmp_path))) as on:
        for question in (QUESTION, {**QUESTION, "stream": True}):
            answer = ask(on, question)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "audit_failed")
            assert "fine" not in answer.text
        assert on.count("audit_errors_total") == 2
    for settings in (
        recording(audit_settings(tmp_path, on_failure="continue")),
        recording(audit_settings(tmp_path), policy={"shadow": True}),
    ):
        with served(said, settings) as on:
            assert ask(on).json()["choices"][0]["message"]["content"] == "fine"
            assert on.count("audit_errors_total") == 1


def test_a_disk_that_hangs_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "WRITTEN_S", 0.1)
    monkeypatch.setattr(audit._File, "write", lambda self, line: time.sleep(0.5))
    log = log_in(tmp_path)
    with pytest.raises(ApiError, match="held back"):
        asyncio.run(log.write(judged(), 0.5))
    log.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "audit-1.jsonl"
    path.write_text('{"whole": 1}\n{"cut o')
    path.chmod(0o644)
    log = log_in(tmp_path)
    asyncio.run(log.write(judged("one"), 0.5))
    full = os.open("/dev/full", os.O_WRONLY)
    kept = os.dup(log._file.stream.fileno())
    os.dup2(full, log._file.stream.fileno())
    with pytest.raises(ApiError):
        asyncio.run(log.write(judged("lost"), 0.5))
    asyncio.run(log.write(judged("two"), 0.5))
    log.close()
    os.close(full)
    os.close(kept)
    first, cut, one, two = path.read_text().splitlines()
    assert (json.loads(first), cut) == ({"whole": 1}, '{"cut o')
    assert [json.loads(line)["answer_hash"] for line in (one, two)] == [sha256("one"), sha256("two")]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_full_files_are_renamed_and_the_oldest_removed(tmp_path: Path) -> None:
    log = log_in(tmp_path, max_mb=0.002, files=2)
    for number in range(30):
        asyncio.run(log.write(judged(f"words {number}"), 0.5))
    log.close()
    paths = sorted(tmp_path.glob("audit-1.jsonl*"))
    assert [path.name for path in paths] == ["audit-1.jsonl", "audit-1.jsonl.1", "audit-1.jsonl.2"]
    assert all(path.stat().st_size <= 2000 for path in paths)
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}
    kept = [line["answer_hash"] for path in reversed(paths) for line in lines_of(path)]
    assert kept == [sha256(f"words {number}") for number in range(30 - len(kept), 30)]


def test_each_front_has_its_own_file_and_takes_over_that_of_a_dead_one(tmp_path: Path) -> None:
    one, two = log_in(tmp_path), log_in(tmp_path)
    assert [each.path.name for each in (one, two)] == ["audit-1.jsonl", "audit-2.jsonl"]
    one.close()
    three = log_in(tmp_path)
    assert three.path.name == "audit-1.jsonl"
    two.close()
    three.close()


def test_what_cannot_work_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"audit\.folder=.*file"):
        log_in(tmp_path / "file")
    with pytest.raises(InputError, match=r"audit\.hash_key_env=NO_SUCH_KEY"):
        log_in(tmp_path, hash_key_env="NO_SUCH_KEY")
