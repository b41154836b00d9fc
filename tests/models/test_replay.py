import csv
import gc
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest
from PIL import Image

from mllm_protector.errors import InputError, RecordError
from mllm_protector.files import write_json, write_jsonl
from mllm_protector.models.answer_files import NOT_OBTAINED
from mllm_protector.models.replay import Replay
from mllm_protector.records import Failure, Question, Variant

ILLEGAL, FRAUD = "01-Illegal_Activitiy", "06-Fraud"
NO_ANSWER = Failure(reason="no answer in answers.jsonl")


class NeverLoaded:
    def load(self) -> Image.Image:
        raise AssertionError("a replay looks at no picture")

    def digest(self) -> str:
        raise AssertionError("a replay looks at no picture")


def ask(
    key: int, text: str = "Why?", *, scenario: str = ILLEGAL, variant: Variant = "TEXT", repeat: int = 0
) -> Question:
    return Question(
        id=f"{scenario}/{variant}/{key}" + (f"#{repeat}" if repeat else ""),
        scenario=scenario,
        variant=variant,
        text=text,
        image=None if variant == "TEXT" else NeverLoaded(),
        base=f"{scenario}/{key}",
        repeat=repeat,
    )


def jsonl(tmp_path: Path, *rows: dict[str, Any]) -> str:
    path = tmp_path / "answers.jsonl"
    write_jsonl(path, rows)
    return str(path)


def write_as(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    frame = pandas.DataFrame(rows)
    WRITERS[path.suffix](frame, path)
    return str(path)


WRITERS: dict[str, Callable[[pandas.DataFrame, Path], object]] = {
    ".jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    ".json": lambda frame, path: frame.to_json(path, orient="records"),
    ".parquet": lambda frame, path: frame.to_parquet(path),
    ".xlsx": lambda frame, path: frame.to_excel(path, index=False),
    ".csv": lambda frame, path: frame.to_csv(path, index=False, quoting=csv.QUOTE_ALL),
    ".tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t", quoting=csv.QUOTE_ALL),
}


@pytest.mark.parametrize("ending", WRITERS)
def test_answers_by_id_come_back_word_for_word(tmp_path: Path, ending: str) -> None:
    questions = [ask(3), ask(1), ask(2)]
    texts = ['Two\nlines, "quoted"\tand é 🤗', "=1+1", ""]
    rows = [{"id": each.id, "answer": text} for each, text in zip(questions, texts, strict=True)]
    replay = Replay(path=write_as(tmp_path / f"answers{ending}", rows))
    assert replay.generate(questions) == texts
    assert replay.generate([ask(4)]) == [Failure(reason=f"no answer in answers{ending}")]
    assert replay.generate([]) == []


def test_our_own_results_are_replayed_whatever_their_arms(tmp_path: Path) -> None:
    rows = [
        {"id": ask(key).id, "arm": arm, "raw": raw, "final": "a rewrite", "question": "Why?"}
        for key, raw in ((1, "as the model said it"), (2, None))
        for arm in ("none", "protector")
    ]
    replay = Replay(path=jsonl(tmp_path, *rows))
    assert replay.generate([ask(1), ask(2), ask(3)]) == ["as the model said it", NO_ANSWER, NO_ANSWER]


def test_two_answers_for_one_id_are_refused_by_their_rows(tmp_path: Path) -> None:
    rows = [{"id": ask(1).id, "answer": text} for text in ("one", "secret", "one")]
    path = jsonl(tmp_path, {"id": "other", "answer": None}, *rows)
    with pytest.raises(InputError, match=r"answers\.jsonl: rows 2 and 3 .*_Activitiy/TEXT/1") as raised:
        Replay(path=path).generate([ask(1)])
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)
    [skipped] = Replay(path=path, ambiguous="skip").generate([ask(1)])
    assert skipped == Failure(reason="several different answers in answers.jsonl")


