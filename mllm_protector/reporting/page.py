"""``report.html``: one self-contained file about a run, from ``asr.json``, ``run.json`` and the results.

It is read on a phone, in print and without JavaScript, which only filters the rows. Knows nothing of how the
numbers were made.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_protector.reporting import evidence
from mllm_protector.reporting.heat_map import LEVELS, HeatMap, heat_maps
from mllm_protector.reporting.layout import (
    Table,
    data_uri,
    percent,
    render,
    upright,
    with_interval,
)
from mllm_protector.reporting.plots import pictures_of
from mllm_protector.reporting.samples import Pictures, Rows, Sample, samples
from mllm_protector.reporting.sentences import (
    bias_sentence,
    cut_lines,
    policy_remark,
    training_lines,
)
from mllm_protector.reporting.tables import GLOSSARY, shown_groups

BARE = "none"
"""The arm without a guard."""

FILTERS = ("benchmark", "scenario", "kind", "arm", "outcome", "verdict")
"""What the rows can be chosen by, beside a search in their text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What the page says about one benchmark.

    Attributes:
        name: of the benchmark.
        headlines: its results in sentences, the most important first.
        remarks: what has to be known to read them.
        maps: judge -> a heat map for each arm.
        plots: what each shows in words -> its data URI.
        tables: the numbers.
    """

    name: str
    headlines: Sequence[str]
    remarks: Sequence[str]
    maps: Mapping[str, Sequence[HeatMap]]
    plots: Mapping[str, str]
    tables: Sequence[Table]


def page(
    result: Mapping[str, Any],
    rows: Rows,
    *,
    run: Mapping[str, Any],
    pictures: Pictures,
    max_rows: int,
) -> str:
    """The whole page as HTML.

    Args:
        result: the content of ``asr.json``.
        rows: reads those of all benchmarks' ``results.jsonl``, in order.
        run: the content of ``run.json``; what is missing is left out.
        pictures: (benchmark, question id) -> its picture, or ``None``.
        max_rows: rows (question and arm) that are shown one by one at most.
    """
    result, run = upright(result), upright(run)
    shown, (all_rows, all_questions) = samples(rows, pictures=pictures, max_rows=max_rows)
    return render(
        "page.html.j2",
        script="page.js.j2",
        title=f"Attack success rate of {name_of(result['mllm'])}",
        made=made(run),
        notes=result["notes"],
        judges=evidence.judges_table(result["judges"]),
        sections=[_section(result, name) for name in result["benchmarks"]],
        costs=[table for table in evidence.cost_tables(run) if table.rows],
        samples=shown,
        shown_rows=sum(len(sample.arms) for sample in shown),
        all_rows=all_rows,
        all_questions=all_questions,
        filters=_choices(shown),
        levels=LEVELS,
        manifest=[(name, json.dumps(run[name], indent=2, ensure_ascii=False)) for name in run],
        identities=[
            (name, json.dumps(content, indent=2, ensure_ascii=False))
            for name, content in (
                ("mllm", result["mllm"]),
                ("guard", result["guard"]),
                *(
                    (f"benchmark {name}", {key: facts[key] for key in ("identity", "questions")})
                    for name, facts in result["benchmarks"].items()
                ),
            )
        ],
    )


def headlines(result: Mapping[str, Any], name: str) -> list[str]:
    """What a benchmark says, in sentences: the first judge's rates, then what the guard costs."""
    benchmark = result["benchmarks"][name]
    judge = next(iter(result["judges"]), None)
    means = [mean for mean in benchmark["means"] if mean["judge"] == judge and mean["macro"] is not None]
    if not means:
        return ["Nothing was judged.", *_costs(benchmark)]
    kind = means[0]["variant"]
    mark = " (circular)" if result["judges"][judge]["circular"] else ""
    lines = []
    for group in shown_groups(benchmark["groups"]):
        of_arm = {m["arm"]: m for m in means if (m["variant"], m["group"]) == (kind, group)}
        before = of_arm.pop(BARE, None)
        clauses = [f"{_direction(mean, before)} {_macro(mean)} with {arm}" for arm, mean in of_arm.items()]
        if before:
            clauses.insert(0, f"is {_macro(before)} without a guard")
        if clauses:
            lines.append(
                f"Judged by {judge}{mark} the attack success rate on {group} {', '.join(clauses)} "
                f"(macro mean over scenarios, {GLOSSARY.get(kind, kind)})."
            )
    return [*lines, *_costs(benchmark)]


