import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mllm_protector.data.augmentation import Augmentation
from mllm_protector.data.batching import pack_answers
from mllm_protector.data.sources import Pairs, Toy
from mllm_protector.errors import InputError, RunError
from mllm_protector.guard.calibration import Aim, choose_threshold, fit_scale
from mllm_protector.metrics import DETECTION_METRICS, detection_metrics
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.models.guard_file import Scale, read_guard_file
from mllm_protector.models.packing import use_packed_attention
from mllm_protector.models.tuning import FullTuning, Tuning
from mllm_protector.records import LabelledAnswer, labelled_answers
from mllm_protector.training.losses import detector_loss
from tests.data.builders import OPTIONS, write_rows
from tests.models.builders import Family
from tests.training.parts import DATA, LORA, Given, Unread, pairs
from tests.training.parts import train_a_detector as train
from tests.training.tagger import CONFIG

DIVISIONS: list[dict[str, Any]] = [
    {"packing": True},
    {"packing": True, "micro_batch_tokens": 120},
    {"micro_batch_tokens": 120},
    {"micro_batch_size": 1, "gradient_checkpointing": True},
]
"""Settings that must change nothing but memory and speed."""


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2"])
def test_a_packed_example_has_the_loss_that_it_has_alone(
    make_detector: Callable[..., HarmDetector], family: Family
) -> None:
    detector = make_detector(family)
    rows = detector.encoder.encode_records(list(labelled_answers(pairs(3))))
    rows = [replace(row, ids=row.ids[: len(row.ids) - cut]) for cut, row in enumerate(rows)]
    detector.model.eval()
    with torch.no_grad():
        alone = [detector_loss(detector.model, detector.encoder([row])).item() for row in rows]
        padded = detector_loss(detector.model, detector.encoder(rows)).item()
        use_packed_attention(detector.model)
        packed = [detector_loss(detector.model, pack_answers([row])).item() for row in rows]
        together = detector_loss(detector.model, pack_answers(rows)).item()
    assert packed == pytest.approx(alone, abs=1e-5)
    assert [padded, together] == pytest.approx([sum(alone)] * 2, abs=1e-5)
    assert len({round(loss, 4) for loss in alone}) == len(alone)


def validation_logits(folder: Path, data: Given = DATA) -> tuple[list[bool], list[float]]:
    """Labels and logits of the validation split, as the saved detector has them."""
    records = list(labelled_answers(data.validation))
    logits = load_detector(folder).logits(
        queries=[r.query for r in records], answers=[r.answer for r in records]
    )
    return [r.harmful for r in records], logits


@pytest.mark.parametrize("tuning", [FullTuning(), LORA], ids=["full", "lora"])
def test_a_trained_detector_loads_and_scores_as_it_was_measured(
    tmp_path: Path, base: Path, tuning: Tuning
) -> None:
    prompt = "Q: {query}\nA: {answer}"
    metrics = train(tmp_path, base, tuning=tuning, prompt=prompt)
    assert load_detector(tmp_path).encoder.prompt == prompt
    assert metrics["auroc"] == 1.0
    labels, logits = validation_logits(tmp_path)
    again = detection_metrics(labels, Scale().scores(logits), threshold=0.5)
    assert {name: metrics[name] for name in DETECTION_METRICS} == pytest.approx(again, abs=1e-6)
    assert (metrics["examples"], metrics["validation_examples"]) == (32, 10)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    guard = read_guard_file(tmp_path, "detector")
    assert guard.metrics == {name: metrics[name] for name in DETECTION_METRICS}
    assert guard.metrics.keys() == metrics["last"].keys()
    assert guard.tuning == tuning.kind
    assert guard.data["fingerprint"] == DATA.load().fingerprint


def own_pairs(folder: Path) -> Pairs:
    """A user's own file."""
    return Pairs(path=write_rows(folder / "mine.jsonl", map(asdict, pairs(40))), **OPTIONS)


