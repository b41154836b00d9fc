"""The measurements of a benchmark as tables: pivots of the rows, each metric in one of them.

A metric that no other table shows is in the last one, ``Other metrics``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllm_protector.records import Outcome, Status
from mllm_protector.reporting.tables import Row, Table, count, decimal, share, shown

Column = tuple[str, str, Callable[[Row], str]]
"""A heading, a metric, and how it is shown."""


def counted(row: Row) -> str:
    """A share with its interval in percent, and the counts."""
    if row["value"] is None:
        return "-"
    return f"{share(row)} ({round(row['value'] * row['n']):,}/{row['n']:,})"


def total(row: Row) -> str:
    """How many answers a number is computed from."""
    return f"{row['n']:,}"


def bounds(row: Row) -> str:
    """The limits alone, in percent."""
    return f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"


def points(row: Row) -> str:
    """A difference with its interval, in percentage points."""
    return shown(row, "+.1f", 100)


def p_value(row: Row) -> str:
    """A p-value, such as ``0.012`` or ``< 0.001``."""
    return "< 0.001" if row["value"] is not None and row["value"] < 0.001 else decimal(row)


HEADLINE: tuple[Column, ...] = (
    ("macro", "macro_asr", share),
    ("pooled", "asr", share),
    ("unjudged", "unjudged", count),
    ("bounds", "asr_bounds", bounds),
    ("corrected", "corrected_asr", share),
    ("difference", "asr_difference", points),
    ("p", "asr_difference_p", p_value),
)
IMAGE_EFFECT: tuple[Column, ...] = (
    ("n", "image_effect", total),
    ("as text", "text_asr", share),
    ("with image", "image_asr", share),
    ("difference", "image_effect", points),
    ("p", "image_effect_p", p_value),
)
HARMLESS: tuple[Column, ...] = (
    ("changed", "changed", counted),
    ("refused", "refused", counted),
    ("mean score", "score", share),
    ("correct answers lost", "lost", counted),
    ("without an answer", "unanswered", count),
)
OUTCOMES: tuple[Column, ...] = tuple(
    (str(outcome).replace("_", " "), f"outcome_{outcome}", count) for outcome in Outcome
)
STATUSES: tuple[Column, ...] = tuple((str(status).replace("_", " "), str(status), count) for status in Status)
REFERENCE: tuple[Column, ...] = (
    ("accuracy", "accuracy", counted),
    *((name, name, count) for name in ("tp", "fp", "fn", "tn")),
    ("kappa", "kappa", decimal),
)
AGREEMENT: tuple[Column, ...] = (
    ("answers", "agreement", total),
    ("agree", "agreement", share),
    ("Cohen's kappa", "agreement_kappa", decimal),
    ("Fleiss' kappa", "fleiss_kappa", decimal),
)
CHANGED: tuple[Column, ...] = (
    ("made safe", "made_safe", count),
    ("made harmful", "made_harmful", count),
)
TRADE_OFF: tuple[Column, ...] = (
    ("attack success rate", "threshold_asr", share),
    ("harmless answers flagged", "threshold_flagged", share),
)
KNOWN = {
    "macro_asr_bounds",
    "correct",
    "cut",
    *(
        metric
        for columns in (
            HEADLINE,
            IMAGE_EFFECT,
            HARMLESS,
            OUTCOMES,
            STATUSES,
            REFERENCE,
            AGREEMENT,
            CHANGED,
            TRADE_OFF,
        )
        for _, metric, _ in columns
    ),
}
"""The metrics that have a table or a sentence of their own."""

TESTS = (
    "p: McNemar's exact test where every question has one pair of verdicts; elsewhere a sign-flip test on the"
    " net change of each question."
)
KEYS = {"group": "scenarios"}


@dataclass(frozen=True, slots=True)
class Pivot:
    """The measurements of one benchmark, by the names that tables need.

    Judges and arms are in the order of the tables, variants with all images together first; ``groups`` are
    those that tables show -> their scenarios that no group before has.
    """

    rows: Sequence[Row]
    facts: Mapping[str, Any]
    judges: Mapping[str, Any]
    arms: Sequence[str]
    variants: Sequence[str] = field(init=False)
    groups: Mapping[str, Sequence[str]] = field(init=False)

    def __post_init__(self) -> None:
        asked = dict.fromkeys(row["variant"] for row in self.rows if row["metric"] == "asr")
        object.__setattr__(self, "variants", list(asked))
        object.__setattr__(self, "groups", shown_groups(self.facts["groups"]))

    def select(self, **where: Any) -> list[Row]:
        """The rows with these fields; a field that is a list may be any of its values."""
        return [
            row
            for row in self.rows
            if all(
                row[name] in value if isinstance(value, list | tuple) else row[name] == value
                for name, value in where.items()
            )
        ]

    def get(self, metric: str, **where: Any) -> Row | None:
        """The one row of a metric with these fields."""
        return next(iter(self.select(metric=metric, **where)), None)

    def judge(self, name: str | None) -> str:
        """A judge's name, marked where it is circular."""
        facts = self.judges.get(name or "")
        return f"{name} (circular)" if facts and facts["circular"] else name or "-"


def pivot(result: Mapping[str, Any], name: str) -> Pivot:
    """The measurements of a benchmark of a run."""
    rows = [row for row in result["measurements"] if row["benchmark"] == name]
    return Pivot(rows, result["benchmarks"][name], result["judges"], result["arms"])


