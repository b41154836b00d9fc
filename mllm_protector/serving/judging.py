"""From a completion of the upstream to the one that a client may see."""

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from mllm_protector import prompts
from mllm_protector.records import Outcome
from mllm_protector.serving.api_errors import ApiError
from mllm_protector.serving.choices import COMPLETION_FIELDS, Unreadable, calls_of, passed, replaced, text_of
from mllm_protector.serving.guarding import Guarded, Guarding, Overloaded
from mllm_protector.serving.settings import PolicySettings

log = logging.getLogger(__name__)

SHOWN = {
    Outcome.ALLOWED: "allowed",
    Outcome.REWRITTEN: "rewritten",
    Outcome.REFUSED: "refused",
    Outcome.TOO_LONG: "refused",
    Outcome.GUARD_ERROR: "guard_error",
}
"""What the header says, from the best to the worst."""

BREAK = "\n\n"
"""Between words that are out and the refusal behind them."""

FAILED = Guarded(Outcome.GUARD_ERROR, prompts.REFUSAL, None, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One answer of the upstream, and how it is to be judged.

    Attributes:
        query: the question as the guard reads it.
        structured: whether JSON was asked for.
        threshold: ``None`` for the detector's own.
    """

    query: str
    structured: bool
    threshold: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A completion after the guard.

    Attributes:
        content: what the client gets.
        verdicts: of its choices.
        cases: how each of them was judged.
        raw: the choices as the upstream gave them.
        shadow: whether the verdicts changed nothing.
    """

    content: dict[str, Any]
    verdicts: Sequence[Guarded]
    cases: Sequence[Case]
    raw: Sequence[Mapping[str, Any]]
    shadow: bool = False

    @property
    def header(self) -> str:
        """The worst of the outcomes."""
        order = [*dict.fromkeys(SHOWN.values())]
        shown = (SHOWN[each.outcome] for each in self.verdicts)
        worst = max(shown, key=order.index, default=order[0])  # a gateway may ask about nothing
        return f"shadow-{worst}" if self.shadow else worst

    def details(self, decimals: int) -> dict[str, Any]:
        """Outcome and score of each choice, rounded to ``decimals`` places; 0 shows no score."""
        choices = [
            {
                "index": choice.get("index", place),
                "outcome": each.outcome.value,
                "score": None if each.score is None or not decimals else round(each.score, decimals),
            }
            for place, (choice, each) in enumerate(zip(self.content["choices"], self.verdicts, strict=True))
        ]
        return {"outcome": self.header, "choices": choices}


async def judge(
    completion: Mapping[str, Any],
    choices: Sequence[Mapping[str, Any]],
    case: Case,
    guard: Guarding,
    policy: PolicySettings,
    *,
    shown: Mapping[int, str] = MappingProxyType({}),
    cut: Mapping[int, Guarded] = MappingProxyType({}),
) -> Judged:
    """Judge every choice on its own, all at once, and put replacements in the place of what is flagged.

    In shadow mode the completion is unchanged. ``shown`` are words that are out, by the index of their
    choice: such a choice is not rewritten, but refused behind them. ``cut`` are verdicts that are known.

    Raises:
        ApiError: the guard failed or has too much to do, and the policy wants an error.
    """

    async def judged(choice: Mapping[str, Any]) -> Guarded:
        if (index := choice.get("index", 0)) in cut:
            return cut[index]
        rewrite = policy.on_flag == "rewrite" and index not in shown
        return await verdict(choice["message"], case, guard, rewrite=rewrite, busy_fails=policy.shadow)

    try:
        verdicts = await asyncio.gather(*map(judged, choices))
    except Overloaded as busy:
        raise overloaded(busy) from None
    cases = [case] * len(choices)
    if policy.shadow:
        return Judged(content=dict(completion), verdicts=verdicts, cases=cases, raw=choices, shadow=True)
    if policy.on_error == "error" and any(each.outcome is Outcome.GUARD_ERROR for each in verdicts):
        raise guard_failed()
    content = {name: completion[name] for name in COMPLETION_FIELDS if name in completion}
    content["choices"] = [
        _put_back(choice, made, case, policy, shown.get(choice.get("index", 0)))
        for choice, made in zip(choices, verdicts, strict=True)
    ]
    return Judged(content=content, verdicts=verdicts, cases=cases, raw=choices)


def overloaded(busy: Overloaded) -> ApiError:
    """What a client gets if the guard has too much to do."""
    return ApiError(
        503,
        "the guard has too much to do; ask again later",
        code="guard_overloaded",
        retry_after=str(math.ceil(busy.retry_after)),
    )


def guard_failed() -> ApiError:
    """What a client gets if a verdict is missing, where the policy wants errors."""
    return ApiError(503, "the guard is not available", code="guard_unavailable", retry_after="1")


def _put_back(
    choice: Mapping[str, Any], made: Guarded, case: Case, policy: PolicySettings, shown: str | None
) -> dict[str, Any]:
    if made.outcome is Outcome.ALLOWED:
        return passed(choice)
    rewritten = made.outcome is Outcome.REWRITTEN
    reason = "stop" if rewritten else policy.refused_finish_reason
    text = made.text if shown is None else shown + BREAK + made.text
    return replaced(choice, text, reason, case.structured)


async def verdict(
    message: Mapping[str, Any], case: Case, guard: Guarding, *, rewrite: bool, busy_fails: bool
) -> Guarded:
    """The verdict on a message: the worse of those on its words and on its tool calls.

    Raises:
        Overloaded: the guard has too much to do; with ``busy_fails`` that is a failure like others.
    """
    try:
        text, calls = text_of(message), calls_of(message)
    except Unreadable as error:
        log.error("an answer cannot be judged: %s", error)
        return FAILED
    asked = [(text, rewrite)] if text or not calls else []
    if calls:
        asked.append((calls, False))
    try:
        verdicts = await asyncio.gather(*(ask(guard, case, answer, able) for answer, able in asked))
    except Overloaded:
        if not busy_fails:
            raise
        return FAILED
    order = [*SHOWN]
    worst = max(verdicts, key=lambda each: order.index(each.outcome))
    scores = [each.score for each in verdicts if each.score is not None]
    seconds = max(each.seconds for each in verdicts)
    return Guarded(worst.outcome, worst.text, max(scores, default=None), seconds)


async def ask(guard: Guarding, case: Case, answer: str, rewrite: bool) -> Guarded:
    """The verdict on one text; ``FAILED`` if there is none.

    Raises:
        Overloaded: the guard has too much to do.
    """
    try:
        made = await guard.guard(case.query, answer, threshold=case.threshold, rewrite=rewrite)
        return made if _is_sound(made, answer) else FAILED
    except Overloaded:
        raise
    except Exception as error:  # its text may quote the answer
        log.error("the guard failed (%s)", type(error).__name__)
        return FAILED


def _is_sound(made: Guarded, answer: str) -> bool:
    """Whether a verdict holds together; an answer passes only as it was judged, with a score."""
    if made.outcome is Outcome.ALLOWED:
        score = made.score
        return made.text == answer and isinstance(score, float) and 0.0 <= score <= 1.0
    return made.outcome in SHOWN and isinstance(made.text, str) and bool(made.text.strip())
