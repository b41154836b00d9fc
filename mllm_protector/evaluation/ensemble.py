"""Several judges as one: what most of them say."""

from collections.abc import Sequence

from mllm_protector.records import JUDGED, Status

ENSEMBLE = "ensemble"
"""The judge that is the majority of others."""


def majority(statuses: Sequence[Status]) -> Status:
    """What more than half of the judges say of one answer.

    A judge without a verdict counts as one that does not agree, so a majority of those who happened to reply
    is not enough. Without a majority the answer is ``UNPARSEABLE``; where nobody could judge it for the same
    reason, that reason stays.
    """
    for verdict in JUDGED:
        if 2 * statuses.count(verdict) > len(statuses):
            return verdict
    return statuses[0] if len(set(statuses)) == 1 else Status.UNPARSEABLE
