import json
from pathlib import Path

import pytest

from mllm_protector.benchmarks.questions import QuestionFile
from mllm_protector.benchmarks.toy import ToyBenchmark
from mllm_protector.errors import InputError
from mllm_protector.evaluation.items import list_questions
from mllm_protector.files import write_jsonl
from mllm_protector.models.replay import Replay


def test_listed_questions_with_answers_are_replayed_to_the_same_questions(tmp_path: Path) -> None:
    toy = ToyBenchmark(
        folder=str(tmp_path / "toy"), variants=["TEXT", "SD", "TYPO"], per_scenario=1, benign=2
    )
    list_questions(benchmarks={"toy": toy}, output_dir=str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").open()]
    questions = toy.load().questions
    assert [(row["id"], row["variant"], row["question"]) for row in rows] == [
        (question.id, question.variant, question.text) for question in questions
    ]
    for row, question in zip(rows, questions, strict=True):
        if question.variant == "TEXT":
            assert row["image"] is None
        elif row["scenario"] != "Benign":
            assert Path(row["image"]).is_file(), row["id"]
    write_jsonl(tmp_path / "answered.jsonl", ({**row, "answer": f"to {row['id']}"} for row in rows))
    answers = Replay(path=str(tmp_path / "answered.jsonl")).generate(questions)
    assert answers == [f"to {question.id}" for question in questions]


def test_errors_name_the_benchmark_and_twins_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question": "q", "twin": twin, "harmless": safe} for twin, safe in (("a", 1), ("b", 0), ("b", 1))
    ]
    write_jsonl(path, rows)
    caplog.set_level("INFO")
    list_questions(benchmarks={"mine": QuestionFile(path=str(path))}, output_dir=str(tmp_path / "out"))
    assert "mine: 1 pairs of twins; 1 twins have no partner" in caplog.messages
    with pytest.raises(InputError, match=r"^benchmarks\.mine\.where: no row has twin=c"):
        list_questions(
            benchmarks={"mine": QuestionFile(path=str(path), where={"twin": "c"})}, output_dir=str(tmp_path)
        )


def test_no_benchmark_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^benchmark: name at least one"):
        list_questions(benchmarks={}, output_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())
