"""What a server's completion says: a text, a refusal, or nothing that can be used."""

from typing import Any

from mllm_protector.reading import whole_characters
from mllm_protector.records import CutText, Failure

DECLINED = ("content_filter", "content_policy_violation", "invalid_prompt", "ResponsibleAIPolicyViolation")
"""Error codes of content filters: OpenAI's, Azure's, LiteLLM's and OpenRouter's."""


def declined(body: object) -> bool:
    """Whether an error's body is that of a content filter, at whatever depth the services put it."""
    if not isinstance(body, dict):
        return False
    return body.get("code") in DECLINED or "flagged_input" in body or any(map(declined, body.values()))


def text_of(completion: Any) -> str | Failure:
    """The reply in what the client made of a 200: it checks no types, so anything may be anywhere."""
    try:
        choice = completion.choices[0]
        content = choice.message.content
        refusal = getattr(choice.message, "refusal", None)
        finish = getattr(choice, "finish_reason", None)
    except (AttributeError, IndexError, KeyError, TypeError):
        return Failure(reason="the reply is no chat completion")
    if finish == "content_filter" or refusal:
        return Failure(reason="declined by the service", refused=True)
    if not isinstance(content, str):
        return Failure(reason="the reply holds no text")
    text = whole_characters(content.strip())
    return CutText(text) if finish == "length" else text
