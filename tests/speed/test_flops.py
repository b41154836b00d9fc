from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm_protector.data.encoding import EncodedAnswer, EncodedCorrection
from mllm_protector.models.packing import pretrained
from mllm_protector.training.losses import LanguageLoss, detector_loss
from speed.arms import Bench
from speed.flops import forward_flops, generation_flops, language_head, score_head, training_flops
from speed.shape import Shape

LENGTH, TARGETS = 20, 7


def counted(model: torch.nn.Module, work: Callable[[torch.nn.Module], object]) -> int:
    """By PyTorch's own counter, which knows matrix products; fused attention is none."""
    pretrained(model).set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        work(model)
    return counter.get_total_flops()


def beside(shape: Shape, attentions: int) -> int:
    """What is counted but not useful: the upper half of the attention."""
    return attentions * shape.hidden * (2 * LENGTH**2 - LENGTH * (LENGTH + 1))


def test_training_a_detoxifier_counts_what_pytorch_counts(bench: Bench, shape: Shape) -> None:
    row = EncodedCorrection(list(range(5, 5 + LENGTH - TARGETS)), list(range(5, 5 + TARGETS)))
    batch = bench.texts.detoxifier_encoder([row])
    model = bench.model("detoxifier")
    loss_fn = LanguageLoss(model)
    found = counted(model, lambda model: loss_fn(model, batch).backward())
    expected = training_flops(shape, [LENGTH], head=language_head(shape, TARGETS), head_trained=False)
    # two products forward in each layer, four backward, but in the first layer the keys learn nothing
    assert found == expected + beside(shape, 6 * shape.layers - 1)


def test_training_a_detector_counts_what_pytorch_counts(bench: Bench, shape: Shape) -> None:
    batch = bench.texts.detector_encoder([EncodedAnswer(list(range(5, 5 + LENGTH)), 1.0)])
    found = counted(bench.model("detector"), lambda model: detector_loss(model, batch).backward())
    expected = training_flops(shape, [LENGTH], head=score_head(shape, 1), head_trained=True)
    # transformers scores every position of a padded row, and reads one
    elsewhere = 3 * score_head(shape, LENGTH - 1)
    assert found == expected + beside(shape, 6 * shape.layers - 1) + elsewhere


def test_scoring_and_writing_count_what_has_to_be_computed(bench: Bench, shape: Shape) -> None:
    ids = torch.arange(5, 5 + LENGTH)[None]
    with torch.no_grad():
        found = counted(bench.model("detector"), lambda model: model(input_ids=ids))
    expected = forward_flops(shape, [LENGTH], head=score_head(shape, LENGTH))
    assert found == expected + beside(shape, 2 * shape.layers)
    # a prompt of 6, and 5 new tokens of which the last is never read
    expected = forward_flops(shape, [10], head=language_head(shape, 5))
    assert generation_flops(shape, [6], read=10) == expected
