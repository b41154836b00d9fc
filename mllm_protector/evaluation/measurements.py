"""The result: measurements, one number with its interval in each row, the same for every statistic.

``asr.json`` and ``metrics.json`` hold them as a list, ``measurements.csv`` is the same list, and every table
and plot is a pivot of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pandas as pd

from mllm_protector.evaluation.statistics import Floats, Ints, Proportion, mean_interval

SCHEMA = 2
"""Of ``asr.json``; grows when a key changes its meaning."""

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What makes a spreadsheet run a text, also in full width (OWASP, "CSV injection")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One number with its interval; a field that does not apply is ``None``.

    Attributes:
        benchmark: its name.
        judge: whose verdicts; for agreement the names of all judges, joined by `` + ``.
        arm: ``none`` or a guard; in ``eval_detector`` and ``eval_detoxifier`` what scored or wrote.
        variant: how the questions were asked, or ``IMAGES`` for every image together.
        group: a scenario, a group of scenarios, or the threshold of a trade-off.
        metric: what is measured, such as ``asr``; docs/evaluation.md lists the names.
        value: the number; shares lie in [0, 1].
        low: lower limit of the 95 % interval.
        high: upper limit.
        n: the answers (or pairs, or queries) that it rests on.
        method: of the interval or the test, or why there is no value.
    """

    benchmark: str | None = None
    judge: str | None = None
    arm: str | None = None
    variant: str | None = None
    group: str | None = None
    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    method: str | None = None


FIELDS = tuple(field.name for field in fields(Measurement))


def of_share(metric: str, share: Proportion, **where: Any) -> Measurement:
    """A share with Wilson's interval; ``where`` are the other fields."""
    rest = {"n": share.total, "method": "Wilson", **where}
    return Measurement(metric=metric, value=share.value, low=share.low, high=share.high, **rest)


def of_mean(
    metric: str, values: Floats | Ints, clusters: Ints, sizes: Ints | None = None, **where: Any
) -> Measurement:
    """The mean of values (N,), or their sum over that of ``sizes``, with Student's interval over clusters."""
    low, high = mean_interval(values, clusters, sizes)
    value = float(values.sum() / (len(values) if sizes is None else sizes.sum()))
    rest = {"n": len(values), "method": "Student", **where}
    return Measurement(metric=metric, value=value, low=low, high=high, **rest)


def placed(rows: Iterable[Measurement], **where: Any) -> list[Measurement]:
    """The same measurements with these fields."""
    return [replace(row, **where) for row in rows]


def as_rows(measurements: Iterable[Measurement]) -> list[dict[str, Any]]:
    """Measurements as JSON objects."""
    return [asdict(each) for each in measurements]


def as_frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The rows of a result as a table with the columns ``FIELDS``; ``None`` stays ``None`` in texts."""
    return pd.DataFrame(list(rows), columns=list(FIELDS)).astype(
        dict.fromkeys(("value", "low", "high", "n"), float)
    )


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV that no spreadsheet runs as formulas."""
    frame = as_frame(rows).astype({"n": "Int64"})

    def safe(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value

    # Lines end as in RFC 4180, or a lone carriage return in a name would stay unquoted.
    return str(frame.map(safe).to_csv(index=False, lineterminator="\r\n"))
