import json
import re
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_protector.data.report import data_report, describe, render, write_data_report
from mllm_protector.data.splits import Origin, SourceAccount
from mllm_protector.records import AnswerPair, LabelledAnswer

HOSTILE = (
    "a | b",
    "<script>alert(1)</script>",
    "**bold** `code`",
    "[x](javascript:1)",
    "line\n\n# heading",
    "![x](http://evil.example/x.png)",
    "\u202eturned",
    "half \ud800 pair",
    "https://evil.example and www.evil.example",
)


def pair(
    query: str = "How?", accepted_harmful: bool = False, rejected_harmful: bool = True, **given: Any
) -> AnswerPair:
    return AnswerPair(
        query=query,
        accepted="a kind answer",
        rejected="bad",
        accepted_harmful=accepted_harmful,
        rejected_harmful=rejected_harmful,
        **given,
    )


def single(harmful: bool = True, **given: Any) -> LabelledAnswer:
    return LabelledAnswer(**{"query": "How?", "answer": "so", "harmful": harmful} | given)


def source(name: str = "one", **given: Any) -> dict[str, Any]:
    origin = {name: given.pop(name) for name in ("licence", "revision", "files") if name in given}
    counts = {
        "read": 10,
        "kept": 7,
        "quarantined": 1,
        "dropped": {"empty answer": 2},
        "train": 6,
        "validation": 1,
    }
    made = Origin(**{"name": "made up", "licence": "mit", "files": {"one.jsonl": "0" * 64}} | origin)
    return SourceAccount(name=name, origin=made, **counts | given).as_json()


def found(**given: Any) -> dict[str, Any]:
    return {
        "questions": 1680,
        "fingerprint": "f" * 64,
        "threshold": 0.8,
        "rows": 3,
        "found": {"0" * 16: 1, "1" * 16: 2},
        "examples": [{"row": 5, "question": "How is it done?", "text": "how is it DONE", "share": 1.0}],
        "removed": False,
    } | given


def whole(
    sources: Sequence[dict[str, Any]] = (source(),), contamination: dict[str, Any] | None = None
) -> dict[str, Any]:
    return data_report(
        sources,
        train=[pair(scenario="Fraud"), single()],
        validation=[pair("Why?")],
        fingerprint="f" * 64,
        contamination=contamination,
    )


