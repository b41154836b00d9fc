"""Sets that a YAML option describes by its columns, and the questions of test sets in any training."""

import json
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.data import test_sets
from mllm_protector.data.duplicates import question_digest
from mllm_protector.data.pairing import Paired
from mllm_protector.data.preparation import prepare
from mllm_protector.data.table import VARIABLE
from mllm_protector.errors import InputError, RecordError
from tests.data.builders import configured, everything, write_rows

PUBLIC_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
QUESTIONS = [
    f"How would one repair a {thing} in winter?"
    for thing in ["roof", "boat", "clock", "wall", "gate", "oven"]
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path_factory.mktemp("cache")))


def dialogue(query: str, answer: str, label: str) -> dict[str, str]:
    return {
        "input": f"Human user:\n{query}\n\nAI assistant:\n{answer}",
        "output": f"Answers: \nRequest: None\nResponse: {label}\n",
    }


def labelled_rows() -> list[dict[str, Any]]:
    return [
        {"question": question, "answer": f"{word} answer {number}", "label": label}
        for number, question in enumerate(QUESTIONS)
        for word, label in (("calm", 0), ("foul", 1))
    ]


def test_labels_and_texts_are_found_where_the_option_says(tmp_path: Path) -> None:
    asked = [QUESTIONS[0], f"{QUESTIONS[1]}\n\nWith a second paragraph?"]
    rows = [dialogue(asked[0], "One.\n\nTwo.", "harmful"), dialogue(asked[1], "Three.", "Unharmful")]
    rows.append(dialogue(QUESTIONS[2], "Four.", "None"))
    path = write_rows(tmp_path / "set.jsonl", rows)
    splits = configured("guardreasoner", path=path, validation_fraction=0.5).load()
    found = sorted((each.query, each.answer, each.harmful) for each in everything(splits))
    assert found == sorted([(asked[0], "One.\n\nTwo.", True), (asked[1], "Three.", False)])
    assert "unclear label: 1" in splits.account

    path = write_rows(
        tmp_path / "mini.jsonl", [*labelled_rows(), {"question": "a", "answer": None, "label": 1}]
    )
    splits = configured("jailbreakeval", path=path).load()
    assert [each.harmful for each in everything(splits)].count(True) == len(QUESTIONS)
    assert "no answer: 1" in splits.account


def test_rows_of_lists_are_pairs(tmp_path: Path) -> None:
    rows = [
        {"prompt": question, "chosen": [f"no {number}", "never"], "rejected": ["yes", f"sure {number}"]}
        for number, question in enumerate(QUESTIONS)
    ]
    splits = configured("rm_bench", path=write_rows(tmp_path / "lists.json", rows)).load()
    pairs = everything(splits)
    assert len(pairs) == 2 * len(QUESTIONS)
    assert all(each.rejected_harmful for each in pairs)
    assert ("never", "sure 3") in {(each.accepted, each.rejected) for each in pairs}

    uneven = write_rows(tmp_path / "uneven.jsonl", [{**rows[0], "chosen": ["no"]}])
    with pytest.raises(RecordError, match=r"uneven.jsonl:1: has 1 accepted and 2 rejected answers"):
        configured("rm_bench", path=uneven).load()


def test_what_does_not_fit_the_option_is_one_clear_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "set.jsonl", labelled_rows())
    bad = write_rows(tmp_path / "bad.jsonl", [{"question": "a", "answer": "b", "label": "often"}])
    for changes, message in (
        ({"path": path, "query": "asked"}, r"missing \['asked'\] of the columns"),
        ({"path": bad}, r"bad.jsonl:1: field 'label' must be one of '0', '1', not 'often'"),
        ({"path": path, "harmful": [1, True]}, "the label '1' stands there twice"),
        ({"path": path, "dialogue": "(?P<query>.*)"}, "must have the groups answer and query"),
        ({"path": path, "label_within": "("}, "not a regular expression"),
    ):
        with pytest.raises(InputError, match=message):
            configured("jailbreakeval", **changes).load()


def test_a_test_set_is_trained_on_only_if_asked(tmp_path: Path) -> None:
    rows = [
        dialogue(question, "Well.", label) for question in QUESTIONS for label in ("harmful", "unharmful")
    ]
    source = configured("guardreasoner", path=write_rows(tmp_path / "set.jsonl", rows))
    for each in (source, Paired(source=source)):
        with pytest.raises(InputError, match="data: is a test set; contaminated=keep"):
            prepare(each, {}, contaminated="drop", folder=tmp_path)
    assert len(everything(prepare(source, {}, contaminated="keep", folder=tmp_path).splits)) == len(rows)


def test_questions_of_test_sets_are_left_out_of_both_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = configured("jailbreakeval", path=write_rows(tmp_path / "a.jsonl", labelled_rows()))
    splits = source.load()
    held = [splits.train[0].query.upper(), splits.validation[0].query.replace("?", " ?!")]
    file = tmp_path / "known.json"
    monkeypatch.setattr(test_sets, "FILE", file)
    file.write_text(json.dumps({"A test": "".join(map(question_digest, held))}))
    with pytest.raises(InputError, match="nothing is left to validate with; contaminated=keep"):
        prepare(source, {}, contaminated="drop", folder=tmp_path)

    file.write_text(json.dumps({"A test": question_digest(held[0]), "Another": question_digest("no such")}))
    prepared = prepare(source, {}, contaminated="drop", folder=tmp_path)
    assert {each.query for each in splits.train} - {each.query for each in prepared.splits.train} == {
        splits.train[0].query
    }
    assert prepared.contamination is not None
    assert prepared.contamination.keys() == {"A test"}
    assert prepared.contamination["A test"]["rows"] == 2
    assert prepared.splits.sources[0].contaminated == 2


def test_the_shipped_digests_are_of_the_published_questions() -> None:
    known = test_sets.known()
    assert all(len(digest) == test_sets.DIGITS for digests in known.values() for digest in digests)
    path = PUBLIC_DATA / "labelled" / "guardreasoner_beaver_tails.json"
    if not path.exists():
        pytest.skip("the published BeaverTails test set is not here")
    asked = {
        question_digest(each.query) for each in everything(configured("guardreasoner", path=str(path)).load())
    }
    assert asked == known["BeaverTails test"]
