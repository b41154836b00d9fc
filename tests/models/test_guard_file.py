import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mllm_protector.errors import InputError, RunError
from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.guard_file import FILE_NAME, Scale, read_guard_file
from mllm_protector.prompts import template_hash
from tests.models.fixtures import LORA


@pytest.fixture(scope="module")
def saved(make_detector: Callable[..., HarmDetector], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "detector"
    make_detector().save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved detector that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "part"))


def change(folder: Path, name: str = FILE_NAME, **changes: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_calibration_found_is_read_as_it_was_written(folder: Path):
    found: dict[str, Any] = {
        "threshold": 0.123456789012345678,
        "threshold_how": "best F1 (0.900) on 20 answers",
        "group_thresholds": {"01-Illegal_Activitiy": 0.25},
        "temperature": 1 / 3,
        "offset": -0.1,
        "calibration": {"aim": "f1", "target": None, "promised": None, "ece": 0.1},
        "window": 64,
    }
    replace(read_guard_file(folder, "detector"), **found).write(folder)
    read = read_guard_file(folder, "detector")
    assert {name: getattr(read, name) for name in found} == found


LATER = ("group_thresholds", "calibration", "window", "offset", "files", "base_fingerprint", "pretrained")
"""Keys that the first release did not have."""


def test_a_guard_file_of_before_these_keys_loads_without_them(folder: Path, caplog: pytest.LogCaptureFixture):
    content = json.loads((folder / FILE_NAME).read_text())
    earlier = {key: value for key, value in content.items() if key not in LATER} | {"schema": 1}
    (folder / FILE_NAME).write_text(json.dumps(earlier))
    for _ in range(2):
        read = read_guard_file(folder, "detector")
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"{folder}: saved by an earlier release, so its configuration and tokenizer files are not checked"
    ]
    assert (read.group_thresholds, read.calibration, read.window) == ({}, None, None)
    assert read.scale == Scale(temperature=1.5, offset=0.0)


def test_an_origin_is_what_is_known_before_the_training_and_nothing_measured(folder: Path):
    guard = read_guard_file(folder, "detector")
    measured = {"threshold": 0.9, "threshold_how": "x", "temperature": 9.0, "offset": 1.0}
    measured |= {"calibration": {"n": 1}, "metrics": {"f1": 1.0}}
    assert replace(guard, **measured).origin() == guard.origin()
    assert guard.origin()["schema"] == 1, "a training that an earlier release began can no longer go on"
    for change in ({"window": 8}, {"max_length": 8}, {"prompt": "{query}{answer}"}, {"data": {"x": 1}}):
        assert replace(guard, **change).origin() != guard.origin()


def test_a_folder_that_holds_no_such_part_is_refused(folder: Path, tmp_path: Path):
    for kind in ("detector", "detoxifier"):
        with pytest.raises(
            InputError, match=f"no such folder; train the {kind} first or give {kind}=<folder>"
        ):
            read_guard_file(tmp_path / "nowhere", kind)
    with pytest.raises(InputError, match="holds a detector, but a detoxifier is wanted"):
        read_guard_file(folder, "detoxifier")


def test_an_edited_guard_file_is_refused(folder: Path):
    good = (folder / FILE_NAME).read_text()
    prompts = ("{answer}", "{query}", "{query}{answer}{query}", "none", "")
    cases: list[tuple[dict[str, object], str]] = [
        ({"schema": 99}, "another release"),
        ({"prompt": "{answer}"}, "the prompt was edited"),
        ({"prompt": None}, "the prompt was edited"),
        ({"prompt_sha256": ""}, "the prompt was edited"),
        ({"base": {"nmae": "x"}}, "base.name is missing"),
        ({"weights": {}}, "names no weights"),
        ({"weights": {"model.safetensors": "0" * 64}}, "not a file that the part was saved with"),
        *(
            ({"prompt": each, "prompt_sha256": template_hash(each)}, "must have the fields")
            for each in prompts
        ),
    ]
    for changes, message in cases:
        (folder / FILE_NAME).write_text(good)
        change(folder, **changes)
        assert message in refusal(folder), changes


IMPOSSIBLE: dict[str, list[Any]] = {
    "schema": [0, 3, True, "2", None, math.nan],
    "tuning": ["none", "lora", None],
    "base": [{}, [], "x"],
    "base.name": ["", 3, None],
    "base.dtype": ["float8", None],
    "base.quantization": ["2bit"],
    "base.trust_remote_code": ["no", 1],
    "base.path": ["x"],
    "base_fingerprint": ["abc", 1],
    "pretrained": ["yes", 0, None],
    "max_length": [0, -1, 1.5, True, "512", math.inf],
    "pad_id": [-1, 0.5, False, None],
    "chat": ["yes", 1, None],
    "joined": ["yes", 0],
    "threshold": [2, -0.1, True, math.nan, "0.5", None, 1e999],
    "threshold_how": [1],
    "group_thresholds": [[], None],
    "group_thresholds.one": [1.5, False, math.nan, None],
    "temperature": [-1, 0, math.inf, math.nan, True, "x"],
    "offset": [-math.inf, math.inf, math.nan, None, "1", False],
    "calibration": ["x", []],
    "window": [0, -5, 2.5, True],
    "data": [None, []],
    "metrics": [None, {"f1": math.nan}],
    "versions": [None, {"torch": 2}],
    "weights": [None, {"model.safetensors": 1}, {"model.safetensors": "0" * 64}],
    "files": [None, {}, {"config.json": "0" * 64}],
    "harm_convention": ["positive logit = harmless", None],
    "thershold": [0.5],
}
"""Key, or key within a key, to what no training writes there."""


