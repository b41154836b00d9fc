import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_protector.errors import InputError
from mllm_protector.models.backbone import Backbone
from mllm_protector.models.detoxifier import load_detoxifier
from mllm_protector.models.tuning import FullTuning, Tuning
from mllm_protector.records import AnswerPair, Correction, labelled_answers
from mllm_protector.training.detoxifier import METRICS, shuffle_rejected
from tests.training.parts import DATA, LORA, Given, Unread
from tests.training.parts import train_a_detoxifier as train
from tests.training.tagger import CONFIG
from tests.training.test_detector import DIVISIONS, largest_difference, own_pairs


@given(st.integers(2, 40), st.integers(0, 9))
def test_no_record_keeps_its_own_rejected_answer_in_the_control(count: int, seed: int) -> None:
    records = [Correction(query=f"q{i}", rejected=f"r{i}", accepted=f"a{i}") for i in range(count)]
    shuffled = shuffle_rejected(records, seed)
    assert sorted(record.rejected for record in shuffled) == sorted(record.rejected for record in records)
    for record, other in zip(records, shuffled, strict=True):
        assert record.rejected != other.rejected
        assert (record.query, record.accepted) == (other.query, other.accepted)


@pytest.mark.parametrize("tuning", [FullTuning(), LORA], ids=["full", "lora"])
def test_a_trained_detoxifier_is_saved_with_its_metrics_and_corrects(
    tmp_path: Path, base: Path, tuning: Tuning
) -> None:
    metrics = train(tmp_path, base, tuning=tuning, chat=True)
    assert tuple(metrics)[:3] == METRICS
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "validation"]
    assert losses[-1] < losses[0]
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert (metrics["examples"], metrics["validation_examples"]) == (16, 5)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    detoxifier = load_detoxifier(tmp_path, max_new_tokens=4)
    assert detoxifier.guard.chat
    assert detoxifier.guard.metrics == {name: metrics[name] for name in METRICS}
    assert len(detoxifier.correct(queries=["q", "p"], answers=["a", "b"])) == 2


@pytest.mark.slow
def test_packing_and_the_division_of_a_step_change_no_weights(tmp_path: Path, base: Path) -> None:
    for tuning in (FullTuning(), LORA):
        folder = tmp_path / tuning.kind
        plain = train(folder, base, tuning=tuning)
        for number, division in enumerate(DIVISIONS):
            divided = tmp_path / f"{tuning.kind}-{number}"
            again = train(divided, base, tuning=tuning, fit=replace(CONFIG, epochs=3, **division))
            assert largest_difference(folder, divided) < 1e-6, (tuning, division)
            assert again["loss"] == pytest.approx(plain["loss"], abs=1e-5), (tuning, division)


def test_the_validation_loss_is_per_token_or_per_example_and_perplexity_per_token(
    tmp_path: Path, base: Path
) -> None:
    made = {
        normalise: train(tmp_path / normalise, base, fit=replace(CONFIG, max_steps=1, normalise=normalise))
        for normalise in ("tokens", "examples")
    }
    # Only the step's unit differs, and Adam's first step does not depend on it.
    assert made["examples"]["perplexity"] == pytest.approx(made["tokens"]["perplexity"], rel=1e-3)
    tokenizer = load_detoxifier(tmp_path / "tokens", max_new_tokens=1).encoder.tokenizer
    targets = [
        len(tokenizer(pair.accepted, add_special_tokens=False)["input_ids"]) for pair in DATA.validation
    ]
    mean = sum(targets) / len(targets) + 1  # and the end token
    assert made["examples"]["loss"] == pytest.approx(mean * math.log(made["examples"]["perplexity"]))


def test_random_weights_trained_on_own_data_are_said_to_guard_nothing(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path / "part", base, data=own_pairs(tmp_path), fit=replace(CONFIG, max_steps=1))
    assert caplog.text.count("guards nothing") == 2  # at start and end
    caplog.clear()
    load_detoxifier(tmp_path / "part", device="cpu", max_new_tokens=4)
    assert caplog.text.count("the detoxifier is a tiny model that began with random weights") == 1


def test_an_adapter_on_a_base_by_a_relative_path_works_from_another_folder(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project/models").mkdir(parents=True)
    shutil.copytree(base, tmp_path / "project/models/base")
    monkeypatch.chdir(tmp_path / "project")
    settings: dict[str, Any] = {"tuning": LORA, "fit": replace(CONFIG, max_steps=1)}
    train(Path("outputs/part"), base, backbone=lambda: Backbone(name="models/base"), **settings)
    monkeypatch.chdir(tmp_path)
    load_detoxifier("project/outputs/part", device="cpu", max_new_tokens=4)
    shutil.move(tmp_path / "project", tmp_path / "moved")
    load_detoxifier("moved/outputs/part", device="cpu", max_new_tokens=4)


def test_pairs_of_two_harmful_answers_are_dropped_or_learnt_as_asked(tmp_path: Path, base: Path) -> None:
    worse = AnswerPair(
        query="q",
        accepted="[harmful] a",
        rejected="[harmful] b",
        accepted_harmful=True,
        rejected_harmful=True,
    )
    data = Given([*DATA.train, worse], DATA.validation)
    for both_harmful, examples in (("drop", 16), ("safer", 17)):
        metrics = train(
            tmp_path, base, data=data, both_harmful=both_harmful, fit=replace(CONFIG, max_steps=1)
        )
        assert metrics["examples"] == examples, both_harmful


def test_pairs_whose_accepted_answer_refuses_can_be_left_out(tmp_path: Path, base: Path) -> None:
    refusing = AnswerPair(
        query="q",
        accepted="I'm sorry, but I can't help with that.",
        rejected="[harmful] b",
        accepted_harmful=False,
        rejected_harmful=True,
    )
    train_pairs, validation = (
        [replace(pair, accepted="A safe way is to ask somebody.") for pair in part]
        for part in (DATA.train, DATA.validation)
    )
    more = [replace(refusing, query=f"q {number}") for number in range(30)]
    data = Given([*train_pairs, *more], [*validation, *more])
    once = replace(CONFIG, max_steps=1)
    found = {}
    for refusals in (1.0, 0.5, 0.0):
        metrics = train(tmp_path / str(refusals), base, data=data, refusals=refusals, fit=once)
        found[refusals] = metrics["examples"], metrics["validation_examples"]
        stored = json.loads((tmp_path / str(refusals) / "guard.json").read_text())
        assert stored["data"]["refusals"] == refusals
    assert found[0.0] == (len(train_pairs), len(validation))
    assert found[1.0] == tuple(count + 30 for count in found[0.0])
    assert all(5 < half - least < 25 for half, least in zip(found[0.5], found[0.0], strict=True))
    only = Given(train_pairs, [refusing, refusing])
    with pytest.raises(InputError, match="beside, with refusals=0"):
        train(tmp_path / "only", base, data=only, refusals=0.0)


def test_what_cannot_be_trained_on_is_refused_in_one_line(tmp_path: Path, base: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"data": Given(list(labelled_answers(DATA.train)), DATA.validation)}, "learns from pairs"),
        ({"data": Given(DATA.train, DATA.validation[:1])}, "validation split has fewer than two"),
        (
            {"data": Unread(), "fit": replace(CONFIG, best_metric="auroc")},
            r"fit.best_metric=auroc: choose one of loss",
        ),
    ]
    for changes, message in refused:
        with pytest.raises(InputError, match=message):
            train(tmp_path, base, **changes)
