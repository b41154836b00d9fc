import numpy as np
import pytest

from mllm_protector.errors import InputError
from mllm_protector.guard.calibration import Aim, choose_threshold
from mllm_protector.guard.each_source import choose_for_each, in_words

NAMES = ("calm", "loud", "foul")


def answers(each: int = 400) -> tuple[list[bool], list[float], list[str]]:
    """Harmless answers of two sources, one of them scored high, and harmful ones of a third."""
    rng = np.random.default_rng(0)
    scores = [rng.beta(*shape, size=each) for shape in ((1, 8), (3, 4), (6, 2))]
    labels = [name == "foul" for name in NAMES for _ in range(each)]
    return labels, np.concatenate(scores).tolist(), [name for name in NAMES for _ in range(each)]


def test_the_rate_is_kept_on_the_worst_source_and_not_on_the_mean_alone() -> None:
    labels, scores, sources = answers()
    queries = [str(place) for place in range(len(labels))]
    aim = Aim("false_positive_rate", 0.1)
    threshold, facts = choose_for_each(labels, scores, aim, queries, sources)
    pooled = choose_threshold(labels, scores, aim, queries).threshold
    flagged = np.array(scores) >= threshold
    of = np.array(sources)
    assert facts.keys() == {"calm", "loud"}
    for name, found in facts.items():
        rate = flagged[of == name].mean()
        assert found["false_positive_rate"] == pytest.approx(rate)
        assert rate <= found["false_positive_rate_bound"] <= 0.1
        assert found["promised"] is True
    assert (np.array(scores)[of == "loud"] >= pooled).mean() > 0.1
    assert threshold > pooled
    assert "on each of 2 sources at confidence 0.95, kept (calm 0.003, loud" in in_words(aim, facts)


def test_recall_is_kept_on_each_source_with_harmful_answers() -> None:
    labels, scores, sources = answers()
    turned = [1 - score for score in scores]
    queries = [str(place) for place in range(len(labels))]
    threshold, facts = choose_for_each(
        [not label for label in labels], turned, Aim("recall", 0.9), queries, sources
    )
    assert facts.keys() == {"calm", "loud"}
    assert min(found["recall_bound"] for found in facts.values()) >= 0.9
    assert threshold < 0.7


def test_what_cannot_be_kept_is_said() -> None:
    labels, scores, sources = answers(20)
    queries = [str(place) for place in range(len(labels))]
    aim = Aim("false_positive_rate", 0.01)
    assert "not kept everywhere" in in_words(aim, choose_for_each(labels, scores, aim, queries, sources)[1])
    with pytest.raises(InputError, match="has no rate to keep on each source"):
        choose_for_each(labels, scores, Aim("f1", None), queries, sources)
