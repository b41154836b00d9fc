"""What every translation of a gateway's protocol asks of the guard."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mllm_protector.records import Outcome
from mllm_protector.serving.api_errors import bad_request
from mllm_protector.serving.gateways.questions import Questions
from mllm_protector.serving.guarding import Guarded, Overloaded
from mllm_protector.serving.judging import FAILED, Case, Judged, ask, guard_failed, overloaded
from mllm_protector.serving.state import State

MOST_ANSWERS = 512
"""In one request."""


class Answer(NamedTuple):
    """An answer to be judged.

    Attributes:
        text: of the answer.
        question: it is an answer to; ``None`` where it is not known.
        rewrite: whether it may be rewritten; otherwise it is refused when it is flagged.
    """

    text: str
    question: str | None
    rewrite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """One request of a gateway.

    Attributes:
        state: of the front.
        key: the name of the gateway's API key.
        questions: that gateways told before.
    """

    state: State
    key: str | None
    questions: Questions

    @property
    def rewrites(self) -> bool:
        """Whether flagged answers are rewritten."""
        return self.state.settings.policy.on_flag == "rewrite"

    async def judge(self, answers: Sequence[Answer], model: str) -> list[Guarded]:
        """The verdicts on answers of ``model``; in shadow mode all are allowed, and only counted.

        An answer whose question is not known has the threshold ``policy.answer_only_threshold``.

        Raises:
            ApiError: too many answers (400), or a verdict is missing (503).
        """
        if len(answers) > MOST_ANSWERS:
            raise bad_request(f"at most {MOST_ANSWERS} texts are judged at once")
        judged = await self.state.judged(self._judged(answers, model))
        verdicts = zip(answers, judged.verdicts, strict=True)
        if judged.shadow:
            return [replace(made, outcome=Outcome.ALLOWED, text=answer.text) for answer, made in verdicts]
        if any(made.outcome is Outcome.GUARD_ERROR for made in judged.verdicts):
            raise guard_failed()
        return [*judged.verdicts]

    async def _judged(self, answers: Sequence[Answer], model: str) -> Judged:
        shadow = self.state.settings.policy.shadow
        cases = [self._case(answer, model) for answer in answers]
        verdicts = await asyncio.gather(*map(self._verdict, answers, cases))
        raw = [_choice(answer.text) for answer in answers]
        shown = raw if shadow else [_choice(made.text) for made in verdicts]
        content: dict[str, Any] = {"choices": shown}
        return Judged(content=content, verdicts=verdicts, cases=cases, raw=raw, shadow=shadow)

    def _case(self, answer: Answer, model: str) -> Case:
        policy = self.state.settings.policy
        threshold = policy.threshold_of(model, self.key)
        if answer.question is None and policy.answer_only_threshold is not None:
            threshold = policy.answer_only_threshold
        return Case(query=answer.question or "", structured=False, threshold=threshold)

    async def _verdict(self, answer: Answer, case: Case) -> Guarded:
        try:
            return await ask(self.state.guard, case, answer.text, answer.rewrite)
        except Overloaded as busy:
            if self.state.settings.policy.shadow:
                return FAILED
            raise overloaded(busy) from None


def _choice(text: str) -> dict[str, Any]:
    return {"message": {"content": text}}


def texts_of(value: Any, name: str) -> list[str]:
    """A list of texts; ``None`` is an empty one.

    Raises:
        ApiError: it is not a list of texts.
    """
    texts = [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise bad_request(f"{name}: must be a list of texts")
    return texts


def model_of(body: dict[str, Any]) -> str:
    """The name of the model that answered, empty where it is not given.

    Raises:
        ApiError: it is not a text.
    """
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise bad_request("model: must be a text")
    return model or ""
