"""``POST /v1/moderations``: the guard where a program expects OpenAI's moderation.

``input`` are answers: a text, a list of texts, or the parts of one. Their questions are in the field
``question``, a text or a list of as many. The guard has one score and no categories, so all categories are
``null``: not known. The score is in the field ``mllm_protector``, with the text to show where ``rewrite`` is
true.
"""

import uuid
from typing import Any

from mllm_protector.records import Outcome
from mllm_protector.serving.api_errors import bad_request
from mllm_protector.serving.gateways.asking import Answer, Asking, model_of
from mllm_protector.serving.guarding import Guarded

NAME = "mllm-protector"
CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
UNKNOWN = dict.fromkeys(CATEGORIES)


async def answer(body: dict[str, Any], asking: Asking) -> dict[str, Any]:
    """A result for each input.

    Raises:
        ApiError: a body of another form, an input without text, or the guard has no verdict.
    """
    inputs = _inputs(body.get("input"))
    rewrite = body.get("rewrite", False)
    if not isinstance(rewrite, bool):
        raise bad_request("rewrite: must be true or false")
    answers = [
        Answer(text, question, rewrite and asking.rewrites)
        for text, question in zip(inputs, _questions(body.get("question"), len(inputs)), strict=True)
    ]
    verdicts = await asking.judge(answers, model_of(body))
    decimals = asking.state.settings.score_decimals
    results = [_result(each, rewrite, decimals) for each in verdicts]
    return {"id": f"modr-{uuid.uuid4().hex}", "model": NAME, "results": results}


def _result(verdict: Guarded, rewrite: bool, decimals: int) -> dict[str, Any]:
    score = None if verdict.score is None or not decimals else round(verdict.score, decimals)
    own = {"outcome": verdict.outcome.value, "score": score} | ({"text": verdict.text} if rewrite else {})
    return {
        "flagged": verdict.outcome is not Outcome.ALLOWED,
        "categories": UNKNOWN,
        "category_scores": UNKNOWN,
        "category_applied_input_types": {name: ["text"] for name in CATEGORIES},
        "mllm_protector": own,
    }


def _inputs(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise bad_request("input: must be a text, or a list of texts or of parts")
    if all(isinstance(each, str) for each in value):
        return value
    parts = [part for part in value if isinstance(part, dict)]
    texts = [part.get("text") for part in parts if part.get("type") == "text"]
    if len(parts) < len(value) or not all(isinstance(text, str) for text in texts):
        raise bad_request("input: must be a text, or a list of texts or of parts")
    if not texts:
        raise bad_request("input: none of its parts is text; images are not read")
    return ["\n".join(map(str, texts))]


def _questions(value: Any, count: int) -> list[str | None]:
    if value is None:
        return [None] * count
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or len(listed) != count:
        raise bad_request("question: must be a text, or a list of as many as there are inputs")
    if not all(isinstance(each, str) for each in listed):
        raise bad_request("question: must be text")
    return listed