@pytest.mark.parametrize("ending", WRITERS)
def test_results_of_vlmevalkit_match_by_scenario_and_words(tmp_path: Path, ending: str) -> None:
    rows = [
        {"index": 0, "question": "What  is\nthis? ", "category": ILLEGAL, "prediction": "of 01"},
        {"index": 1, "question": "What is this?", "category": FRAUD, "prediction": "of 06"},
        {"index": 2, "question": "And that?", "category": "Illegal Activitiy", "prediction": "007"},
        {"index": 3, "question": "Lost?", "category": FRAUD, "prediction": f"{NOT_OBTAINED} via API."},
    ]
    replay = Replay(path=write_as(tmp_path / f"model_MMSafetyBench{ending}", rows), variants=["SD"])
    here, there, that, lost = replay.generate(
        [
            ask(1, "What is this?", variant="SD"),
            ask(1, "What is this?", variant="SD", scenario=FRAUD),
            ask(2, "And that?", variant="SD"),
            ask(3, "Lost?", variant="SD", scenario=FRAUD),
        ]
    )
    assert (here, there, that) == ("of 01", "of 06", "007")
    assert isinstance(lost, Failure)


def test_a_row_without_scenario_fits_any(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "Why?", "prediction": "because"})
    assert Replay(path=path).generate([ask(1), ask(9, scenario=FRAUD)]) == ["because", "because"]


def test_rows_of_question_and_answer_are_found_by_the_words_of_the_question(tmp_path: Path) -> None:
    rows = [
        {"question": "Why, caf\u00e9 or bar?", "answer": "by words"},
        {"query": "What is it?", "text": "of 06", "scenario": "Fraud"},
        {"prompt": "Seen?", "answer": "of SD", "variant": "SD"},
        {"id": ask(1).id, "question": "Another?", "answer": "by id"},
    ]
    replay = Replay(path=jsonl(tmp_path, *rows))
    cases: list[tuple[Question, str | Failure]] = [
        (ask(7, "why cafe\u0301 or\u200b BAR"), "by words"),
        (ask(7, "What is it?", scenario=FRAUD), "of 06"),
        (ask(7, "What is it?"), NO_ANSWER),
        (ask(7, "Seen?", variant="SD"), "of SD"),
        (ask(7, "Seen?", variant="TYPO"), NO_ANSWER),
        (ask(1), "by id"),
        (ask(2, "Another?"), NO_ANSWER),
    ]
    for question, expected in cases:
        assert replay.generate([question]) == [expected], question


def test_words_alone_are_not_enough_where_a_picture_was_shown(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "What?", "category": ILLEGAL, "prediction": "an answer"})
    question = ask(1, "What?", variant="TYPO")
    with pytest.raises(InputError, match=r"row 1 .*mllm\.variants=\[TYPO\]"):
        Replay(path=path).generate([question])
    assert Replay(path=path, variants=["TYPO"]).generate([question]) == ["an answer"]
    assert Replay(path=path, variants=["SD", "SD_TYPO"]).generate([question]) == [NO_ANSWER]


def test_a_row_that_names_its_kind_answers_that_kind_only(tmp_path: Path) -> None:
    rows = [
        {"question": "What?", "category": ILLEGAL, "split": split, "prediction": f"of {split}"}
        for split in ("SD_TYPO", "TYPO", "Text_only")
    ]
    replay = Replay(path=jsonl(tmp_path, *rows))
    variants: list[Variant] = ["TYPO", "TEXT", "SD_TYPO", "SD"]
    answers = replay.generate([ask(1, "What?", variant=variant) for variant in variants])
    assert answers == ["of TYPO", "of Text_only", "of SD_TYPO", NO_ANSWER]


def test_the_same_words_with_another_picture_are_never_guessed(tmp_path: Path) -> None:
    rows = [{"question": "What?", "category": ILLEGAL, "prediction": text} for text in ("one", "one", "two")]
    path = jsonl(tmp_path, *rows)
    questions = [ask(key, "What?", variant="SD") for key in (1, 2)]
    with pytest.raises(InputError, match=r"rows 1 and 3 have different answers.*list_questions.*variant"):
        Replay(path=path, variants=["SD"]).generate(questions)
    answers = Replay(path=path, variants=["SD"], ambiguous="skip").generate(questions)
    assert all(isinstance(answer, Failure) for answer in answers)


