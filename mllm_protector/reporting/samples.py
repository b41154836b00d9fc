"""The questions that a page shows one by one: which ones, and their images made small.

A question is shown with all of its arms or not at all, so that they can be compared.
"""

import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from PIL import Image

from mllm_protector.errors import InputError
from mllm_protector.records import BENIGN, JUDGED, Outcome, Status

Row = Mapping[str, Any]
"""A line of ``results.jsonl``."""

Rows = Callable[[], Iterable[Row]]
"""Reads rows, as often as it is called."""

Images = Callable[[str, str], Image.Image | None]
"""(benchmark, question id) -> its image."""

REASONS = (
    "still harmful under a guard",
    "without a verdict",
    "harmless question, answer changed",
    "from the rest",
)
"""Why a question is shown, the most interesting first."""

THUMBNAIL = 160
"""The longest side of an image in pixels."""

LONGEST_TEXT = 4000
"""Characters of a text that are shown; the rest is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One arm's end of a question.

    Attributes:
        row: the line of ``results.jsonl``.
        statuses: of its verdicts, each once; ``benign`` means a question that is not judged.
        final: what the user saw; ``None`` if it is the raw answer or there is none.
        folded: whether ``final`` must not be in plain sight: it is not safe to every judge.
    """

    row: Row
    statuses: Sequence[str]
    final: str | None
    folded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A question with all of its arms.

    Attributes:
        first: one of its rows, for what all of them share.
        reason: one of ``REASONS``.
        question: clipped.
        raw: the MLLM's answer, clipped; ``None`` if it made none.
        image: a small JPEG file; ``None`` if there is none or another sample shows it.
        shown_by: the number of the sample that shows the same image.
    """

    first: Row
    arms: Sequence[Shown]
    reason: str
    question: str
    raw: str | None
    image: bytes | None
    shown_by: int | None


def samples(read: Rows, *, images: Images, max_rows: int) -> tuple[list[Sample], tuple[int, int]]:
    """The questions worth looking at, the most interesting first, and spread over scenarios and variants.

    The rows are read twice, and of those that are not shown nothing is kept.

    Args:
        read: reads the rows in the order of ``results.jsonl``, all arms of a question together.
        images: loads a question's image.
        max_rows: rows (question and arm) that are shown at most.

    Returns:
        The samples, and how many (rows, questions) they were chosen from.
    """
    strata: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    queue = []
    for place, arms in enumerate(_questions(read)):
        reason = min(map(_reason, arms))
        stratum = strata[reason, *(arms[0][key] for key in ("benchmark", "scenario", "variant"))]
        stratum.append(place)
        # The first of each stratum, then the second of each, and so on.
        queue.append((reason, len(stratum), stratum[0], place, len(arms)))
    chosen: dict[int, int] = {}  # place -> reason
    left = max_rows
    for reason, _, _, place, size in sorted(queue):
        if size <= left:
            left -= size
            chosen[place] = reason
    found = [(chosen[place], arms) for place, arms in enumerate(_questions(read)) if place in chosen]
    found.sort(key=itemgetter(0))
    return list(_with_images(found, images)), (sum(size for *_, size in queue), len(queue))


def _questions(read: Rows) -> Iterator[list[Row]]:
    for _, arms in groupby(read(), key=itemgetter("benchmark", "id")):
        yield list(arms)


def _reason(row: Row) -> int:
    """The index in ``REASONS``."""
    statuses = {verdict["status"] for verdict in row["verdicts"].values()}
    if row["outcome"] is not None and Status.HARMFUL in statuses:
        return 0
    if statuses - set(JUDGED) or row["outcome"] == Outcome.GUARD_ERROR or row["generation_error"]:
        return 1
    return 2 if row["scenario"] == BENIGN and row["changed"] else 3


def _with_images(chosen: Sequence[tuple[int, list[Row]]], images: Images) -> Iterator[Sample]:
    first_shown: dict[str, int] = {}
    for number, (reason, arms) in enumerate(chosen, start=1):
        first = arms[0]
        shown_by = first_shown.get(first["image"])
        image = None
        if first["image"] is not None and shown_by is None and (image := _thumbnail(images, first)):
            first_shown[first["image"]] = number
        yield Sample(
            first=first,
            arms=[_shown(row) for row in arms],
            reason=REASONS[reason],
            question=_clipped(first["question"]),
            raw=None if first["raw"] is None else _clipped(first["raw"]),
            image=image,
            shown_by=shown_by,
        )


def _shown(row: Row) -> Shown:
    statuses = list(dict.fromkeys(str(verdict["status"]) for verdict in row["verdicts"].values()))
    benign = row["scenario"] == BENIGN
    final = row["final"]
    return Shown(
        row=row,
        statuses=["benign"] if benign else statuses,
        final=None if final is None or final == row["raw"] else _clipped(final),
        folded=not benign and statuses != [Status.SAFE],
    )


def _clipped(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT:,} more characters in results.jsonl)"


def _thumbnail(images: Images, row: Row) -> bytes | None:
    """A small copy; an image that has gone since the run is left out."""
    try:
        image = images(row["benchmark"], row["id"])
    except InputError:
        return None
    if image is None:
        return None
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    small.save(out, format="JPEG", quality=70, optimize=True)
    return out.getvalue()
