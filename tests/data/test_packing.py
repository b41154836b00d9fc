import torch

from mllm_protector.data.encoding import (
    IGNORED,
    EncodedAnswer,
    EncodedCorrection,
    collate_targets,
)
from mllm_protector.data.packing import (
    BORDERS,
    count_tokens,
    is_packed,
    moved,
    pack_answers,
    pack_corrections,
)

CORRECTIONS = [
    EncodedCorrection(prompt=[1, 2, 3], target=[4, 9]),
    EncodedCorrection(prompt=[5], target=[6, 7, 9]),
]
ANSWERS = [EncodedAnswer([1, 2, 3], 1.0), EncodedAnswer([4], 0.0)]


def test_texts_stand_end_to_end_and_positions_begin_anew() -> None:
    batch = pack_answers(ANSWERS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0]]
    assert batch[BORDERS].tolist() == [0, 3, 4]
    assert batch[BORDERS].dtype == torch.int32
    assert batch["labels"].tolist() == [1.0, 0.0]
    assert "attention_mask" not in batch


def test_labels_are_the_targets_at_their_own_places() -> None:
    labels = pack_corrections(CORRECTIONS)["labels"]
    assert labels.tolist() == [[IGNORED, IGNORED, IGNORED, 4, 9, IGNORED, 6, 7, 9]]


def test_the_first_token_of_a_text_is_never_a_target_of_the_text_before() -> None:
    batch = pack_corrections(CORRECTIONS)
    assert all(batch["labels"][0, start] == IGNORED for start in batch[BORDERS][:-1].tolist())


def test_real_tokens_and_positions_are_counted_in_both_forms() -> None:
    assert count_tokens(pack_corrections(CORRECTIONS)) == (9, 9)
    assert count_tokens(collate_targets(CORRECTIONS, pad_id=0)) == (9, 10)


def test_a_batch_knows_its_form() -> None:
    assert is_packed(pack_answers(ANSWERS))
    assert not is_packed(collate_targets(CORRECTIONS, pad_id=0))


def test_the_borders_stay_where_their_values_are_looked_at() -> None:
    batch = moved(pack_answers(ANSWERS), torch.device("meta"))
    assert batch[BORDERS].device.type == "cpu"
    assert {batch[name].device.type for name in ("input_ids", "position_ids", "labels")} == {"meta"}
