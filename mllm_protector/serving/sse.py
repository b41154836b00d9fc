"""Server-sent events: framing only. Source: HTML standard, section 9.2.6.

Lines end at the bytes CR and LF and nowhere else. ``str.splitlines`` also cuts at U+2028 and U+0085, which
JSON may hold unescaped, so every line here is found among bytes.
"""

from collections.abc import Iterator
from typing import NamedTuple

PING = b": ping\n\n"
DONE = "[DONE]"


class Event(NamedTuple):
    """One event.

    Attributes:
        data: its ``data`` lines, joined; other fields are left out.
        raw: all its lines, each with LF at its end, and a blank one.
    """

    data: str
    raw: bytes


class Frames:
    """Cuts a stream of bytes, in pieces of any size, into events."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._searched = 0
        self._raw = bytearray()
        self._data: list[bytes] = []
        self._after_cr = False
        self._first = True

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that are complete with ``piece``; a comment alone is not one."""
        self._rest += piece
        while (line := self._line()) is not None:
            if event := self._take(line):
                yield event

    def end(self) -> Event | None:
        """What a stream that ended without its last blank line still holds."""
        if self._rest:
            line = bytes(self._rest)
            self._raw += line
            self._rest.clear()
            self._searched = 0
            self._take(line)
        return self._dispatch()

    def _line(self) -> bytes | None:
        """The next whole line, without its end, which is already moved to ``_raw``."""
        if self._after_cr and self._rest:
            self._after_cr = False
            if self._rest[0] == 0x0A:
                del self._rest[0]
        ends = [at for at in map(self._rest.find, b"\r\n", (self._searched,) * 2) if at >= 0]
        if not ends:
            self._searched = len(self._rest)
            return None
        at = min(ends)
        line = bytes(self._rest[:at])
        self._after_cr = self._rest[at] == 0x0D
        del self._rest[: at + 1]
        self._searched = 0
        self._raw += line
        return line

    def _take(self, line: bytes) -> Event | None:
        if self._first:
            line = line.removeprefix(b"\xef\xbb\xbf")
            self._first = False
        if not line:
            return self._dispatch()
        self._raw += b"\n"
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
        return None

    def _dispatch(self) -> Event | None:
        data, raw = b"\n".join(self._data), bytes(self._raw) + b"\n"
        given = bool(self._data)
        self._data.clear()
        self._raw.clear()
        return Event(data.decode(errors="replace"), raw) if given else None


def frame(data: str) -> bytes:
    """An event with ``data``, whose lines become lines of the event."""
    lines = data.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "".join(f"data: {line}\n" for line in lines).encode() + b"\n"
