"""What has to stand beside the numbers of ``asr.json``, in sentences for the terminal and for Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from mllm_protector.evaluation.statistics import agreement
from mllm_protector.records import JUDGED, Status
from mllm_protector.reporting.layout import decimal, p_value, percent, points, with_interval
from mllm_protector.reporting.tables import GLOSSARY, Entry, View, harm_groups, policy_groups

TITLE = "Attack success rate (ASR) in %, lower is better"

TESTS = (
    "p: McNemar's exact test where every question has one pair of verdicts; elsewhere a sign-flip test on the"
    " net change of each question."
)


def legend(result: Entry) -> list[str]:
    """How to read the numbers, and what the usual names stand for."""
    kinds = {mean["variant"]: None for entry in result["benchmarks"].values() for mean in entry["means"]}
    words = (
        "; ".join(f"{name}: {GLOSSARY[name]}" for name in names if name in GLOSSARY)
        for names in (result["arms"], kinds)
    )
    notes = [f"Note: {note}" for note in result["notes"]]
    return [*notes, "ASR = harmful / judged answers; in brackets its 95% interval.", *filter(None, words)]


def judge_lines(judges: Mapping[str, Entry]) -> list[str]:
    """A line for each judge: its note and how it compared with people."""
    return [
        f"Judge {name}{' (circular)' if facts['circular'] else ''}: "
        + " ".join(filter(None, (facts["note"], bias_sentence(facts["bias"]))))
        for name, facts in judges.items()
    ]


def bias_sentence(bias: Entry | None) -> str:
    """How a judge compared with people, in one sentence."""
    total = sum(bias[name] for name in ("found", "missed", "false_alarms", "rejected")) if bias else 0
    if bias is None or not total:
        return "Not measured against people."
    found = agreement(**{name: bias[name] for name in ("found", "missed", "false_alarms", "rejected")})
    kappa = "" if found.kappa is None else f" (kappa {found.kappa:.2f})"
    return (
        f"On {total:,} answers ({bias['source']}) it agreed with people in {percent(found.right.value)}%"
        f"{kappa}: it put the ASR at {percent((bias['found'] + bias['false_alarms']) / total)}%, people at"
        f" {percent((bias['found'] + bias['missed']) / total)}%."
    )


def policy_remark(groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Why some groups stand apart, where a benchmark has such."""
    apart = policy_groups(groups)
    if not apart:
        return []
    asking = "".join(f"{group} asks for harmful content; " for group in harm_groups(groups))
    return [
        f"{asking}in {', '.join(apart)} a plain helpful answer already counts as unsafe, so these scenarios "
        "stand apart."
    ]


def training_lines(benchmark: Entry, name: str) -> list[str]:
    """What is known of a benchmark's questions in the guard's training data, parts alike in one line."""
    return [
        _found_in_training(found, " and the ".join(part for part, _ in parts), name)
        for found, parts in groupby(benchmark["contamination"].items(), key=itemgetter(1))
    ]


def contamination_notes(name: str, contamination: Entry) -> list[str]:
    """What nobody may overlook: parts of the guard that learnt from a benchmark's questions."""
    learnt = [
        f"{part} ({found['found']:,} of {found['asked']:,} different questions)"
        for part, found in contamination.items()
        if found and found["found"] and not found["removed"]
    ]
    if not learnt:
        return []
    return [
        f"Contaminated: questions of {name} stand, nearly word for word, in the training data of"
        f" the {' and the '.join(learnt)}, so on new questions the guard may do worse than these figures say."
    ]


def headlines(view: View) -> list[str]:
    """The macro means of all pictures (of the text, if there are none), a line for each group."""
    mark = " (circular)" if view.facts["circular"] else ""
    return [
        f"{kind}, {group}{mark}: "
        + ", ".join(f"{arm} {macro_text(view.means[kind, group, arm], count=False)}" for arm in view.arms)
        for kind in view.kinds[:1]
        for group in view.blocks
    ]


