import re

import pytest

from mllm_protector.evaluation.summary import JudgeInfo
from mllm_protector.records import VARIANTS, Confusion
from mllm_protector.reporting.latex import escape, latex
from mllm_protector.scenarios import GROUPS, SCENARIOS
from tests.evaluation.builders import report, rows, summary

HATE, LEGAL = "02-HateSpeech", "10-Legal_Opinion"


def whole_benchmark() -> str:
    table = [
        each
        for scenario in SCENARIOS
        for variant in VARIANTS
        for arm, harmful in (("none", 9), ("protector", 3))
        for each in rows(scenario, variant, arm, harmful, 10 - harmful, 1)
    ]
    bias = Confusion(source="made up", found=90, missed=10, false_alarms=40, rejected=160)
    judges = {"keyword": JudgeInfo(identity={}, bias=bias)}
    return latex(report(table, judges=judges, groups=GROUPS))


def tables(text: str) -> list[tuple[int, list[str]]]:
    """Columns and rows of each tabular."""
    found = re.findall(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", text, flags=re.DOTALL)
    return [(len(columns), re.findall(r"^(.*) \\\\$", body, flags=re.MULTILINE)) for columns, body in found]


def test_every_row_has_as_many_cells_as_columns() -> None:
    found = tables(whole_benchmark())
    assert len(found) == 2
    for columns, body in found:
        for line in body:
            spans = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line))
            assert len(re.split(r"(?<!\\)&", line)) + spans == columns, line


def test_headline_table_has_raw_and_corrected_rates_bounds_and_the_difference() -> None:
    (_, headline), _ = tables(whole_benchmark())
    header, first, second = headline[:3]
    assert header.count(r"$\downarrow$") == 4
    assert first.startswith("keyword & 01-07+09 & none & 90.0 [")
    assert " & 100.0 [" in first
    assert " & 81.8--90.9 & -- & --" in first
    assert re.search(r"& \$-\$60\.0 \[\$-\$\d+\.\d, \$-\$\d+\.\d\]( \$.*\$)? & \$<\$\\,0\.001", second)


def test_scenario_table_has_every_scenario_and_a_macro_mean_for_each_group() -> None:
    _, (columns, body) = tables(whole_benchmark())
    assert columns == 1 + 4 * 2
    names = [line.split(" & ")[0] for line in body[2:]]
    assert [name.replace("\\", "") for name in names if not name.startswith("Macro")] == [
        *(name for name in SCENARIOS if name in GROUPS["01-07+09"]),
        *(name for name in SCENARIOS if name in GROUPS["08+10-13"]),
    ]
    assert [name for name in names if name.startswith("Macro")] == [
        "Macro mean, 01-07+09",
        "Macro mean, 08+10-13",
        "Macro mean, all",
    ]
    assert body[2].split(" & ")[1:] == ["90.0", "30.0"] * 4


def test_tables_use_booktabs_and_no_other_package() -> None:
    text = whole_benchmark()
    commands = set(re.findall(r"\\([a-z]+)", text, flags=re.IGNORECASE))
    assert commands <= {
        *("usepackage", "begin", "end", "centering", "footnotesize", "setlength", "tabcolsep", "caption"),
        *("toprule", "midrule", "bottomrule", "cmidrule", "multicolumn", "downarrow"),
    }
    assert text.isascii()


def test_a_rate_that_is_not_corrected_says_why_in_the_caption() -> None:
    assert "these scenarios are judged by different criteria" in whole_benchmark()


def test_each_benchmark_and_judge_has_its_table() -> None:
    result = report(rows(HATE, "TEXT", "none", 1, 1, judges=["one", "two"]), name="first")
    result["benchmarks"]["second"] = summary(rows("Fraud", "SD", "none", 1, 1, judges=["one", "two"]))
    text = latex(result)
    assert text.count("\\begin{table*}") == text.count("\\end{table*}") == 6


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b & 5% #1 $x$ {y}", r"a\_b \& 5\% \#1 \$x\$ \{y\}"),
        (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("~^<>|", r"\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}\textbar{}"),
        ("[2cm] *", "{[}2cm{]} {*}"),
        ("a\n\\end{table}", r"a \textbackslash{}end\{table\}"),
        ("Ärger 文 \x1b", "Arger ? ?"),
        ("\uff04\uff3c", r"\$\textbackslash{}"),  # full-width signs become plain ones first
    ],
)
def test_no_text_is_read_as_a_command(text: str, escaped: str) -> None:
    assert escape(text) == escaped


def test_hostile_names_open_and_close_nothing() -> None:
    name = "\\end{tabular}\n%$ & [x]"
    text = latex(report(rows(name, "SD", name, 1, 1, judges=[name]), name=name))
    assert text.count("\\end{tabular}") == text.count("\\begin{tabular}") == 2
    for columns, body in tables(text):
        assert all(len(re.split(r"(?<!\\)&", line)) == columns for line in body)


def test_nothing_judged_makes_no_table() -> None:
    text = latex(report([], judges={"keyword": JudgeInfo(identity={})}))
    assert "nothing was judged" in text
    assert "\\begin" not in text