def table(
    data: Pivot, title: str, keys: Sequence[str], columns: Sequence[Column], rows: Sequence[Row], **look: Any
) -> Table:
    """A line for each value of the keys; columns without any value are left out."""
    metrics = {metric for _, metric, _ in columns}
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["metric"] in metrics:
            lines.setdefault(tuple(row[key] for key in keys), {})[row["metric"]] = row
    used = [column for column in columns if any(column[1] in line for line in lines.values())]
    return Table(
        title=title,
        header=[*(KEYS.get(key, key) for key in keys), *(heading for heading, _, _ in used)],
        rows=[
            [
                data.judge(value) if key == "judge" else value or "-"
                for key, value in zip(keys, names, strict=True)
            ]
            + [show(line[metric]) if metric in line else "-" for _, metric, show in used]
            for names, line in lines.items()
        ],
        words=len(keys),
        **look,
    )


def tables(data: Pivot) -> list[Table]:
    """Every table that has rows, the most important first."""
    return [each for each in _tables(data) if each.rows]


def headline(data: Pivot, columns: Sequence[Column] = HEADLINE) -> Table:
    """The rates of all judges on the first variant."""
    variant = next(iter(data.variants), None)
    rows = data.select(variant=variant, group=list(data.groups))
    order = {name: place for place, name in enumerate([*data.judges, *data.groups])}
    rows.sort(key=lambda row: (order[row["judge"]], order[row["group"]]))
    return table(
        data,
        f"Attack success rate in %, {variant}",
        ("judge", "group", "arm"),
        columns,
        rows,
        note="Macro: every scenario counts the same; pooled: every answer does. Bounds: pooled, if all"
        " answers without a verdict were safe, and if all were harmful. Corrected: pooled, for the judge's"
        f" errors where these are known. Difference: to no guard on the same answers, in points. {TESTS}",
    )


def by_scenario(data: Pivot, judge: str, variant: str, *, folded: bool = False) -> Table:
    """Scenarios down, arms across: the rate with its interval and counts, and answers without a verdict."""
    rows = data.select(judge=judge, variant=variant, metric=["asr", "unjudged"])
    found = {(row["group"], row["arm"], row["metric"]): row for row in rows}

    def cell(group: str, arm: str) -> str:
        rate, unjudged = found.get((group, arm, "asr")), found.get((group, arm, "unjudged"))
        missing = f" +{unjudged['value']:,}?" if unjudged else ""
        return (counted(rate) if rate else "-") + missing

    return Table(
        title=f"Attack success rate in % by scenario: judge {data.judge(judge)}, {variant}",
        header=["scenario", *data.arms],
        rows=[
            [name if name in own else f"{name}, pooled", *(cell(name, arm) for arm in data.arms)]
            for group, own in data.groups.items()
            for name in (*own, group)
            if any((name, arm, "asr") in found for arm in data.arms)
        ],
        note="In parentheses: harmful / judged answers. +n?: n answers without a verdict.",
        folded=folded,
    )


def _tables(data: Pivot) -> Iterator[Table]:
    grouped = [row for row in data.rows if row["group"] in data.groups]
    yield headline(data)
    for number, judge in enumerate(data.judges):
        for place, variant in enumerate(data.variants):
            yield by_scenario(data, judge, variant, folded=number + place > 0)
    rest = [row for row in grouped if row["variant"] != next(iter(data.variants), None)]
    keys = ("judge", "variant", "group", "arm")
    yield table(data, "Attack success rate in %, other variants", keys, HEADLINE, rest, folded=True)
    yield harmless(data)
    yield table(data, "What the guard did", ("arm",), OUTCOMES, data.rows)
    note = f"Percentage points. {TESTS}"
    title = "Effect of the image: attack success rate in % of the same questions"
    yield table(data, title, keys, IMAGE_EFFECT, grouped, note=note, folded=True)
    yield table(data, "Verdicts that a guard changed", keys, CHANGED, grouped, folded=True)
    note = "Harmful is the positive class."
    yield table(
        data, "Judges against what is known of these answers", ("judge",), REFERENCE, data.rows, note=note
    )
    yield table(data, "Agreement of judges", ("judge",), AGREEMENT, data.rows)
    ends = data.select(group="all")
    note = "Only harmful and safe are in a rate; all others are counted here and in the bounds."
    title = "Where every answer ended"
    yield table(data, title, ("judge", "variant", "arm"), STATUSES, ends, note=note, folded=True)
    yield other_metrics(data)
    title = "Trade-off over thresholds, in %"
    yield table(data, title, ("group", "judge"), TRADE_OFF, data.rows, folded=True)


def harmless(data: Pivot) -> Table:
    """What each arm does to harmless questions."""
    note = "Changed, refused and lost: lower is better. Score and correct: higher is better."
    return table(data, "Harmless questions, in %", ("arm",), HARMLESS, data.rows, note=note)


def other_metrics(data: Pivot) -> Table:
    """Every metric without a table, such as those of the benchmark."""
    rows = [row for row in data.rows if row["metric"] not in KNOWN]
    return Table(
        title="Other metrics",
        header=["metric", "judge", "arm", "variant", "scenarios", "value", "n", "method"],
        rows=[
            [
                *(row[key] or "-" for key in ("metric", "judge", "arm", "variant", "group")),
                decimal(row),
                "-" if row["n"] is None else total(row),
                row["method"] or "-",
            ]
            for row in rows
        ],
        words=5,
    )


def shown_groups(groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The groups worth a mean of their own, each with those of its scenarios that no group before it has."""
    found: dict[str, list[str]] = {}
    for group, members in groups.items():
        own = [name for name in members if not any(name in names for names in found.values())]
        if own or len(found) > 1:  # "all" after a single group would say the same twice
            found[group] = own
    return found
