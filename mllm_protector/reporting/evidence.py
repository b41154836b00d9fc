"""The numbers of ``asr.json`` and ``run.json`` as tables of words for the page. Computes nothing new."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mllm_protector.records import Status
from mllm_protector.reporting.layout import Table, decimal, p_value, percent, points, with_interval
from mllm_protector.reporting.sentences import TESTS, bias_sentence, uncorrected_lines
from mllm_protector.reporting.tables import shown_groups

Entry = Mapping[str, Any]


def tables(result: Entry, name: str) -> Iterator[Table]:
    """What a benchmark measured, judge by judge and side by side; tables of nothing are left out."""
    benchmark = result["benchmarks"][name]
    for judge, facts in result["judges"].items():
        yield from _means(benchmark, judge, " (circular)" if facts["circular"] else "")
    yield from _in_two(_paired(benchmark))
    yield from _in_two(_pictures(benchmark))
    yield _benign(benchmark)
    yield _own_metrics(benchmark)
    yield _outcomes(benchmark)
    yield _endings(benchmark)
    yield _reference(benchmark)
    yield _agreement(benchmark)
    yield _trade_off(benchmark)


def judges_table(judges: Mapping[str, Entry]) -> Table:
    """Who judged, by what settings, and how it compared with people."""
    return Table(
        title="Judges and their settings",
        header=["judge", "what to know", "measured against people", "settings"],
        words=4,
        rows=[
            [
                f"{name} (circular)" if facts["circular"] else name,
                facts["note"] or "-",
                bias_sentence(facts["bias"]),
                in_short(facts["identity"]),
            ]
            for name, facts in judges.items()
        ],
    )


def cost_tables(run: Entry) -> Iterator[Table]:
    """Latency of each arm, time of each stage, peak memory."""
    parts = ("", "detector_", "corrector_")
    yield Table(
        title="Time the guard adds to one answer, in milliseconds",
        header=["arm", "answers", "median", "95th percentile", "detector", "corrector"],
        rows=[
            [
                arm,
                f"{figures['n']:,.0f}",
                decimal(figures.get("median_ms"), 1),
                decimal(figures.get("p95_ms"), 1),
                *(
                    f"{decimal(figures.get(f'{part}median_ms'), 1)} / "
                    f"{decimal(figures.get(f'{part}p95_ms'), 1)}"
                    for part in parts[1:]
                ),
            ]
            for arm, figures in (run.get("latency") or {}).items()
        ],
        note="Detector and corrector: median / 95th percentile. Answers that pass need no corrector.",
    )
    yield Table(
        title="Stages of the run",
        header=["stage", "rows", "made in this run", "seconds"],
        rows=[
            [stage, f"{took['rows']:,}", f"{took['new']:,}", decimal(took["seconds"], 1)]
            for stage, took in (run.get("stages") or {}).items()
        ],
    )
    yield Table(
        title="Peak memory in MiB",
        header=["where", "MiB"],
        rows=[[place, decimal(peak, 0)] for place, peak in (run.get("peak_memory_mib") or {}).items()],
    )


def in_short(value: Any) -> str:
    """A JSON value on one line; a text as it is."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={in_short(item)}" for key, item in value.items()) or "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _in_two(table: Table) -> Iterator[Table]:
    """A long table: the first judge's first kind in sight, everything else folded."""
    judge, kind = table.header.index("judge"), table.header.index("kind")
    first = [
        row for row in table.rows if (row[judge], row[kind]) == (table.rows[0][judge], table.rows[0][kind])
    ]
    rest = [row for row in table.rows if row not in first]
    yield replace(table, rows=first)
    yield replace(table, title=f"{table.title}: other kinds and judges", rows=rest, folded=True)


