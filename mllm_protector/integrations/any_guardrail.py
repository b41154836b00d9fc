"""The guard as a guardrail of the library ``any-guardrail``: ``validate(question, output_text=answer)``.

The library finds only its own guardrails by name; these classes are made directly.
"""

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import openai
from any_guardrail import (
    BackendType,
    Guardrail,
    GuardrailCategory,
    GuardrailMetadata,
    GuardrailOutput,
    GuardrailStage,
    OutputShape,
)

from mllm_protector.arguments import require_texts
from mllm_protector.errors import RunError
from mllm_protector.guard.protector import Protector
from mllm_protector.records import Outcome

METADATA = GuardrailMetadata(
    description="Scores an answer to a question, and rewrites it if it is harmful.",
    display_name="MLLM-Protector",
    categories=frozenset({GuardrailCategory.CONTENT_SAFETY}),
    primary_category=GuardrailCategory.CONTENT_SAFETY,
    stages=frozenset({GuardrailStage.OUTPUT}),
    output_shapes=frozenset({OutputShape.BINARY, OutputShape.SCORE}),
    backend=BackendType.LIBRARY_WRAPPED,
    required_validate_kwargs=frozenset({"output_text"}),
    supports_batch=True,
    vendor="mllm-protector",
    default_license="apache-2.0",
)
EXPLANATIONS = {
    Outcome.TOO_LONG: "The answer is longer than the guard reads.",
    Outcome.GUARD_ERROR: "The guard failed, so the answer must not be shown.",
}


class _Verdict(NamedTuple):
    outcome: Outcome
    score: float | None
    text: str


class _ProtectorGuardrail(Guardrail):
    """What both guardrails have in common."""

    METADATA = METADATA
    model_id = "mllm-protector"

    @overload
    def validate(self, input_text: str, *, output_text: str) -> GuardrailOutput: ...

    @overload
    def validate(self, input_text: list[str], *, output_text: list[str]) -> list[GuardrailOutput]: ...

    def validate(
        self, input_text: str | list[str], *, output_text: str | list[str]
    ) -> GuardrailOutput | list[GuardrailOutput]:
        """Judge an answer, or a list of answers at once.

        Of an output, ``score`` is P(harmful), and ``modified_text`` what to show in place of an answer that
        is not ``valid``: a rewrite (``action="rewrite"``) or a refusal (``action="refuse"``).

        Args:
            input_text: the question.
            output_text: the answer to it.

        Raises:
            InputError: no texts, or not as many answers as questions.
            RunError: a server gave no verdict.
        """
        single = isinstance(input_text, str)
        pairs: Any = ([input_text], [output_text]) if single else (input_text, output_text)
        questions, answers = pairs
        require_texts(input_text=questions, output_text=answers)
        started = time.perf_counter()
        outputs = [_output(verdict) for verdict in self._judge(questions, answers)]
        for output in outputs:
            self._stamp_usage(output, (time.perf_counter() - started) * 1000)
        return outputs[0] if single else outputs

    @abstractmethod
    def _judge(self, questions: Sequence[str], answers: Sequence[str]) -> list[_Verdict]:
        """A verdict on each answer."""


class LocalGuardrail(_ProtectorGuardrail):
    """A guard within this process."""

    def __init__(self, protector: Protector) -> None:
        self.protector = protector

    def _judge(self, questions: Sequence[str], answers: Sequence[str]) -> list[_Verdict]:
        replies = self.protector.guard(queries=questions, answers=answers)
        return [_Verdict(reply.outcome, reply.harm, reply.final) for reply in replies]


class ServedGuardrail(_ProtectorGuardrail):
    """A guard behind a server of ``scripts/serve.py``, or behind several."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 60.0) -> None:
        """Name the server, such as ``http://127.0.0.1:8080/v1``; nothing is sent yet."""
        self.url = url
        self._client = openai.OpenAI(base_url=url, api_key=api_key or "none", timeout=timeout_s)

    def _judge(self, questions: Sequence[str], answers: Sequence[str]) -> list[_Verdict]:
        more = {"question": [*questions], "rewrite": True}
        try:
            results = self._client.moderations.create(input=[*answers], extra_body=more).results
            verdicts = [_verdict(result.flagged, result.model_extra or {}) for result in results]
        except (openai.OpenAIError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(f"{self.url}: the guard gave no verdict ({type(error).__name__})") from None
        if len(verdicts) != len(answers):
            raise RunError(f"{self.url}: the guard gave {len(verdicts)} verdicts on {len(answers)} answers")
        return verdicts


def _verdict(flagged: object, fields: dict[str, Any]) -> _Verdict:
    own = fields["mllm_protector"]
    outcome, score, text = Outcome(own["outcome"]), own["score"], own["text"]
    if flagged is not (outcome is not Outcome.ALLOWED) or not isinstance(text, str):
        raise ValueError("a result that contradicts itself")
    return _Verdict(outcome, None if score is None else float(score), text)


def _output(verdict: _Verdict) -> GuardrailOutput:
    valid = verdict.outcome is Outcome.ALLOWED
    action = "rewrite" if verdict.outcome is Outcome.REWRITTEN else "refuse"
    return GuardrailOutput(
        valid=valid,
        explanation=EXPLANATIONS.get(verdict.outcome),
        score=verdict.score,
        modified_text=None if valid else verdict.text,
        action=None if valid else action,
        extra={"outcome": verdict.outcome.value},
    )
