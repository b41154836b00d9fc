import io
import re
import sys
from typing import Any

import pytest

from mllm_protector.evaluation.summary import JudgeInfo
from mllm_protector.records import VARIANTS, Confusion
from mllm_protector.reporting.terminal import print_report
from mllm_protector.scenarios import GROUPS, SCENARIOS
from tests.evaluation.builders import benign_rows, report, row, rows, summary

ARMS = ("none", "refusal", "protector")
MALWARE, HATE, HEALTH = "03-Malware_Generation", "02-HateSpeech", "12-Health_Consultation"


def whole_benchmark() -> dict[str, Any]:
    """13 scenarios, 4 kinds, 3 arms, 2 judges of which the second is circular."""
    table = [
        each
        for scenario in SCENARIOS
        for variant in VARIANTS
        for arm, harmful in zip(ARMS, (11, 0, 3), strict=True)
        for each in rows(
            scenario,
            variant,
            arm,
            harmful,
            11 - harmful,
            judges=("keyword", "detector"),
            truth=harmful > 5,
            changed=arm != "none",
            outcome=None if arm == "none" else "refused",
        )
    ]
    judges = {
        "keyword": JudgeInfo(
            identity={"judge": "keyword"},
            bias=Confusion(source="made up", found=90, missed=10, false_alarms=40, rejected=160),
        ),
        "detector": JudgeInfo(identity={"judge": "detector"}, note="Circular: a reason", circular=True),
    }
    return report(table, judges=judges, groups=GROUPS, notes=["The MLLM is a toy."])


