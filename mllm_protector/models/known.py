"""Known answers: texts whose logits a detector's export keeps, by which a server of it is told from others.

A server that applies an activation, cuts inputs, computes in few bits or holds another model gives numbers
all the same, and every verdict from them is wrong without an error.
"""

import math
from collections.abc import Sequence

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

TOLERANCE = 0.02
"""In logits: what libraries and devices differ by in float32, and less than bfloat16 does."""

ACTIVATED = 0.01
"""How closely a value must be that of an activation to name it; half precision is nearer."""

ROUNDING = 0.1
"""Of the largest logit, at least 1: what half precision may change."""


@with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class KnownAnswer(TypedDict):
    """A pair, the ids that its detector reads, and the logit of them in float32 (before ``Scale``)."""

    query: str
    answer: str
    ids: list[int]
    logit: float


def difference(known: Sequence[KnownAnswer], found: Sequence[float], tolerance: float) -> str | None:
    """Why values are not the logits of the known answers, with the likely cause; ``None`` if they are."""
    if not all(map(math.isfinite, found)):
        return "gives values that are not numbers; serve the detector with --dtype float32"
    wanted = [each["logit"] for each in known]
    off = _off(wanted, found)
    if off <= tolerance:
        return None
    if _off([1.0] * len(wanted), found) <= ACTIVATED:
        return (
            "gives 1 for every text: it applies softmax, which is 1 for any one logit; update vLLM, or serve "
            "the detector with --override-pooler-config '{\"softmax\": false}'"
        )
    if _off([1 / (1 + math.exp(-logit)) for logit in wanted], found) <= ACTIVATED:
        return (
            "gives scores and not logits: it applies a sigmoid and does not know use_activation; update vLLM"
        )
    if off <= ROUNDING * max(1.0, *map(abs, wanted)):
        return (
            f"gives logits that differ by {off:.2g}, as half precision does; serve the detector with --dtype "
            f"float32, or allow a tolerance above {tolerance:g} and choose the threshold again on such scores"
        )
    return f"gives logits that differ by {off:.2g}: it serves another model than this detector's export"


def _off(wanted: Sequence[float], found: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(wanted, found, strict=True))
