import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_protector.errors import RunError
from mllm_protector.training.logging import NoTracker, WandbTracker
from tests.training import tagger

REPOSITORY = Path(__file__).parents[2]
CANARY = "canary-4f0c7d-secret"


OFFLINE_RUN = """
import sys
from pathlib import Path
from mllm_protector.training.logging import WandbTracker
from tests.training import tagger

tracker = WandbTracker(project="tests", mode="offline", name="a run")
tagger.run(Path(sys.argv[1]), tracker=tracker, max_steps=3)
"""


def test_an_offline_run_is_written_below_the_output_folder_and_holds_no_secret(tmp_path: Path) -> None:
    secrets = dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "MY_OWN_SECRET"), CANARY)
    # A process of its own, because wandb writes the last of a run when its process ends.
    ran = subprocess.run(
        [sys.executable, "-c", OFFLINE_RUN, str(tmp_path)],
        env=os.environ | secrets,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    [recorded] = [path for path in files if path.suffix == ".wandb"]
    assert b"validation/loss" in recorded.read_bytes()
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    assert CANARY not in ran.stdout + ran.stderr
    assert "wandb" not in ran.stdout + ran.stderr


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


def test_without_a_tracker_the_metrics_are_in_metrics_jsonl(tmp_path: Path) -> None:
    tagger.run(tmp_path, tracker=NoTracker(), max_steps=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [(row["step"], row["kind"]) for row in map(json.loads, lines)] == [
        (1, "train"),
        (2, "train"),
        (2, "validation"),
    ]


@pytest.mark.parametrize(
    ("mode", "resumed", "same", "asked"),
    [
        ("online", True, True, "allow"),
        ("offline", True, True, None),
        ("online", False, False, None),
    ],
)
def test_a_resumed_training_continues_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, resumed: bool, same: bool, asked: str | None
) -> None:
    calls: list[dict[str, object]] = []
    monkeypatch.setattr("wandb.init", lambda **settings: calls.append(settings))
    tracker = WandbTracker(project="tests", mode=mode, name=None)
    tracker.start(str(tmp_path), {}, resumed=False)
    tracker.start(str(tmp_path), {}, resumed=resumed)
    assert (calls[0]["id"] == calls[1]["id"]) == same
    assert (calls[0]["resume"], calls[1]["resume"]) == (None, asked)
