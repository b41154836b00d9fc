import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mllm_protector.errors import InputError
from mllm_protector.guard.protector import Protector
from mllm_protector.judges.detector import DetectorJudge
from mllm_protector.models.backbone import Backbone
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.models.detoxifier import Detoxifier, load_detoxifier, load_untrained
from mllm_protector.models.export import export_detector
from mllm_protector.models.guard_file import read_guard_file
from mllm_protector.models.parts import (
    BLOCK,
    BLOCKS,
    bases_of,
    fingerprint,
    part_backbone,
    provenance,
    require_bases,
)
from mllm_protector.models.shared import can_share, load_shared
from tests.models.fixtures import LORA

TEXTS = {"queries": ["How do I bake bread?", "Why?"], "answers": ["Mix flour and water.", "No."]}


@pytest.fixture
def project(
    make_detector: Callable[..., HarmDetector],
    make_detoxifier: Callable[..., Detoxifier],
    bases: dict[str, Path],
    tmp_path: Path,
) -> Path:
    """A base and two adapters on it, as two trainings leave them: ``models/base``, ``outputs/<part>``."""
    root = tmp_path / "project"
    base = Path(shutil.copytree(bases["llama"], root / "models/base"))
    save_on(base, make_detector(tuning=LORA), root / "outputs/detector")
    save_on(base, make_detoxifier(tuning=LORA), root / "outputs/detoxifier")
    return root


def save_on(base: Path, made: HarmDetector | Detoxifier, folder: Path) -> Path:
    """Save a part with the provenance of its base."""
    made.guard = replace(made.guard, **provenance(Backbone(name=str(base))))
    made.save(folder)
    return folder


def export(detector: Path, folder: Path, base: str | None = None) -> Path:
    return export_detector(
        detector=str(detector), output_dir=str(folder), base=base, push_to=None, private=True
    )


@pytest.fixture(scope="module")
def expected(make_detector: Callable[..., HarmDetector]) -> list[float]:
    return make_detector(tuning=LORA).score(**TEXTS)


def other_weights(base: Path, folder: Path) -> Path:
    """A model of the same shape that was trained otherwise."""
    shutil.copytree(base, folder)
    path = folder / "model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return folder


