"""When a growing answer is judged, and when it is cut: the one rule of the proxy and of its measurement.

A prefix is judged when ``tokens`` more have come since the last one that was. A token counts as 4 bytes of
UTF-8, and a prefix ends where a piece of the stream ends. Ends of sentences would be no better borders:
whoever makes a model answer without full stops would decide how much is judged at a time.

A text may be shown as far as the last prefix that passed. After ``hits`` prefixes in a row that did not, the
answer is cut or, if nothing of it was shown, held until all of it is judged.
"""

from mllm_protector.guard.protector import BYTES_PER_TOKEN


class Windows:
    """What is known about one answer so far.

    Attributes:
        shown: how many bytes of it may be shown.
        is_over: prefixes are judged no more.
    """

    def __init__(self, *, tokens: int, hits: int) -> None:
        """Begin an empty answer."""
        self.shown = 0
        self.is_over = False
        self._step = tokens * BYTES_PER_TOKEN
        self._hits = hits
        self._judged = 0
        self._in_row = 0

    @property
    def is_cut(self) -> bool:
        """Whether it ends here: it was shown in part, and its end will not be."""
        return self.is_over and self.shown > 0

    def is_due(self, size: int) -> bool:
        """Whether an answer of ``size`` bytes is judged now."""
        return not self.is_over and size - self._judged >= self._step

    def judged(self, size: int, *, passed: bool) -> None:
        """Take the verdict on a prefix of ``size`` bytes; one that failed did not pass."""
        self._judged = size
        self._in_row = 0 if passed else self._in_row + 1
        if passed:
            self.shown = size
        self.is_over = self._in_row >= self._hits


def size_of(text: str) -> int:
    """The bytes of a text; half of a surrogate pair has three."""
    return len(text.encode(errors="surrogatepass"))
