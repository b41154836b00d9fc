"""All statistics of a benchmark: from judged answers to measurements."""

from collections.abc import Callable, Iterable

from mllm_protector.evaluation import effects, harmless, rates
from mllm_protector.evaluation.grid import Answers
from mllm_protector.evaluation.measurements import Measurement, placed

Statistic = Callable[[Answers], Iterable[Measurement]]

STATISTICS: list[Statistic] = [
    rates.macro_means,
    rates.attack_success,
    rates.corrected_rates,
    effects.guard_effects,
    effects.image_effects,
    harmless.harmless_answers,
    harmless.outcomes,
    effects.reference,
    effects.judge_agreement,
    effects.detector_on_answers,
    rates.cut_texts,
    harmless.trade_off,
]
"""A metric is a function in this list; every file and page shows what it returns."""


def measure(benchmark: str, answers: Answers) -> list[Measurement]:
    """What every statistic says of a benchmark: the same to the byte for the same rows in any order."""
    return [row for statistic in STATISTICS for row in placed(statistic(answers), benchmark=benchmark)]
