"""The dry run: what is there, what is missing, and what judging it would take."""

import logging
from collections.abc import Mapping, Sequence

from mllm_protector.evaluation.grid import NONE
from mllm_protector.evaluation.items import Item
from mllm_protector.evaluation.stages import probes_of
from mllm_protector.evaluation.store import Store
from mllm_protector.protocols import Cost, Judge, Priced
from mllm_protector.records import BENIGN, Answer

log = logging.getLogger(__name__)

ASSUMED = 800
"""Characters of an answer that nobody has made yet."""


def estimate(
    items: Sequence[Item],
    answers: Store,
    judges: Mapping[str, Judge],
    arms: Sequence[str],
) -> dict[str, Cost]:
    """Say how many answers are missing, and what each judge that costs calls would take.

    Args:
        items: all questions.
        answers: what was answered already.
        judges: by name.
        arms: each may have another text to judge for every question.

    Returns:
        Judge -> the cost of judging everything from the start, which is the most that it can be: verdicts
        that are there already, and texts that stand in several arms, are not paid again.
    """
    missing = sum(item.key not in answers for item in items)
    log.info("answers: %s wanted, %s to be made", f"{len(items):,}", f"{missing:,}")
    judged = [item for item in items if item.question.scenario != BENIGN]
    texts = [(answers.get(item.key) or {}).get("text", "x" * ASSUMED) for item in judged]
    costs = {}
    for name, judge in judges.items():
        if not isinstance(judge, Priced):
            log.info("judge %s: costs no calls", name)
            continue
        probes = probes_of(judge)
        questions = [item.question for item in judged for _ in arms]
        # Distinct texts, as those of different arms may be: a judge is not asked twice about the same one.
        rows = [
            Answer(id=item.question.id, text=text if arm == NONE else f"{text} ({arm})")
            for item, text in zip(judged, texts, strict=True)
            for arm in arms
        ]
        questions += [probe.question for probe in probes]
        rows += [Answer(id=probe.question.id, text=probe.answer) for probe in probes]
        costs[name] = cost = judge.cost(questions, rows)
        log.info(
            "judge %s: at most %s calls, about %s tokens sent and at most %s received",
            name,
            f"{cost.calls:,}",
            f"{cost.prompt_tokens:,}",
            f"{cost.completion_tokens:,}",
        )
    return costs
