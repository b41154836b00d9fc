"""A detoxifier behind an OpenAI-compatible server, and which parts a config makes of a guard."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mllm_protector.errors import InputError, RunError
from mllm_protector.guard.protector import Protector
from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.detoxifier import Detoxifier, load_detoxifier
from mllm_protector.models.export import export_detector
from mllm_protector.prompts import REFUSAL
from mllm_protector.records import Outcome
from mllm_protector.serving.loading import load
from mllm_protector.serving.remote_detector import RemoteDetector
from mllm_protector.serving.remote_detoxifier import (
    ChatDetoxifier,
    RemoteDetoxifier,
    load_remote_detoxifier,
)
from tests.models.fixtures import LORA
from tests.serving.builders import guard_settings
from tests.serving.fake_vllm import FakeCompletions, FakeVllm

TEXTS = {
    "queries": ["How do I bake bread?", "", "</s>", "Why? " * 80],
    "answers": ["placeholder of a harmful answer", "", "<s> a", "Because. " * 80],
}


@pytest.fixture(scope="module")
def folder(make_detoxifier: Callable[..., Detoxifier], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("detoxifier") / "detoxifier"
    make_detoxifier(tuning=LORA).save(root)
    return root


@pytest.fixture(scope="module")
def local(folder: Path) -> Detoxifier:
    return load_detoxifier(folder, device="cpu")


def test_first_attempts_are_those_of_the_detoxifier_here(
    folder: Path, local: Detoxifier, tmp_path: Path
) -> None:
    light = Path(shutil.copytree(folder, tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors")))
    with FakeCompletions(local) as server:
        remote = load_remote_detoxifier(light, f"{server.url}/v1", "mine", check_s=60.0)
        written = remote.correct(**TEXTS)
        assert written == local.correct(**TEXTS)
        assert len(set(written)) > 1
        assert {body["temperature"] for body in server.asked} == {0}
        remote.close()


def test_later_attempts_are_sampled_from_a_seed_of_the_row_and_the_attempt(
    folder: Path, local: Detoxifier
) -> None:
    with FakeCompletions(local) as server:
        remote = load_remote_detoxifier(folder, f"{server.url}/v1", "mine", check_s=60.0)
        for attempt in (1, 1, 2):
            remote.correct(queries=["Why?"] * 2, answers=["a", "b"], attempt=attempt)
        bodies = server.asked[1:]
        remote.close()
    assert {(body["temperature"], body["top_p"]) for body in bodies} == {(0.7, 0.95)}
    seeds = [{body["seed"] for body in bodies[start : start + 2]} for start in (0, 2, 4)]
    assert seeds[0] == seeds[1]
    assert len(seeds[0] | seeds[2]) == 4
    assert all(0 <= seed < 2**31 for seed in seeds[0])


def test_a_model_that_the_server_has_not_is_refused_at_once(folder: Path, local: Detoxifier) -> None:
    with FakeCompletions(local) as server, pytest.raises(RunError, match=r"^detoxifier_url: .* status 404"):
        load_remote_detoxifier(folder, f"{server.url}/v1", "another")


def test_a_server_that_is_gone_means_a_refusal(folder: Path, local: Detoxifier) -> None:
    class Suspicious:
        card = local.card

        def score(self, *, queries: list[str], answers: list[str]) -> list[float]:
            return [0.9] * len(answers)

    with FakeCompletions(local) as server:
        remote = load_remote_detoxifier(folder, f"{server.url}/v1", "mine", check_s=60.0)
        server.stop()
        [reply] = Protector(Suspicious(), remote, 0.5).guard(queries=["Why?"], answers=["a"])
        assert (reply.outcome, reply.final) == (Outcome.GUARD_ERROR, REFUSAL)
        remote.close()


def test_a_chat_model_is_asked_in_words(local: Detoxifier) -> None:
    with FakeCompletions(local) as server:
        chat = ChatDetoxifier(f"{server.url}/v1", "mine")
        texts = {"queries": ["Why is it so?"], "answers": ["placeholder of a harmful answer"]}
        assert chat.correct(**texts) == ["Better: Below is"]
        chat.correct(**texts, attempt=1)
        first, later = server.asked
        [turn] = first["messages"]
        assert texts["queries"][0] in turn["content"]
        assert texts["answers"][0] in turn["content"]
        assert (first["temperature"], later["temperature"]) == (0, 0.7)
        assert first["seed"] != later["seed"]
        server.stop()
        assert chat.correct(**texts) == [""]


def test_a_config_puts_each_part_here_or_elsewhere(
    folder: Path, local: Detoxifier, make_detector: Callable[..., HarmDetector], tmp_path: Path
) -> None:
    make_detector().save(tmp_path / "trained")
    exported = export_detector(
        detector=str(tmp_path / "trained"),
        output_dir=str(tmp_path / "exported"),
        base=None,
        push_to=None,
        private=True,
    )
    with FakeVllm(make_detector()) as scorer, FakeCompletions(local) as writer:
        scoring = {"detector": str(exported), "detector_urls": [scorer.url], "tolerance": 10}
        writing = {"detoxifier_url": f"{writer.url}/v1", "detoxifier_model": "mine"}
        for settings, detector, corrector in (
            (scoring, RemoteDetector, "Refusal"),
            (scoring | {"detoxifier": str(folder)}, RemoteDetector, "Detoxifier"),
            (scoring | writing, RemoteDetector, "ChatDetoxifier"),
            (
                {"detector": str(exported), "detoxifier": str(folder)} | writing,
                HarmDetector,
                "RemoteDetoxifier",
            ),
            ({"detector": str(exported)}, HarmDetector, "Refusal"),
        ):
            made = load(guard_settings(**settings, max_answer_tokens=77))
            assert isinstance(made.detector, detector)
            assert type(made.corrector).__name__ == corrector
            assert (made.threshold, made.max_answer_tokens) == (0.4, 77)
            for part in (made.detector, made.corrector):
                if isinstance(part, RemoteDetector | RemoteDetoxifier):
                    part.close()


def test_a_served_detoxifier_needs_both_address_and_name() -> None:
    for given in ({"detoxifier_url": "http://127.0.0.1:1/v1"}, {"detoxifier_model": "mine"}):
        with pytest.raises(InputError, match="detoxifier_model: give it with detoxifier_url"):
            guard_settings(**given)
