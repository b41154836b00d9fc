"""The guard within the evaluations of ``inspect_ai``: as a scorer, and around a solver.

A guard is a ``Protector``, or the folder of a trained detector, which refuses what it flags. Texts alone are
read: of a question with images, its words. All guards of an event loop share one thread, since models that
share a backbone cannot work at the same time.
"""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar
from inspect_ai.model import ChatMessageAssistant, ModelOutput
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver

from mllm_protector.guard.protector import Protector
from mllm_protector.guard.rows import Row, scores_of
from mllm_protector.records import Outcome

T = TypeVar("T")

METADATA = "mllm_protector"
"""The field of a sample's metadata that ``guarded`` fills."""

_turn: RunVar[CapacityLimiter] = RunVar("turn")


@scorer(metrics=[mean(), stderr()])
def harm_scorer(detector: str | Protector) -> Scorer:
    """Score the last answer to the sample's input: the value is P(harmful), 0 to 1.

    The score's metadata has the ``threshold`` of the guard, and whether the answer is ``flagged``. Where the
    guard gives no score, the sample is unscored, with ``too_long`` or ``guard_error`` as the reason.

    Raises:
        InputError: the folder does not hold a detector.
    """
    guard = _guard(detector)

    def judge(row: Row) -> Score:
        known = {"threshold": guard.threshold}
        if guard.is_too_long(row.answer):
            return Score.unscored(reason=Outcome.TOO_LONG.value, metadata=known)
        [harm] = scores_of(guard.detector, [row])
        if harm is None:
            return Score.unscored(reason=Outcome.GUARD_ERROR.value, metadata=known)
        return Score(value=harm, metadata=known | {"flagged": harm >= guard.threshold})

    async def score(state: TaskState, target: Target) -> Score:
        row = Row(state.input_text, state.output.completion)
        return await _in_thread(lambda: judge(row))

    return score


@solver
def guarded(solver: Solver, protector: str | Protector, keep_raw: bool = False) -> Solver:
    """Run a solver, and put the guard's reply in the place of its answer.

    The sample's metadata gets ``mllm_protector`` with the ``outcome``, the ``score``, P(harmful), which is
    ``None`` without one, and the ``threshold``. An answer that was replaced is nowhere in the state, unless
    ``keep_raw`` adds it there as ``raw``; the log's own record of the model's calls is not touched.

    Raises:
        InputError: the folder does not hold a detector.
    """
    guard = _guard(protector)

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state = await solver(state, generate)
        question, answer = state.input_text, state.output.completion
        [reply] = await _in_thread(lambda: guard.guard(queries=[question], answers=[answer]))
        state.metadata[METADATA] = {
            "outcome": reply.outcome.value,
            "score": reply.harm,
            "threshold": guard.threshold,
        } | ({"raw": answer} if keep_raw else {})
        if reply.outcome is not Outcome.ALLOWED:
            _replace(state, answer, reply.final)
        return state

    return solve


def _replace(state: TaskState, answer: str, text: str) -> None:
    """Whole messages and outputs are made anew: the old ones may hold reasoning, or tokens, of the answer."""
    old = state.output
    state.output = ModelOutput.from_content(old.model, text, old.stop_reason)
    state.output.usage = old.usage
    state.messages = [
        ChatMessageAssistant(content=text, model=old.model)
        if message.role == "assistant" and message.text == answer
        else message
        for message in state.messages
    ]


def _guard(given: str | Protector) -> Protector:
    return given if isinstance(given, Protector) else _loaded(given)


@cache
def _loaded(folder: str) -> Protector:
    """Scorer and solver of one folder share its model."""
    return Protector.from_pretrained(folder)


async def _in_thread(work: Callable[[], T]) -> T:
    limiter = _turn.get(None)
    if limiter is None:
        limiter = CapacityLimiter(1)
        _turn.set(limiter)
    return await to_thread.run_sync(work, limiter=limiter)
