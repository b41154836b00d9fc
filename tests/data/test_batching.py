import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm_protector.data.batching import (
    BORDERS,
    GlobalStep,
    MicroBatchLimit,
    by_length,
    count_tokens,
    is_packed,
    moved,
    pack_answers,
    pack_corrections,
    plan_epoch,
    steps_per_epoch,
)
from mllm_protector.data.encoding import IGNORED, EncodedAnswer, EncodedCorrection, collate_targets
from mllm_protector.errors import InputError

lengths_of = st.lists(st.integers(1, 500), max_size=200)
sizes = st.integers(1, 40)
processes_of = st.integers(1, 5)
limits = st.builds(
    MicroBatchLimit,
    tokens=st.none() | st.integers(1, 2000),
    examples=st.none() | st.integers(1, 9),
    packed=st.booleans(),
)
LONG_TAILED = [round(random.Random(index).lognormvariate(4, 0.8)) + 1 for index in range(2048)]


NO_LIMIT = MicroBatchLimit()


def plan(lengths: Sequence[int], limit: MicroBatchLimit = NO_LIMIT, **changes: int) -> list[GlobalStep]:
    defaults = {"batch_size": 16, "processes": 1, "seed": 0, "epoch": 1}
    return list(plan_epoch(lengths, **defaults | changes, limit=limit))


def slots(steps: Sequence[GlobalStep]) -> list[tuple[int, ...]]:
    return [slot for step in steps for shard in step.shards for slot in shard]


def examples(step: GlobalStep) -> list[int]:
    return sorted(index for slot in slots([step]) for index in slot)


def positions(steps: Sequence[GlobalStep], lengths: Sequence[int], limit: MicroBatchLimit) -> int:
    """All that is computed, padding included."""
    return sum(
        sum(lengths[i] for i in slot) if limit.packed else len(slot) * max(lengths[i] for i in slot)
        for slot in slots(steps)
        if slot
    )


@given(lengths_of, sizes, limits, processes_of, st.integers(0, 99), st.integers(1, 9))
def test_an_epoch_has_each_example_exactly_once(
    lengths: list[int], batch_size: int, limit: MicroBatchLimit, processes: int, seed: int, epoch: int
) -> None:
    steps = plan(lengths, limit, batch_size=batch_size, processes=processes, seed=seed, epoch=epoch)
    assert sorted(index for step in steps for index in examples(step)) == list(range(len(lengths)))


@given(lengths_of, sizes, limits, processes_of)
def test_all_processes_have_equally_many_slots_within_the_limit(
    lengths: list[int], batch_size: int, limit: MicroBatchLimit, processes: int
) -> None:
    for step in plan(lengths, limit, batch_size=batch_size, processes=processes):
        assert len(step.shards) == processes
        assert len({len(shard) for shard in step.shards}) == 1
        for slot in slots([step]):
            if len(slot) > 1:
                each = [lengths[index] for index in slot]
                assert len(slot) <= (limit.examples or len(slot))
                size = sum(each) if limit.packed else max(each) * len(each)
                assert size <= (limit.tokens or size)


@given(lengths_of, sizes, limits, processes_of)
def test_which_examples_make_a_step_depends_on_its_size_alone(
    lengths: list[int], batch_size: int, limit: MicroBatchLimit, processes: int
) -> None:
    steps = plan(lengths, limit, batch_size=batch_size, processes=processes)
    plain = plan([7] * len(lengths), batch_size=batch_size)
    assert [examples(step) for step in steps] == [examples(step) for step in plain]
    assert all(len(examples(step)) == batch_size for step in steps[:-1])
    assert len(steps) == steps_per_epoch(len(lengths), batch_size=batch_size)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = plan([7] * 100, seed=3, epoch=1)
    assert [index for slot in slots(first) for index in slot] != list(range(100))
    same = [plan([7] * 100, seed=seed, epoch=epoch) == first for seed, epoch in ((3, 1), (4, 1), (3, 2))]
    assert same == [True, False, False]


