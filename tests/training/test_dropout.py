from typing import Any

import pytest
import torch

from mllm_protector.data.batching import pack_answers
from mllm_protector.data.encoding import Batch, EncodedAnswer
from mllm_protector.training.dropout import KEYS, attention_dropout, dropout_keys
from mllm_protector.training.parallel import Objective
from tests.models.builders import Family

SHARE, WIDTH = 0.1, 256


class Layers(torch.nn.Module):
    """Ones through dropout, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Dropout(SHARE), torch.nn.Dropout(SHARE)

    def forward(self, batch: Batch) -> torch.Tensor:
        ones = torch.ones(*batch["input_ids"].shape, WIDTH)
        return torch.stack([self.first(ones), self.second(ones)])


def dropped(batch: Batch, examples: list[int], *, seed: int = 0, step: int = 1) -> torch.Tensor:
    """(2, B, T, WIDTH) bool: what the two layers leave out."""
    objective = Objective(Layers().train(), lambda model, given: model(given))
    keys = dropout_keys(batch, examples, seed=seed, step=step)
    return objective({**batch, KEYS: keys}) == 0


def padded(count: int, length: int) -> Batch:
    return {"input_ids": torch.zeros(count, length, dtype=torch.int64)}


def test_the_asked_share_is_dropped_at_each_position_and_in_each_channel() -> None:
    found = dropped(padded(16, 64), list(range(16))).float()
    assert found.mean().item() == pytest.approx(SHARE, abs=0.002)
    for over in ((1, 2), (0, 3)):  # channels of a layer, positions
        shares = found.mean(dim=over)
        count = found.numel() / shares.numel()
        expected = (SHARE * (1 - SHARE) / count) ** 0.5
        assert shares.std().item() == pytest.approx(expected, rel=0.15), over


def test_masks_of_other_seeds_steps_examples_positions_and_layers_have_nothing_in_common() -> None:
    batch = padded(8, 32)
    examples = list(range(8))
    mask = dropped(batch, examples)
    others = {
        "seed": dropped(batch, examples, seed=1),
        "step": dropped(batch, examples, step=2),
        "example": mask.roll(1, dims=1),
        "position": mask.roll(1, dims=2),
        "channel": mask.roll(1, dims=3),
        "layer": mask.flip(0),
    }
    for name, other in others.items():
        assert (mask & other).float().mean().item() == pytest.approx(SHARE**2, abs=0.002), name


def test_an_example_has_the_same_mask_in_any_company_padded_or_packed() -> None:
    lengths = [5, 3, 7]
    together = dropped(padded(3, 7), [4, 9, 2])
    packed = dropped(pack_answers([EncodedAnswer([1] * each, 0.0) for each in lengths]), [4, 9, 2])
    start = 0
    for row, (example, length) in enumerate(zip([4, 9, 2], lengths, strict=True)):
        alone = dropped(padded(1, length), [example])[:, 0]
        assert torch.equal(together[:, row, :length], alone)
        assert torch.equal(packed[:, 0, start : start + length], alone)
        start += length


def test_one_vector_for_each_row_has_the_mask_of_its_first_position() -> None:
    def pooled(model: Any, batch: Batch) -> torch.Tensor:
        return model.first(torch.ones(3, WIDTH)) == 0

    batch = padded(3, 7)
    keys = dropout_keys(batch, [4, 9, 2], seed=0, step=1)
    found = Objective(Layers().train(), pooled)({**batch, KEYS: keys})
    assert torch.equal(found, dropped(batch, [4, 9, 2])[0, :, 0])


def test_dropout_of_attention_weights_is_found(bases: dict[Family, Any]) -> None:
    from transformers import AutoModelForSequenceClassification

    found = {
        family: attention_dropout(AutoModelForSequenceClassification.from_pretrained(bases[family]))
        for family in ("llama", "bert")
    }
    assert found == {"llama": 0.0, "bert": pytest.approx(0.1)}