def remarks(view: View) -> list[str]:
    """What a judge's headlines need beside them: unjudged answers with bounds, corrections, the reference."""
    if not view.cells:
        return ["Nothing was judged."]
    kind = view.kinds[0]
    lines = _unjudged_lines(view)
    for group in view.blocks:
        means = {arm: view.means[kind, group, arm] for arm in view.arms}
        corrected = {arm: mean["corrected"] for arm, mean in means.items() if mean["corrected"]}
        if corrected:
            values = "; ".join(
                f"{arm} {percent(means[arm]['micro'])} raw,"
                f" {with_interval(each['asr'], each['low'], each['high'])} corrected"
                for arm, each in corrected.items()
            )
            lines.append(
                f"Pooled ASR corrected for the judge's errors ({next(iter(corrected.values()))['source']}),"
                f" {kind}, {group}: {values}"
            )
    shown = [view.means[kind, group, arm] for group in view.blocks for arm in view.arms]
    lines += uncorrected_lines(shown)
    if facts := view.benchmark["reference"].get(view.judge):
        kappa = "" if facts["kappa"] is None else f", kappa {facts['kappa']:.2f}"
        known = "people's labels" if facts["kind"] == "human" else "the known truth"
        lines.append(
            f"Against {known}: right on {facts['right']:,} of {facts['total']:,} different answers"
            f" ({percent(facts['accuracy'])}%{kappa}); {facts['missed']:,} harmful ones called safe,"
            f" {facts['false_alarms']:,} safe ones called harmful"
        )
    return lines


def uncorrected_lines(means: Iterable[Entry]) -> list[str]:
    """Why rates are not corrected for the judge's errors, a line for each reason."""
    where: dict[str, dict[str, None]] = {}
    for mean in means:
        if mean["uncorrected"]:
            where.setdefault(mean["uncorrected"], {})[mean["group"]] = None
    return [
        f"Not corrected for the judge's errors, {', '.join(groups)}: {reason}"
        for reason, groups in where.items()
    ]


def comparisons(view: View) -> list[str]:
    """The guard's effect on the same answers, and that of the pictures on the same questions."""
    lines = []
    kind = next(iter(view.kinds), "")
    for group in view.blocks:
        effects = [entry for entry in view.of_judge("paired", kind, group) if entry["n"]]
        if effects:
            found = ", ".join(f"{entry['arm']} {_effect(entry)}" for entry in effects)
            lines.append(f"Difference to {effects[0]['against']} in points, {kind}, {group}: {found}")
    for group in [*view.blocks][-1:]:
        pictures = [entry for entry in view.of_judge("images", kind, group) if entry["n"]]
        if pictures:
            found = ", ".join(f"{entry['arm']} {_effect(entry)}" for entry in pictures)
            lines.append(f"{kind} against TEXT in points, {group}: {found}")
    return lines


def closing(benchmark: Entry, *, named: int | None) -> list[str]:
    """What was measured beside the ASR; at most ``named`` of the questions left out by name."""
    measured = [entry for entry in benchmark["benign"] if entry["total"]]
    lines = [
        f"Harmless questions {what} in %, lower is better: {_benign(measured, name) or 'not measured'}"
        for name, what in (("changed", "with a changed answer"), ("refused", "refused"))
    ]
    if scored := [entry for entry in measured if entry["scored"]]:
        found = ", ".join(
            f"{entry['arm']} {percent(entry['score'])} (n={entry['scored']:,})" for entry in scored
        )
        lines.append(f"Mean score of harmless answers in %, higher is better: {found}")
        if lost := _benign(scored, "lost"):
            lines.append(f"Correct answers lost in %, lower is better: {lost}")
    for arm, metrics in benchmark.get("own_metrics", {}).items():
        found = ", ".join(f"{name.replace('_', ' ')} {decimal(each, 3)}" for name, each in metrics.items())
        lines.append(f"The benchmark's own metrics, {arm}: {found}")
    if unanswered := sum(entry["generation_error"] for entry in benchmark["benign"]):
        lines.append(f"Harmless questions without an answer, left out: {unanswered:,} (over all arms)")
    lines += cut_lines(benchmark)
    for pair in benchmark["agreement"]["pairs"]:
        if pair["n"]:
            kappa = "" if pair["kappa"] is None else f", kappa {pair['kappa']:.2f}"
            lines.append(
                f"{' and '.join(pair['judges'])} agree on {percent(pair['agree'])}% of {pair['n']:,}"
                f" answers{kappa}"
            )
    if (fleiss := benchmark["agreement"]["fleiss"]) and fleiss["kappa"] is not None:
        lines.append(f"All judges together: Fleiss' kappa {fleiss['kappa']:.2f} (n={fleiss['n']:,})")
    for arm, outcomes in benchmark["outcomes"].items():
        done = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.items())
        lines.append(f"Outcomes of {arm}, {sum(outcomes.values()):,} answers: {done}")
    missing = benchmark["questions"]["missing"]
    if count := missing["count"]:
        first = missing["first"][:named]
        more = f"; and {count - len(first):,} more" if count > len(first) else ""
        lines.append(f"Questions left out of all numbers: {count:,} ({'; '.join(first)}{more})")
    return lines


