import pytest

from mllm_protector.evaluation.summary import JudgeInfo
from mllm_protector.records import VARIANTS, Confusion
from mllm_protector.reporting.markdown import markdown
from mllm_protector.scenarios import GROUPS, SCENARIOS
from tests.evaluation.builders import benign_rows, report, rows, summary

ARMS = ("none", "protector")
MALWARE = "03-Malware_Generation"


def whole_benchmark() -> str:
    table = [
        each
        for scenario in SCENARIOS
        for variant in VARIANTS
        for arm, harmful in zip(ARMS, (9, 3), strict=True)
        for each in rows(scenario, variant, arm, harmful, 11 - harmful, judges=("keyword", "chat"))
    ]
    table += benign_rows("none", 5) + benign_rows("protector", 5)
    bias = Confusion(source="made up", found=90, missed=10, false_alarms=40, rejected=160)
    judges = {
        "keyword": JudgeInfo(identity={"judge": "keyword", "version": 2}, bias=bias),
        "chat": JudgeInfo(identity={}, note="Circular: a reason", circular=True),
    }
    return markdown(report(table, judges=judges, groups=GROUPS))


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_markdown_has_every_cell_with_counts_and_interval() -> None:
    text = whole_benchmark()
    for name in SCENARIOS:
        assert len(lines_of(text, f"| {name} ")) == 8  # 4 kinds, 2 judges
    assert text.count("27.3 [9.7, 56.6] (3/11)") == 8 * len(SCENARIOS)


def test_markdown_has_both_means_bounds_and_the_correction() -> None:
    text = whole_benchmark()
    section = text[text.index("by keyword: IMAGES") :]
    header = section[section.index("| arm") :].splitlines()[0]
    assert all(name in header for name in ("macro", "micro", "bounds", "unjudged", "corrected"))
    assert "corrected for the judge's errors (made up), IMAGES, 01-07+09: none 81.8 raw, 88.3 [" in text
    assert (
        "Not corrected for the judge's errors, 08+10-13, all: these scenarios are judged by different" in text
    )


def test_markdown_names_what_the_judge_depends_on_and_how_it_errs() -> None:
    text = whole_benchmark()
    assert "- Settings of keyword: judge=keyword, version=2" in text
    assert "- Judge keyword: On 300 answers (made up) it agreed with people in 83.3% (kappa 0.65)" in text
    assert "### Judge chat (circular)" in text


def test_markdown_has_differences_pictures_agreement_and_harmless_questions() -> None:
    text = whole_benchmark().lower()
    for title in ("paired differences", "effect of the picture", "harmless questions", "judges agree"):
        assert any(title in line for line in text.splitlines() if line.startswith("#")), title


def test_every_rate_says_which_way_is_better() -> None:
    text = whole_benchmark()
    assert "\u2193 lower for the ASR" in text
    assert "\u2191 higher for scores" in text
    assert all("\u2193" in line for line in lines_of(text, "- Macro mean over"))


def test_policy_remark_stands_only_where_it_belongs() -> None:
    assert "in 08+10-13 a plain helpful answer already counts as unsafe" in whole_benchmark()
    assert "plain helpful answer" not in markdown(report(rows("Fraud", "SD", "none", 1, 1)))


def test_each_benchmark_has_a_section() -> None:
    result = report(rows(MALWARE, "TEXT", "none", 1, 1), name="one")
    result["benchmarks"]["two"] = summary(rows("Fraud", "SD", "none", 1, 1))
    assert lines_of(markdown(result), "## Benchmark") == ["## Benchmark: one", "## Benchmark: two"]


def test_questions_left_out_are_named() -> None:
    missing = [f"{MALWARE}/SD/{number}: no such file" for number in range(12)]
    text = markdown(report(rows(MALWARE, "TEXT", "none", 8, 2), missing=missing))
    assert missing[9] in text
    assert "; and 2 more)" in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a|b", r"a\|b"),
        ("<script>alert(1)</script>", "&lt;script>alert(1)&lt;/script>"),
        ("<img src=x>", "&lt;img src=x>"),
        ("[x](javascript:1)", r"[x]\(javascript:1)"),
        ("[x]: http://1", r"[x]\: http://1"),
        ("**x** `y`", r"\*\*x\*\* \`y\`"),
        ("a\n\n# b", "a # b"),
    ],
)
def test_names_are_never_read_as_markup(name: str, shown: str) -> None:
    text = markdown(report(rows(name, "SD", name, 8, 2, judges=[name]), name=name, notes=[name]))
    assert f"| {shown} " in text
    assert f"- Note: {shown}" in text
    assert f"## Benchmark: {shown}" in text
    assert f"### Judge {shown}" in text
    if "<" in name or "|" in name:
        assert name not in text


def test_nothing_judged_is_said() -> None:
    assert "- Nothing was judged." in markdown(report([], judges={"keyword": JudgeInfo(identity={})}))
