"""Numbers with ranges, for signatures that configs fill: they are checked before anything is built."""

from typing import Annotated

from annotated_types import Interval
from pydantic import AllowInfNan

LARGEST = 2**63 - 1
"""Libraries keep whole numbers in 64 bits."""

Whole = Annotated[int, Interval(ge=-LARGEST, le=LARGEST)]
Number = Annotated[float, Interval(ge=-LARGEST, le=LARGEST), AllowInfNan(False)]
Count = Annotated[int, Interval(ge=1, le=10**9)]
"""A number of things, at least one."""
Amount = Annotated[int, Interval(ge=0, le=10**9)]
"""A number of things, perhaps none."""
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]
"""Accepted by every generator of random numbers."""
Share = Annotated[float, Interval(ge=0, le=1)]
Positive = Annotated[float, Interval(ge=1e-9, le=1e9)]
Temperature = Annotated[float, Interval(ge=0, le=1e3)]
"""Of sampling; 0 for the likeliest text."""
Rate = Annotated[float, Interval(ge=1e-12, le=1e3)]
"""A learning rate."""
Width = Annotated[int, Interval(ge=1, le=2**16)]
"""The width of a layer."""