def cut_lines(benchmark: Entry) -> list[str]:
    """How many answers, and how many replies of each judge, their model did not end itself."""
    counts: dict[str, list[str]] = {}
    for each in benchmark["cut"]:
        if each["cut"]:
            what = "Answers" if each["judge"] is None else f"Replies of the judge {each['judge']}"
            counts.setdefault(what, []).append(f"{each['arm']} {each['cut']:,} of {each['total']:,}")
    return [f"{what} cut at their longest length: {', '.join(found)}" for what, found in counts.items()]


def macro_text(mean: Entry, *, count: bool = True) -> str:
    """A macro mean with its interval, and perhaps how many answers have no verdict."""
    missing = unjudged_text(mean) if count else ""
    return with_interval(mean["macro"], mean["macro_low"], mean["macro_high"]) + missing


def share_text(entry: Entry) -> str:
    """The pooled rate of a cell or mean, such as ``33.3 [19.2, 51.2] (10/30) +5?``."""
    if not entry["judged"]:
        return "-" + unjudged_text(entry)
    shown = with_interval(rate(entry), entry["low"], entry["high"])
    return f"{shown} ({entry['harmful']:,}/{entry['judged']:,}){unjudged_text(entry)}"


def rate_text(entry: Entry) -> str:
    """The pooled rate alone."""
    return percent(rate(entry))


def rate(entry: Entry) -> float | None:
    """The pooled rate of a cell or mean."""
    found: float | None = entry["asr"] if "asr" in entry else entry["micro"]
    return found


def unjudged_text(entry: Entry) -> str:
    """How many answers have no verdict, if any."""
    return f" +{entry['unjudged']:,}?" if entry["unjudged"] else ""


def unjudged_kinds(entries: Iterable[Entry]) -> str:
    """Why answers have no verdict, counted, such as ``5 unparseable, 3 empty``."""
    rows = list(entries)
    kinds = [status for status in Status if status not in JUDGED]
    counts = {str(status).replace("_", " "): sum(row[status] for row in rows) for status in kinds}
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)


def _found_in_training(found: Entry | None, parts: str, name: str) -> str:
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


def _unjudged_lines(view: View) -> list[str]:
    unjudged = sum(cell["unjudged"] for cell in view.cells.values())
    if not unjudged:
        return []
    kind, group = view.kinds[0], [*view.blocks][-1]
    bounds = ", ".join(
        f"{arm} {percent(mean['bound_low'])} to {percent(mean['bound_high'])}"
        for arm in view.arms
        if (mean := view.means[kind, group, arm])["unjudged"]
    )
    total = unjudged + sum(cell["judged"] for cell in view.cells.values())
    lines = [
        f"{unjudged:,} of {total:,} answers have no verdict ({unjudged_kinds(view.cells.values())}; +n? in"
        " the tables): they count neither as safe nor as harmful"
    ]
    if bounds:
        lines.append(
            f"Pooled ASR if all of them were safe, and if all were harmful, {kind}, {group}: {bounds}"
        )
    return lines


def _effect(entry: Any) -> str:
    """A paired difference with its interval, its p and the test that gave it."""
    shown = points(entry["difference"], entry["low"], entry["high"])
    p = p_value(entry["p"])
    return f"{shown} (p {p if p.startswith('<') else f'= {p}'}, {entry['test']}; n={entry['n']:,})"


def _benign(entries: Sequence[Entry], name: str) -> str:
    return ", ".join(
        f"{entry['arm']} "
        f"{with_interval(entry[f'{name}_share'], entry[f'{name}_low'], entry[f'{name}_high'])}"
        f" ({entry[name]:,}{'' if name == 'lost' else '/' + format(entry['total'], ',')})"
        for entry in entries
        if entry[f"{name}_share"] is not None
    )
