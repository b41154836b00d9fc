"""What two sets report beside the share of right answers: POPE's yes-no metrics and MME's pairs.

Values are shares in [0, 1], but MME's scores, which are the official sums of percentages. What cannot be
computed is ``None``. No metric has an interval.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

from mllm_protector.benchmarks.vqa_formats import Format
from mllm_protector.benchmarks.vqa_scoring import KnownAnswer, YesNo

Metrics = dict[str, float | None]

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)


def pope_metrics(known: Mapping[str, KnownAnswer], answers: Mapping[str, str]) -> Metrics:
    """Yes is the positive class (Li et al., arXiv 2305.10355; AoiDragon/POPE, ``evaluate.py``).

    An answer that says neither yes nor no is wrong; the official script takes it for a yes.

    Args:
        known: by the question's id.
        answers: texts by the question's id.
    """
    rows = [(each.yes, each.said(answers[key])) for key, each in _yes_or_no(known, answers)]
    tp, fp = rows.count((True, True)), rows.count((False, True))
    right, positive = tp + rows.count((False, False)), sum(yes for yes, _ in rows)
    return {
        "accuracy": _share(right, len(rows)),
        "precision": _share(tp, tp + fp),
        "recall": _share(tp, positive),
        "f1": _share(2 * tp, tp + fp + positive),
        "yes_ratio": _share(tp + fp, len(rows)),
        "neither": _share(sum(said is None for _, said in rows), len(rows)),
    }


def mme_metrics(known: Mapping[str, KnownAnswer], answers: Mapping[str, str]) -> Metrics:
    """Accuracy, accuracy+ (images of which both questions are answered right) and MME's two scores.

    A score is the sum of 100 (accuracy + accuracy+) over its categories (Fu et al., arXiv 2306.13394):
    perception up to 2,000, cognition up to 800; ``None`` where a category has no answers. Images of which one
    question was asked only are in no accuracy+.

    Args:
        known: by the question's id, ``<category>/<picture>/<line>``.
        answers: texts by the question's id.
    """
    images: dict[str, dict[str, list[float]]] = {}
    for key, each in _yes_or_no(known, answers):
        category, image, _ = key.split("/")
        images.setdefault(category, {}).setdefault(image, []).append(each.score(answers[key]))
    scores = {category: _accuracies(of_images.values()) for category, of_images in images.items()}
    accuracy, both = _accuracies([rows for of_images in images.values() for rows in of_images.values()])
    return {
        "accuracy": accuracy,
        "accuracy+": both,
        "perception": _total(scores, PERCEPTION),
        "cognition": _total(scores, COGNITION),
    }


METRICS: Mapping[Format, Callable[[Mapping[str, KnownAnswer], Mapping[str, str]], Metrics]] = {
    "pope": pope_metrics,
    "mme": mme_metrics,
}


def _yes_or_no(known: Mapping[str, KnownAnswer], answers: Mapping[str, str]) -> list[tuple[str, YesNo]]:
    return [(key, each) for key, each in known.items() if key in answers and isinstance(each, YesNo)]


def _accuracies(images: Collection[Sequence[float]]) -> tuple[float | None, float | None]:
    """Of the questions of images, and of the images whose two questions were both asked."""
    right = [score for scores in images for score in scores]
    pairs = [scores for scores in images if len(scores) == 2]
    return _share(sum(right), len(right)), _share(sum(min(scores) for scores in pairs), len(pairs))


def _total(scores: Mapping[str, tuple[float | None, float | None]], names: Sequence[str]) -> float | None:
    parts = [part for name in names for part in scores.get(name, (None,))]
    known = [part for part in parts if part is not None]
    return 100 * sum(known) if len(known) == len(parts) else None


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