def printed(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    print_report(result)
    return capsys.readouterr().out


def flat(text: str) -> str:
    """Without the line breaks of the print."""
    return " ".join(text.split())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_a_terminal(result: dict[str, Any], columns: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    print_report(result)
    return re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()


def line_of(text: str, start: str) -> str:
    (found,) = (line for line in text.splitlines() if line.startswith(start))
    return found


def test_print_fits_two_screens_of_110_columns(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(whole_benchmark(), capsys).splitlines()
    assert len(lines) < 90
    assert max(map(len, lines)) == 110


def test_print_shows_every_rate_of_the_first_judge_in_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(whole_benchmark(), capsys)
    for name in (*SCENARIOS, "01-07+09 pooled", "08+10-13 pooled", "all pooled"):
        assert line_of(text, name).split()[-12:] == ["100.0", "0.0", "27.3"] * 4
    header, arms = text[: text.index("01-Illegal")].splitlines()[-3:-1]
    assert header.replace("-", "").split() == list(VARIANTS)
    assert arms.split() == ["scenario", *["none", "refus.", "prote."] * 4]


def test_print_writes_arms_in_full_where_there_is_room(capsys: pytest.CaptureFixture[str]) -> None:
    table = [each for arm in ARMS for kind in ("SD", "TEXT") for each in rows(MALWARE, kind, arm, 1, 1)]
    assert line_of(printed(report(table), capsys), "scenario ").split() == ["scenario", *ARMS * 2]


@pytest.mark.parametrize("columns", [60, 80, 109, 200])
def test_terminal_of_any_width_cuts_no_number(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = on_a_terminal(whole_benchmark(), columns, monkeypatch)
    assert max(map(len, lines)) <= min(columns, 110)
    rates = [line.split()[1:] for line in lines if line.startswith("12-Health")]
    assert [rate for part in rates for rate in part] == ["100.0", "0.0", "27.3"] * 4


def test_print_says_notes_and_bias_before_any_rate(capsys: pytest.CaptureFixture[str]) -> None:
    text = flat(printed(whole_benchmark(), capsys))
    bias = (
        "Judge keyword: On 300 answers (made up) it agreed with people in 83.3% (kappa 0.65): it put the ASR"
        " at 43.3%, people at 33.3%."
    )
    assert text.index("Note: The MLLM is a toy.") < text.index(bias) < text.index("100.0")
    assert "Judge detector (circular): Circular: a reason Not measured against people." in text


def test_second_judge_gets_headlines_and_remarks_but_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(whole_benchmark(), capsys)
    second = text[text.index("judge detector (circular)") : text.index("beside the ASR")]
    assert "Against the known truth: right on 1,560 of 1,716 different answers (90.9%" in second
    assert "01-Illegal" not in second
    assert len(second.splitlines()) <= 9


def test_headline_is_the_macro_mean_with_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    result = report(rows(MALWARE, "TEXT", "none", 8, 2) + rows(HATE, "TEXT", "none", 0, 40))
    (mean,) = result["benchmarks"]["mmsafety"]["means"]
    interval = f"[{100 * mean['macro_low']:.1f}, {100 * mean['macro_high']:.1f}]"
    assert line_of(printed(result, capsys), "TEXT, all: ") == f"TEXT, all: none 40.0 {interval}"


def test_every_headline_of_a_circular_judge_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    plain, circular = printed(whole_benchmark(), capsys).split("mmsafety, judge detector")
    headlines = [line for line in circular.splitlines() if ": none 100.0 [" in line]
    assert len(headlines) == 3
    assert all("(circular)" in line for line in headlines)
    assert "(circular): none" not in plain


def test_raw_and_corrected_rates_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    text = flat(printed(whole_benchmark(), capsys))
    assert "judge's errors (what is known of these answers by construction), IMAGES, 01-07+09: " in text
    # All of its answers are safe, and 3 of 11 are called harmful.
    assert "protector 27.3 raw, 0.0 [0.0, " in text
    assert (
        "Not corrected for the judge's errors, 08+10-13, all: these scenarios are judged by different" in text
    )


def test_unjudged_answers_are_counted_by_kind_with_the_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    table = [*rows(MALWARE, "TEXT", "none", 10, 20, 5), row("0", HEALTH, "TEXT", "none", keyword="empty")]
    text = printed(report(table), capsys)
    assert "6 of 36 answers have no verdict (5 unparseable, 1 empty;" in flat(text)
    assert "if all of them were safe, and if all were harmful, TEXT, all: none 27.8 to 44.4" in flat(text)
    assert line_of(text, MALWARE).split() == [MALWARE, "33.3"]
    assert line_of(text, HEALTH).split() == [HEALTH, "-"]


def test_differences_stand_with_interval_p_and_the_test_that_gave_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = flat(printed(whole_benchmark(), capsys))
    found = re.search(
        r"Difference to none in points, IMAGES, all: refusal -100\.0 \[([^]]+)\] \(([^)]+)\)", text
    )
    assert found
    assert found[2] == "p < 0.001, sign flips; n=429"
    assert "IMAGES against TEXT in points, all: none +0.0 [" in text


def test_policy_remark_stands_only_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    remark = "asks for harmful content; in 08+10-13 a plain helpful answer already counts as unsafe"
    assert f"01-07+09 {remark}" in flat(printed(whole_benchmark(), capsys))
    assert "stand apart" not in printed(report(rows("Fraud", "SD", "none", 1, 1)), capsys)


def test_several_benchmarks_come_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    result = report(rows(MALWARE, "TEXT", "none", 1, 1), name="one")
    result["benchmarks"]["two"] = summary(rows("Fraud", "SD", "none", 1, 1))
    text = printed(result, capsys)
    places = [text.index(part) for part in ("Benchmark: one", MALWARE, "Benchmark: two", "Fraud")]
    assert places == sorted(places)


def test_harmless_questions_and_outcomes_stand_beside_the_rates(capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(MALWARE, "TEXT", "none", 8, 2)
    table += rows(MALWARE, "TEXT", "refusal", 0, 10, outcome="refused", changed=True)
    table += benign_rows("none", 40, score=1.0)
    table += benign_rows(
        "refusal", 40, score=[float(n > 0) for n in range(40)], changed=[n == 0 for n in range(40)]
    )
    text = flat(printed(report(table), capsys))
    assert (
        "changed answer in %, lower is better: none 0.0 [0.0, 8.8] (0/40), refusal 2.5 [0.4, 12.9] (1/40)"
        in text
    )
    assert "score of harmless answers in %, higher is better: none 100.0 (n=40), refusal 97.5 (n=40)" in text
    assert (
        "Correct answers lost in %, lower is better: none 0.0 [0.0, 8.8] (0), refusal 2.5 [0.4, 12.9] (1)"
        in text
    )
    assert (
        "Outcomes of refusal, 10 answers: 0 allowed, 0 rewritten, 10 refused, 0 too_long, 0 guard_error"
        in text
    )
    bare = printed(report(rows(MALWARE, "TEXT", "none", 8, 2)), capsys)
    assert "lower is better: not measured" in bare


def test_judges_that_agree_are_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(whole_benchmark(), capsys)
    assert "keyword and detector agree on 100.0% of 1,716 answers, kappa 1.00" in text


def test_questions_left_out_are_counted_and_the_first_named(capsys: pytest.CaptureFixture[str]) -> None:
    missing = [f"{MALWARE}/SD/{number}: no such file" for number in range(12)]
    text = flat(printed(report(rows(MALWARE, "TEXT", "none", 8, 2), missing=missing), capsys))
    assert f"left out of all numbers: 12 ({missing[0]}; {missing[1]}; {missing[2]}; and 9 more)" in text


def test_glossary_explains_only_what_occurs(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(report(rows(MALWARE, "TEXT", "none", 1, 1) + rows(MALWARE, "TEXT", "mine", 1, 1)), capsys)
    assert line_of(text, "none: ") == "none: no guard"
    assert line_of(text, "TEXT: ") == "TEXT: no picture"


def test_names_are_never_read_as_markup_or_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(report(rows(MALWARE, "SD", "[red]x\x1b[2J[/red]", 1, 1)), capsys)
    assert "[red]x?[2J[/red]" in text
    assert "\x1b" not in text


def test_terminal_without_unicode_still_gets_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    print_report(report(rows(MALWARE, "TEXT", "ärmel", 8, 2)))
    assert b"?rmel 80.0 [49.0, 94.3]" in raw.getvalue()


def test_nothing_judged_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    result = report([], judges={"keyword": JudgeInfo(identity={})})
    assert "Nothing was judged." in printed(result, capsys)
