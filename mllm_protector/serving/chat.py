"""Requests of /v1/chat/completions: what is asked of the upstream, and the question that the guard reads.

A request is written anew before it is sent on: of a key that is given twice, two servers may read different
values, and the guard must read what the upstream reads.

**The question** is the dialogue up to the answer. A single turn is its plain words, as in training; several
are told apart by who speaks. System messages are left out: they are the operator's words, the same for every
question, no detector was trained with them, and they would take the room of the dialogue. Only where no user
says anything they are read too, so that a question cannot be hidden there. A turn without words is a mark
such as ``[image]``; words have no mark beside them, because detectors learn from questions without marks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_protector import prompts
from mllm_protector.serving.api_errors import bad_request

QUERY_CHARACTERS = 16_000
"""Of the longest question that is sent to the guard, about 4,000 tokens; detectors read less."""

SPEAKERS = {"assistant": "Assistant", "tool": "Tool", "function": "Tool"}
SYSTEM = {"system": "System", "developer": "System"}
CHECKED = {"messages", "model", "n", "stream", "modalities", "audio", "response_format"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A request that was checked.

    Attributes:
        body: what is sent to the upstream.
        model: the name of its model, or empty.
        choices: how many answers are asked for.
        stream: whether the answer is a stream.
        structured: whether the answer must be JSON, which a replacement is not.
        query: the question as the guard reads it.
    """

    body: bytes
    model: str
    choices: int
    stream: bool
    structured: bool
    query: str


def read_request(raw: bytes, *, choices: int) -> ChatRequest:
    """Check a body and find the question in it; ``choices`` is the largest ``n``.

    Raises:
        ApiError: no JSON object with a list of messages, too many choices, or an answer that is not text.
    """
    try:
        body = json.loads(raw, parse_constant=_no_number)
        sent = json.dumps(body, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise bad_request("the body is not JSON") from None
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise bad_request("the body must be a JSON object with a list of messages")
    if not all(isinstance(message, dict) for message in body["messages"]):
        raise bad_request("messages: each must be an object")
    for key in body:
        if key not in CHECKED and key.lower() in CHECKED:  # servers in Go would read it
            raise bad_request(f"write the key {key.lower()} in small letters")
    count, stream, model = body.get("n"), body.get("stream"), body.get("model")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise bad_request("n: must be a whole number of at least 1")
    if count is not None and count > choices:
        raise bad_request(f"n: at most {choices} choices are allowed here")
    if stream is not None and not isinstance(stream, bool):
        raise bad_request("stream: must be true or false")
    if model is not None and not isinstance(model, str):
        raise bad_request("model: must be a text")
    if body.get("audio") is not None or body.get("modalities") not in (None, [], ["text"]):
        raise bad_request("only text answers are guarded; leave audio and modalities out", "not_guarded")
    wanted = body.get("response_format")
    structured = isinstance(wanted, dict) and wanted.get("type") in ("json_object", "json_schema")
    return ChatRequest(
        body=sent,
        model=model or "",
        choices=count or 1,
        stream=bool(stream),
        structured=structured,
        query=query_of(body["messages"]),
    )


def query_of(messages: Sequence[Mapping[str, Any]], most: int = QUERY_CHARACTERS) -> str:
    """The dialogue as one text of at most ``most`` characters: head and tail of a longer one are kept."""
    turns, system, asked = [], [], False
    for message in messages:
        text = _words(message.get("content"))
        role = message.get("role")
        speaker = role if isinstance(role, str) else ""
        if not text:
            continue
        if speaker in SYSTEM:
            system.append((SYSTEM[speaker], text))
        else:
            asked = asked or speaker not in SPEAKERS
            turns.append((SPEAKERS.get(speaker, "User"), text))
    if not asked:
        turns = system + turns
    if len(turns) == 1:
        return capped(turns[0][1], most)
    return capped("\n\n".join(f"{speaker}: {text}" for speaker, text in turns), most)


def capped(text: str, most: int = QUERY_CHARACTERS) -> str:
    """A text as it is, or its head and tail with a mark between them, as the encoder cuts questions."""
    if len(text) <= most:
        return text
    kept = max(most - len(prompts.GAP), 2)
    return text[: kept - kept // 2] + prompts.GAP + text[len(text) - kept // 2 :]


def _words(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    words = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    return "\n".join(words) or " ".join(map(_mark, parts))


def _mark(part: Mapping[str, Any]) -> str:
    kind = str(part.get("type"))
    return next((f"[{name}]" for name in ("image", "audio", "video", "file") if name in kind), "[part]")


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
