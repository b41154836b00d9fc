import xml.etree.ElementTree as ElementTree

import numpy as np

from mllm_protector.reporting.plots import curves

LABELS = [False, True, False, True, True, False]
SCORES = [0.1, 0.9, 0.4, 0.6, 0.3, 0.2]


def drawn(scores: list[float] = SCORES) -> dict[str, bytes]:
    return curves(
        LABELS,
        {"detector": scores, "baseline": SCORES[::-1]},
        uncalibrated={"before": SCORES},
        marks={"detector": (0.3, 0.6, 0.7)},
    )


def test_the_same_scores_give_the_same_bytes_and_others_do_not() -> None:
    assert drawn() == drawn()
    other = drawn([0.9, 0.1, 0.5, 0.5, 0.5, 0.5])
    assert all(drawn()[title] != other[title] for title in drawn())


def test_every_plot_is_whole_whatever_the_scores() -> None:
    for scores in (SCORES, [0.5] * 6, [0.0] * 6, [1.0] * 6):
        plots = drawn(scores)
        assert len(plots) == 3
        for content in plots.values():
            assert ElementTree.fromstring(content).tag.endswith("svg"), scores  # noqa: S314


def test_a_plot_of_many_answers_stays_small() -> None:
    dice = np.random.default_rng(0)
    labels = (dice.random(50_000) < 0.3).tolist()
    scores = dice.random(50_000).tolist()
    plots = curves(labels, {"detector": scores}, uncalibrated={}, marks={})
    assert max(map(len, plots.values())) < 200_000
