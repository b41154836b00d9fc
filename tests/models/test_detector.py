import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from mllm_protector.data.batching import MicroBatchLimit
from mllm_protector.data.tokens import encode_texts
from mllm_protector.errors import InputError
from mllm_protector.models.detector import HarmDetector, load_detector, score_logits, worst_logits
from mllm_protector.models.guard_file import Scale, weight_hashes
from mllm_protector.models.tuning import Tuning
from tests.models.builders import FAMILIES, Family
from tests.models.fixtures import FULL, LORA

QUERIES = ["How do I bake bread?", "", "What is this? " * 9, "x", "Why?", "How do I bake bread?"]
ANSWERS = ["Mix flour and water.", "", "No.", "The image shows a red square. " * 5, "", "Ask a baker."]

Maker = Callable[..., HarmDetector]


def score(detector: HarmDetector) -> list[float]:
    return detector.score(queries=QUERIES, answers=ANSWERS)


@pytest.fixture(scope="module")
def saved(
    make_detector: Maker, tuning: Tuning, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HarmDetector, Path]:
    detector = make_detector(tuning=tuning)
    folder = tmp_path_factory.mktemp("saved") / tuning.kind
    detector.save(folder)
    return detector, folder


@pytest.fixture
def lora_folder(make_detector: Maker, tmp_path: Path) -> Path:
    make_detector(tuning=LORA).save(tmp_path / "lora")
    return tmp_path / "lora"


def rewrite_guard_file(folder: Path, **changes: object) -> None:
    path = folder / "guard.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": weight_hashes(folder)} | changes))


