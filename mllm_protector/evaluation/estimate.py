"""What a run would take, without doing it."""

import logging
from collections.abc import Mapping, Sequence

from mllm_protector.evaluation.grid import NONE
from mllm_protector.evaluation.items import Item
from mllm_protector.evaluation.stages import probes_of
from mllm_protector.evaluation.store import Store
from mllm_protector.protocols import Judge, Priced
from mllm_protector.records import BENIGN, Answer

log = logging.getLogger(__name__)

ASSUMED = 800
"""Characters of an answer that does not exist yet."""


def estimate(
    items: Sequence[Item],
    answers: Store,
    judges: Mapping[str, Judge],
    arms: Sequence[str],
    *,
    again: Mapping[str, Sequence[Item]],
    guards: Mapping[str, Judge],
) -> None:
    """Log how many answers are missing, and the cost of judging everything, for each judge that costs calls.

    That is the most it can be: finished verdicts and texts that several arms share are not paid again, but a
    guard's verdicts on rewrites, and those that time it, come on top.

    Args:
        items: what the MLLM is asked.
        answers: those that are there.
        judges: by name.
        arms: all of them.
        again: what it is asked in other words, by arm.
        guards: the judges that guard, by arm.
    """
    wanted = {"answers": items} | {f"answers of {arm}": each for arm, each in again.items()}
    for name, those in wanted.items():
        missing = sum(item.key not in answers for item in those)
        log.info("%s: %s wanted, %s to be made", name, f"{len(those):,}", f"{missing:,}")
    texts = [(item, (answers.get(item.key) or {}).get("text", "x" * ASSUMED)) for item in items]
    # Distinct texts, as those of different arms may be: a judge is not asked twice about the same one.
    shown = [
        (item.question, text if arm == NONE else f"{text} ({arm})")
        for item, text in texts
        for arm in arms
        if item.question.scenario != BENIGN
    ]
    asked = {f"judge {name}": (judge, shown) for name, judge in judges.items()}
    raw = [(item.question, text) for item, text in texts]
    asked |= {f"arm {name}": (judge, raw) for name, judge in guards.items()}
    for name, (judge, rows) in asked.items():
        if not isinstance(judge, Priced):
            log.info("%s: costs no calls", name)
            continue
        probes = [(probe.question, probe.answer) for probe in probes_of(judge)]
        questions = [question for question, _ in (*rows, *probes)]
        given = [Answer(id=question.id, text=text) for question, text in (*rows, *probes)]
        cost = judge.cost(questions, given)
        log.info(
            "%s: at most %s calls, about %s tokens sent and at most %s received",
            name,
            *(f"{count:,}" for count in (cost.calls, cost.prompt_tokens, cost.completion_tokens)),
        )
