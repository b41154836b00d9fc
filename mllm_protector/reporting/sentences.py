"""What a table cannot say about a run, in sentences for every page."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from mllm_protector.evaluation.grid import NONE
from mllm_protector.evaluation.statistics import cohens_kappa
from mllm_protector.records import Confusion
from mllm_protector.reporting.pivots import Pivot
from mllm_protector.reporting.tables import GLOSSARY, Row, share
from mllm_protector.scenarios import HARM, POLICY


def legend(result: Mapping[str, Any]) -> list[str]:
    """The run's notes, how to read the numbers, and who judged."""
    names = [*result["arms"], *dict.fromkeys(row["variant"] for row in result["measurements"])]
    words = "; ".join(f"{name}: {GLOSSARY[name]}" for name in names if name in GLOSSARY)
    return [
        *(f"Note: {note}" for note in result["notes"]),
        "ASR = harmful / judged answers, lower is better; in brackets the 95 % interval.",
        *([words] if words else []),
        *judge_lines(result["judges"]),
    ]


def judge_lines(judges: Mapping[str, Any]) -> list[str]:
    """A line for each judge: its note and how it compared with labels."""
    return [
        f"Judge {name}{' (circular)' if facts['circular'] else ''}: "
        + " ".join(filter(None, (facts["note"], bias_sentence(facts["bias"]))))
        for name, facts in judges.items()
    ]


def bias_sentence(bias: Mapping[str, Any] | None) -> str:
    """How a judge compared with labels, in one sentence."""
    counts = Confusion(**bias) if bias else None
    if counts is None or not counts.total:
        return "Not measured against labels."
    agreed, beyond_chance = counts.accuracy or 0, cohens_kappa(counts)
    kappa = "" if beyond_chance is None else f" (kappa {beyond_chance:.2f})"
    judge, labelled = (positive / counts.total for positive in (counts.tp + counts.fp, counts.tp + counts.fn))
    return (
        f"On {counts.total:,} answers ({counts.source}) it agreed with the labels in"
        f" {100 * agreed:.1f}%{kappa}: it put the ASR at {100 * judge:.1f}%, the labels at"
        f" {100 * labelled:.1f}%."
    )


def benchmark_lines(data: Pivot, name: str) -> list[str]:
    """What was asked, what the guard was trained on, what was left out, and what was cut."""
    questions = data.facts["questions"]
    lines = [f"{questions['count']:,} questions, fingerprint {questions['fingerprint'][:12]}."]
    lines += [*training_lines(data.facts, name), *_apart(data.facts["groups"])]
    if count := questions["missing"]["count"]:
        first = "; ".join(questions["missing"]["first"])
        lines.append(f"Questions left out of all numbers: {count:,}, such as {first}")
    lines += _uncorrected(data)
    for row in data.select(metric="cut"):
        if row["value"]:
            what = f"replies of the judge {row['judge']}" if row["judge"] else "answers"
            cut = f"{row['value']:,} of {row['n']:,} {what}"
            lines.append(f"{row['arm']}: {cut} are cut at their longest length.")
    return lines


def headlines(data: Pivot) -> list[str]:
    """What a benchmark says: the first judge's rates, then what the guard does to harmless questions."""
    judge, variant = next(iter(data.judges), None), next(iter(data.variants), None)
    lines = []
    for group in data.groups:
        where = {"judge": judge, "variant": variant, "group": group}
        rows = {arm: data.get("macro_asr", arm=arm, **where) for arm in data.arms}
        rates = {arm: row for arm, row in rows.items() if row and row["value"] is not None}
        none = rates.pop(NONE, None)
        clauses = [f"is {share(none)} % without guard"] if none else []
        clauses += [f"{_direction(row, none)} {share(row)} % with {arm}" for arm, row in rates.items()]
        if clauses:
            lines.append(
                f"Judged by {data.judge(judge)} the attack success rate on {group} {', '.join(clauses)} "
                f"(macro mean over scenarios, {GLOSSARY.get(str(variant), variant)})."
            )
    return [*(lines or ["Nothing was judged."]), _harmless(data)]


def _apart(groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Why some groups stand apart, where a benchmark has such."""
    apart, harm = (
        [group for group, members in groups.items() if members and set(members) <= set(kind)]
        for kind in (POLICY, HARM)
    )
    asking = "".join(f"{group} asks for harmful content; " for group in harm)
    return [
        f"{asking}in {', '.join(apart)} a plain helpful answer already counts as unsafe, so these scenarios "
        "are reported apart."
    ] * bool(apart)


def training_lines(facts: Mapping[str, Any], name: str) -> list[str]:
    """What is known of a benchmark's questions in the guard's training data, parts alike in one line."""
    return [
        _found_in_training(found, " and the ".join(part for part, _ in parts), name)
        for found, parts in groupby(facts["contamination"].items(), key=itemgetter(1))
    ]


def _harmless(data: Pivot) -> str:
    clauses = []
    for arm in data.arms:
        changed, lost = (data.get(metric, arm=arm) for metric in ("changed", "lost"))
        if arm != NONE and changed and changed["value"] is not None:
            clause = f"{arm} changes {share(changed)} % of the answers"
            if lost and lost["value"] is not None:
                clause += f" and loses {share(lost)} % of the correct ones"
            clauses.append(clause)
    return f"Harmless questions: {'; '.join(clauses) or 'not measured'}."


def _uncorrected(data: Pivot) -> list[str]:
    """Why rates are not corrected for a judge's errors, a line for each judge and reason."""
    where: dict[tuple[str, str], dict[str, None]] = {}
    for row in data.select(metric="corrected_asr", value=None, group=list(data.groups)):
        where.setdefault((row["judge"], row["method"]), {})[row["group"]] = None
    return [
        f"{judge}: not corrected for its errors on {', '.join(groups)}: {reason}."
        for (judge, reason), groups in where.items()
    ]


def _direction(row: Row, none: Row | None) -> str:
    if none is None:
        return "is"
    if row["value"] == none["value"]:
        return "stays at"
    return "falls to" if row["value"] < none["value"] else "rises to"


def _found_in_training(found: Mapping[str, Any] | None, parts: str, name: str) -> str:
    data = f"the training data of the {parts}"
    if found is None:
        return f"Not checked: whether these questions stand in {data}; train with benchmark=[{name}] to know."
    asked = f"the {found['asked']:,} different questions"
    if not found["found"]:
        if found["same_questions"]:
            return f"Checked: none of {asked} stands in {data}."
        return f"Checked for another selection of questions: none of {asked} is among those found in {data}."
    scenarios = ", ".join(f"{scenario}: {count:,}" for scenario, count in found["scenarios"].items())
    fate = "removed before the training" if found["removed"] else "learnt from"
    more = "" if found["same_questions"] else " Another selection was checked, so there may be more."
    return (
        f"Checked: {data} holds, nearly word for word, {found['found']:,} of {asked} ({scenarios}); texts"
        f" that hold them: {found['rows']:,}, {fate}.{more}"
    )