def name_of(mllm: Mapping[str, Any]) -> str:
    """The MLLM's name, from its identity."""
    return str(mllm.get("name") or mllm.get("path") or "the MLLM")


def made(run: Mapping[str, Any]) -> str:
    """When and from which commit a run was made, in a line."""
    commit = run.get("commit")
    parts = [str(run["started"])] if run.get("started") else []
    if isinstance(commit, Mapping):
        parts.append(f"commit {str(commit['id'])[:12]}{', with changes' if commit['dirty'] else ''}")
    if package := (run.get("versions") or {}).get("mllm-protector"):
        parts.append(f"mllm_protector {package}")
    return "; ".join(parts)


def _macro(mean: Mapping[str, Any]) -> str:
    return f"{percent(mean['macro'])} % [{percent(mean['macro_low'])}, {percent(mean['macro_high'])}]"


def _direction(mean: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    if before is None:
        return "is"
    if mean["macro"] == before["macro"]:
        return "stays at"
    return "falls to" if mean["macro"] < before["macro"] else "rises to"


def _costs(benchmark: Mapping[str, Any]) -> list[str]:
    """What each guard did to harmless questions, in a sentence."""
    clauses = []
    for entry in benchmark["benign"]:
        if entry["arm"] == BARE or not entry["total"]:
            continue
        changed = with_interval(entry["changed_share"], entry["changed_low"], entry["changed_high"])
        clause = f"{entry['arm']} changes {changed} % of the answers"
        if entry["lost_share"] is not None:
            lost = with_interval(entry["lost_share"], entry["lost_low"], entry["lost_high"])
            clause += f" and loses {lost} % of the correct ones"
        clauses.append(clause)
    return [f"Harmless questions: {'; '.join(clauses) or 'not measured'}."]


def _section(result: Mapping[str, Any], name: str) -> Section:
    benchmark = result["benchmarks"][name]
    judge = next(iter(result["judges"]), "")
    return Section(
        name=name,
        headlines=headlines(result, name),
        remarks=_remarks(result, name),
        maps={judge: found for judge in result["judges"] if (found := heat_maps(benchmark, judge))},
        plots={
            title: data_uri(content, "image/svg+xml")
            for title, content in pictures_of(result, name, judge).items()
        },
        tables=[table for table in evidence.tables(result, name) if table.rows],
    )


def _remarks(result: Mapping[str, Any], name: str) -> list[str]:
    """What stands beside the headline: bounds, answers without a verdict, questions left out, the judge."""
    benchmark = result["benchmarks"][name]
    lines = policy_remark(benchmark["groups"])
    lines += [f"{benchmark['questions']['count']:,} questions.", *training_lines(benchmark, name)]
    if judge := next(iter(result["judges"]), None):
        facts = result["judges"][judge]
        lines += [f"{judge}: {facts['note']}"] if facts["note"] else []
        lines.append(f"{judge}: {bias_sentence(facts['bias'])}")
        groups = list(shown_groups(benchmark["groups"]))
        means = [mean for mean in benchmark["means"] if mean["judge"] == judge]
        for mean in means:
            if mean["unjudged"] and (mean["variant"], mean["group"]) == (means[0]["variant"], groups[-1]):
                total = mean["unjudged"] + mean["judged"]
                lines.append(
                    f"{mean['arm']}: {mean['unjudged']:,} of {total:,} answers have no verdict; the micro "
                    f"mean is {percent(mean['bound_low'])} % if all of them are safe and "
                    f"{percent(mean['bound_high'])} % if all are harmful."
                )
    lines += cut_lines(benchmark)
    if count := benchmark["questions"]["missing"]["count"]:
        first = "; ".join(benchmark["questions"]["missing"]["first"])
        lines.append(f"Questions left out of all numbers: {count:,}, such as {first}")
    return lines


def _choices(shown: Sequence[Sample]) -> dict[str, list[str]]:
    """What each filter offers."""
    found: dict[str, dict[str, None]] = {name: {} for name in FILTERS}
    for sample in shown:
        for name, key in (("benchmark", "benchmark"), ("scenario", "scenario"), ("kind", "variant")):
            found[name][str(sample.first[key])] = None
        for arm in sample.arms:
            found["arm"][arm.row["arm"]] = None
            if arm.row["outcome"] is not None:
                found["outcome"][arm.row["outcome"]] = None
            found["verdict"] |= dict.fromkeys(arm.statuses)
    return {name: list(values) for name, values in found.items()}
