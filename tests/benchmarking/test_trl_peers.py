import pytest
import torch

from mllm_protector.benchmarking.arms import Bench
from mllm_protector.benchmarking.trl_peers import TrlReward, TrlSft, compaction
from mllm_protector.data.packing import pack_answers, pack_corrections
from mllm_protector.models.packing import packed_logits, use_packed_attention
from mllm_protector.training.losses import LanguageLoss

trl = pytest.importorskip("trl")


def test_trl_computes_the_pairwise_loss_of_our_logits(bench: Bench) -> None:
    [rows] = bench.texts.detector.rounds(1)
    model, ours = bench.model("detector"), bench.model("detector")
    arm = TrlReward(model, bench.texts.tokenizer, bench.meter(model), precision="fp32", learning_rate=1e-3)
    trainer = arm.trainer(rows[:8])
    inputs = trainer.data_collator(list(trainer.train_dataset))
    theirs = trainer.compute_loss(trainer.model, inputs)
    use_packed_attention(ours)
    logits = packed_logits(ours, pack_answers(rows[:8]))[:, 0]
    expected = -torch.nn.functional.logsigmoid(logits[1::2] - logits[::2]).mean()
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed_tokens", [None, 300])
@pytest.mark.parametrize("compact", [False, True])
def test_trl_computes_our_language_loss(bench: Bench, packed_tokens: int | None, compact: bool) -> None:
    [rows] = bench.texts.detoxifier.rounds(1)
    model, ours = bench.model("detoxifier"), bench.model("detoxifier")
    arm = TrlSft(
        model,
        bench.texts.tokenizer,
        bench.meter(model),
        precision="fp32",
        learning_rate=1e-3,
        packed_tokens=packed_tokens,
        compact=compact,
    )
    trainer = arm.trainer(rows)
    with compaction(compact):
        theirs = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    use_packed_attention(ours)
    targets = sum(len(row.target) for row in rows)
    expected = LanguageLoss(ours)(ours, pack_corrections(rows)) / targets
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compact", [False, True])
def test_only_a_compact_head_leaves_out_what_carries_no_label(bench: Bench, compact: bool) -> None:
    from trl.trainer import utils

    [rows] = bench.texts.detoxifier.rounds(1)
    seen = []
    head = utils._ChunkedLogProbFunction
    model = bench.model("detoxifier")
    arm = TrlSft(
        model,
        bench.texts.tokenizer,
        bench.meter(model),
        precision="fp32",
        learning_rate=1e-3,
        packed_tokens=None,
        compact=compact,
    )
    with pytest.MonkeyPatch.context() as patch:

        class Watched:
            @staticmethod
            def apply(hidden: torch.Tensor, *others: object) -> object:
                seen.append(len(hidden))
                return head.apply(hidden, *others)

        patch.setattr(utils, "_ChunkedLogProbFunction", Watched)
        arm.step(rows)
    targets = sum(len(row.target) for row in rows)
    assert (sum(seen) == targets) == compact


def test_compaction_is_undone(bench: Bench) -> None:
    from trl.trainer import utils

    before = utils._use_triton
    with compaction(True):
        assert utils._use_triton(torch.device("cpu"))
    assert utils._use_triton is before
