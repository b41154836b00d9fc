"""A detector behind vLLM scores as the same detector here, and a server that is not one is refused."""

import asyncio
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_protector.errors import InputError, RunError
from mllm_protector.guard.protector import Protector, Refusal
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.models.export import export_detector
from mllm_protector.prompts import REFUSAL
from mllm_protector.records import Outcome
from mllm_protector.serving.remote_detector import ROWS, RemoteDetector, load_remote_detector
from tests.models.fixtures import LORA
from tests.serving.fake_vllm import FakeVllm, Values
from tests.serving.processes import until
from tests.serving.stubs import running

CHECK_S = 0.05
CANARY = "CANARY-51c8"


@pytest.fixture(scope="module")
def folder(make_detector: Callable[..., HarmDetector], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    made = make_detector(tuning=LORA)
    with torch.no_grad():
        made.model.base_model.model.score.modules_to_save["default"].weight.mul_(30)  # logits far from 0
    made.save(root / "trained")
    given: dict[str, Any] = {"base": None, "push_to": None, "private": True}
    return export_detector(detector=str(root / "trained"), output_dir=str(root / "exported"), **given)


@pytest.fixture(scope="module")
def local(folder: Path) -> HarmDetector:
    return load_detector(folder, device="cpu")


@contextmanager
def remote(folder: Path, *servers: FakeVllm, **settings: Any) -> Iterator[RemoteDetector]:
    given = {"timeout_s": 20.0, "check_s": 60.0} | settings
    detector = load_remote_detector(folder, [server.url for server in servers], **given)
    try:
        yield detector
    finally:
        detector.close()


def pairs(count: int) -> dict[str, list[str]]:
    return {
        "queries": [f"What is number {index}?" for index in range(count)],
        "answers": [f"It is {index}." * (1 + index % 7) for index in range(count)],
    }


def test_scores_are_those_of_the_detector_here(folder: Path, local: HarmDetector) -> None:
    texts = pairs(2 * ROWS + 5)
    texts["queries"] += ["", "</s> <pad>", "A long one?", "Ｗｈａｔ is this?"]
    texts["answers"] += ["", "Mix <s> flour \n", 400 * "A red square. ", "Ｎｏ\u200bthing"]
    expected = local.score(**texts)
    assert max(expected) - min(expected) > 0.5
    assert any(len(rows) > 1 for rows in local.encoder.windows(**texts))
    with FakeVllm(local) as one, FakeVllm(local) as other, remote(folder, one, other) as detector:
        assert detector.score(**texts) == pytest.approx(expected, abs=1e-5)
        assert detector.threshold == local.threshold
        assert abs(one.rows - other.rows) <= ROWS, "the rows of one batch are not spread over the servers"
        assert detector.score(queries=[], answers=[]) == []


def test_the_model_worker_runs_on_it_unchanged(folder: Path, local: HarmDetector) -> None:
    texts = pairs(40)

    async def scores(detector: RemoteDetector) -> list[Any]:
        async with running(detector, patience_ms=50) as guard:
            asked = zip(texts["queries"], texts["answers"], strict=True)
            found = await asyncio.gather(*(guard.client.guard(*pair) for pair in asked))
            return [each.score for each in found]

    with FakeVllm(local) as server, remote(folder, server) as detector:
        assert asyncio.run(scores(detector)) == pytest.approx(local.score(**texts), abs=1e-5)
        assert len(server.asked) < 20, "concurrent answers are sent one at a time"


def test_the_folder_needs_no_weights(folder: Path, local: HarmDetector, tmp_path: Path) -> None:
    light = Path(shutil.copytree(folder, tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors")))
    with FakeVllm(local) as server, remote(light, server) as detector:
        assert detector.score(**pairs(3)) == pytest.approx(local.score(**pairs(3)), abs=1e-5)
    (light / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json: not a file that the part was saved with"):
        load_remote_detector(light, ["http://127.0.0.1:1"])


def sigmoid(logits: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-logit)) for logit in logits]


def few_bits(logits: list[float]) -> list[float]:
    return [round(logit * 1.01, 3) + 0.02 for logit in logits]


WRONG: dict[str, Values] = {
    "applies softmax": lambda logits: [1.0] * len(logits),
    "applies a sigmoid": sigmoid,
    "half precision": few_bits,
    "another model": lambda logits: [-logit for logit in logits],
    "not numbers": lambda logits: [None] * len(logits),
    "values that are not numbers": lambda logits: ["1.5"] * len(logits),
    "2 values for a text": lambda logits: [[0.0, logit] for logit in logits],
    "answers 3 rows of 4": lambda logits: logits[1:],
}


def test_a_server_that_gives_something_else_is_refused_with_the_likely_cause(
    folder: Path, local: HarmDetector
) -> None:
    for cause, values in WRONG.items():
        with FakeVllm(local, values) as server, pytest.raises(RunError) as refused:
            load_remote_detector(folder, [server.url])
        message = str(refused.value)
        assert message.startswith(f"detector_urls: no server can be used: {server.url} "), cause
        assert cause in message
        assert "\n" not in message
    with FakeVllm(local, extra=1) as server, pytest.raises(RunError, match="cuts texts or adds tokens"):
        load_remote_detector(folder, [server.url])
    with FakeVllm(local) as server:
        with pytest.raises(RunError, match="HTTP status 404; is this the server's root, without /v1"):
            load_remote_detector(folder, [f"{server.url}/v1"])
        server.stop()
        with pytest.raises(RunError, match="cannot be reached"):
            load_remote_detector(folder, [server.url])


def test_half_precision_is_a_matter_of_the_tolerance(folder: Path, local: HarmDetector) -> None:
    with FakeVllm(local, few_bits) as server, remote(folder, server, tolerance=1.0) as detector:
        assert detector.score(**pairs(3)) != pytest.approx(local.score(**pairs(3)), abs=1e-5)
        assert detector.card.identity["tolerance"] == 1.0


def test_an_export_without_known_answers_or_with_another_tokenizer_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    content = json.loads((copied / "guard.json").read_text())
    known = content.pop("known")
    (copied / "guard.json").write_text(json.dumps(content))
    load_detector(copied, device="cpu")
    with pytest.raises(InputError, match=r"no known answers .* export the detector again"):
        load_remote_detector(copied, ["http://127.0.0.1:1"])
    known[0]["ids"] = known[0]["ids"][1:]
    (copied / "guard.json").write_text(json.dumps({**content, "known": known}))
    with pytest.raises(InputError, match="this tokenizer makes other token ids"):
        load_remote_detector(copied, ["http://127.0.0.1:1"])


def test_no_address_and_no_message_may_hold_a_secret(folder: Path) -> None:
    with pytest.raises(InputError, match="detector_urls: must hold no user, password") as refused:
        load_remote_detector(folder, ["http://me:secret@127.0.0.1:1"])
    assert "secret" not in str(refused.value)
    for wrong in ([], ["127.0.0.1:8000"]):
        with pytest.raises(InputError, match=r"^detector_urls: "):
            load_remote_detector(folder, wrong)


def test_the_key_is_sent_from_its_environment_variable(
    folder: Path, local: HarmDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUARD_KEY", "a-key")
    with FakeVllm(local) as server, remote(folder, server, api_key_env="GUARD_KEY"):
        assert set(server.keys) == {"Bearer a-key"}
    with FakeVllm(local) as server, remote(folder, server):
        assert set(server.keys) == {None}


def test_a_server_that_dies_is_left_out_and_asked_for_the_known_answers_before_it_comes_back(
    folder: Path, local: HarmDetector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    expected = pytest.approx(local.score(**pairs(3)), abs=1e-5)
    with (
        FakeVllm(local) as one,
        FakeVllm(local) as other,
        remote(folder, one, other, check_s=CHECK_S) as detector,
    ):
        one.stop()
        for _ in range(4):
            assert detector.score(**pairs(3)) == expected
        assert f"detector_urls: {one.url} is not used" in caplog.text
        one.values = lambda logits: [logit + 3 for logit in logits]
        one.start()
        until(lambda: "serves another model" in caplog.text)
        for _ in range(4):
            assert detector.score(**pairs(3)) == expected
        one.values = lambda logits: logits
        until(lambda: caplog.text.count(f"{one.url} is used") >= 2)
        other.stop()
        assert detector.score(**pairs(3)) == expected


def test_a_slow_server_costs_one_wait_and_then_none(folder: Path, local: HarmDetector) -> None:
    with (
        FakeVllm(local) as one,
        FakeVllm(local) as other,
        remote(folder, one, other, timeout_s=4.0) as detector,
    ):
        one.seconds = 1000.0
        assert detector.score(**pairs(3)) == pytest.approx(local.score(**pairs(3)), abs=1e-5)
        before = time.monotonic()
        for _ in range(3):
            detector.score(**pairs(3))
        assert time.monotonic() - before < 4.0


def test_with_all_servers_down_every_answer_is_refused_at_once(
    folder: Path, local: HarmDetector, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeVllm(local) as one, FakeVllm(local) as other, remote(folder, one, other) as detector:
        one.stop()
        other.stop()
        protector = Protector(detector, Refusal(), 1.0)
        replies = protector.guard(queries=["Why?"] * 20, answers=[CANARY] * 20)
    assert {reply.outcome for reply in replies} == {Outcome.GUARD_ERROR}
    assert {reply.final for reply in replies} == {REFUSAL}
    assert CANARY not in caplog.text


def test_a_text_that_no_server_takes_costs_its_own_answer_only(folder: Path, local: HarmDetector) -> None:
    for status in (400, 500):
        with FakeVllm(local) as one, FakeVllm(local) as other, remote(folder, one, other) as detector:
            [[poison]] = local.encoder.windows(queries=["Why?"], answers=["poison"])
            for server in (one, other):
                server.refused[tuple(poison)] = status
            texts = {"queries": ["Why?"] * 3, "answers": ["fine", "poison", "good"]}
            for _ in range(3):
                replies = Protector(detector, Refusal(), 1.0).guard(**texts)
                outcomes = [reply.outcome for reply in replies]
                assert outcomes == [Outcome.ALLOWED, Outcome.GUARD_ERROR, Outcome.ALLOWED], status


def test_a_score_that_is_not_a_number_lets_nothing_pass(folder: Path, local: HarmDetector) -> None:
    with FakeVllm(local) as server, remote(folder, server) as detector:
        server.values = lambda logits: [None] * len(logits)
        [reply] = Protector(detector, Refusal(), 1.0).guard(queries=["Why?"], answers=["Because."])
        assert reply.outcome == Outcome.GUARD_ERROR


def test_closing_ends_the_checks(folder: Path, local: HarmDetector) -> None:
    with FakeVllm(local) as server:
        with remote(folder, server, check_s=CHECK_S):
            until(lambda: len(server.asked) > 2)
        until(lambda: "detector_urls" not in {thread.name for thread in threading.enumerate()})
        before = len(server.asked)
        time.sleep(4 * CHECK_S)
        assert len(server.asked) <= before + 1  # one may have been on its way
