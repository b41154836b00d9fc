"""Ranges of numbers, as part of a signature: a config's values are held to them before anything is made."""

from dataclasses import dataclass
from typing import Annotated


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
