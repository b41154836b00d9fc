"""The figures of a detector and its baselines on the same answers.

Pure functions of labels, scores and queries.

All intervals are Wilson's on the number of independent answers that a figure is worth; see ``ranking`` for
AUROC and average precision. F1 is a function of the Jaccard index, which is a share: of the answers that are
harmful or flagged, those that are both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mllm_protector.evaluation.ranking import Ranking, auroc, average_precisions, difference_limits
from mllm_protector.evaluation.statistics import Ints, effective_size, proportion
from mllm_protector.metrics import OperatingPoint, detection_metrics, operating_point
from mllm_protector.records import AnswerPair, LabelledAnswer

RESAMPLES = 2000
WITHOUT_GROUP = "(no group)"


def differing_pairs(records: Sequence[AnswerPair | LabelledAnswer]) -> list[tuple[int, int]]:
    """Where the accepted and the rejected answer of each pair with two different labels stand."""
    pairs, place = [], 0
    for record in records:
        if isinstance(record, LabelledAnswer):
            place += 1
            continue
        if record.accepted_harmful != record.rejected_harmful:
            pairs.append((place, place + 1))
        place += 2
    return pairs


def figures_of_all(
    labels: Sequence[bool],
    columns: Mapping[str, Sequence[float]],
    flags: Mapping[str, Sequence[bool]],
    clusters: Ints,
    pairs: Sequence[tuple[int, int]],
    *,
    seed: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The figures of each column of scores, and how far the detector is above each of the others.

    Args:
        labels: True for harmful; both kinds occur.
        columns: what scored (``detector``, and its baselines) -> P(harmful) of each answer.
        flags: what scored -> whether each answer reaches its threshold.
        clusters: (N,) from 0 without gaps; answers to one query have the same number.
        pairs: of places: the answer that should score lower, and the one that should score higher.
        seed: of the bootstrap.
    """
    harm = np.array(labels, dtype=bool)
    arrays = {name: np.array(scores, dtype=np.float64) for name, scores in columns.items()}
    rankings = {
        "auroc": {name: auroc(harm, scores, clusters) for name, scores in arrays.items()},
        "average_precision": average_precisions(harm, arrays, clusters, resamples=RESAMPLES, seed=seed),
    }
    figures = {
        name: _figures_of(
            labels,
            scores,
            flags[name],
            clusters,
            pairs,
            {figure: of_name[name] for figure, of_name in rankings.items()},
        )
        for name, scores in columns.items()
    }
    against: dict[str, dict[str, Any]] = {name: {} for name in columns if name != "detector"}
    for name, differences in against.items():
        for figure, of_name in rankings.items():
            low, high = difference_limits(of_name["detector"], of_name[name])
            difference = figures["detector"][figure] - figures[name][figure]
            differences[figure] = {"difference": difference, "low": low, "high": high}
    return figures, against


def _figures_of(
    labels: Sequence[bool],
    scores: Sequence[float],
    flagged: Sequence[bool],
    clusters: Ints,
    pairs: Sequence[tuple[int, int]],
    rankings: Mapping[str, Ranking],
) -> dict[str, Any]:
    ranked = detection_metrics(labels, scores, threshold=0.5)
    point = operating_point(labels, flagged)
    right = np.array([scores[accepted] < scores[rejected] for accepted, rejected in pairs], dtype=bool)
    of_pairs = clusters[[accepted for accepted, _ in pairs]] if pairs else clusters[:0]
    figures: dict[str, Any] = {name: ranked[name] for name in ("auroc", "average_precision")}
    figures |= {"f1": point.f1, "ece": ranked["ece"], "brier": ranked["brier"]}
    for name, ranking in rankings.items():
        figures[f"{name}_low"], figures[f"{name}_high"] = ranking.limits
    figures |= _f1_limits(np.array(labels), np.array(flagged), clusters)
    figures |= _rates(labels, flagged, clusters, point) | _share("pairwise_accuracy", right, of_pairs)
    return figures


def _f1_limits(harm: Any, flag: Any, clusters: Ints) -> dict[str, float | None]:
    """Those of the Jaccard index, J, turned into F1 = 2 J / (1 + J)."""
    either = harm | flag
    jaccard = _share("jaccard", (harm & flag)[either], clusters[either])
    low, high = jaccard["jaccard_low"], jaccard["jaccard_high"]
    return {
        "f1_low": None if low is None else 2 * low / (1 + low),
        "f1_high": None if high is None else 2 * high / (1 + high),
    }


def _rates(
    labels: Sequence[bool], flagged: Sequence[bool], clusters: Ints, point: OperatingPoint
) -> dict[str, Any]:
    """The counts of an operating point, and its shares with their intervals."""
    harm, flag = np.array(labels), np.array(flagged)
    counts = {name: getattr(point, name) for name in ("found", "missed", "false_alarms", "rejected")}
    return (
        counts
        | _share("accuracy", harm == flag, clusters)
        | _share("precision", harm[flag], clusters[flag])
        | _share("recall", flag[harm], clusters[harm])
        | _share("false_positive_rate", flag[~harm], clusters[~harm])
    )


def _share(name: str, values: Any, clusters: Ints) -> dict[str, float | None]:
    """A share with Wilson's interval on the number of independent answers that it is worth."""
    worth = effective_size(values.astype(np.float64), clusters) if len(values) else None
    share = proportion(int(values.sum()), len(values), worth)
    return {name: share.value, f"{name}_low": share.low, f"{name}_high": share.high}


def figures_by_group(
    labels: Sequence[bool],
    columns: Mapping[str, Sequence[float]],
    flagged: Sequence[bool],
    clusters: Ints,
    names: Sequence[str | None],
) -> list[dict[str, Any]]:
    """The figures of each group, by the alphabet.

    There is no AUROC where all answers of a group have one label.

    Args:
        labels: True for harmful.
        columns: as in ``figures_of_all``.
        flagged: whether the detector flags each answer.
        clusters: as in ``figures_of_all``.
        names: the group of each answer, or ``None``.
    """
    rows = []
    for group in sorted({name or WITHOUT_GROUP for name in names}):
        inside = np.array([(name or WITHOUT_GROUP) == group for name in names])
        harm = np.array(labels)[inside].tolist()
        flag = np.array(flagged)[inside].tolist()
        ranked = {
            name: detection_metrics(harm, np.array(scores)[inside].tolist(), threshold=0.5)
            for name, scores in columns.items()
            if 0 < sum(harm) < len(harm)
        }
        rows.append(
            {"group": group, "answers": len(harm), "harmful": sum(harm)}
            | {name: ranked.get("detector", {}).get(name) for name in ("auroc", "average_precision")}
            | {f"{name}_auroc": ranked.get(name, {}).get("auroc") for name in columns if name != "detector"}
            | _rates(harm, flag, clusters[inside], operating_point(harm, flag))
        )
    return rows
