"""LiteLLM's Generic Guardrail API, for the modes ``pre_call`` (tells the question) and ``post_call``.

LiteLLM sends an answer without its question; the two have a call's id in common. A reply's ``texts`` take the
place of all texts that were sent, in their order; an empty list would let the originals through. Tool calls
cannot be replaced, so a flagged one blocks the answer.
"""

from typing import Any

from mllm_protector.records import Outcome
from mllm_protector.serving.api_errors import bad_request
from mllm_protector.serving.chat import capped, query_of
from mllm_protector.serving.choices import Unreadable, calls_of
from mllm_protector.serving.gateways.asking import Answer, Asking, model_of, texts_of

BLOCKED = "The answer was withheld by the guard."
UNREAD = "The answer holds an image, which the guard does not read."
CALL_CHARACTERS = 256
"""Of the longest id of a call."""


async def answer(body: dict[str, Any], asking: Asking) -> dict[str, Any]:
    """The verdict on one answer, or nothing to say on one question.

    Raises:
        ApiError: a body of another form, or the guard has no verdict.
    """
    call = body.get("litellm_call_id")
    if call is not None and not (isinstance(call, str) and len(call) <= CALL_CHARACTERS):
        raise bad_request(f"litellm_call_id: must be a text of at most {CALL_CHARACTERS} characters")
    if body.get("input_type") == "request":
        if call:
            asking.questions.keep(asking.key, call, _question(body))
        return {"action": "NONE"}
    if body.get("input_type") != "response":
        raise bad_request("input_type: must be request or response")
    return await _verdict(body, asking, asking.questions.find(asking.key, call) if call else None)


async def _verdict(body: dict[str, Any], asking: Asking, question: str | None) -> dict[str, Any]:
    blocks = _blocks(body.get("additional_provider_specific_params"))
    texts = texts_of(body.get("texts"), "texts")
    try:
        calls = calls_of({"tool_calls": body.get("tool_calls")})
    except Unreadable as error:
        raise bad_request(str(error)) from None
    rewrite = asking.rewrites and not blocks
    answers = [Answer(text, question, rewrite) for text in texts]
    if calls:
        answers.append(Answer(calls, question, rewrite=False))
    made = await asking.judge(answers, model_of(body))
    flagged = [each.outcome is not Outcome.ALLOWED for each in made]
    if body.get("images") and not asking.state.settings.policy.shadow:
        return {"action": "BLOCKED", "blocked_reason": UNREAD}
    if any(flagged[len(texts) :]) or (blocks and any(flagged)):
        return {"action": "BLOCKED", "blocked_reason": BLOCKED}
    shown = [each.text for each in made[: len(texts)]]
    # What LiteLLM streams is judged anew as it grows: nothing may be shown before the last verdict.
    reply: dict[str, Any] = {"action": "NONE", "stream_holdback_chars": [len(text) for text in shown]}
    return reply | ({"action": "GUARDRAIL_INTERVENED", "texts": shown} if any(flagged) else {})


def _question(body: dict[str, Any]) -> str:
    messages = body.get("structured_messages")
    if isinstance(messages, list) and messages and all(isinstance(each, dict) for each in messages):
        return query_of(messages)
    return capped("\n".join(texts_of(body.get("texts"), "texts")))


def _blocks(parameters: Any) -> bool:
    """Whether a flagged answer is to be blocked, and not replaced."""
    chosen = parameters.get("on_flag", "replace") if isinstance(parameters, dict) else "replace"
    if chosen not in ("replace", "block"):
        raise bad_request("on_flag: must be replace or block")
    return bool(chosen == "block")