def _means(benchmark: Entry, judge: str, mark: str) -> Iterator[Table]:
    means = [mean for mean in benchmark["means"] if mean["judge"] == judge]
    groups = shown_groups(benchmark["groups"])
    for number, kind in enumerate(dict.fromkeys(mean["variant"] for mean in means)):
        yield Table(
            title=f"Attack success rate in % by {judge}{mark}: {kind}",
            header=["arm", "scenarios", "macro", "micro", "harmful", "bounds", "unjudged", "corrected"],
            rows=[
                [
                    mean["arm"],
                    mean["group"],
                    with_interval(mean["macro"], mean["macro_low"], mean["macro_high"]),
                    with_interval(mean["micro"], mean["low"], mean["high"]),
                    f"{mean['harmful']:,}/{mean['judged']:,}",
                    f"{percent(mean['bound_low'])} to {percent(mean['bound_high'])}",
                    f"{mean['unjudged']:,}",
                    _corrected(mean["corrected"]),
                ]
                for mean in means
                if mean["variant"] == kind and mean["group"] in groups
            ],
            note=" ".join(
                [
                    "Macro: every scenario counts the same; micro: every answer does. Bounds: if all answers "
                    "without a verdict were safe, or harmful. Corrected: for the judge's own errors, where "
                    "these were measured by the criterion of the scenarios.",
                    *(
                        f"{line}."
                        for line in uncorrected_lines(
                            mean for mean in means if mean["variant"] == kind and mean["group"] in groups
                        )
                    ),
                ]
            ),
            words=2,
            folded=number > 0,
        )


def _paired(benchmark: Entry) -> Table:
    groups = shown_groups(benchmark["groups"])
    return Table(
        title="Paired differences on the same answers, in percentage points",
        header=[
            *("judge", "arm", "against", "kind", "scenarios"),
            *("n", "difference", "p", "test", "only here / there"),
        ],
        rows=[
            [
                pair["judge"],
                pair["arm"],
                pair["against"],
                pair["variant"],
                pair["group"],
                f"{pair['n']:,}",
                points(pair["difference"], pair["low"], pair["high"]),
                p_value(pair["p"]),
                pair["test"] or "-",
                f"{pair['only_arm']:,} / {pair['only_against']:,}",
            ]
            for pair in benchmark["paired"]
            if pair["group"] in groups
        ],
        note=f"Below zero: fewer harmful answers. {TESTS} Only here / there: harmful in one of the two arms.",
        words=5,
    )


def _pictures(benchmark: Entry) -> Table:
    groups = shown_groups(benchmark["groups"])
    return Table(
        title="Effect of the picture: attack success rate in % of the same questions",
        header=[
            "judge",
            "arm",
            "kind",
            "scenarios",
            "n",
            "as text",
            "with picture",
            "difference",
            "p",
            "test",
        ],
        note=TESTS,
        words=4,
        rows=[
            [
                entry["judge"],
                entry["arm"],
                entry["variant"],
                entry["group"],
                f"{entry['n']:,}",
                percent(entry["text"]),
                percent(entry["image"]),
                points(entry["difference"], entry["low"], entry["high"]),
                p_value(entry["p"]),
                entry["test"] or "-",
            ]
            for entry in benchmark["images"]
            if entry["group"] in groups
        ],
    )


def _benign(benchmark: Entry) -> Table:
    def counted(entry: Entry, name: str, total: str) -> str:
        share = with_interval(entry[f"{name}_share"], entry[f"{name}_low"], entry[f"{name}_high"])
        return f"{share} ({entry[name]:,}/{entry[total]:,})" if entry[total] else "-"

    return Table(
        title="Harmless questions: what the guard costs, in %",
        header=["arm", "questions", "changed", "refused", "score", "correct answers lost"],
        rows=[
            [
                entry["arm"],
                f"{entry['total']:,}",
                counted(entry, "changed", "total"),
                counted(entry, "refused", "total"),
                percent(entry["score"]) + (f" (n={entry['scored']:,})" if entry["scored"] else ""),
                "-"
                if entry["lost_share"] is None
                else f"{with_interval(entry['lost_share'], entry['lost_low'], entry['lost_high'])} "
                f"({entry['lost']:,})",
            ]
            for entry in benchmark["benign"]
            if entry["total"]
        ],
        note="Changed and refused, lower is better; score: how right the answers are where that is known, "
        "higher is better.",
    )


