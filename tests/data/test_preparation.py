import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.data import preparation
from mllm_protector.data.mixture import Mixture
from mllm_protector.data.preparation import prepare, prepare_data
from mllm_protector.data.sources import Pairs, Toy
from mllm_protector.data.table import VARIABLE
from mllm_protector.errors import InputError
from mllm_protector.protocols import Card
from mllm_protector.records import LoadedBenchmark, Question
from tests.data import builders
from tests.data.builders import texts, write_rows

ASKED = [
    "Which of the seven hills of the old town was built upon last?",
    "What would a miller have paid for the use of the village weir?",
    "Why do swallows leave the valley before the first frost comes?",
]
OPTIONS = builders.OPTIONS | {"validation_fraction": 0.1}


@dataclass
class Asks:
    """A benchmark of these questions, each asked in two ways."""

    questions: list[str]
    loads: int = 0

    def load(self) -> LoadedBenchmark:
        self.loads += 1
        questions = [
            Question(id=f"{n}/{variant}", scenario="s", variant=variant, text=text)  # type: ignore[arg-type]
            for n, text in enumerate(self.questions)
            for variant in ("TEXT", "TYPO")
        ]
        return LoadedBenchmark(questions=questions, missing=[])

    @property
    def card(self) -> Card:
        return Card(identity={"name": "asks"})


def write(path: Path, queries: list[str]) -> Pairs:
    rows = [{"query": query, "accepted": f"a {n}", "rejected": f"r {n}"} for n, query in enumerate(queries)]
    return Pairs(path=write_rows(path, rows), **OPTIONS)


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    """Of 23 queries three are (nearly) questions; the seed puts none of these into the validation split."""
    planted = [
        ASKED[0],
        ASKED[1].upper().replace("?", ""),
        f"First this. {ASKED[1].replace('miller', 'smith')}",
    ]
    source = write(tmp_path / "pairs.jsonl", [*texts("other", 20), *planted])
    assert not {record.query for record in source.load().validation} & set(planted)
    return source


def test_what_stands_in_a_benchmark_is_found_and_told(
    pairs: Pairs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        prepared = prepare(pairs, {"asks": Asks(ASKED)}, contaminated="keep", folder=tmp_path)
    assert prepared.contamination is not None
    found = prepared.contamination["asks"]
    assert (found["questions"], len(found["found"]), found["rows"], found["removed"]) == (3, 2, 3, False)
    assert (
        "2 of asks's 3 questions are in 3 training records; contaminated=drop leaves these out" in caplog.text
    )
    assert prepared.splits is prepared.loaded
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert report["contamination"]["asks"]["rows"] == 3
    assert ASKED[0] in (tmp_path / "data_report.md").read_text()
    assert ASKED[0] not in json.dumps(prepared.facts())


def test_what_stands_in_a_benchmark_can_be_left_out(pairs: Pairs, tmp_path: Path) -> None:
    loaded = pairs.load()
    prepared = prepare(pairs, {"asks": Asks(ASKED)}, contaminated="drop", folder=tmp_path)
    assert {record.query for record in prepared.splits.train} <= set(texts("other", 20))
    assert len(prepared.splits.train) == len(loaded.train) - 3
    assert list(prepared.splits.validation) == list(loaded.validation)
    [account] = prepared.splits.sources
    assert (account.contaminated, account.kept) == (3, account.train + account.validation + 3)
    assert prepared.splits.fingerprint != loaded.fingerprint == prepared.facts()["fingerprint"]
    assert "3 training and 0 validation records hold a question of a test set" in prepared.splits.account
    json.loads((tmp_path / "data_report.json").read_text())


def test_of_a_mixture_each_source_accounts_for_its_own(pairs: Pairs, tmp_path: Path) -> None:
    second = write(tmp_path / "second.jsonl", [*texts("second", 20), f"{ASKED[2]} Really?"])
    both = Mixture(
        sources={"first": pairs, "second": second}, weights={"second": 2}, duplicates="exact", seed=0
    )
    prepared = prepare(both, {"asks": Asks(ASKED)}, contaminated="drop", folder=tmp_path)
    assert [account.contaminated for account in prepared.splits.sources] == [3, 2]
    assert len(prepared.splits.train) == sum(account.train for account in prepared.splits.sources)


def test_the_search_is_done_once_for_the_same_data_and_questions(
    pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    searches = []
    check = preparation.check_contamination

    def counting(*given: Any) -> Any:
        searches.append(given)
        return check(*given)

    monkeypatch.setattr(preparation, "check_contamination", counting)
    for questions in (ASKED, ASKED[::-1], ASKED[:2]):
        prepare(pairs, {"asks": Asks(questions)}, contaminated="keep", folder=tmp_path)
    assert len(searches) == 2


def test_where_nobody_looks_this_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        prepared = prepare(Toy(), {}, contaminated="drop", folder=tmp_path)
    assert prepared.contamination is None
    assert prepared.facts()["contamination"] is None
    assert "contamination: none; benchmark=[mmsafety]" in caplog.text


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl", [*ASKED])
    with pytest.raises(InputError, match="nothing is left to train on"):
        prepare(source, {"asks": Asks(ASKED)}, contaminated="drop", folder=tmp_path)


def test_the_report_alone_and_the_records_if_wanted(pairs: Pairs, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"data": pairs, "benchmarks": {}, "contaminated": "keep", "seed": 0}
    prepare_data(**arguments, export=False, output_dir=str(tmp_path / "report"))
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "data_report.json",
        "data_report.md",
    ]
    prepare_data(**arguments, export=True, output_dir=str(tmp_path / "export"))
    exported = Pairs(path=str(tmp_path / "export" / "train.jsonl"), **OPTIONS).load()
    assert sorted(r.query for part in (exported.train, exported.validation) for r in part) == sorted(
        record.query for record in pairs.load().train
    )