@given(lengths_of, sizes, limits, st.integers(0, 9))
def test_a_plan_may_begin_behind_the_steps_that_are_done(
    lengths: list[int], batch_size: int, limit: MicroBatchLimit, done: int
) -> None:
    whole = plan(lengths, limit, batch_size=batch_size)
    assert plan(lengths, limit, batch_size=batch_size, done=done) == whole[done:]


def test_little_is_padded() -> None:
    for limit, most in (
        (MicroBatchLimit(tokens=1024, packed=True), 1.0),
        (MicroBatchLimit(tokens=1024), 1.15),
        (MicroBatchLimit(examples=8), 1.25),
    ):
        steps = plan(LONG_TAILED, limit, batch_size=128)
        assert positions(steps, LONG_TAILED, limit) <= most * sum(LONG_TAILED), limit
    at_random = plan(LONG_TAILED, MicroBatchLimit(), batch_size=8)
    assert positions(at_random, LONG_TAILED, MicroBatchLimit()) > 1.8 * sum(LONG_TAILED)


def test_no_process_waits_long_for_another() -> None:
    for packed in (True, False):
        limit = MicroBatchLimit(tokens=1024, packed=packed)
        together = 0
        steps = plan(LONG_TAILED, limit, batch_size=256, processes=4)
        for step in steps:
            for side_by_side in zip(*step.shards, strict=True):
                each = [GlobalStep(((slot,),)) for slot in side_by_side]
                together += 4 * max(positions([one], LONG_TAILED, limit) for one in each)
        assert together < 1.06 * positions(steps, LONG_TAILED, limit), limit


def test_packed_passes_are_as_few_as_the_tokens_allow_and_of_like_size() -> None:
    limit = MicroBatchLimit(tokens=1024, packed=True)
    for step in plan(LONG_TAILED, limit, batch_size=128):
        sums = [sum(LONG_TAILED[index] for index in slot) for slot in slots([step])]
        assert len(sums) <= -(-sum(sums) // 1024) + 1
        assert max(sums) - min(sums) < 200


@given(lengths_of, limits)
def test_batches_by_length_have_each_index_once_and_the_longest_first(
    lengths: list[int], limit: MicroBatchLimit
) -> None:
    batches = list(by_length(lengths, limit))
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)


def test_batches_by_length_are_as_large_as_the_limit_allows() -> None:
    assert list(by_length([9, 9, 5, 4, 4, 1], MicroBatchLimit(tokens=18))) == [[0, 1], [2, 3, 4], [5]]
    assert list(by_length([9, 9, 5, 4, 4, 1], MicroBatchLimit(examples=4))) == [[0, 1, 2, 3], [4, 5]]
    assert list(by_length([9, 9, 5, 4], MicroBatchLimit(tokens=18, packed=True))) == [[0, 1], [2, 3]]


def test_a_limit_under_which_nothing_fits_is_refused() -> None:
    for name in ("tokens", "examples"):
        with pytest.raises(InputError, match=f"^{name}=0: must be at least 1"):
            MicroBatchLimit(**{name: 0})


# Packing

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


def test_a_batch_knows_its_form_its_real_tokens_and_its_positions() -> None:
    packed, padded = pack_corrections(CORRECTIONS), collate_targets(CORRECTIONS, pad_id=0)
    assert (is_packed(packed), is_packed(padded)) == (True, False)
    assert (count_tokens(packed), count_tokens(padded)) == ((9, 9), (9, 10))


def test_the_borders_stay_where_their_values_are_looked_at() -> None:
    batch = moved(pack_answers(ANSWERS), torch.device("meta"))
    assert batch[BORDERS].device.type == "cpu"
    assert {batch[name].device.type for name in ("input_ids", "position_ids", "labels")} == {"meta"}
