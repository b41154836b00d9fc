"""A linear layer that reads the states of several blocks of a frozen backbone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_protector.data.encoding import DetectorEncoder
from mllm_protector.data.tokens import choose_pad_id
from mllm_protector.errors import InputError
from mllm_protector.models.backbone import Backbone, inference
from mllm_protector.models.guard_file import PROBE_FILE
from mllm_protector.models.probe import LinearProbe, load_probe, new_probe
from mllm_protector.models.tuning import ProbeTuning
from tests.models.builders import FAMILIES, Family

TUNING = ProbeTuning(depths=[0.5, 1.0], strengths=[1.0])
QUERIES, ANSWERS = ["How do I bake bread?", "Why?"], ["Mix flour, water and salt.", "So."]


def encoder_of(backbone: Backbone) -> DetectorEncoder:
    tokenizer = backbone.load_tokenizer()
    return DetectorEncoder(tokenizer, pad_id=choose_pad_id(tokenizer), max_length=128)


def probe_of(backbone: Backbone, encoder: DetectorEncoder, tuning: ProbeTuning = TUNING) -> LinearProbe:
    probe = new_probe(backbone, tuning, closing=encoder.closing, max_length=128)
    torch.manual_seed(0)
    torch.nn.init.normal_(probe.score.weight)
    return probe.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_reads_the_means_of_the_whole_text_and_of_its_closing_words(
    bases: dict[Family, Path], family: Family
) -> None:
    backbone = Backbone(name=str(bases[family]))
    encoder = encoder_of(backbone)
    probe = probe_of(backbone, encoder)
    rows = encoder.encode(queries=QUERIES, answers=ANSWERS)
    endings = {tuple(row[-encoder.closing :]) for row in rows}
    assert len(endings) == 1
    assert "Verdict" in encoder.tokenizer.decode(*endings)
    whole = backbone.load_body().eval()
    with inference(probe):
        found = probe.states(**encoder.pad(rows))
        alone = []
        for row in rows:
            each = whole(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
            parts = [(states[0].mean(0), states[0, -encoder.closing :].mean(0)) for states in each]
            alone.append(torch.cat([*parts[1], *parts[2]]))
        logits = probe(**encoder.pad(rows)).logits
        expected = probe.score(found)
    assert found.shape == (2, probe.width)
    assert torch.allclose(found, torch.stack(alone), atol=1e-5)
    assert torch.allclose(logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_above_the_highest_one_are_gone(bases: dict[Family, Path], family: Family) -> None:
    backbone = Backbone(name=str(bases[family]))
    encoder = encoder_of(backbone)
    probe = probe_of(backbone, encoder, ProbeTuning(depths=[0.5], strengths=[1.0]))
    whole = backbone.load_body()
    assert probe.blocks == [1]
    assert sum(p.numel() for p in probe.body.parameters()) < sum(p.numel() for p in whole.parameters())
    with inference(probe):
        assert probe.states(**encoder.pad(encoder.encode(queries=QUERIES, answers=ANSWERS))).isfinite().all()


def test_depths_are_shares_of_any_backbone() -> None:
    tuning = ProbeTuning(depths=[0.333, 0.5, 0.667, 0.01], strengths=[1.0])
    assert tuning.blocks(18) == [1, 6, 9, 12]
    assert tuning.blocks(32) == [1, 11, 16, 21]
    assert tuning.blocks(1) == [1]
    for empty in ({"depths": []}, {"strengths": []}):
        with pytest.raises(InputError, match=f"tuning.{next(iter(empty))}: is empty"):
            replace(tuning, **empty)


def test_only_the_layer_is_written_and_another_backbone_is_refused(
    bases: dict[Family, Path], tmp_path: Path
) -> None:
    backbone = Backbone(name=str(bases["llama"]))
    probe = probe_of(backbone, encoder_of(backbone))
    probe.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / PROBE_FILE)
    assert {name: list(each.shape) for name, each in tensors.items()} == {
        "weight": [1, probe.width],
        "bias": [1],
        "blocks": [2],
        "closing": [],
    }
    again = load_probe(tmp_path, backbone)
    assert torch.equal(again.score.weight, probe.score.weight)
    assert (again.blocks, again.closing) == (probe.blocks, probe.closing)
    save_file({**tensors, "weight": torch.ones(1, 3)}, tmp_path / PROBE_FILE)
    with pytest.raises(InputError, match=r"probe.safetensors: does not fit its base model \(size mismatch"):
        load_probe(tmp_path, backbone)
    broken = ({"blocks": torch.tensor([1, 99])}, {"blocks": torch.tensor([])}, {"blocks": torch.tensor(1)})
    for each in (*broken, {"closing": torch.tensor(0)}, {"bias": torch.tensor([float("nan")])}):
        save_file({**tensors, **each}, tmp_path / PROBE_FILE)
        with pytest.raises(InputError, match="does not fit its base model"):
            load_probe(tmp_path, backbone)
    save_file({"weight": torch.ones(1, 3)}, tmp_path / PROBE_FILE)
    with pytest.raises(InputError, match="does not fit its base model"):
        load_probe(tmp_path, backbone)
