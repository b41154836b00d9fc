"""However many choices and tool calls an answer has, its verdict comes within one deadline."""

import asyncio
import time

from mllm_protector.records import Outcome
from mllm_protector.serving.judging import Case, judge
from tests.serving.builders import policy_settings
from tests.serving.fakes import message
from tests.serving.stubs import StubCorrector, StubDetector, running

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
DEADLINE_S = 1.0


def test_a_guard_that_hangs_costs_one_deadline_for_all_choices_and_tool_calls() -> None:
    async def seconds(detector: StubDetector, corrector: StubCorrector) -> float:
        choices = [message(f"a harmful answer {index}", index, tool_calls=[CALL]) for index in range(8)]
        case = Case(query="Why?", structured=False, threshold=None)
        async with running(detector, corrector, deadline_s=DEADLINE_S, batch_tokens=1) as guard:
            started = time.monotonic()
            judged = await judge({"choices": choices}, choices, case, guard.client, policy_settings())
            took = time.monotonic() - started
            detector.gate.set()
            corrector.gate.set()
        assert [each.outcome for each in judged.verdicts] == 8 * [Outcome.GUARD_ERROR]
        assert "harmful" not in str(judged.content)
        return took

    hanging = StubDetector()
    hanging.gate.clear()
    assert DEADLINE_S <= asyncio.run(seconds(hanging, StubCorrector())) < 6 * DEADLINE_S
    rewriting = StubCorrector()
    rewriting.gate.clear()
    assert DEADLINE_S <= asyncio.run(seconds(StubDetector(), rewriting)) < 6 * DEADLINE_S
