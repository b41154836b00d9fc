"""``asr.tex``: tables to paste into a paper. They need the package booktabs and nothing else."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm_protector.reporting import sentences
from mllm_protector.reporting.layout import p_value, percent, points, with_interval
from mllm_protector.reporting.tables import Block, View, views

_ESCAPED = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # At the start of a row these would belong to the line break before it.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
} | {each: f"\\{each}" for each in "{}$&#_%"}


def latex(result: Mapping[str, Any]) -> str:
    """For each benchmark the headline numbers, then each judge's scenarios by kind and arm."""
    parts = ["% Needs \\usepackage{booktabs}. ASR = harmful / judged answers in %, lower is better."]
    parts += [f"% {escape(line)}" for line in sentences.judge_lines(result["judges"])]
    for name in result["benchmarks"]:
        found = [view for view in views(result, name) if view.cells]
        if not found:
            parts.append(f"% {escape(name)}: nothing was judged.")
            continue
        parts.append(_headlines(name, found))
        parts += [_scenarios(name, view) for view in found]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """A text in which LaTeX reads no command: plain ASCII on one line, accents dropped, the rest as ``?``."""
    bare = (each for each in unicodedata.normalize("NFKD", text) if not unicodedata.combining(each))
    ascii_only = (
        each if each.isascii() and each.isprintable() else "?" for each in " ".join("".join(bare).split())
    )
    return "".join(_ESCAPED.get(each, each) for each in ascii_only)


def _headlines(name: str, found: Sequence[View]) -> str:
    """Judge, group and arm down; raw and corrected rates and the paired difference across."""
    header = ["Judge", "Scenarios", "Arm", r"Macro $\downarrow$", r"Pooled $\downarrow$"]
    header += [r"Corrected $\downarrow$", "Bounds", r"Difference $\downarrow$", "$p$"]
    blocks = [list(_headline_rows(view)) for view in found]
    kind = found[0].kinds[0]
    caption = (
        f"Attack success rate on {escape(name)} in \\% ({escape(kind)}), with 95\\% intervals. Macro: mean"
        " over scenarios; pooled: all answers; corrected: pooled, for the judge's errors where these were"
        " counted by the same criterion; bounds: pooled, if all answers without a verdict were safe or"
        " harmful; difference: to no guard on the same answers, in points, with Bonett and Price's interval"
        f" over questions. {escape(sentences.TESTS)}"
    )
    shown = (view.means[kind, group, arm] for view in found for group in view.blocks for arm in view.arms)
    caption += "".join(f" {escape(line)}." for line in sentences.uncorrected_lines(shown))
    return _table(caption, "lllrrrrrr", [" & ".join(header)], blocks)


def _headline_rows(view: View) -> Iterator[list[str]]:
    kind = view.kinds[0]
    for group in view.blocks:
        effects = {entry["arm"]: entry for entry in view.of_judge("paired", kind, group)}
        for arm in view.arms:
            mean, effect = view.means[kind, group, arm], effects.get(arm)
            fixed = mean["corrected"]
            yield [
                *map(escape, (view.title, group, arm)),
                _number(with_interval(mean["macro"], mean["macro_low"], mean["macro_high"])),
                _number(with_interval(mean["micro"], mean["low"], mean["high"])),
                _number(with_interval(fixed["asr"], fixed["low"], fixed["high"]) if fixed else "-"),
                "--"
                if mean["bound_low"] is None
                else f"{percent(mean['bound_low'])}--{percent(mean['bound_high'])}",
                _number(points(effect["difference"], effect["low"], effect["high"]) if effect else "-"),
                _number(p_value(effect["p"]) if effect else "-"),
            ]


def _scenarios(name: str, view: View) -> str:
    """Scenarios down, kinds and inside them arms across; each group ends with its macro mean."""
    columns = [(variant, arm) for variant in view.variants for arm in view.arms]
    wide = len(view.arms)
    kinds = " & ".join(f"\\multicolumn{{{wide}}}{{c}}{{{escape(variant)}}}" for variant in view.variants)
    rules = " ".join(
        f"\\cmidrule(lr){{{2 + wide * place}-{1 + wide * (place + 1)}}}"
        for place in range(len(view.variants))
    )
    arms = " & ".join(["Scenario", *(escape(arm) for _, arm in columns)])
    blocks: list[Block] = [
        [
            *(
                [escape(scenario)]
                + [_number(percent(view.cells[variant, scenario, arm]["asr"])) for variant, arm in columns]
                for scenario in scenarios
            ),
            [f"Macro mean, {escape(group)}"]
            + [_number(percent(view.means[variant, group, arm]["macro"])) for variant, arm in columns],
        ]
        for group, scenarios in view.blocks.items()
    ]
    caption = (
        f"Attack success rate on {escape(name)} in \\% ($\\downarrow$) by scenario, judged by"
        f" {escape(view.title)}."
    )
    return _table(caption, "l" + "r" * len(columns), [f" & {kinds}", rules, arms], blocks)


def _table(caption: str, columns: str, header: Sequence[str], blocks: Sequence[Block]) -> str:
    head = "\n".join(line if line.startswith("\\cmidrule") else f"{line} \\\\" for line in header)
    body = "\n\\midrule\n".join("\n".join(f"{' & '.join(row)} \\\\" for row in block) for block in blocks)
    return (
        "\\begin{table*}[t]\n\\centering\\footnotesize\\setlength{\\tabcolsep}{3pt}\n"
        f"\\caption{{{caption}}}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{head}\n\\midrule\n{body}\n"
        "\\bottomrule\n\\end{tabular}\n\\end{table*}"
    )


def _number(text: str) -> str:
    """A formatted number with real minus signs; nothing becomes a dash."""
    if text == "-":
        return "--"
    return text.replace("-", "$-$").replace("< ", "$<$\\,")
