import logging
from pathlib import Path

import pytest

from mllm_protector.errors import RunError
from mllm_protector.training.logging import WandbTracker
from tests.forked import Started
from tests.training import tagger

CANARY = "canary-4f0c7d-secret"


def train_offline(folder: Path) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tagger.run(folder, tracker=WandbTracker(project="tests", mode="offline", name="a run"), max_steps=3)


def test_an_offline_run_is_written_below_the_output_folder_and_holds_no_secret(tmp_path: Path) -> None:
    secrets = dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "MY_OWN_SECRET"), CANARY)
    # In a process of its own, because wandb writes the last of a run when its process ends.
    ran = Started(train_offline, tmp_path, environment=secrets).end()
    assert ran.code == 0, ran.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    [recorded] = [path for path in files if path.suffix == ".wandb"]
    assert b"validation/loss" in recorded.read_bytes()
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    assert CANARY not in ran.out + ran.err
    said = [line for line in (ran.out + ran.err).splitlines() if "wandb" in line]
    assert said == [f"offline run of Weights & Biases: to upload it, type: wandb sync {recorded.parent}"]


def test_online_without_a_key_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a key might be kept
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    tracker = WandbTracker(project="tests", mode="online", name=None)
    with pytest.raises(
        RunError, match=r"^tracker.mode=online: wandb did not start \(.+\); try .*offline$"
    ) as caught:
        tracker.start(str(tmp_path), {}, resumed=False)
    assert "\n" not in str(caught.value)


def test_a_resumed_training_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []
    monkeypatch.setattr("wandb.init", lambda **settings: calls.append(settings))
    for mode, resumed, asked in (("online", True, "allow"), ("offline", True, None), ("online", False, None)):
        tracker = WandbTracker(project="tests", mode=mode, name=None)  # type: ignore[arg-type]
        tracker.start(str(tmp_path), {}, resumed=False)
        tracker.start(str(tmp_path), {}, resumed=resumed)
        first, second = calls[-2:]
        assert (first["id"] == second["id"]) == resumed, (mode, resumed)
        assert (first["resume"], second["resume"]) == (None, asked), (mode, resumed)
