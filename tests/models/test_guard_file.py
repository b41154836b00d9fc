import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mllm_protector.errors import InputError, RunError
from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.detoxifier import Detoxifier
from mllm_protector.models.guard_file import (
    FILE_NAME,
    add_adapter,
    library_versions,
    not_in_adapter,
    part_backbone,
    read_guard_file,
    weight_hashes,
)
from mllm_protector.scaling import Scale
from tests.models.fixtures import FULL, LORA


@pytest.fixture(scope="module")
def saved(make_detector: Callable[..., HarmDetector], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "detector"
    make_detector().save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved detector that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "part"))


def change(folder: Path, **changes: object) -> None:
    path = folder / FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_written_is_what_is_read(
    make_detector: Callable[..., HarmDetector], folder: Path, saved: Path
):
    written, read = make_detector().guard, read_guard_file(folder, "detector")
    for name in ("kind", "tuning", "base", "prompt", "max_length", "pad_id", "threshold", "temperature"):
        assert getattr(read, name) == getattr(written, name)
    assert read.weights == weight_hashes(saved)
    assert read.weights.keys() == {"model.safetensors"}


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


def test_a_guard_file_of_before_these_keys_loads_without_them(folder: Path):
    content = json.loads((folder / FILE_NAME).read_text())
    for name in ("group_thresholds", "calibration", "window", "offset"):
        del content[name]
    (folder / FILE_NAME).write_text(json.dumps(content))
    read = read_guard_file(folder, "detector")
    assert (read.group_thresholds, read.calibration, read.window) == ({}, None, None)
    assert read.scale == Scale(temperature=1.5, offset=0.0)


def test_an_origin_is_what_is_known_before_the_training_and_nothing_measured(folder: Path):
    guard = read_guard_file(folder, "detector")
    measured = replace(
        guard,
        threshold=0.9,
        threshold_how="x",
        temperature=9.0,
        offset=1.0,
        calibration={"n": 1},
        metrics={"f1": 1.0},
    )
    assert measured.origin() == guard.origin()
    for change in ({"window": 8}, {"max_length": 8}, {"prompt": "{query}{answer}"}, {"data": {"x": 1}}):
        assert replace(guard, **change).origin() != guard.origin()


def test_a_missing_folder_says_what_to_give(tmp_path: Path):
    for kind in ("detector", "detoxifier"):
        with pytest.raises(
            InputError, match=f"no such folder; train the {kind} first or give {kind}=<folder>"
        ):
            read_guard_file(tmp_path / "nowhere", kind)


def test_a_folder_without_guard_file_is_no_trained_part(folder: Path):
    (folder / FILE_NAME).unlink()
    with pytest.raises(InputError, match="not a trained detector"):
        read_guard_file(folder, "detector")


def test_a_part_of_the_other_kind_is_refused(folder: Path):
    with pytest.raises(InputError, match="holds a detector, but a detoxifier is wanted"):
        read_guard_file(folder, "detoxifier")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "another release"),
        ({"prompt": "{answer}"}, "the prompt was edited"),
        ({"prompt": None}, "the prompt was edited"),
        ({"prompt_sha256": ""}, "the prompt was edited"),
        ({"base": {"nmae": "x"}}, "incomplete"),
        ({"weights": {}}, "names no weights"),
        ({"weights": {"model.safetensors": "0" * 64}}, "not a file that the part was saved with"),
    ],
)
def test_an_edited_guard_file_is_refused(folder: Path, changes: dict[str, object], message: str):
    change(folder, **changes)
    with pytest.raises(InputError, match=message):
        read_guard_file(folder, "detector")


def test_a_guard_file_without_one_of_its_keys_is_refused(folder: Path):
    content = json.loads((folder / FILE_NAME).read_text())
    del content["max_length"]
    (folder / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(InputError, match="max_length"):
        read_guard_file(folder, "detector")


def test_a_guard_file_that_is_cut_off_is_refused(folder: Path):
    path = folder / FILE_NAME
    path.write_text(path.read_text()[:100])
    with pytest.raises(InputError, match="not readable as JSON"):
        read_guard_file(folder, "detector")


def test_one_changed_byte_of_the_weights_is_refused(folder: Path):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors: not a file that the part was saved with"):
        read_guard_file(folder, "detector")


def test_missing_weights_are_refused(folder: Path):
    path = folder / "model.safetensors"
    torch.save({}, folder / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: missing"):
        read_guard_file(folder, "detector")


def test_weights_that_were_added_are_refused(folder: Path):
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: not a file that"):
        read_guard_file(folder, "detector")


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


def test_nothing_half_saved_stays_beside_a_saved_part(
    make_detector: Callable[..., HarmDetector], tmp_path: Path
):
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "model.safetensors").write_bytes(b"cut off")
    make_detector().save(tmp_path)
    assert not (tmp_path / ".saving").exists()
    read_guard_file(tmp_path, "detector")


def test_an_adapter_of_an_earlier_run_does_not_stay(
    make_detector: Callable[..., HarmDetector], tmp_path: Path
):
    make_detector(tuning=LORA).save(tmp_path)
    make_detector(tuning=FULL).save(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert read_guard_file(tmp_path, "detector").weights.keys() == {"model.safetensors"}


def test_an_adapter_says_which_new_modules_it_lacks(
    make_detoxifier: Callable[..., Detoxifier], make_detector: Callable[..., HarmDetector], tmp_path: Path
):
    make_detector("bert", LORA).save(tmp_path / "detector")
    make_detoxifier("llama", LORA).save(tmp_path / "detoxifier")
    modules = ["bert.pooler.dense", "classifier"]
    assert not_in_adapter(tmp_path / "detector", modules) == []
    assert not_in_adapter(tmp_path / "detector", ["score", *modules]) == ["score"]
    assert not_in_adapter(tmp_path / "detoxifier", ["score"]) == ["score"]


def test_an_adapter_that_is_no_safetensors_file_is_refused(folder: Path):
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: missing"):
        not_in_adapter(folder, ["score"])
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: missing"):
        add_adapter(torch.nn.Linear(1, 1), folder)


def test_only_the_one_who_loads_can_trust_code_that_comes_with_a_model(folder: Path):
    base = {"name": "base", "revision": "abc", "trust_remote_code": True}
    for tuning in ("full", "lora"):
        change(folder, base=base, tuning=tuning)
        guard = read_guard_file(folder, "detector")
        assert not part_backbone(guard, folder, None).trust_remote_code
        assert part_backbone(guard, folder, None, trust_remote_code=True).trust_remote_code


def test_a_whole_model_is_loaded_from_its_folder_and_an_adapter_from_its_base(folder: Path):
    change(folder, base={"name": "base", "revision": "abc", "dtype": "bfloat16"})
    whole = part_backbone(read_guard_file(folder, "detector"), folder, None)
    assert (whole.name, whole.revision, whole.dtype) == (str(folder), None, "float32")
    change(folder, tuning="lora")
    guard = read_guard_file(folder, "detector")
    adapted = part_backbone(guard, folder, None)
    assert (adapted.name, adapted.revision, adapted.dtype) == ("base", "abc", "bfloat16")
    moved = part_backbone(guard, folder, "elsewhere")
    assert (moved.name, moved.revision, moved.dtype) == ("elsewhere", None, "bfloat16")


def test_the_versions_of_what_the_numbers_depend_on_are_known():
    versions = library_versions()
    assert versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert all(versions.values())
