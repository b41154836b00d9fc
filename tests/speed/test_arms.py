import pytest
import torch

from mllm_protector.data.batching import pack_answers
from mllm_protector.errors import InputError
from mllm_protector.models.packing import packed_logits, use_packed_attention
from speed import trl_peers
from speed.arms import ENTRIES, Bench, choose
from speed.ours import end_some_answers
from speed.shape import Shape
from speed.trl_peers import TrlPeer, compaction


def test_all_arms_of_a_training_see_the_same_tokens_and_have_the_same_loss(bench: Bench) -> None:
    for task in ("detector", "detoxifier"):
        rounds = list(bench.workload(task).rounds(2))  # the second one after an optimisation step
        expected: list[float | None] = []
        for entry in choose([task], None, bench.shape):
            arm = entry.build(bench)
            readings = [arm.step(rows) for rows in rounds]
            for rows, reading in zip(rounds, readings, strict=True):
                assert reading.real_tokens == sum(map(len, rows)), entry
                assert (reading.positions == reading.real_tokens) >= entry.is_ours, entry
                assert reading.positions >= reading.real_tokens, entry
            losses = [reading.loss for reading in readings]
            expected = expected or losses  # of the official loop, which comes first
            if entry.name.startswith("trl_reward"):
                assert None not in losses, entry  # pairwise
            else:
                near = 1e-3 if entry.precision == "bf16" else 1e-5
                assert losses == pytest.approx(expected, rel=near), entry


def test_trl_computes_the_pairwise_loss_of_our_logits(bench: Bench) -> None:
    pytest.importorskip("trl")
    [rows] = bench.texts.detector.rounds(1)
    [entry] = [entry for entry in ENTRIES if entry.name == "trl_reward"]
    arm, ours = entry.build(bench), bench.model("detector")
    assert isinstance(arm, TrlPeer)
    trainer = arm.trainer(rows)
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    use_packed_attention(ours)
    logits = packed_logits(ours, pack_answers(rows))[:, 0]
    expected = -torch.nn.functional.logsigmoid(logits[1::2] - logits[::2]).mean()
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-6)


def test_trl_computes_logits_at_labelled_positions_only(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    from trl.trainer import utils

    seen = []
    head, as_shipped = utils._ChunkedLogProbFunction, utils._use_triton

    class Watched:
        @staticmethod
        def apply(hidden: torch.Tensor, *others: object) -> object:
            seen.append(len(hidden))
            return head.apply(hidden, *others)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Watched)
    [rows] = bench.texts.detoxifier.rounds(1)
    [entry] = [entry for entry in ENTRIES if entry.name == "trl_sft_compact"]
    entry.build(bench).step(rows)
    assert sum(seen) == sum(len(row.target) for row in rows)
    with compaction():
        assert utils._use_triton(torch.device("cpu"))
    assert utils._use_triton is as_shipped


def test_arms_train_their_own_adapters_on_shared_weights(bench: Bench) -> None:
    one, other = bench.model("detector"), bench.model("detector")
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (mine is theirs) != mine.requires_grad, name
        assert torch.equal(mine, theirs), name


def test_scoring_in_batches_scores_the_same_tokens(bench: Bench) -> None:
    [rows] = bench.workload("scoring").rounds(1)
    for entry in choose(["scoring"], None, bench.shape):
        reading = entry.build(bench).step(rows)
        assert reading.real_tokens == sum(map(len, rows)), entry
        assert (reading.forward_steps == len(rows)) == (entry.name == "one_at_a_time"), entry


def test_answers_have_the_same_length_in_any_batch(bench: Bench) -> None:
    [rows] = bench.workload("generation").rounds(1)
    one, ours = (entry.build(bench).step(rows) for entry in choose(["generation"], None, bench.shape))
    assert one.real_tokens == ours.real_tokens
    assert ours.forward_steps <= 2 * 8 < one.forward_steps  # eight rewrites of eight tokens, four at once


def test_some_answers_end_early_and_some_do_not(bench: Bench) -> None:
    model = bench.model("detoxifier")
    end_some_answers(model, end_id=2, mean=4)
    head = model.get_output_embeddings()  # type: ignore[operator]
    chosen = head(torch.randn(4000, bench.shape.hidden)).argmax(dim=-1)
    assert 0.2 < float((chosen == 2).float().mean()) < 0.3


def test_arms_that_cannot_be_had_are_left_out_and_unknown_ones_refused(
    monkeypatch: pytest.MonkeyPatch, shape: Shape
) -> None:
    monkeypatch.setattr(trl_peers, "available", lambda: False)
    assert [entry.name for entry in choose(["detector"], None, shape)] == [
        "official_loop",
        "packed",
        "packed_bf16",
    ]
    with pytest.raises(InputError, match="none is left"):
        choose(["detector"], ["trl_reward"], shape)
    with pytest.raises(InputError, match="no arm nope in these tasks; choose from one_at_a_time, ours"):
        choose(["generation"], ["nope"], shape)
    half = Shape(hidden=32, layers=1, heads=4, kv_heads=4, intermediate=48, vocab=600, dtype="bfloat16")
    assert not [entry for entry in choose(["scoring"], None, half) if entry.name.endswith("_bf16")]
