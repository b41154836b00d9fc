"""Checks of what callers pass: lists, texts and questions.

A text is also a sequence of letters, and a dict one of keys: taken for a list, each letter would be answered.
"""

from collections.abc import Mapping, Sequence, Set
from os import PathLike
from typing import Any

from PIL import Image

from mllm_protector.errors import InputError
from mllm_protector.images import ImageSource, as_image
from mllm_protector.records import Question, Variant

AnyImage = str | PathLike[str] | Image.Image | ImageSource
"""A file, a PIL image, or an image of ``images``; never an address."""

Asked = Question | str | tuple[str, AnyImage | None]
"""A question, its text, or its text and its image."""


def require_lists(**lists: Any) -> None:
    """Refuse anything but lists of the same length; ``None`` is a list not given.

    Raises:
        InputError: a text, a dict, a set or no list at all, or lists of different lengths.
    """
    given = {name: values for name, values in lists.items() if values is not None}
    for name, values in given.items():
        if isinstance(values, str | bytes | Mapping | Set) or not hasattr(values, "__len__"):
            raise InputError(f"{name}: must be a list, not {_kind(values)}; write {name}=[...]")
    lengths = {name: len(values) for name, values in given.items()}
    if len({*lengths.values()}) > 1:
        counts = ", ".join(f"{name} has {count}" for name, count in lengths.items())
        raise InputError(f"the lists must have the same length, but {counts}")


def require_texts(**lists: Any) -> None:
    """``require_lists`` of lists of texts.

    Raises:
        InputError: as ``require_lists``, or an entry is no text.
    """
    require_lists(**lists)
    for name, values in lists.items():
        for number, value in enumerate(() if values is None else values):
            if not isinstance(value, str):
                raise InputError(f"{name}[{number}]: must be a text, not {_kind(value)}")


def require_threshold(name: str, value: Any) -> None:
    """Refuse anything but a number from 0 to 1; true and false are no numbers here.

    Raises:
        InputError: it cannot be a threshold; the message begins with the key ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{name}={value}: must be a number from 0 to 1")


def as_questions(questions: Sequence[Asked]) -> list[Question]:
    """Questions of all three forms of ``Asked``; their position is the id of those that have none.

    Raises:
        InputError: not a list, an entry that is no question, or an image that cannot be used.
    """
    require_lists(questions=questions)
    return [_as_question(asked, number) for number, asked in enumerate(questions)]


def _as_question(asked: Asked, number: int) -> Question:
    if isinstance(asked, Question):
        return asked
    text, image = asked if isinstance(asked, tuple) and len(asked) == 2 else (asked, None)
    if not isinstance(text, str):
        raise InputError(
            f"questions[{number}]: must be a Question, a text, or a pair (text, image), not {_kind(text)}"
        )
    shown = None if image is None else as_image(image)
    variant: Variant = "TEXT" if shown is None else "SD"
    return Question(id=str(number), scenario="", variant=variant, text=text, image=shown)


def _kind(value: Any) -> str:
    return "a text" if isinstance(value, str) else f"of type {type(value).__name__}"
