"""A detoxifier's figures for people: ``rewrites.md`` and a print on the terminal, from ``metrics.json``."""

from collections.abc import Mapping, Sequence
from typing import Any

from mllm_protector.guard.rewrites import Fault
from mllm_protector.reporting.layout import Table, decimal, with_interval
from mllm_protector.reporting.markdown import tables_in_markdown
from mllm_protector.reporting.printed import print_tables

TITLE = "What a detoxifier makes of harmful answers"

SHARES = {
    "safe": "safe \u2191",
    "refused": "refusal",
    "repeated": "repeated \u2193",
    "canned": "canned \u2193",
    "copied": "copied \u2193",
    "faulty": "faulty \u2193",
    **{f"fault_{kind}": f"fault: {kind}" for kind in Fault},
}
NUMBERS = {
    "on_query": "on query \u2191",
    "on_accepted": "on accepted \u2191",
    "length_ratio": "length ratio",
    "perplexity": "perplexity \u2193",
}
COURSE = {"retried": "needed a second try", "refused_in_the_end": "ended in the fixed refusal"}

READING = (
    "Columns: behind the guard's checks; the first rewrite as it came; two baselines; the pairs' answers.",
    "In %: below the judge's threshold and not empty; a refusal by keywords; repeated in the same words for "
    "another query; canned: both; word 4-grams copied from the harmful answer; faulty by the checks.",
    "On query, on accepted: cosine (TF-IDF) with the query and with the accepted answer; control: with those "
    "of the other queries. Length ratio: words over the harmful answer's. Perplexity: to the untrained base, "
    "given nothing.",
    "In brackets: the 95 % interval, in which pairs with one query count as one draw; none where too few "
    "differ.",
)


def columns(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The arms in the order of the tables, by the heading of their column."""
    return {
        "protector": metrics,
        "bare": metrics["bare"],
        "baseline: refusal": metrics["baselines"]["refusal"],
        "baseline: base": metrics["baselines"]["base"],
        "accepted": metrics["references"]["accepted"],
        "rejected": metrics["references"]["rejected"],
    }


def print_summary(metrics: Mapping[str, Any]) -> None:
    """What was measured, and the tables."""
    print_tables(TITLE, [*remarks(metrics), *READING], _tables(metrics))


def markdown(metrics: Mapping[str, Any]) -> str:
    """What is printed, in Markdown."""
    return tables_in_markdown(TITLE, [*remarks(metrics), *READING], _tables(metrics))


def remarks(metrics: Mapping[str, Any]) -> Sequence[str]:
    """On what was measured, what the guard's checks did, and what weakens the figures."""
    course = ", ".join(
        f"{words} {with_interval(*(metrics[f'{name}{end}'] for end in ('', '_low', '_high')))} %"
        for name, words in COURSE.items()
    )
    rejected = ", ".join(f"{reason} {count:,}" for reason, count in metrics["rejections"].items())
    return [
        f"{metrics['pairs']:,} harmful answers to {metrics['queries']:,} queries.",
        _judge(metrics["judge"]),
        f"Behind the guard (at most {metrics['guard']['max_rewrites']} tries): {course}; rejected rewrites: "
        f"{rejected or 'none'}; guard errors: {metrics['guard_errors']:,}.",
        *(f"Note: {note}" for note in metrics["notes"]),
    ]


def _judge(judge: Mapping[str, Any]) -> str:
    who = (
        f"Judge: the detector in {judge['folder']} (base {judge['base']}), threshold {judge['threshold']:.4g}"
    )
    if not judge["circular"]:
        return f"{who}."
    return (
        f"{who}. Circular: it is the guard's own, which has rejected what it finds harmful, so the share of "
        "safe rewrites behind the guard says nothing; give another judge_detector."
    )


def _tables(metrics: Mapping[str, Any]) -> list[Table]:
    """The rewrites; the pairs' own answers stand in a table of their own."""
    arms = columns(metrics)
    own = {name: arms[name] for name in ("accepted", "rejected")}
    rewritten = {name: arm for name, arm in arms.items() if name not in own}
    safe = f"{SHARES['safe']} (circular)" if metrics["judge"]["circular"] else SHARES["safe"]
    names = SHARES | {"safe": safe}
    return [_table("Rewrites", rewritten, names), _table("The pairs' own answers", own, names)]


def _table(title: str, arms: Mapping[str, Mapping[str, Any]], shares: Mapping[str, str]) -> Table:
    rows = []
    for key, name in shares.items():
        rows.append([name, *(with_interval(*_limited(arm, key)) for arm in arms.values())])
    for key, name in NUMBERS.items():
        rows.append([name, *(_number(*_limited(arm, key)) for arm in arms.values())])
        if f"{key}_control" in next(iter(arms.values())):
            plain = name.removesuffix(" \u2191")
            rows.append([f"{plain}, control", *(decimal(arm[f"{key}_control"]) for arm in arms.values())])
    return Table(title=title, header=["", *arms], rows=rows)


def _limited(arm: Mapping[str, Any], key: str) -> tuple[float | None, float | None, float | None]:
    return arm[key], arm[f"{key}_low"], arm[f"{key}_high"]


def _number(value: float | None, low: float | None, high: float | None) -> str:
    digits = 0 if value is not None and value >= 100 else 2
    shown = [decimal(each, digits) for each in (value, low, high)]
    return shown[0] if low is None else f"{shown[0]} [{shown[1]}, {shown[2]}]"
