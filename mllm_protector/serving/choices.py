"""Choices of a chat completion: which of their words are judged, and how they are put back.

Every field of an answer has a rule, and what has none is dropped: servers add fields of their own, and one
of them may repeat the answer in words that nobody judged.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

TEXT_FIELDS = ("reasoning_content", "reasoning", "content", "refusal")
"""Of a message. They are judged together, in this order."""

MESSAGE_FIELDS = ("role", *TEXT_FIELDS, "tool_calls", "function_call")
CHOICE_FIELDS = ("index", "finish_reason", "logprobs", "stop_reason")
COMPLETION_FIELDS = ("id", "object", "created", "model", "system_fingerprint", "service_tier", "usage")
UNSAID = ("id", "index", "type")
"""Of a tool call: names that the model does not choose."""


_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")


class Unreadable(Exception):
    """An answer of a form that cannot be judged."""


def json_object(raw: bytes) -> dict[str, Any] | None:
    """The JSON object that some bytes are; ``None`` if they are not one."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def text_of(message: Mapping[str, Any]) -> str:
    """The words of a message; equal ones in two fields count once.

    Raises:
        Unreadable: a field is not text.
    """
    words = [_field(message, name) for name in TEXT_FIELDS]
    return "\n\n".join(dict.fromkeys(word for word in words if word))


def calls_of(message: Mapping[str, Any]) -> str:
    """All tool calls of a message as one text: a line for each name and value; empty without calls.

    Arguments are read as JSON where they are, so that no escape hides a word; of a key that is given twice,
    both values are there.

    Raises:
        Unreadable: the calls are not a list of objects.
    """
    calls = listed(message.get("tool_calls"))
    said: list[Any] = [
        [(name, value) for name, value in call.items() if name not in UNSAID] for call in calls
    ]
    if message.get("function_call"):
        said.append([("function", message["function_call"])])
    try:
        return "\n".join(line for call in said for line in _lines("", _Pairs(call)))
    except RecursionError:
        raise Unreadable("a tool call is nested too deeply") from None


def listed(calls: Any) -> list[dict[str, Any]]:
    """Tool calls as they are; ``None`` is an empty list.

    Raises:
        Unreadable: not a list of objects.
    """
    calls = calls or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Unreadable("tool_calls is not a list of objects")
    return calls


def passed(choice: Mapping[str, Any]) -> dict[str, Any]:
    """A choice that the guard allows, without the fields that have no rule."""
    message = {name: choice["message"][name] for name in MESSAGE_FIELDS if name in choice["message"]}
    return {name: choice[name] for name in CHOICE_FIELDS if name in choice} | {"message": message}


def replaced(choice: Mapping[str, Any], text: str, finish_reason: str, structured: bool) -> dict[str, Any]:
    """A choice with ``text`` in place of all that the upstream said in it.

    The log probabilities name the words that were said, so they go too. Where JSON was asked for, the text
    is in ``refusal``, where clients that parse the content look first.
    """
    message = {"role": "assistant", "content": text, "refusal": None}
    if structured:
        message |= {"content": None, "refusal": text}
    return {
        "index": choice.get("index", 0),
        "message": message,
        "finish_reason": finish_reason,
        "logprobs": None,
    }


def read_choices(completion: Any, most: int) -> list[dict[str, Any]]:
    """The choices of a completion.

    Raises:
        Unreadable: not a completion with 1 to ``most`` choices that have a message each.
    """
    choices = completion.get("choices") if isinstance(completion, dict) else None
    if not isinstance(choices, list) or not 1 <= len(choices) <= most:
        raise Unreadable(f"no list of 1 to {most} choices")
    for choice in choices:
        if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
            raise Unreadable("a choice without a message")
    return choices


def _field(message: Mapping[str, Any], name: str) -> str:
    value = message.get(name)
    if value is None or isinstance(value, str):
        return value or ""
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise Unreadable(f"{name} is not text")
    if any({*part} - {"type", "text"} for part in parts):
        raise Unreadable(f"{name} holds more than text")
    return "\n".join(part["text"] for part in parts)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with all its pairs, also those of one name."""


def _lines(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = _Pairs(value.items())
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value, object_pairs_hook=_Pairs, parse_int=str, parse_float=str)
        except ValueError:  # cut at the longest length
            value = _ESCAPE.sub(lambda found: chr(int(found.group(1), 16)), value)
    if isinstance(value, _Pairs):
        for key, each in value:
            yield from _lines(key, each)
    elif isinstance(value, list):
        for each in value:
            yield from _lines(name, each)
    elif value is not None:
        yield f"{name}: {value}" if name else str(value)
