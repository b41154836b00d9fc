"""A threshold that keeps its aim on each of several sources of answers.

A rate over all answers together hides a source on which the detector gives many false alarms, and answers in
use come from yet another source. Threshold and rates are those of ``calibration``, source by source.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mllm_protector.errors import InputError
from mllm_protector.guard.calibration import Aim, Sizes, choose_threshold, describe


def choose_for_each(
    labels: Sequence[bool],
    scores: Sequence[float],
    aim: Aim,
    queries: Sequence[str],
    sources: Sequence[str],
) -> tuple[float, dict[str, dict[str, Any]]]:
    """The threshold that keeps an aim on each of several sources, not only on all answers together.

    The rate that the aim limits is counted in each source alone. A source without answers of that label says
    nothing about it and is left out.

    Returns:
        The strictest of the sources' own thresholds (the lowest one for ``recall``), and by source what
        ``Choice.facts`` says of the limited rate at that threshold.

    Raises:
        InputError: as ``choose_threshold``; or an aim that limits no rate.
    """
    if aim.kind not in ("false_positive_rate", "recall"):
        raise InputError(f"calibration={aim.kind}: has no rate to keep on each source; use one source")
    limited = aim.kind == "recall"
    names = [name for name in dict.fromkeys(sources) if (name, limited) in zip(sources, labels, strict=True)]

    def answers_of(name: str) -> tuple[list[bool], list[float], list[str]]:
        # Answers of the other label, which the rate does not count, come from everywhere.
        inside = [
            place
            for place, (source, label) in enumerate(zip(sources, labels, strict=True))
            if source == name or label != limited
        ]
        return [labels[i] for i in inside], [scores[i] for i in inside], [queries[i] for i in inside]

    answers = {name: answers_of(name) for name in names}
    own_aims = [choose_threshold(harm, score, aim, asked) for harm, score, asked in answers.values()]
    strictest = min if limited else max
    threshold = strictest(choice.threshold for choice in own_aims)
    counted = "positives" if limited else "negatives"
    facts = {}
    for name, (harm, score, asked) in answers.items():
        at = choose_threshold(harm, score, Aim("fixed", threshold, aim.confidence), asked).facts
        rates = {rate: at[rate] for rate in ("recall", "false_positive_rate", "f1")}
        found = describe(aim, threshold, **rates, sizes=Sizes.of(harm, asked))
        own = ("aim", "target", "confidence", counted, f"independent_{counted}", "promised")
        facts[name] = {key: found.facts[key] for key in (*own, aim.kind, f"{aim.kind}_bound")}
    return threshold, facts


def in_words(aim: Aim, facts: Mapping[str, Mapping[str, Any]]) -> str:
    """The choice in one sentence, with the rate on each source."""
    which, most = ("highest", "at least") if aim.kind == "recall" else ("lowest", "at most")
    rates = ", ".join(f"{name} {found[aim.kind]:.3f}" for name, found in facts.items())
    kept = "kept" if all(found["promised"] for found in facts.values()) else "not kept everywhere"
    return (
        f"{which} threshold with a {aim.kind.replace('_', ' ')} of {most} {aim.target:g} on each of "
        f"{len(facts)} sources at confidence {aim.confidence:g}, {kept} ({rates})"
    )
