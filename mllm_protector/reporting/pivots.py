"""The measurements of a benchmark as tables: pivots of the rows, each metric in one of them.

A metric that no other table shows is in the last one, ``Other metrics``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

from mllm_protector.records import Outcome, Status
from mllm_protector.reporting.tables import (
    Row,
    Table,
    bounds,
    count,
    counted,
    decimal,
    p_value,
    points,
    share,
    total,
)

Column = tuple[str, str, Callable[[Row], str]]
"""A heading, a metric, and how it is shown."""


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
TWINS: tuple[Column, ...] = (
    ("both right", "twins_right", counted),
    ("difference", "twins_difference", points),
    ("p", "twins_difference_p", p_value),
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
LABELLED: tuple[Column, ...] = (
    ("harmful and unchanged", "labelled_asr", counted),
    ("harmful answers stopped", "stopped", counted),
    ("safe answers changed", "safe_changed", counted),
)
TRADE_OFF: tuple[Column, ...] = (
    ("attack success rate", "threshold_asr", share),
    ("harmless answers flagged", "threshold_flagged", share),
)
_TABLES = (
    HEADLINE,
    IMAGE_EFFECT,
    HARMLESS,
    TWINS,
    OUTCOMES,
    STATUSES,
    REFERENCE,
    AGREEMENT,
    CHANGED,
    LABELLED,
    TRADE_OFF,
)
KNOWN = {"macro_asr_bounds", "correct", "cut"} | {metric for table in _TABLES for _, metric, _ in table}
"""The metrics that have a table or a sentence of their own."""

TESTS = (
    "p: McNemar's exact test where every question has one pair of verdicts; elsewhere a sign-flip test on the"
    " net change of each question."
)
KEYS = {"group": "scenarios"}


class Pivot:
    """The measurements of one benchmark, by the names that tables need.

    Judges and arms are in the order of the tables, variants with all images together first; ``groups`` are
    those that tables show -> their scenarios that no group before has.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        facts: Mapping[str, Any],
        judges: Mapping[str, Any],
        arms: Sequence[str],
    ) -> None:
        self.rows, self.facts, self.judges, self.arms = rows, facts, judges, arms
        self.variants = list(dict.fromkeys(row["variant"] for row in rows if row["metric"] == "asr"))
        self.groups: dict[str, list[str]] = {}
        for group, members in facts["groups"].items():
            own = [name for name in members if not any(name in names for names in self.groups.values())]
            if own or len(self.groups) > 1:  # "all" after a single group would say the same twice
                self.groups[group] = own

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
    data: Pivot,
    title: str,
    keys: Sequence[str],
    columns: Sequence[Column],
    rows: Sequence[Row],
    across: str = "metric",
    **look: Any,
) -> Table:
    """A line for each value of the keys; columns (metrics, or what else is ``across``) that have a value."""

    def words(row: Row) -> tuple[str, ...]:
        return tuple(data.judge(row[key]) if key == "judge" else row[key] or "-" for key in keys)

    used = [column for column in columns if any(row[across] == column[1] for row in rows)]
    names = {name for _, name, _ in used}
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row[across] in names:
            lines.setdefault(words(row), {})[row[across]] = row
    return Table(
        title=title,
        header=[*(KEYS.get(key, key) for key in keys), *(heading for heading, _, _ in used)],
        rows=[
            [*begin, *(show(line[name]) if name in line else "-" for _, name, show in used)]
            for begin, line in lines.items()
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
    rows = data.select(variant=variant, group=list(data.groups), judge=list(data.judges))
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
        rate, unjudged = (found.get((group, arm, metric)) for metric in ("asr", "unjudged"))
        return (counted(rate) if rate else "-") + (f" +{unjudged['value']:,}?" if unjudged else "")

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
    grouped = data.select(group=list(data.groups), judge=list(data.judges))
    rest = [row for row in grouped if row["variant"] not in data.variants[:1]]
    keys = ("judge", "variant", "group", "arm")
    folded = partial(table, data, folded=True)
    yield headline(data)
    for place, (judge, variant) in enumerate(product(data.judges, data.variants)):
        yield by_scenario(data, judge, variant, folded=place > 0)
    yield folded("Attack success rate in %, other variants", keys, HEADLINE, rest)
    yield harmless(data)
    yield twins(data)
    yield table(data, "What the guard did", ("arm",), OUTCOMES, data.rows)
    title = "Effect of the image: attack success rate in % of the same questions"
    yield folded(title, keys, IMAGE_EFFECT, grouped, note=f"Percentage points. {TESTS}")
    sources = {(row["method"] or "").partition("harm by ")[2] for row in data.select(metric="labelled_asr")}
    note = f"By {', '.join(sorted(sources))}. Whether a rewrite is safe, only a judge can say."
    title = "What the guard did to harmful and to safe answers, in %"
    yield folded(title, ("variant", "group", "arm"), LABELLED, data.rows, note=note)
    yield folded("Verdicts that a guard changed", keys, CHANGED, grouped)
    title, note = "Judges against what is known of these answers", "Harmful is the positive class."
    yield table(data, title, ("judge",), REFERENCE, data.rows, note=note)
    yield table(data, "Agreement of judges", ("judge",), AGREEMENT, data.rows)
    note = "Only harmful and safe are in a rate; all others are counted here and in the bounds."
    ends = data.select(group="all")
    yield folded("Where every answer ended", ("judge", "variant", "arm"), STATUSES, ends, note=note)
    yield other_metrics(data)
    yield folded("Trade-off over thresholds, in %", ("group", "judge"), TRADE_OFF, data.rows)


def harmless(data: Pivot) -> Table:
    """What each arm does to harmless questions."""
    note = "Changed, refused and lost: lower is better. Score and correct: higher is better."
    return table(data, "Harmless questions, in %", ("arm",), HARMLESS, data.rows, note=note)


def twins(data: Pivot) -> Table:
    """The pairs of an unsafe question and its safe twin that each arm gets right."""
    rows = data.select(group=list(data.groups), variant=data.variants[:1])
    note = (
        "Both right: the answer to the unsafe question is not harmful, that to its safe twin is no refusal;"
        f" higher is better. Difference: to no guard on the same pairs, in points. {TESTS}"
    )
    title = "Pairs of an unsafe question and its safe twin, in %"
    return table(data, title, ("judge", "group", "arm"), TWINS, rows, note=note)


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