def _own_metrics(benchmark: Entry) -> Table:
    metrics = benchmark.get("own_metrics", {})
    names = list(next(iter(metrics.values()), {}))
    return Table(
        title="Harmless questions: the benchmark's own metrics",
        header=["arm", *(name.replace("_", " ") for name in names)],
        rows=[[arm, *(decimal(of_arm[name], 3) for name in names)] for arm, of_arm in metrics.items()],
        note="Over answered questions, without intervals. Neither: answers that say neither yes nor no.",
    )


def _outcomes(benchmark: Entry) -> Table:
    names = list(dict.fromkeys(name for counts in benchmark["outcomes"].values() for name in counts))
    return Table(
        title="What the guard did",
        header=["arm", *(name.replace("_", " ") for name in names)],
        rows=[
            [arm, *(f"{counts.get(name, 0):,}" for name in names)]
            for arm, counts in benchmark["outcomes"].items()
        ],
    )


def _endings(benchmark: Entry) -> Table:
    pairs = dict.fromkeys((cell["judge"], cell["arm"]) for cell in benchmark["cells"])
    return Table(
        title="Where every answer ended",
        header=["judge", "arm", *(status.replace("_", " ") for status in Status)],
        words=2,
        rows=[
            [
                *pair,
                *(
                    f"{sum(c[status] for c in benchmark['cells'] if (c['judge'], c['arm']) == pair):,}"
                    for status in Status
                ),
            ]
            for pair in pairs
        ],
        note="Only harmful and safe are in a rate; all others are counted here and in the bounds.",
        folded=True,
    )


def _reference(benchmark: Entry) -> Table:
    return Table(
        title="Judges against what is known of these answers",
        words=2,
        header=["judge", "known from", "right in %", "missed", "false alarms", "kappa"],
        rows=[
            [
                judge,
                {"truth": "construction", "human": "people"}.get(facts["kind"], facts["kind"]),
                f"{with_interval(facts['accuracy'], facts['low'], facts['high'])} "
                f"({facts['right']:,}/{facts['total']:,})",
                f"{facts['missed']:,}",
                f"{facts['false_alarms']:,}",
                decimal(facts["kappa"]),
            ]
            for judge, facts in benchmark["reference"].items()
            if facts is not None
        ],
    )


def _agreement(benchmark: Entry) -> Table:
    found = benchmark["agreement"]
    rows = [
        [" and ".join(pair["judges"]), f"{pair['n']:,}", percent(pair["agree"]), decimal(pair["kappa"])]
        for pair in found["pairs"]
    ]
    if fleiss := found["fleiss"]:
        rows.append(
            [f"all {len(fleiss['judges'])} (Fleiss)", f"{fleiss['n']:,}", "-", decimal(fleiss["kappa"])]
        )
    return Table(
        title="How far judges agree",
        header=["judges", "answers judged by all of them", "agree in %", "kappa"],
        rows=rows,
    )


def _trade_off(benchmark: Entry) -> Table:
    return Table(
        title="Trade-off over thresholds, in %",
        header=["threshold", "judge", "attack success rate", "harmless answers flagged"],
        words=2,
        rows=[
            [
                f"{point['threshold']:.3g}",
                judge,
                with_interval(point["asr"], point["low"], point["high"]),
                with_interval(point["flagged"], point["flagged_low"], point["flagged_high"]),
            ]
            for judge, curve in benchmark["tradeoff"].items()
            for point in curve or []
        ],
        folded=True,
    )


def _corrected(corrected: Entry | None) -> str:
    if corrected is None:
        return "-"
    return with_interval(corrected["asr"], corrected["low"], corrected["high"])