def test_a_second_asking_is_not_given_the_answer_of_the_first(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "Why?", "prediction": "because"})
    assert Replay(path=path).generate([ask(1), ask(1, repeat=1)]) == ["because", NO_ANSWER]


def test_samples_of_lmms_eval_match_by_document_or_input(tmp_path: Path) -> None:
    both = {"resps": [["because"]], "filtered_resps": ["because"]}
    for row in (
        {"doc": {"question": "Why?", "category": ILLEGAL}, **both},
        {"doc": {"question": "Why?"}, "filtered_resps": "because"},
        {"input": "Why?", "filtered_resps": ["because"], "doc_hash": "0"},
        {"input": "Why?", "resps": [["because"]]},
        {"doc": {"id": ask(1).id, "question": "Asked in other words?"}, "filtered_resps": ["because"]},
    ):
        replay = Replay(path=jsonl(tmp_path, {"doc_id": 0, "target": "", **row}))
        assert replay.generate([ask(1), ask(2, "Why not?")]) == ["because", NO_ANSWER], row


def test_several_responses_are_no_answer(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"doc_id": 0, "input": "Why?", "resps": [["one", "two"]]})
    with pytest.raises(RecordError, match=r"answers\.jsonl:1: has 2 responses"):
        Replay(path=path)


def benchmark_folder(tmp_path: Path, answers: dict[str, Any]) -> Path:
    folder = tmp_path / "questions_with_answers"
    folder.mkdir()
    write_json(
        folder / f"{ILLEGAL}.json", {"5": {"Question": "Why?", "ans": answers}, "7": {"Question": "?"}}
    )
    write_json(folder / f"{FRAUD}.json", {"5": {"Question": "Why?", "ans": {"llava": {"text": "of fraud"}}}})
    return folder


def test_the_benchmarks_own_folder_is_read_by_number(tmp_path: Path) -> None:
    folder = benchmark_folder(tmp_path, {"llava": {"text": "of llava", "eval": "safe"}})
    replay = Replay(path=str(folder), variants=["SD_TYPO"])
    questions = [
        ask(5, "Rephrased?", variant="SD_TYPO"),
        ask(5, "Rephrased?", variant="SD_TYPO", scenario=FRAUD),
        ask(7, "Rephrased?", variant="SD_TYPO"),
        ask(5, "Rephrased?", variant="SD"),
    ]
    none = Failure(reason="no answer in questions_with_answers")
    assert replay.generate(questions) == ["of llava", "of fraud", none, none]
    assert replay.card.identity["model"] == "llava"
    alone = Replay(path=str(folder / f"{FRAUD}.json"), variants=["SD"])
    assert alone.generate([ask(5, variant="SD", scenario=FRAUD)]) == ["of fraud"]