def table(text: str, section: str) -> list[list[str]]:
    """The cells of the last table of a section, its header first."""
    body = text.split(f"## {section}\n")[1].split("\n## ")[0]
    block = [each for each in map(str.strip, body.split("\n\n")) if each.startswith("|")][-1]
    lines = [line for line in block.splitlines() if not re.fullmatch(r"[|:\-]+", line)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


def test_kinds_and_labels_are_counted_and_only_those_that_occur() -> None:
    facts = describe([pair(), pair(), pair(rejected_harmful=False), single(), single(harmful=False)])
    assert facts["records"] == 5
    assert facts["kinds"] == {"both harmless": 1, "harmless over harmful": 2, "single answers": 2}
    assert facts["answers"] == {"harmful": 3, "harmless": 5}
    assert describe([pair(accepted_harmful=True), pair(accepted_harmful=True, rejected_harmful=False)])[
        "kinds"
    ] == {"both harmful": 1, "harmful over harmless": 1}


def test_answers_are_counted_by_scenario_and_label() -> None:
    facts = describe([pair(scenario="Fraud"), single(scenario="Fraud"), single(harmful=False)])
    assert list(facts["scenarios"].items()) == [
        ("(none)", {"harmful": 0, "harmless": 1}),
        ("Fraud", {"harmful": 2, "harmless": 1}),
    ]


def test_the_hundred_most_frequent_scenarios_are_named_and_the_others_summed() -> None:
    records = [single(scenario=f"s{place:03}") for place in range(130) for _ in range(1 + (place >= 30))]
    scenarios = describe(records)["scenarios"]
    assert [*scenarios] == [*(f"s{place:03}" for place in range(30, 130)), "(others)"]
    assert scenarios["(others)"] == {"harmful": 30, "harmless": 0}


@given(st.lists(st.integers(1, 60), min_size=1, max_size=200))
def test_percentiles_are_exact(lengths: list[int]) -> None:
    facts = describe([single(answer="ab " * length) for length in lengths])
    wanted = [int(np.percentile(lengths, share, method="inverted_cdf")) for share in (5, 50, 95, 99)]
    assert [*facts["words"]["answer"].values()] == [*wanted, max(lengths)]
    assert [*facts["characters"]["answer"].values()] == [3 * length for length in [*wanted, max(lengths)]]


def test_nothing_has_no_lengths_and_still_renders() -> None:
    report = data_report([], train=[], validation=[], fingerprint="", contamination=None)
    assert report["splits"]["train"]["words"]["query"]["longest"] is None
    assert report["splits"]["train"]["queries"] == 0
    assert "0 records from 0 sources" in render(report)


def test_describing_streams() -> None:
    def records(count: int) -> Iterator[LabelledAnswer]:
        for place in range(count):
            yield single(query=f"{place} " + "x" * 2_000, answer="y" * 2_000)

    describe(records(10))
    tracemalloc.start()
    describe(records(2_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_rows_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="one: read 11 rows, but kept 7, quarantined 1 and dropped 2"):
        whole([source(read=11)])


def test_rendered_counts_add_up() -> None:
    counts = [(3, 1, 2, {"empty": 2, "long": 1}), (50_000, 0, 0, {"long": 4_000}), (7, 2, 0, {})]
    sources = [
        source(
            f"source {place}",
            read=train + 1 + contaminated + quarantined + sum(dropped.values()),
            kept=train + 1 + contaminated,
            quarantined=quarantined,
            dropped=dropped,
            train=train,
            validation=1,
            contaminated=contaminated,
        )
        for place, (train, contaminated, quarantined, dropped) in enumerate(counts)
    ]
    text = render(whole(sources))
    header, *rows = table(text, "Sources")
    shown = [dict(zip(header[2:], map(number, row[2:]), strict=True)) for row in rows]
    for each in shown:
        assert each["read"] == each["kept"] + each["quarantined"] + each["dropped"]
        assert each["kept"] == each["train"] + each["validation"] + each["contaminated"]
    assert [row[0] for row in rows] == [*(each["name"] for each in sources), "all"]
    assert shown[-1] == {name: sum(each[name] for each in shown[:-1]) for name in header[2:]}
    assert table(text, "Dropped rows")[1:] == [
        ["long", "1", "4,000", "0", "4,001"],
        ["empty", "2", "0", "0", "2"],
        ["all", "3", "4,000", "0", "4,003"],
    ]


def test_first_words_say_how_many_from_where_and_under_which_licences() -> None:
    text = render(whole([source("one"), source("two"), source("three", licence="apache-2.0")]))
    assert (
        "3 records from 3 sources: 2 to train on, with 1 different queries, and 1 to validate with. Of their"
        " 5 answers 3 are harmful (60.0 %). Licences: one, two: mit; three: apache-2.0." in text
    )
    assert "Warning" not in text


def test_non_commercial_and_missing_licences_are_warned_of() -> None:
    assert "**Warning:** no licence is stated: one." in render(whole([source(licence="none is known")]))
    for licence in ("cc-by-nc-4.0", "CC BY-NC-SA 4.0", "non-commercial research"):
        assert "**Warning:** non-commercial use only: one." in render(whole([source(licence=licence)]))


def test_scenarios_labels_and_lengths_stand_beside_each_other_for_both_splits() -> None:
    text = render(whole())
    assert table(text, "Scenarios")[1:] == [["(none)", "1", "0", "1", "1"], ["Fraud", "1", "1", "0", "0"]]
    assert ["harmful answers", "2 (66.7 %)", "1 (50.0 %)"] in table(text, "Labels")
    assert ["train", "query", "characters", *["4"] * 5] in table(text, "Lengths")


def test_a_report_says_that_nobody_looked_and_how_to_look() -> None:
    for contamination in (None, {}):
        text = render(whole(contamination=contamination))
        assert "Nobody looked." in text
        assert "`benchmark=[mmsafety]`" in text


def test_contamination_is_counted_by_benchmark_with_examples() -> None:
    text = render(whole(contamination={"mmsafety": found(), "xstest": found(rows=0, found={}, examples=[])}))
    section = text.split("## Benchmark questions in the training data")[1]
    assert re.search(r"\| mmsafety +\| +1,680 \| +2 \| +3 \| +no \| +0.8 \|", section)
    assert re.search(r"\| xstest +\| +1,680 \| +0 \| +0 \| +no \| +0.8 \|", section)
    assert table(text, "Benchmark questions in the training data")[1:] == [
        ["mmsafety", "How is it done?", "how is it DONE", "1.00"]
    ]


@pytest.mark.parametrize("words", HOSTILE)
def test_texts_from_data_are_never_read_as_markup(words: str, tmp_path: Path) -> None:
    example = {"row": 1, "question": words, "text": words, "share": 1.0}
    report = data_report(
        [source(words, revision=words, licence=words, files={words: "0"}, dropped={words: 2})],
        train=[single(scenario=words)],
        validation=[],
        fingerprint="f",
        contamination={words: found(examples=[example])},
    )
    write_data_report(tmp_path, report)
    text = (tmp_path / "data_report.md").read_text(encoding="utf-8")
    assert words not in text
    assert "<" not in text
    assert "\u202e" not in text
    assert not re.search(r"(?<!\\)[*`](?!Warning|\*)|\]\(", text)
    assert not re.search(r"https://|www\.", text)
    assert len(re.findall(r"^#", text, re.MULTILINE)) == 8
    for section in ("Sources", "Dropped rows", "Scenarios", "Benchmark questions in the training data"):
        assert len({len(row) for row in table(text, section)}) == 1
    assert json.loads((tmp_path / "data_report.json").read_text()) == report


def test_files_are_named_with_their_hashes_and_many_are_cut_short() -> None:
    text = render(whole([source(files={f"{place:02}.jsonl": "a" * 64 for place in range(25)})]))
    assert table(text, "Files")[1] == ["one", "00.jsonl", "a" * 64]
    assert "20.jsonl" not in text
    assert "And 5 more, see data_report.json." in text
