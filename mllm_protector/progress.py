"""How far long work has come: a bar on a terminal, and elsewhere a line a minute in the log."""

import logging
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import TypeVar

from tqdm.auto import tqdm

log = logging.getLogger(__name__)

T = TypeVar("T")
EVERY = 60.0
"""Seconds between two lines."""


class Progress:
    """Counts units of work; used in a ``with``."""

    def __init__(
        self, title: str, unit: str, total: int | None = None, *, done: int = 0, active: bool = True
    ) -> None:
        """Show nothing yet but an empty bar.

        Args:
            title: of the work.
            unit: what is counted, in the singular.
            total: units at the end, if that is known.
            done: units that were done before.
            active: ``False`` for all processes but the first.
        """
        self._title, self._unit, self._total = title, unit, total
        self._count = self._before = done
        self._active = active
        self._began = self._said = monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=title,
            unit=unit,
            disable=None if active else True,  # None: no bar where there is no terminal
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def update(self, count: int = 1, note: str = "", *, milestone: bool = False) -> None:
        """Count more units; ``note`` is put behind the bar or line, and a milestone is a line in any case."""
        self._count += count
        self._bar.update(count)
        if note:
            self._bar.set_postfix_str(note)
        if self._bar.disable and (milestone or monotonic() - self._said >= EVERY):
            self._said = monotonic()
            self.write(f"{self._state()}: {note}" if note else self._state())

    def write(self, text: str) -> None:
        """Write a line above the bar, or to the log."""
        if self._active:
            show = log.info if self._bar.disable else tqdm.write
            show(text)

    def _state(self) -> str:
        rate = (self._count - self._before) / max(monotonic() - self._began, 1e-9)
        so_far = f"{self._title}: {self._unit} {self._count:,}"
        if self._total is None or not rate:
            return f"{so_far}, {short(rate)}/s"
        left = tqdm.format_interval(max(0, self._total - self._count) / rate)
        return f"{so_far} of {self._total:,}, {short(rate)}/s, {left} left"


def followed(rows: Sequence[T], title: str, unit: str) -> Iterator[T]:
    """The rows one by one, each counted when the next one is asked for."""
    with Progress(title, unit, len(rows)) as progress:
        for row in rows:
            yield row
            progress.update()


def short(number: float) -> str:
    """A rate or a time with as many digits as help."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