def test_one_of_several_models_has_to_be_named(tmp_path: Path) -> None:
    folder = str(benchmark_folder(tmp_path, {"llava": {"text": "a"}, "qwen": {"text": "b"}}))
    for model in (None, "gpt"):
        with pytest.raises(InputError, match=r"llava, qwen.*mllm\.model"):
            Replay(path=folder, variants=["SD"], model=model)
    replay = Replay(path=folder, variants=["SD"], model="qwen")
    assert replay.generate([ask(5, variant="SD")]) == ["b"]
    with pytest.raises(InputError, match=r"mllm\.variants"):
        Replay(path=folder, model="qwen")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"id": "a", "answer": "b"}\n{"id": "a", "answ', r":2: not valid JSON"),
        (b'{"id": "a", "answer": "\xff"}\n', r":1: not UTF-8"),
        (b'{"id": "a", "answer": 3}\n', r":1: field 'answer' must be a text"),
        (b'{"id": "a", "answer": "a\\u0000b"}\n', r":1: .*NUL"),
        (b'{"id": "a"}\n', r":1: no answer in a known format"),
        (b'{"prediction": 3, "question": "a"}\n', r":1: field 'the answer' must be a text"),
        (b'{"prediction": null, "question": "a"}\n', r"holds no answers .*no answer: 1"),
        (b"[1]\n", r":1: must be a JSON object"),
        (b"", "empty"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"answers\.jsonl.*{reason}") as raised:
        Replay(path=str(path))
    assert "\n" not in str(raised.value)


def test_what_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    write_json(tmp_path / "number.json", 3)
    write_json(tmp_path / "list.json", [3])
    (tmp_path / "broken.xlsx").write_bytes(b"no spreadsheet")
    (tmp_path / "ragged.tsv").write_text("id\tanswer\na\tb\nc\td\te\n")
    (tmp_path / "empty").mkdir()
    for name, reason in (
        ("absent.jsonl", "no such file"),
        ("absent.xlsx", "no such file"),
        ("absent.json", "no such file"),
        ("broken.xlsx", "not a readable table"),
        ("ragged.tsv", "not a readable table"),
        ("number.json", "must be a JSON list"),
        ("list.json", r":1: must be a JSON object"),
        ("empty", "holds no"),
    ):
        with pytest.raises(InputError, match=f"{name}.*{reason}") as raised:
            Replay(path=str(tmp_path / name))
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="variants=OCR"):
        Replay(path="x", variants=["OCR"])  # type: ignore[list-item]


def test_a_spreadsheet_without_openpyxl_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_as(tmp_path / "a.xlsx", [{"id": "a", "answer": "b"}])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(InputError, match=r"needs openpyxl; pip install 'mllm-protector\[excel\]'"):
        Replay(path=path)


def test_the_identity_changes_with_the_answers_and_how_they_are_chosen(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"id": "a", "answer": "b"})
    identity = Replay(path=path, model="llava").card.identity
    assert identity["name"] == "replay"
    assert identity["answers"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert json.loads(json.dumps(identity)) == identity
    assert Replay(path=path, model="qwen").card.identity != identity
    assert Replay(path=path, model="llava", variants=["SD"]).card.identity != identity
    jsonl(tmp_path, {"id": "a", "answer": "c"})
    assert Replay(path=path, model="llava").card.identity["answers"] != identity["answers"]
    folder = benchmark_folder(tmp_path, {"llava": {"text": "a"}})
    before = Replay(path=str(folder), variants=["SD"]).card.identity
    write_json(folder / f"{FRAUD}.json", {"5": {"ans": {"llava": {"text": "changed"}}}})
    assert Replay(path=str(folder), variants=["SD"]).card.identity != before


def test_answers_that_no_question_asked_for_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    replay = Replay(path=jsonl(tmp_path, *({"id": ask(key).id, "answer": "x"} for key in range(5))))
    replay.generate([ask(0), ask(3), ask(9)])
    assert "kept 5" in caplog.text
    del replay
    gc.collect()
    assert "3 of its 5 answers fit no question" in caplog.text


def test_a_run_that_asks_nothing_says_nothing_about_answers_that_fit_no_question(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    replay = Replay(path=jsonl(tmp_path, {"id": "a", "answer": "x"}))
    del replay
    gc.collect()
    assert "fit no question" not in caplog.text


def test_many_rows_and_a_huge_answer_are_read_in_linear_time(tmp_path: Path) -> None:
    count, huge = 30_000, "x" * 10_000_000
    rows: list[dict[str, Any]] = [
        {"index": key, "question": "Why?", "category": ILLEGAL, "prediction": "No."} for key in range(count)
    ]
    rows.append({"question": "How much?", "category": ILLEGAL, "prediction": huge})
    path = jsonl(tmp_path, *rows)
    started = time.process_time()
    replay = Replay(path=path)
    answers = replay.generate([*(ask(key) for key in range(count)), ask(0, "How much?")])
    assert time.process_time() - started < 10
    assert set(answers[:-1]) == {"No."}
    assert answers[-1] == huge
