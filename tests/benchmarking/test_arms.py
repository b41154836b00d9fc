import re

import pytest
import torch

from mllm_protector.benchmarking import trl_peers
from mllm_protector.benchmarking.arms import ENTRIES, TASKS, Bench, Entry, Settings, choose
from mllm_protector.benchmarking.inference import end_some_answers
from mllm_protector.benchmarking.shape import Shape
from mllm_protector.errors import InputError

TRAININGS = [entry for entry in ENTRIES if entry.task in ("detector", "detoxifier")]
REWRITINGS = [entry for entry in ENTRIES if entry.task == "generation"]


def ids(entry: Entry) -> str:
    return f"{entry.task}-{entry.name}"


@pytest.mark.parametrize("entry", TRAININGS, ids=ids)
def test_each_arm_trains_on_the_same_tokens_with_the_same_loss(entry: Entry, bench: Bench) -> None:
    if entry.needs_trl:
        pytest.importorskip("trl")
    workload = bench.workload(entry.task)
    arm, plain = entry.build(bench), TRAININGS[0 if entry.task == "detector" else 6].build(bench)
    for rows in workload.rounds(2):  # the second one behind an optimisation step
        loss, reading = arm.step(rows)
        expected, _ = plain.step(rows)
        assert reading.real_tokens == sum(map(len, rows))
        assert reading.positions >= reading.real_tokens
        if not entry.pairwise:
            assert loss == pytest.approx(expected, rel=1e-3 if entry.precision == "bf16" else 1e-5)


@pytest.mark.parametrize("task", ["detector", "detoxifier"])
def test_a_packed_round_has_no_padding(task: str, bench: Bench) -> None:
    [entry] = [entry for entry in ENTRIES if (entry.task, entry.name) == (task, "packed")]
    [rows] = bench.workload(entry.task).rounds(1)
    _, reading = entry.build(bench).step(rows)
    assert reading.positions == reading.real_tokens
    assert reading.forward_steps > 1


def test_arms_train_adapters_of_their_own_on_shared_weights(bench: Bench) -> None:
    one, other = bench.model("detector"), bench.model("detector")
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (mine is theirs) != mine.requires_grad, name
        assert torch.equal(mine, theirs)


def test_scoring_at_once_scores_the_same_tokens(bench: Bench) -> None:
    for entry in [entry for entry in ENTRIES if entry.task == "scoring"]:
        [rows] = bench.workload("scoring").rounds(1)
        _, reading = entry.build(bench).step(rows)
        assert reading.real_tokens == sum(map(len, rows))
        assert (reading.forward_steps == len(rows)) == (entry.name == "one_at_a_time")


def test_answers_are_as_long_however_many_are_written_at_once(bench: Bench) -> None:
    [rows] = bench.workload("generation").rounds(1)
    one, ours = (entry.build(bench).step(rows)[1] for entry in REWRITINGS)
    assert one.real_tokens == ours.real_tokens
    assert ours.forward_steps <= 2 * 8 < one.forward_steps  # eight rewrites of eight tokens, four at once


def test_some_answers_end_early_and_some_do_not(bench: Bench) -> None:
    model = bench.model("detoxifier")
    end_some_answers(model, end_id=2, mean=4)
    head = model.get_output_embeddings()
    chosen = head(torch.randn(4000, bench.shape.hidden)).argmax(dim=-1)
    assert 0.2 < float((chosen == 2).float().mean()) < 0.3


def test_without_trl_its_arms_are_left_out(monkeypatch: pytest.MonkeyPatch, shape: Shape) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not trl_peers.available()
    assert {entry.name for entry in choose(["detector"], None, shape)} == {
        "official_loop",
        "padded",
        "packed",
        "packed_bf16",
    }
    assert 'pip install -e ".[bench]"' in trl_peers.MISSING
    with pytest.raises(InputError, match="none is left"):
        choose(["detector"], ["trl_reward"], shape)


def test_an_unknown_arm_is_refused_with_the_known_ones(shape: Shape) -> None:
    with pytest.raises(
        InputError, match=re.escape("no arm nope in these tasks; choose from one_at_a_time, ours")
    ):
        choose(["generation"], ["nope"], shape)


def test_a_model_in_bfloat16_has_no_arms_of_another_precision() -> None:
    shape = Shape(hidden=32, layers=1, heads=4, kv_heads=4, intermediate=48, vocab=600, dtype="bfloat16")
    chosen = choose(TASKS, None, shape)
    assert {entry.computes_in(shape) for entry in chosen} == {"bf16"}
    assert not [entry.name for entry in chosen if entry.name.endswith("_bf16")]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"micro_batch_tokens": 255}, "micro_batch_tokens=255: must be at least max_length=256"),
        ({"slots": 1}, "slots=1: must be at least 2"),
    ],
)
def test_settings_under_which_arms_would_differ_are_refused(change: dict[str, int], line: str) -> None:
    settings = {"max_length": 256, "micro_batch_tokens": 300, "slots": 4, "new_tokens": 8} | change
    with pytest.raises(InputError, match=line):
        Settings(**settings, learning_rate=1e-3, seed=0)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"layers": 0}, "layers=0: must be at least 1"),
        ({"heads": 3}, "heads=3: must divide hidden=32"),
        ({"kv_heads": 3}, "kv_heads=3: must divide heads=4"),
        ({"dtype": "int8"}, "dtype=int8: use float32 or bfloat16"),
    ],
)
def test_a_shape_that_is_no_llama_is_refused(change: dict[str, int], line: str) -> None:
    shape = {"hidden": 32, "layers": 1, "heads": 4, "kv_heads": 4, "intermediate": 48, "vocab": 600}
    with pytest.raises(InputError, match=line):
        Shape(**{**shape, "dtype": "float32", **change})
