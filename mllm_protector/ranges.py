"""What a signature allows, ranges of numbers included: a config is held to it before anything is made."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True, slots=True)
class Within:
    """The least and the largest number allowed."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        """Whether a number is allowed; NaN never is."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        """The range, as it stands behind "a number"."""
        return f"from {self.low:,} to {self.high:,}"


MOST = 10**9

Count = Annotated[int, Within(1, MOST)]
"""Of what there must be some of."""
Amount = Annotated[int, Within(0, MOST)]
"""Of what there may be none of."""
Seed = Annotated[int, Within(0, 2**32 - 1)]
"""What every generator of random numbers takes."""
Share = Annotated[float, Within(0, 1)]
Rate = Annotated[float, Within(1e-12, 1e3)]
"""A learning rate."""
Width = Annotated[int, Within(1, 2**16)]
"""Of a part of a model."""

LARGEST = 2**63
"""No number of a config is as large: libraries keep whole ones in 64 bits."""

_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def fits(value: Any, wanted: Any) -> bool:
    """Whether a plain value of a config is what an annotation says."""
    origin, choices = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(fits(value, choice) for choice in choices)
    if origin is Literal:
        return value in choices
    if origin in (list, Sequence):
        return isinstance(value, list) and all(fits(item, choices[0]) for item in value)
    if origin is Annotated:
        return fits(value, choices[0]) and value in choices[1]
    if wanted in (int, float):
        known = (int,) if wanted is int else (int, float)
        return isinstance(value, known) and not isinstance(value, bool) and abs(value) < LARGEST
    if wanted in _NAMES:
        return isinstance(value, wanted)
    return wanted is Any or (origin is Mapping and isinstance(value, dict))  # an object is made by a _target_


def in_words(wanted: Any) -> str:
    """What an annotation allows, as it stands behind "must be"."""
    origin, choices = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return " or ".join(map(in_words, choices))
    if origin is Annotated:
        return f"{in_words(choices[0])} {choices[1]}"
    if origin is Literal:
        return f"one of {', '.join(map(str, choices))}"
    if origin in (list, Sequence):
        return f"a list, each {in_words(choices[0])}"
    return _NAMES.get(wanted, "one of the options that --help lists")