def test_the_fingerprint_is_of_the_weights_that_are_loaded(project: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(project / "models/base")
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    before = fingerprint(sharded)
    other_weights(project / "models/base", tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", sharded)
    assert None not in {before, fingerprint(sharded)}
    assert fingerprint(sharded) != before


def test_a_base_is_known_by_its_weights_and_its_configuration_wherever_it_is(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["llama"]
    known = fingerprint(base)
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    for name in ("tokenizer.json", "tiny.json"):
        (copy / name).unlink()
    assert fingerprint(copy) == known
    assert fingerprint(other_weights(base, tmp_path / "other")) != known
    assert fingerprint(bases["qwen2"]) != known
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert fingerprint(copy) != known
    (copy / "model.safetensors").unlink()
    assert fingerprint(copy) is None


def test_of_large_files_blocks_are_read_from_the_first_byte_to_the_last(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    size = 3 * BLOCK * BLOCKS

    def written(place: int, count: int) -> str | None:
        with path.open("wb") as file:
            file.truncate(size)
            file.seek(place)
            file.write(b"x" * count)
        return fingerprint(tmp_path)

    plain = written(0, 0)
    # It reads one block in three, so no run of three blocks is passed over.
    for place, count in ((0, 1), (BLOCK - 1, 1), (size // 2, 3 * BLOCK), (size - BLOCK, 1), (size - 1, 1)):
        assert written(place, count) != plain, place
    os.truncate(path, size - 1)
    assert fingerprint(tmp_path) != plain


def test_a_training_records_the_full_path_of_its_base_and_the_commit_of_one_from_the_hub(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bases["llama"].parent)
    known = provenance(Backbone(name="llama"))
    assert known["base"]["name"] == str(bases["llama"])
    assert (known["base_fingerprint"], known["pretrained"]) == (fingerprint(bases["llama"]), False)
    assert provenance(Backbone(name="qwen2"))["pretrained"] is True
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--some--model"
    shutil.copytree(bases["qwen2"], cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    known = provenance(Backbone(name="some/model"))
    assert (known["base"]["name"], known["base"]["revision"]) == ("some/model", commit)
    assert known["base_fingerprint"] == fingerprint(bases["qwen2"])
    assert provenance(Backbone(name="another/model"))["base"] == asdict(Backbone(name="another/model"))


def test_a_project_that_was_moved_as_a_whole_still_works(
    project: Path, expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    moved = Path(shutil.move(project, tmp_path / "elsewhere/again"))
    one, two = (moved / "outputs" / kind for kind in ("detector", "detoxifier"))
    assert load_detector(one, device="cpu").score(**TEXTS) == expected
    load_detoxifier(two, device="cpu")
    load_untrained(two, device="cpu")
    assert can_share(one, two)
    assert load_shared(one, two, device="cpu")[0].score(**TEXTS) == pytest.approx(expected, abs=1e-5)
    export(one, tmp_path / "exported")


def test_a_base_beside_the_adapter_is_found_and_only_the_right_one(
    project: Path, expected: list[float], tmp_path: Path
) -> None:
    part = Path(shutil.move(project / "outputs/detector", tmp_path / "part"))
    true = Path(shutil.move(project / "models/base", tmp_path / "true"))
    wrong = other_weights(true, tmp_path / "base")
    with pytest.raises(InputError) as caught:
        load_detector(part, device="cpu")
    message = str(caught.value)
    for words in (f"{part}: ", f"{project / 'models/base'} (no such folder)", str(wrong), "base=", "\n"):
        assert (words in message) is (words != "\n"), words
    shutil.copytree(true, part / "base")
    assert load_detector(part, device="cpu").score(**TEXTS) == expected


def refusal(call: Callable[[], object]) -> str:
    """Why a call is refused; empty where it is not."""
    try:
        call()
    except InputError as error:
        return str(error)
    return ""


def test_a_wrong_base_of_the_same_shape_is_refused_wherever_it_is_given(
    project: Path, tmp_path: Path
) -> None:
    one, two = (project / "outputs" / kind for kind in ("detector", "detoxifier"))
    wrong = str(other_weights(project / "models/base", tmp_path / "wrong"))
    calls: dict[str, Callable[[], object]] = {
        "load_detector": lambda: load_detector(one, base=wrong),
        "load_detoxifier": lambda: load_detoxifier(two, base=wrong),
        "load_untrained": lambda: load_untrained(two, base=wrong),
        "load_shared": lambda: load_shared(one, two, base=wrong),
        "Protector, shared": lambda: Protector.from_pretrained(one, two, base=wrong),
        "Protector, detector": lambda: Protector.from_pretrained(one, base=wrong),
        "require_bases": lambda: require_bases(wrong, (one, "detector"), (two, "detoxifier")),
        "export_detector": lambda: export(one, tmp_path / "out", wrong),
    }
    for name, call in calls.items():
        assert f"base={wrong}: is not the model that" in refusal(call), name
    # It is also refused where it has taken the place of the right one.
    shutil.rmtree(project / "models/base")
    shutil.move(wrong, project / "models/base")
    with pytest.raises(InputError, match=r"models/base \(another model\)"):
        load_detector(one)


def test_each_of_two_adapters_on_different_models_finds_its_own(
    project: Path,
    make_detector: Callable[..., HarmDetector],
    bases: dict[str, Path],
    expected: list[float],
    tmp_path: Path,
) -> None:
    other = Path(shutil.copytree(bases["qwen2"], project / "models/other"))
    made = make_detector("qwen2", LORA)
    save_on(other, made, tmp_path / "detector")
    given = str(shutil.move(other, tmp_path / "given"))
    parts = (tmp_path / "detector", "detector"), (project / "outputs/detoxifier", "detoxifier")
    assert not can_share(parts[0][0], parts[1][0])
    assert bases_of(given, *parts) == [given, None]
    assert bases_of(None, *parts) == [None, None]
    protector = Protector.from_pretrained(parts[0][0], parts[1][0], base=given, device="cpu")
    assert protector.detector.score(**TEXTS) == pytest.approx(made.score(**TEXTS), abs=1e-6)
    judge = DetectorJudge.from_folder(str(project / "outputs/detector"), base=given)
    assert judge.detector.score(**TEXTS) == pytest.approx(expected, abs=1e-6)


def test_copies_of_one_base_are_shared_and_another_model_under_its_name_is_not(
    project: Path, make_detoxifier: Callable[..., Detoxifier], tmp_path: Path
) -> None:
    one = project / "outputs/detector"
    for copied, shares in ((shutil.copytree, True), (other_weights, False)):
        base = Path(copied(project / "models/base", tmp_path / copied.__name__))
        other = save_on(base, make_detoxifier(tuning=LORA), tmp_path / f"on_{copied.__name__}")
        assert can_share(one, other) is shares


def test_an_adapter_of_an_earlier_release_is_loaded_as_it_was(
    make_detector: Callable[..., HarmDetector], bases: dict[str, Path], expected: list[float], tmp_path: Path
) -> None:
    make_detector(tuning=LORA).save(tmp_path / "part")  # its guard file has no fingerprint
    guard = read_guard_file(tmp_path / "part", "detector")
    assert guard.base_fingerprint is None
    assert load_detector(tmp_path / "part", device="cpu").score(**TEXTS) == expected
    moved = shutil.copytree(bases["llama"], tmp_path / "moved")
    assert load_detector(tmp_path / "part", base=str(moved), device="cpu").score(**TEXTS) == expected


def test_only_the_one_who_loads_can_trust_code_that_comes_with_a_model(
    make_detector: Callable[..., HarmDetector], tmp_path: Path
) -> None:
    guard = make_detector().guard
    for tuning in ("full", "lora"):
        told = replace(
            guard, base={"name": "base", "revision": "abc", "trust_remote_code": True}, tuning=tuning
        )
        assert not part_backbone(told, tmp_path, None).trust_remote_code
        assert part_backbone(told, tmp_path, None, trust_remote_code=True).trust_remote_code
