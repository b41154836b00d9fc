"""A training on hidden states of the frozen blocks, computed once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mllm_protector.data.table import VARIABLE
from mllm_protector.errors import InputError
from mllm_protector.models.backbone import Backbone
from mllm_protector.models.detector import load_detector
from mllm_protector.models.packing import body
from mllm_protector.models.precomputed import precompute, run_upper_blocks_only
from mllm_protector.models.tuning import LoraTuning, blocks_of
from mllm_protector.training.detoxifier import train_detoxifier
from tests.models.builders import TEXTS, Family, save_tiny_classifier_base
from tests.training.tagger import CONFIG
from tests.training.test_detector import DATA, train

TUNING = LoraTuning(rank=2, alpha=4, dropout=0.1, targets="all-linear", blocks=1)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path_factory.mktemp("cache")))


def base(family: Family, folder: Path) -> Path:
    texts = [text for pair in DATA.train for text in (pair.query, pair.accepted, pair.rejected)]
    return save_tiny_classifier_base(family, folder / "base", [*TEXTS, *texts])


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_trained_weights_and_metrics_are_those_of_a_training_without(
    tmp_path: Path, family: Family
) -> None:
    name, found, metrics = base(family, tmp_path), {}, {}
    for precomputed, packing in ((False, True), (True, True), (True, False)):
        folder = tmp_path / f"{precomputed}-{packing}"
        metrics[folder] = train(
            folder,
            name,
            tuning=replace(TUNING, precompute=precomputed),
            fit=replace(CONFIG, best_metric="auroc", epochs=2, packing=packing),
        )
        found[folder] = load_file(folder / "adapter_model.safetensors")
    first, *others = found
    for other in others:
        assert found[first].keys() == found[other].keys()
        for each, weight in found[first].items():
            assert torch.allclose(weight, found[other][each], atol=1e-5), (other.name, each)
        assert metrics[other]["auroc"] == pytest.approx(metrics[first]["auroc"])
    pair = DATA.validation[0]
    texts: dict[str, Any] = {"queries": [pair.query], "answers": [pair.rejected]}
    scores = [load_detector(each, device="cpu").score(**texts)[0] for each in found]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)


def test_the_frozen_blocks_are_run_once(tmp_path: Path) -> None:
    model, fresh = Backbone(name=str(base("llama", tmp_path))).load_classifier(pad_id=0)
    adapted = TUNING.prepare(model, "SEQ_CLS", fresh)
    rows = [[5, 6, 7], [8, 9], [5, 6, 7]]
    passes: list[int] = []
    blocks_of(adapted)[1][0].register_forward_hook(lambda *_: passes.append(1))
    arguments: dict[str, Any] = {"base": "a", "pad_id": 0, "limit": CONFIG.validation_batch}
    places = precompute(adapted, 1, rows, **arguments)
    assert places.states.shape[0] == 5
    again = precompute(adapted, 1, rows, **arguments)
    assert len(passes) == 1
    assert again.of([8, 9]) == places.of([8, 9])
    ids = torch.tensor([rows[0]])
    whole = body(adapted)(input_ids=ids).last_hidden_state
    run_upper_blocks_only(adapted, 1, places, rows)
    upper = body(adapted)(input_ids=torch.tensor([places.of(rows[0])])).last_hidden_state
    assert torch.allclose(whole, upper, atol=1e-5)


def test_a_bfloat16_backbone_is_no_obstacle(tmp_path: Path) -> None:
    given = Backbone(name=str(base("llama", tmp_path)), dtype="bfloat16")
    model, fresh = given.load_classifier(pad_id=0)
    adapted = TUNING.prepare(model, "SEQ_CLS", fresh)
    rows = [[5, 6, 7, 9, 11], [8, 9], [5, 6], [12, 13, 14], [4, 4, 9, 17]]
    places = precompute(adapted, 1, rows, base="a", pad_id=0, limit=CONFIG.validation_batch)
    run_upper_blocks_only(adapted, 1, places, rows)
    embedding = model.get_input_embeddings()
    assert embedding(torch.tensor([places.of(rows[0])])).dtype == torch.bfloat16


def test_what_cannot_be_precomputed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tuning.precompute=true: needs frozen blocks"):
        LoraTuning(rank=2, alpha=4, dropout=0.0, targets="all-linear", precompute=True)
    name = base("gpt2", tmp_path)
    with pytest.raises(InputError, match="the frozen blocks have dropout"):
        train(tmp_path / "out", name, tuning=replace(TUNING, precompute=True))
    model, fresh = Backbone(name=str(name)).load_classifier(pad_id=0)
    adapted = TUNING.prepare(model, "SEQ_CLS", fresh)
    for module in adapted.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rows = [[5, 6, 7], [8, 9]]
    places = precompute(adapted, 1, rows, base="a", pad_id=0, limit=CONFIG.validation_batch)
    with pytest.raises(InputError, match="cannot be done with gpt2"):  # adds positions to what it looks up
        run_upper_blocks_only(adapted, 1, places, rows)
    asked = {"tuning": replace(TUNING, precompute=True), "fit": replace(CONFIG, best_metric="loss")}
    with pytest.raises(InputError, match="is for detectors"):
        train_detoxifier(**dict.fromkeys(train_detoxifier.__annotations__.keys() - {"return"}) | asked)