def windowed(detector: HarmDetector, window: int | None, batch_tokens: int = 4096) -> HarmDetector:
    return HarmDetector(
        detector.model, detector.encoder, detector.guard, window=window, batch_tokens=batch_tokens
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_does_not_depend_on_the_batch(make_detector: Maker, family: Family):
    detector = make_detector(family)
    pairs = {"queries": [*QUERIES, "x"], "answers": [*ANSWERS, "Four five six. " * 60]}
    for window in (None, 40):
        alone = windowed(detector, window, batch_tokens=1).logits(**pairs)
        together = windowed(detector, window).logits(**pairs)
        assert together == pytest.approx(alone, abs=1e-5)
        assert len({round(logit, 4) for logit in alone}) == len(alone)


def test_an_answer_that_fits_is_scored_as_if_there_were_no_windows(make_detector: Maker):
    detector = make_detector()
    rows = detector.encoder.encode(queries=QUERIES, answers=ANSWERS)
    exact = score_logits(detector.model, detector.encoder, rows, limit=MicroBatchLimit(tokens=4096))
    for window in (None, 200, 256):
        assert windowed(detector, window).logits(queries=QUERIES, answers=ANSWERS) == exact
    assert score(detector) == Scale(temperature=1.5).scores(exact)


def test_a_long_answer_is_as_harmful_as_its_worst_window(make_detector: Maker):
    detector = windowed(make_detector(), 40)
    texts = {"queries": ["Why?"], "answers": [" ".join(f"Mix {number} flour." for number in range(99))]}
    [rows] = detector.encoder.windows(**texts, window=40)
    logits = score_logits(detector.model, detector.encoder, rows, limit=detector.limit)
    assert detector.logits(**texts) == pytest.approx([max(logits)], abs=1e-6)
    assert max(logits) > max(logits[0], logits[-1]) + 1e-3


def test_a_window_without_a_number_is_not_overlooked(make_detector: Maker):
    encoder, model = make_detector().encoder, torch.nn.Linear(1, 1)
    for broken in (0, 1, 2):
        model.forward = (
            lambda input_ids, broken=broken, **_: SimpleNamespace(  # type: ignore[method-assign]
                logits=torch.where(input_ids[:, :1] == broken, torch.nan, input_ids[:, :1].float())
            )
        )
        windows = [[[0], [1], [2]], [[3], [4]]]
        [logit, other] = worst_logits(windows, partial(score_logits, model, encoder, limit=MicroBatchLimit()))
        assert math.isnan(logit), broken
        assert other == 4.0


def test_of_an_answer_that_grows_only_the_new_end_is_read_if_asked_and_a_broken_score_is_not_kept(
    make_detector: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def counted(*given: Any, **named: Any) -> list[float]:
        read.append(len(given[2]))
        return score_logits(*given, **named)

    monkeypatch.setattr("mllm_protector.models.detector.score_logits", counted)
    detector = windowed(make_detector(), 40)
    detector.known = {}
    words = [f"Mix {number} flour." for number in range(99)]
    for size in range(3, 99, 3):
        texts = {"queries": ["Why?"], "answers": [" ".join(words[:size])]}
        assert detector.logits(**texts) == pytest.approx(windowed(detector, 40).logits(**texts), abs=1e-5)
    grown, whole = read[::2], read[1::2]
    assert whole[-1] > 20
    assert max(grown) <= 2
    assert detector.logits(**texts) == detector.logits(**texts)
    assert read[-2:] == [0, 0]

    known: dict[bytes, float] = {}
    worst_logits([[[1, 2]]], lambda rows: [math.nan], known)
    assert not known
    monkeypatch.setattr("mllm_protector.models.detector.REMEMBERED", 3)
    assert worst_logits([[[1], [2]], [[3], [4], [5]]], lambda rows: [0.5] * len(rows), known) == [0.5, 0.5]
    assert len(known) == 3


def test_the_windows_of_an_answer_grow_in_proportion_to_it(make_detector: Maker):
    tokens = 21_000
    detector = windowed(make_detector("llama"), 128)
    widths: list[int] = []
    hook = detector.model.register_forward_pre_hook(
        lambda _, args, given: widths.append(given["input_ids"].numel()), with_kwargs=True
    )
    answer = " x," * (tokens // 3)
    [ids] = encode_texts(detector.encoder.tokenizer, [answer])
    [logit] = detector.logits(queries=["Why?"], answers=[answer])
    hook.remove()
    assert len(ids) == tokens
    assert math.isfinite(logit)
    assert max(widths) <= detector.limit.tokens
    [rows] = detector.encoder.windows(queries=["Why?"], answers=[answer], window=128)
    assert len(rows) == math.ceil((tokens - 128) / 96) + 1


def test_the_window_comes_from_the_training_unless_another_is_given(make_detector: Maker, tmp_path: Path):
    detector = make_detector()
    guard = replace(detector.guard, window=40)
    HarmDetector(detector.model, detector.encoder, guard).save(tmp_path)
    learnt = load_detector(tmp_path, device="cpu")
    other = load_detector(tmp_path, device="cpu", window=64)
    assert (learnt.window, other.window, detector.window) == (40, 64, None)
    assert learnt.card.identity["window"] == 40
    assert other.card.identity == learnt.card.identity | {"window": 64}
    with pytest.raises(InputError, match="window=0: must be at least 1"):
        load_detector(tmp_path, device="cpu", window=0)


def test_the_offset_moves_all_scores_and_is_part_of_what_a_detector_is(
    saved: tuple[HarmDetector, Path], tmp_path: Path
):
    detector, _ = saved
    HarmDetector(detector.model, detector.encoder, replace(detector.guard, offset=-0.75)).save(tmp_path)
    moved = load_detector(tmp_path, device="cpu")
    logits = detector.logits(queries=QUERIES, answers=ANSWERS)
    expected = [1 / (1 + math.exp(-(logit - 0.75) / 1.5)) for logit in logits]
    assert score(moved) == pytest.approx(expected, abs=1e-6)
    assert score(moved) != pytest.approx(score(detector), abs=1e-3)
    assert detector.card.identity["offset"] == 0.0
    assert moved.card.identity["offset"] == -0.75


def test_an_answer_is_never_scored_without_its_question(make_detector: Maker):
    detector = make_detector()
    with pytest.raises(TypeError, match="queries"):
        detector.score(answers=ANSWERS)
    with pytest.raises(InputError, match="queries has 1, answers has 6"):
        detector.score(queries=QUERIES[:1], answers=ANSWERS)
    one, other = detector.score(queries=["How do I bake bread?", "Why?"], answers=["No."] * 2)
    assert abs(one - other) > 1e-4


def test_a_loaded_detector_scores_exactly_as_the_saved_one(saved: tuple[HarmDetector, Path]):
    detector, folder = saved
    loaded = load_detector(folder, device="cpu")
    assert score(loaded) == score(detector)
    assert loaded.threshold == detector.threshold == 0.4
    assert loaded.card.identity["weights"] == weight_hashes(folder)
    assert not loaded.model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_on_a_bfloat16_base_scores_exactly_as_it_was_saved(
    make_detector: Maker, family: Family, tmp_path: Path
):
    detector = make_detector(family, LORA, "bfloat16")
    detector.save(tmp_path)
    assert score(load_detector(tmp_path, device="cpu")) == score(detector)


def test_stock_transformers_give_the_same_logits(make_detector: Maker, tmp_path: Path):
    detector = make_detector()
    detector.save(tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert stock.config.id2label == {0: "HARMFUL"}
    assert_same_logits(stock, detector)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_stock_peft_gives_the_same_logits(make_detector: Maker, family: Family, tmp_path: Path):
    detector = make_detector(family, LORA)
    detector.save(tmp_path)
    stock = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    stock.config.pad_token_id = detector.encoder.pad_id
    assert_same_logits(stock, detector)


def assert_same_logits(stock: torch.nn.Module, detector: HarmDetector) -> None:
    ids = detector.encoder.encode(queries=QUERIES, answers=ANSWERS)
    with torch.no_grad():
        logits = stock(**detector.encoder.pad(ids)).logits[:, 0].tolist()
    ours = score_logits(detector.model, detector.encoder, ids, limit=MicroBatchLimit())
    assert logits == pytest.approx(ours, abs=1e-6)


def test_a_bfloat16_base_with_a_float32_head_scores_within_two_hundredths(lora_folder: Path):
    exact = score(load_detector(lora_folder, device="cpu"))
    base = json.loads((lora_folder / "guard.json").read_text())["base"]
    rewrite_guard_file(lora_folder, base=base | {"dtype": "bfloat16"})
    rounded = load_detector(lora_folder, device="cpu")
    dtypes = {name: p.dtype for name, p in rounded.model.named_parameters()}
    assert dtypes["base_model.model.score.modules_to_save.default.weight"] == torch.float32
    assert dtypes["base_model.model.model.embed_tokens.weight"] == torch.bfloat16
    assert score(rounded) == pytest.approx(exact, abs=2e-2)
    assert score(rounded) != exact


@pytest.mark.parametrize(
    ("family", "how", "module"),
    [("llama", FULL, "score"), ("llama", LORA, "score"), ("bert", LORA, "bert.pooler.dense")],
)
def test_a_detector_without_its_head_is_refused(
    make_detector: Maker, family: Family, how: Tuning, module: str, tmp_path: Path
):
    make_detector(family, how).save(tmp_path)
    path = tmp_path / ("model.safetensors" if how is FULL else "adapter_model.safetensors")
    weights = load_file(path)
    kept = {name: tensor for name, tensor in weights.items() if f".{module}." not in f".{name}"}
    assert 0 < len(kept) < len(weights)
    save_file(kept, path, metadata={"format": "pt"})
    rewrite_guard_file(tmp_path)
    with pytest.raises(InputError, match=rf"trained head \({module}\) is missing"):
        load_detector(tmp_path, device="cpu")


def test_an_adapter_for_another_base_or_without_weights_is_refused(
    lora_folder: Path, bases: dict[Family, Path]
):
    with pytest.raises(InputError, match="does not fit its base model") as caught:
        load_detector(lora_folder, base=str(bases["gpt2"]), device="cpu")
    assert "\n" not in str(caught.value)
    (lora_folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: missing"):
        load_detector(lora_folder, device="cpu")
