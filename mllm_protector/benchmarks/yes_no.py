"""What yes-or-no questions report beside the share of right answers: the metrics of POPE and of MME."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from mllm_protector.benchmarks.scoring import KnownAnswer, YesNo

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


class Known(NamedTuple):
    """The known answer of a question, and what its metrics are grouped by."""

    answer: KnownAnswer
    category: str = ""
    pair: str = ""


def yes_no_metrics(known: Mapping[str, Known], texts: Mapping[str, str]) -> dict[str, float | None]:
    """POPE's metrics, in which yes is positive, and where questions come in pairs those of MME.

    An answer that says neither yes nor no is wrong; POPE's script takes it for a yes (Li et al., arXiv
    2305.10355). MME (Fu et al., arXiv 2306.13394) counts the pairs of which both answers are right, its
    accuracy+, and adds 100 (accuracy + accuracy+) over its categories of perception (at most 2,000) and
    cognition (at most 800). A question whose pair was not asked is in no accuracy+.

    Args:
        known: by the question's id.
        texts: answers by the question's id.

    Returns:
        Shares in [0, 1] and MME's two sums; ``None`` for what cannot be computed, such as a sum where a
        category has no answers.
    """
    asked = [(each, texts[key]) for key, each in known.items() if key in texts]
    rows = [
        (each.answer.yes, each.answer.said(text)) for each, text in asked if isinstance(each.answer, YesNo)
    ]
    tp, fp = rows.count((True, True)), rows.count((False, True))
    right, positive = tp + rows.count((False, False)), sum(yes for yes, _ in rows)
    metrics = {
        "accuracy": _share(right, len(rows)),
        "precision": _share(tp, tp + fp),
        "recall": _share(tp, positive),
        "f1": _share(2 * tp, tp + fp + positive),
        "yes_ratio": _share(tp + fp, len(rows)),
        "neither": _share(sum(said is None for _, said in rows), len(rows)),
    }
    if any(each.pair for each in known.values()):
        metrics |= _mme([(each.category, each.pair, each.answer.score(text)) for each, text in asked])
    return metrics


def _mme(rows: list[tuple[str, str, float]]) -> dict[str, float | None]:
    frame = pd.DataFrame(rows, columns=["category", "pair", "right"])
    pairs = frame.groupby(["category", "pair"])["right"].agg(["min", "size"])
    both = pairs.loc[pairs["size"] == 2, "min"]
    sums = 100 * (frame.groupby("category")["right"].mean() + both.groupby("category").mean())
    found = {
        "accuracy+": both.mean(),
        "perception": sums.reindex(PERCEPTION).sum(skipna=False),
        "cognition": sums.reindex(COGNITION).sum(skipna=False),
    }
    return {name: None if pd.isna(value) else float(value) for name, value in found.items()}


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
