"""Fitting a linear probe on states that are computed once."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_protector.data.table import VARIABLE
from mllm_protector.errors import InputError, RunError
from mllm_protector.metrics import detection_metrics
from mllm_protector.models.backbone import Backbone
from mllm_protector.models.detector import load_detector
from mllm_protector.models.export import export_detector
from mllm_protector.models.guard_file import PROBE_FILE, Scale, read_guard_file
from mllm_protector.models.probe import LinearProbe
from mllm_protector.models.shared import can_share
from mllm_protector.models.tuning import ProbeTuning
from mllm_protector.training import probe as module
from mllm_protector.training.detoxifier import train_detoxifier
from tests.models.builders import TEXTS, save_tiny_classifier_base
from tests.training.parts import DATA, Given, pairs, save_base, train_a_detoxifier
from tests.training.parts import train_a_detector as train
from tests.training.tagger import CONFIG
from tests.training.test_detector import validation_logits

TUNING = ProbeTuning(depths=[0.5, 1.0], strengths=[1e-6, 1e-2, 1.0])


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each forward pass of a probe's backbone read."""
    rows: list[int] = []
    states = LinearProbe.states

    def counted(self: LinearProbe, **batch: torch.Tensor) -> torch.Tensor:
        rows.append(len(batch["input_ids"]))
        return states(self, **batch)

    monkeypatch.setattr(LinearProbe, "states", counted)
    return rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_loads_and_scores_as_it_was_measured(tmp_path: Path, base: Path, dtype: str) -> None:
    fit = replace(CONFIG, best_metric="brier")
    backbone = Backbone(name=str(base), dtype=dtype)
    metrics = train(tmp_path, base, tuning=TUNING, fit=fit, backbone=lambda: backbone)
    assert metrics["auroc"] == 1.0
    assert (metrics["examples"], metrics["steps"]) == (32, len(TUNING.strengths))
    assert metrics["step"] > 1  # next to nothing is learnt with the first strength
    labels, logits = validation_logits(tmp_path)
    again = detection_metrics(labels, Scale().scores(logits), threshold=0.5)
    close = 1e-3 if dtype == "float32" else 0.05
    assert {name: metrics[name] for name in again} == pytest.approx(again, abs=close)
    guard = read_guard_file(tmp_path, "detector")
    assert guard.tuning == "probe"
    assert guard.weights.keys() == {PROBE_FILE}
    assert guard.threshold == metrics["calibrated"]["threshold"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(TUNING.strengths)


def test_long_answers_are_read_in_windows_in_training_as_in_use(tmp_path: Path, base: Path) -> None:
    long = [*DATA.validation, *pairs(2, start=70)]
    long = [replace(each, rejected=each.rejected * 6) for each in long]
    data = Given(train=DATA.train, validation=long)
    metrics = train(tmp_path, base, tuning=TUNING, data=data, max_length=96)
    labels, logits = validation_logits(tmp_path, data)
    again = detection_metrics(labels, Scale().scores(logits), threshold=0.5)
    assert metrics["auroc"] == pytest.approx(again["auroc"])
    assert metrics["brier"] == pytest.approx(again["brier"], abs=1e-3)


def test_each_text_is_read_once(tmp_path: Path, base: Path, read: list[int]) -> None:
    first = train(tmp_path / "first", base, tuning=TUNING)
    assert sum(read) == 42  # 32 to learn from and 10 for validation
    again = train(tmp_path / "again", base, tuning=TUNING, balance="oversample", seed=1)
    assert sum(read) == 42
    assert again["auroc"] == first["auroc"]
    more = Given(train=[*DATA.train, *pairs(2, start=90)], validation=DATA.validation)
    train(tmp_path / "more", base, tuning=TUNING, data=more)
    assert sum(read) == 46
    train(tmp_path / "other", base, tuning=ProbeTuning(depths=[1.0], strengths=[1.0]))
    assert sum(read) == 88  # of another block
    texts = [text for pair in DATA.train for text in (pair.query, pair.accepted, pair.rejected)]
    other = save_tiny_classifier_base("qwen2", tmp_path / "qwen", [*TEXTS, *texts])
    train(tmp_path / "qwen_probe", other, tuning=TUNING)
    assert sum(read) == 130


def test_a_stopped_training_goes_on_where_it_was(
    tmp_path: Path, base: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 8)
    keep: Callable[..., None] = module._keep
    kept: list[int] = []

    def killed(*arguments: Any) -> None:
        if len(kept) == 2:
            raise KeyboardInterrupt
        keep(*arguments)
        kept.append(len(arguments[-1]))

    monkeypatch.setattr(module, "_keep", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "probe", base, tuning=TUNING)
    assert (sum(kept), sum(read)) == (16, 24)
    monkeypatch.setattr(module, "_keep", keep)
    metrics = train(tmp_path / "probe", base, tuning=TUNING)
    assert sum(read) == 24 + 42 - 16
    undisturbed = train(tmp_path / "other", base, tuning=TUNING)
    assert metrics == undisturbed


def test_what_cannot_be_done_is_refused(tmp_path: Path, base: Path, cache: Path) -> None:
    folder = tmp_path / "probe"
    train(folder, base, tuning=TUNING)
    with pytest.raises(InputError, match="max_length=900: llama has only 512 positions"):
        train(tmp_path / "long", base, tuning=TUNING, max_length=900)
    with pytest.raises(InputError, match="tuning=probe: it reads several blocks"):
        export_detector(
            detector=str(folder), output_dir=str(tmp_path / "out"), base=None, push_to=None, private=True
        )
    asked = {"tuning": TUNING, "fit": replace(CONFIG, best_metric="loss")}
    with pytest.raises(InputError, match="tuning=probe: is for detectors"):
        train_detoxifier(**dict.fromkeys(train_detoxifier.__annotations__.keys() - {"return"}) | asked)
    train_a_detoxifier(tmp_path / "detoxifier", base)
    assert not can_share(folder, tmp_path / "detoxifier")
    other = save_base(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is not the model that"):
        load_detector(folder, base=str(save_tiny_classifier_base("gpt2", tmp_path / "gpt2")))
    assert load_detector(folder, base=str(other)).guard.tuning == "probe"
    [damaged] = cache.glob("pooled_states/*/*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(InputError, match=r"safetensors: damaged .* remove it"):
        train(tmp_path / "again", base, tuning=TUNING)
    (folder / PROBE_FILE).unlink()
    with pytest.raises(InputError, match=f"{PROBE_FILE}: missing"):
        load_detector(folder)


def test_a_backbone_with_broken_weights_is_refused_and_nothing_is_kept(
    tmp_path: Path, base: Path, cache: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(each for each in tensors if each.endswith("mlp.down_proj.weight"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="a state of the backbone is not a number"):
        train(tmp_path / "probe", broken, tuning=TUNING)
    assert not [*cache.glob("pooled_states/*/*")]