def test_random_weights_trained_on_own_data_are_said_to_guard_nothing(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pretrained = Path(shutil.copytree(base, tmp_path / "pretrained"))
    (pretrained / "tiny.json").unlink()
    short = replace(CONFIG, best_metric="auroc", max_steps=1)
    for name, backbone, data, words in (
        ("tiny", base, own_pairs(tmp_path), "random weights and has read mine.jsonl and nothing else"),
        ("real", pretrained, own_pairs(tmp_path), ""),
    ):
        caplog.clear()
        train(tmp_path / name, backbone, data=data, fit=short)
        assert caplog.text.count("guards nothing") == (2 if words else 0), name  # at start and end
        caplog.clear()
        guard, _ = (load_detector(tmp_path / name, device="cpu").guard for _ in range(2))
        assert caplog.text.count("guards nothing") == (1 if words else 0), name
        assert guard.pretrained is not bool(words), name
        assert words in (guard.caveat or ""), name
    toy = guard.data | {"sources": [{"set": source.name} for source in Toy().load().sources]}
    assert replace(guard, pretrained=False, data=toy).caveat is None


@pytest.mark.parametrize("folder", [".", "last"])
def test_all_kept_weights_have_the_scale_and_the_threshold_of_their_own_validation_scores(
    tmp_path: Path, base: Path, folder: str
) -> None:
    metrics = train(tmp_path, base, fit=replace(CONFIG, best_metric="auroc", epochs=4))
    detector = load_detector(tmp_path / folder)
    labels, logits = validation_logits(tmp_path / folder)
    calibration = detector.guard.calibration
    assert calibration is not None
    scale, found = detector.guard.scale, fit_scale(labels, logits)
    assert (scale.temperature, scale.offset) == pytest.approx((found.temperature, found.offset), rel=1e-2)
    assert calibration["scale_how"] == "temperature and offset with the least log loss on 10 answers"
    scores = scale.scores(logits)
    choice = choose_threshold(labels, scores, Aim("f1", None))
    assert detector.threshold == pytest.approx(choice.threshold, abs=1e-5)
    assert detector.guard.threshold_how == choice.how == "best F1 (1.000) on 10 answers"
    for name, value in choice.facts.items():
        assert calibration[name] == value
    after = detection_metrics(labels, scores, threshold=choice.threshold)
    before = detection_metrics(labels, Scale().scores(logits), threshold=0.5)
    for when, metrics_then in (("before", before), ("after", after)):
        for name in ("ece", "brier"):
            assert calibration[f"{name}_{when}_calibration"] == pytest.approx(metrics_then[name], abs=1e-6)
    assert calibration["data"] == {
        "account": "records of a test",
        "fingerprint": DATA.load().fingerprint,
        "part": "validation",
    }
    assert calibration["note"].startswith("measured on the answers on which")
    if folder == ".":
        assert metrics["calibrated"] == {
            "temperature": scale.temperature,
            "offset": scale.offset,
            "threshold": detector.threshold,
            "threshold_how": choice.how,
            **calibration,
        }


def test_a_long_answer_is_validated_in_windows_as_in_use(tmp_path: Path, base: Path) -> None:
    long = replace(pairs(1, start=70)[0], rejected="harmless words " * 60 + "[harmful placeholder] Sure")
    data = Given(DATA.train, [*DATA.validation, long])
    metrics = train(tmp_path, base, data=data)
    labels, logits = validation_logits(tmp_path, data)
    again = detection_metrics(labels, Scale().scores(logits), threshold=0.5)
    assert {name: metrics[name] for name in DETECTION_METRICS} == pytest.approx(again, abs=1e-6)
    assert len(load_detector(tmp_path).encoder.windows(queries=[long.query], answers=[long.rejected])[0]) > 1


def largest_difference(one: Path, other: Path) -> float:
    [weights, others] = [load_file(next(folder.glob("*.safetensors"))) for folder in (one, other)]
    assert weights.keys() == others.keys()
    return max(float((weights[name] - others[name]).abs().max()) for name in weights)


@pytest.mark.slow
def test_packing_and_the_division_of_a_step_change_no_weights(tmp_path: Path, base: Path) -> None:
    short = replace(CONFIG, best_metric="auroc", epochs=3)
    for tuning in (FullTuning(), LORA):
        plain = tmp_path / tuning.kind
        train(plain, base, tuning=tuning, fit=short)
        for number, division in enumerate(DIVISIONS):
            divided = tmp_path / f"{tuning.kind}-{number}"
            train(divided, base, tuning=tuning, fit=replace(short, **division))
            assert largest_difference(plain, divided) < 1e-6, (tuning, division)


def test_the_seed_decides_head_order_and_dropout(tmp_path: Path, base: Path) -> None:
    for tuning in (FullTuning(), LORA):
        for name, seed in (("one", 1), ("again", 1), ("other", 2)):
            train(tmp_path / tuning.kind / name, base, tuning=tuning, seed=seed)
        one, again, other = (
            load_file(next((tmp_path / tuning.kind / name).glob("*.safetensors")))
            for name in ("one", "again", "other")
        )
        assert all(torch.equal(one[key], again[key]) for key in one), tuning
        assert not any(torch.equal(one[key], other[key]) for key in one if "score" in key), tuning


def test_labelled_answers_will_do_as_well_as_pairs(tmp_path: Path, base: Path) -> None:
    labelled = Given(list(labelled_answers(DATA.train)), list(labelled_answers(DATA.validation)))
    short = {"fit": replace(CONFIG, best_metric="auroc", max_steps=2)}
    found = [
        train(tmp_path / "labelled", base, data=labelled, **short),
        train(tmp_path / "pairs", base, **short),
    ]
    for metrics in found:
        del metrics["calibrated"]["data"]
    assert found[0] == found[1]


def test_cut_answers_are_counted_aloud(tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = replace(CONFIG, best_metric="auroc", max_steps=1)
    long = Given([*pairs(4), replace(pairs(1)[0], rejected="long " * 500)], pairs(4, start=50))
    with caplog.at_level(logging.WARNING):
        train(tmp_path, base, data=long, fit=short)
    assert "1 of 10 training texts are longer than max_length=320 tokens and were cut" in caplog.text


HARMLESS = [LabelledAnswer(query="q", answer=str(number), harmful=False) for number in range(4)]


def test_what_cannot_be_trained_on_is_refused_in_one_line(
    tmp_path: Path, base: Path, bases: dict[Family, Path]
) -> None:
    packed = replace(CONFIG, best_metric="auroc", packing=True)
    refused: list[tuple[Path, dict[str, Any], str]] = [
        (base, {"data": Given(HARMLESS, DATA.validation)}, "the training split has only one kind of label"),
        (base, {"data": Given(DATA.train, HARMLESS)}, "the validation split has only one kind of label"),
        (base, {"max_length": 4096}, "max_length=4096: llama has only 512"),
        (bases["bert"], {"fit": packed}, r"fit.packing=true: bert .*; use fit.packing=false"),
        (base, {"data": Unread(), "fit": CONFIG}, r"fit.best_metric=loss: choose one of auroc"),
    ]
    for backbone, changes, message in refused:
        with pytest.raises(InputError, match=message) as error:
            train(tmp_path, backbone, **changes)
        assert "\n" not in str(error.value)


def test_scores_that_are_not_finite_stop_the_run_and_nothing_is_saved(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: Callable[..., list[float]] = lambda windows, score: [math.nan] * len(windows)  # noqa: E731
    monkeypatch.setattr("mllm_protector.training.detector.worst_logits", broken)
    with pytest.raises(RunError, match="score is not a number"):
        train(tmp_path, base)
    assert not (tmp_path / "guard.json").exists()


def test_answers_are_also_learnt_rewritten(tmp_path: Path, bases: dict[Family, Path]) -> None:
    written = train(tmp_path / "plain", bases["llama"])
    augment = Augmentation(share=1.0, transformations=["padded"])
    rewritten = train(tmp_path / "augmented", bases["llama"], augment=augment)
    assert rewritten["examples"] == 2 * written["examples"]
    assert rewritten["validation_examples"] == written["validation_examples"]
