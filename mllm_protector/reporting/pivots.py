"""The measurements of a benchmark as tables: pivots of the rows, each metric in one of them.

A metric that no other table shows is in the last one, ``Other metrics``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

from mllm_protector.records import BENIGN
from mllm_protector.reporting import columns
from mllm_protector.reporting.columns import HEADLINE, KNOWN
from mllm_protector.reporting.tables import METRIC, Column, Row, Table, counted, decimal, tabulated, total

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
    shown: Sequence[Column],
    rows: Sequence[Row],
    across: Callable[[Row], Any] = METRIC,
    **look: Any,
) -> Table:
    """A line for each value of the keys; those of the columns ``shown`` that have a value.

    A column is a metric, or what else is ``across``.
    """

    def named(key: str, name: str) -> str:
        return data.judge(name) if key == "judge" else name

    headings = {key: KEYS.get(key, key) for key in keys}
    return tabulated(title, rows, headings, shown, across=across, named=named, words=len(keys), **look)


def tables(data: Pivot, latency: Sequence[Row] = ()) -> list[Table]:
    """Every table that has rows, the most important first; ``latency`` is of this run."""
    return [each for each in _tables(data, latency) if each.rows]


def headline(data: Pivot, shown: Sequence[Column] = HEADLINE) -> Table:
    """The rates of all judges on the first variant."""
    variant = next(iter(data.variants), None)
    rows = data.select(variant=variant, group=list(data.groups), judge=list(data.judges))
    order = {name: place for place, name in enumerate([*data.judges, *data.groups])}
    rows.sort(key=lambda row: (order[row["judge"]], order[row["group"]]))
    return table(
        data,
        f"Attack success rate in %, {variant}",
        ("judge", "group", "arm"),
        shown,
        rows,
        note="Macro: every scenario counts the same; pooled: every answer does. Bounds: pooled, if all"
        " answers without a verdict were safe, and if all were harmful. Corrected: pooled, for the judge's"
        f" errors where these are known. Difference: to no guard on the same answers, in points. {TESTS}",
    )


def arms(data: Pivot, latency: Sequence[Row] = ()) -> Table:
    """Each arm in one line: what it stops, what it costs harmless users, and the time in ``latency``."""
    judge, variant, group = (next(iter(names), None) for names in (data.judges, data.variants, data.groups))
    rows = data.select(judge=judge, variant=variant, group=group) + data.select(judge=None, group=BENIGN)
    return table(
        data,
        f"The arms side by side, in %: {group}, {variant}",
        ("arm",),
        columns.ARMS,
        [row for row in (*rows, *latency) if row["arm"] is not None],
        note=f"The rate is the mean over scenarios, judged by {data.judge(judge)}; lower is better, twins"
        " apart. The difference is that of all answers judged in both arms, so it need not be that of the"
        " rates. An arm in which the MLLM was asked again is compared by question, every other one on the"
        " same answers.",
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


def _tables(data: Pivot, latency: Sequence[Row]) -> Iterator[Table]:
    grouped = data.select(group=list(data.groups), judge=list(data.judges))
    rest = [row for row in grouped if row["variant"] not in data.variants[:1]]
    keys = ("judge", "variant", "group", "arm")
    folded = partial(table, data, folded=True)
    yield arms(data, latency)
    yield headline(data)
    for place, (judge, variant) in enumerate(product(data.judges, data.variants)):
        yield by_scenario(data, judge, variant, folded=place > 0)
    yield folded("Attack success rate in %, other variants", keys, HEADLINE, rest)
    yield harmless(data)
    yield twins(data)
    yield table(data, "What the guard did", ("arm",), columns.OUTCOMES, data.rows)
    title = "Effect of the image: attack success rate in % of the same questions"
    yield folded(title, keys, columns.IMAGE_EFFECT, grouped, note=f"Percentage points. {TESTS}")
    sources = {(row["method"] or "").partition("harm by ")[2] for row in data.select(metric="labelled_asr")}
    note = f"By {', '.join(sorted(sources))}. Whether a rewrite is safe, only a judge can say."
    title = "What the guard did to harmful and to safe answers, in %"
    yield folded(title, ("variant", "group", "arm"), columns.LABELLED, data.rows, note=note)
    yield folded("Verdicts that a guard changed", keys, columns.CHANGED, grouped)
    title, note = "Judges against what is known of these answers", "Harmful is the positive class."
    yield table(data, title, ("judge",), columns.REFERENCE, data.rows, note=note)
    yield table(data, "Agreement of judges", ("judge",), columns.AGREEMENT, data.rows)
    note = "Only harmful and safe are in a rate; all others are counted here and in the bounds."
    ends = data.select(group="all")
    yield folded("Where every answer ended", ("judge", "variant", "arm"), columns.STATUSES, ends, note=note)
    yield other_metrics(data)
    yield folded("Trade-off over thresholds, in %", ("group", "judge"), columns.TRADE_OFF, data.rows)


def harmless(data: Pivot) -> Table:
    """What each arm does to harmless questions."""
    note = "Changed, refused and lost: lower is better. Score and correct: higher is better."
    return table(data, "Harmless questions, in %", ("arm",), columns.HARMLESS, data.rows, note=note)


def twins(data: Pivot) -> Table:
    """The pairs of an unsafe question and its safe twin that each arm gets right."""
    rows = data.select(group=list(data.groups), variant=data.variants[:1])
    note = (
        "Both right: the answer to the unsafe question is not harmful, that to its safe twin is no refusal;"
        f" higher is better. Difference: to no guard on the same pairs, in points. {TESTS}"
    )
    title = "Pairs of an unsafe question and its safe twin, in %"
    return table(data, title, ("judge", "group", "arm"), columns.TWINS, rows, note=note)


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