def test_no_key_of_a_guard_file_takes_what_it_cannot_mean(folder: Path):
    path = folder / FILE_NAME
    good = path.read_text()
    for key, values in IMPOSSIBLE.items():
        outer, _, inner = key.partition(".")
        for value in values:
            content = json.loads(good)
            content[outer] = (content.get(outer) or {}) | {inner: value} if inner else value
            path.write_text(json.dumps(content))
            message = refusal(folder)
            assert message.startswith(str(folder)), f"{key}={value}: {message}"
            assert "\n" not in message, key
            # JSON has no NaN, so such a file is refused before anybody looks at its keys.
            known = ("not readable as JSON", "not a file that the part was saved with", outer)
            assert any(words in message for words in known), f"{key}={value}: {message}"


def refusal(folder: Path) -> str:
    """Why a detector's folder is refused; empty where it is not."""
    try:
        read_guard_file(folder, "detector")
    except InputError as error:
        return str(error)
    return ""


def test_a_guard_file_without_one_of_its_keys_is_refused(folder: Path):
    path = folder / FILE_NAME
    good = json.loads(path.read_text())
    for missing in sorted(good):
        path.write_text(json.dumps({key: value for key, value in good.items() if key != missing}))
        assert refusal(folder), missing
        if missing not in ("schema", "kind"):
            assert f"{missing} is missing" in refusal(folder), missing


def one_bit_changed(part: Path) -> None:
    content = bytearray((part / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (part / "model.safetensors").write_bytes(content)


def test_every_file_that_is_loaded_must_be_the_one_that_was_saved(
    make_detector: Callable[..., HarmDetector], saved: Path, bases: dict[str, Path], tmp_path: Path
):
    make_detector(tuning=LORA).save(tmp_path / "adapter")
    copy = partial(shutil.copy, bases["qwen2"] / "tokenizer.json")
    cases: dict[str, tuple[Path, Callable[[Path], object]]] = {
        "config.json": (saved, lambda part: change(part, "config.json", num_hidden_layers=1)),
        "tokenizer.json": (saved, copy),
        "tokenizer_config.json": (saved, lambda part: (part / "tokenizer_config.json").unlink()),
        "chat_template.jinja": (saved, lambda part: (part / "chat_template.jinja").write_text("{{ x }}")),
        "vocab.json": (saved, lambda part: (part / "vocab.json").write_text("{}")),
        "model.safetensors": (saved, one_bit_changed),
        "adapter_model.safetensors": (
            saved,
            lambda part: save_file({"x": torch.zeros(1)}, part / "adapter_model.safetensors"),
        ),
        "adapter_config.json": (
            tmp_path / "adapter",
            lambda part: change(part, "adapter_config.json", lora_alpha=1),
        ),
    }
    for name, (part, damage) in cases.items():
        folder = Path(shutil.copytree(part, tmp_path / "damaged" / name))
        read_guard_file(folder, "detector")
        damage(folder)
        assert refusal(folder).startswith(f"{folder / name}: "), name


def test_the_old_schema_cannot_be_claimed_without_a_warning(folder: Path, caplog: pytest.LogCaptureFixture):
    change(folder, "config.json", num_hidden_layers=1)
    change(folder, schema=1)
    assert "config.json: not a file that the part was saved with" in refusal(folder)
    change(folder, files={})
    assert not refusal(folder)
    assert "configuration and tokenizer files are not checked" in caplog.text


def test_another_tokenizer_over_an_earlier_part_leaves_nothing_of_it(
    make_detector: Callable[..., HarmDetector], folder: Path
):
    earlier = read_guard_file(folder, "detector")
    (folder / "vocab.json").write_text("{}")
    earlier.write(folder)  # as if the earlier tokenizer had had such a file
    (folder / "notes.txt").write_text("mine")
    make_detector(tuning=LORA).save(folder)
    read_guard_file(folder, "detector")
    assert not (folder / "vocab.json").exists()
    assert not (folder / "config.json").exists()
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_save_that_breaks_off_leaves_what_was_there(
    make_detector: Callable[..., HarmDetector], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    detector = make_detector()
    before = read_guard_file(folder, "detector")

    def full(_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(detector.encoder.tokenizer, "save_pretrained", full)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(RunError, match=r"cannot be written \(No space"):
            detector.save(target)
    assert read_guard_file(folder, "detector") == before
    with pytest.raises(InputError, match="not a trained detector"):
        read_guard_file(tmp_path / "new", "detector")
