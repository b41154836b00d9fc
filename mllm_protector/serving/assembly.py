"""Streams of a chat completion: from chunks to one completion, and back to chunks.

A stream is put together before anything of it is judged: a value of a tool call comes in fragments, and
choices may be mixed. What is judged is what is released.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mllm_protector.guard.windows import size_of
from mllm_protector.serving.choices import COMPLETION_FIELDS, TEXT_FIELDS, Unreadable, listed

CHARACTERS = 4_000
"""Of a text in one released chunk."""


class Assembly:
    """Puts the chunks of one stream together.

    Attributes:
        usage_alone: the usage came in a chunk of its own, without choices.
        usage_null: chunks before it had an empty usage.
    """

    def __init__(self, most_choices: int) -> None:
        self.most_choices = most_choices
        self.usage_alone = True
        self.usage_null = False
        self._top: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._texts: dict[int, dict[str, list[str]]] = {}
        self._sizes: dict[int, int] = {}

    @property
    def is_finished(self) -> bool:
        """Whether there are choices, and each said why it ended."""
        found = self._choices.values()
        return bool(found) and all(choice["finish_reason"] is not None for choice in found)

    @property
    def has_choices(self) -> bool:
        """Whether any choice has begun."""
        return bool(self._choices)

    def add(self, chunk: Any) -> None:
        """Take a chunk.

        Raises:
            Unreadable: it is not a chunk.
        """
        choices = chunk.get("choices") if isinstance(chunk, dict) else None
        if choices is None:
            choices = []
        if not isinstance(chunk, dict) or not isinstance(choices, list):
            raise Unreadable("a chunk that is not an object with a list of choices")
        for name in COMPLETION_FIELDS:
            if chunk.get(name) is not None and (name == "usage" or name not in self._top):
                self._top[name] = chunk[name]
        if chunk.get("usage") is not None:
            self.usage_alone = not choices
        elif "usage" in chunk:
            self.usage_null = True
        for part in choices:
            self._add(part)

    @property
    def top(self) -> Mapping[str, Any]:
        """What is not of one choice, such as the id."""
        return self._top

    @property
    def sizes(self) -> Mapping[int, int]:
        """The bytes of all texts of each choice so far, by its index."""
        return self._sizes

    def texts(self, index: int) -> dict[str, str]:
        """The texts of a choice so far, by their field."""
        return {name: "".join(pieces) for name, pieces in self._texts[index].items()}

    def completion(self) -> dict[str, Any]:
        """The whole as an answer that is not a stream, choices in order."""
        choices = []
        for index in sorted(self._choices):
            choice = self._choices[index]
            choices.append({**choice, "message": {**choice["message"], **self.texts(index)}})
        return {**self._top, "object": "chat.completion", "choices": choices}

    def _add(self, part: Any) -> None:
        index = part.get("index", 0) if isinstance(part, dict) else None
        if not isinstance(index, int) or not 0 <= index < self.most_choices:
            raise Unreadable("a choice with an index that was not asked for")
        empty = {"index": index, "message": {"role": "assistant"}, "finish_reason": None}
        choice = self._choices.setdefault(index, empty)
        self._texts.setdefault(index, {})
        self._sizes.setdefault(index, 0)
        for name in ("finish_reason", "stop_reason"):
            if part.get(name) is not None:
                choice[name] = part[name]
        if isinstance(part.get("logprobs"), dict):
            _append_lists(choice, part["logprobs"])
        delta = part.get("delta") or part.get("message") or {}
        if not isinstance(delta, dict):
            raise Unreadable("a delta that is not an object")
        message = choice["message"]
        for name in TEXT_FIELDS:
            if value := _text(name, delta.get(name)):
                self._texts[index].setdefault(name, []).append(value)
                self._sizes[index] += size_of(value)
        for call in listed(delta.get("tool_calls")):
            _merge(_place(message.setdefault("tool_calls", []), call), call)
        if isinstance(delta.get("function_call"), dict):
            _merge(message.setdefault("function_call", {}), delta["function_call"])


def chunks(
    completion: Mapping[str, Any], *, alone: bool, null: bool, begun: Collection[int] = ()
) -> Iterator[dict[str, Any]]:
    """A completion as chunks: role, texts, calls, finish; then its usage, in the shape of the upstream.

    Args:
        completion: what is released.
        alone: the usage is a chunk of its own, or else part of the last one.
        null: chunks before have an empty usage.
        begun: the indices of choices whose beginning was released before.
    """
    top = _top(completion, null)
    usage = completion.get("usage")
    last = len(completion["choices"]) - 1
    for place, choice in enumerate(completion["choices"]):
        given = choice.get("logprobs")
        for delta in _deltas(choice["message"], choice.get("index") in begun):
            logprobs, given = (given, None) if "role" not in delta else (None, given)
            yield {**top, "choices": [_part(choice, delta, None, logprobs)]}
        end = {**top, "choices": [_part(choice, {}, choice.get("finish_reason"), given)]}
        if choice.get("stop_reason") is not None:
            end["choices"][0]["stop_reason"] = choice["stop_reason"]
        if usage is not None and not alone and place == last:
            end["usage"] = usage
        yield end
    if usage is not None and alone:
        yield {**top, "choices": [], "usage": usage}


def some_chunks(
    top: Mapping[str, Any], index: int, texts: Mapping[str, str], *, null: bool, begun: bool
) -> Iterator[dict[str, Any]]:
    """More texts of one choice as chunks, in the middle of a stream; ``null`` as in ``chunks``."""
    for delta in _deltas(texts, begun):
        yield {**_top(top, null), "choices": [_part({"index": index}, delta, None, None)]}


def _top(completion: Mapping[str, Any], null: bool) -> dict[str, Any]:
    top = {name: value for name, value in completion.items() if name not in ("choices", "usage")}
    return top | {"object": "chat.completion.chunk"} | ({"usage": None} if null else {})


def _deltas(message: Mapping[str, Any], begun: bool) -> Iterator[dict[str, Any]]:
    if not begun:
        yield {"role": "assistant", "content": ""}
    for name in TEXT_FIELDS:
        value = message.get(name)
        if isinstance(value, str):
            for start in range(0, len(value), CHARACTERS):
                yield {name: value[start : start + CHARACTERS]}
        elif value:
            yield {name: value}
    if calls := message.get("tool_calls"):
        yield {"tool_calls": [{**call, "index": place} for place, call in enumerate(calls)]}
    if call := message.get("function_call"):
        yield {"function_call": call}


def _part(choice: Mapping[str, Any], delta: Any, reason: Any, logprobs: Any) -> dict[str, Any]:
    return {
        "index": choice.get("index", 0),
        "delta": delta,
        "finish_reason": reason,
        "logprobs": logprobs,
    }


def _text(name: str, value: Any) -> str:
    listed = value if isinstance(value, list) else [{"text": "" if value is None else value}]
    parts = [part["text"] for part in listed if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if len(parts) < len(listed):
        raise Unreadable(f"a delta whose {name} is not text")
    return "".join(parts)


def _append_lists(choice: dict[str, Any], found: Mapping[str, Any]) -> None:
    kept = choice.setdefault("logprobs", {})
    for name, values in found.items():
        if isinstance(values, list):
            kept[name] = known = kept.get(name) or []
            known.extend(values)
        else:
            kept.setdefault(name, values)


def _place(calls: list[dict[str, Any]], call: Mapping[str, Any]) -> dict[str, Any]:
    """The call that a fragment belongs to: by its index, else by its id, else the last one."""
    index, name = call.get("index"), call.get("id")
    for known in calls:
        if known["index"] == index if index is not None else name and known.get("id") == name:
            return known
    if index is None and not name and calls:
        return calls[-1]
    calls.append({"index": len(calls) if index is None else index})
    return calls[-1]


def _merge(whole: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add a fragment: texts grow, but names and ids that are sent again do not."""
    for name, value in part.items():
        known = whole.get(name)
        if value is None or name == "index":
            continue
        if isinstance(value, dict) and isinstance(known, dict | None):
            _merge(whole.setdefault(name, {}), value)
        elif isinstance(value, str) and isinstance(known, str) and name in ("arguments", "input", "name"):
            whole[name] = value if name == "name" and known == value else known + value
        elif known is None or isinstance(value, str):
            whole[name] = known if name in ("id", "type") and known else value
        elif known != value:
            raise Unreadable("fragments of a tool call that do not fit together")
