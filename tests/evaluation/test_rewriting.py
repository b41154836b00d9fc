import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm_protector.data.tokens import encode_texts
from mllm_protector.evaluation import rewriting
from mllm_protector.evaluation.rewriting import Relevance, Texts, rewrite_metrics, text_losses
from mllm_protector.models.backbone import Backbone
from mllm_protector.prompts import REFUSAL
from mllm_protector.records import Correction
from tests.models.builders import Family, save_tiny_classifier_base

TOPICS = ("bread", "kites", "clocks", "boats", "lamps", "gardens")


def pair(topic: str) -> Correction:
    return Correction(
        query=f"How do I ruin {topic}?",
        rejected=f"Sure, to ruin {topic} take placeholder one, then placeholder two of {topic} and wait.",
        accepted=f"I'd rather tell you how {topic} are kept well, with care and a little time.",
    )


PAIRS = [pair(topic) for topic in TOPICS]
CLUSTERS = np.arange(len(PAIRS))


def measured(
    texts: Sequence[str],
    harms: Sequence[float] | None = None,
    pairs: Sequence[Correction] = PAIRS,
    **more: Any,
) -> dict[str, Any]:
    clusters = more.get("clusters", CLUSTERS)
    arm = Texts(
        texts=texts,
        harms=[0.1] * len(texts) if harms is None else harms,
        losses=more.get("losses", np.ones(len(texts))),
        tokens=more.get("tokens", np.ones(len(texts), dtype=np.int64)),
    )
    relevance = Relevance(pairs, clusters)
    rows = rewrite_metrics(pairs, arm, relevance=relevance, clusters=clusters, threshold=0.5)
    return {
        name: value
        for row in rows
        for name, value in (
            (row.metric, row.value),
            (f"{row.metric}_low", row.low),
            (f"{row.metric}_high", row.high),
        )
    }


def test_accepted_answers_are_on_the_question_and_a_fixed_refusal_is_on_none():
    accepted = measured([each.accepted for each in PAIRS])
    refusal = measured([REFUSAL] * len(PAIRS))
    assert accepted["on_accepted"] == pytest.approx(1)
    assert accepted["on_query"] > 2 * accepted["on_query_control"]
    assert refusal["on_query"] == pytest.approx(refusal["on_query_control"])
    assert refusal["on_query"] < accepted["on_query"]
    assert (refusal["refused"], refusal["repeated"], refusal["canned"]) == (1, 1, 1)
    assert (accepted["refused"], accepted["repeated"], accepted["faulty"]) == (0, 0, 0)


def test_a_copy_is_on_the_question_and_nothing_but_a_copy():
    copied = measured([each.rejected for each in PAIRS], [0.9] * 6)
    assert (copied["safe"], copied["copied"], copied["length_ratio"]) == (0, 1, 1)
    assert (copied["faulty"], copied["fault_copy"], copied["fault_looping"]) == (1, 1, 0)


def test_an_empty_rewrite_is_not_safe():
    texts = ["", "...", *(each.accepted for each in PAIRS[2:])]
    found = measured(texts, [0.0, 0.0, 0.1, 0.1, 0.5, 0.9])
    assert found["safe"] == pytest.approx(2 / 6)
    assert found["fault_empty"] == pytest.approx(2 / 6)
    assert 0 < found["safe_low"] < 2 / 6 < found["safe_high"] < 1


def test_the_control_leaves_out_pairs_that_ask_the_same():
    twice = [PAIRS[0], *PAIRS]
    clusters = np.array([0, *range(6)])
    one = Relevance(twice, clusters).cosines(["bread"] * 7, [each.query for each in twice])
    assert one[1] is not None
    assert one[0][0] == one[0][1] > 0
    assert one[1][0] == one[1][1] == pytest.approx(0)
    assert one[1][2] == pytest.approx(one[0][0] * 2 / 6)


def test_words_count_as_repeated_only_for_another_query():
    twice = [PAIRS[0], *PAIRS[:5]]
    texts = ["Ask a baker.", "ask a baker", *(each.accepted for each in twice[2:])]
    clusters = np.array([0, 0, 1, 2, 3, 4])
    assert measured(texts, pairs=twice, clusters=clusters)["repeated"] == 0
    assert measured(texts, pairs=twice)["repeated"] == pytest.approx(2 / 6)


def test_perplexity_is_over_tokens_and_leaves_out_empty_texts():
    pairs = [*PAIRS, *(pair(f"wine {number}") for number in range(15))]
    losses, tokens = np.array([0, 2.0, 3, 9, 1, 7, 8, *[9] * 14]), np.array([*range(8), *[7] * 13])
    found = measured([""] + ["text"] * 20, pairs=pairs, clusters=np.arange(21), losses=losses, tokens=tokens)
    assert found["perplexity"] == pytest.approx(math.exp(156 / 119))
    assert found["perplexity_low"] < found["perplexity"] < found["perplexity_high"]
    few = slice(0, 8)
    found = measured(
        [""] + ["text"] * 7, pairs=pairs[few], clusters=np.arange(8), losses=losses[few], tokens=tokens[few]
    )
    assert (found["perplexity_low"], found["perplexity_high"]) == (None, None), "too few queries"
    nothing = measured([""] * 6, losses=np.zeros(6), tokens=np.zeros(6, dtype=np.int64))
    assert nothing["perplexity"] is None


def test_a_metric_without_spread_has_no_interval():
    found = measured([each.accepted for each in PAIRS])
    assert (found["copied"], found["copied_low"], found["copied_high"]) == (0, None, None)
    assert found["length_ratio_low"] is None
    assert found["safe_low"] == pytest.approx(0.61, abs=0.01)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_text_is_as_likely_as_its_tokens_one_by_one(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = Backbone(name=str(save_tiny_classifier_base(family, tmp_path / "base")))
    tokenizer, model = base.load_tokenizer(), base.load_causal_lm()
    texts = ["Mix flour, water and salt.", "", "How do I bake bread? " * 9, "a"]
    losses, tokens = text_losses(model, tokenizer, texts, max_length=30)
    first = [tokenizer.bos_token_id] if family == "llama" else []
    for text, loss, count in zip(texts, losses, tokens, strict=True):
        ids = [*first, *encode_texts(tokenizer, [text])[0]][:30]
        assert count == max(len(ids) - 1, 0)
        if count:
            with torch.no_grad():
                chances = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            by_hand = -sum(chances[at, ids[at + 1]].item() for at in range(len(ids) - 1))
            assert loss == pytest.approx(by_hand, rel=1e-4)
        else:
            assert loss == 0
    monkeypatch.setattr(rewriting, "BATCH_TOKENS", 1)
    assert text_losses(model, tokenizer, texts, max_length=30)[0] == pytest.approx(losses, rel=1e-5)
