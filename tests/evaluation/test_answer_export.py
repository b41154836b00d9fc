"""Answers that go out as other tools' files come back as they were."""

from pathlib import Path
from typing import Any, Literal

import pandas
import pytest

from mllm_protector.errors import InputError, RecordError
from mllm_protector.evaluation.answer_export import export_answers
from mllm_protector.files import write_json, write_jsonl
from mllm_protector.models.answer_files import Format, read_answers
from mllm_protector.models.replay import Replay
from mllm_protector.records import Question

TEXTS = ['Two\nlines, "quoted"\tand é 🤗', "=1+1", "", "NA", "back\\slash\r\nend ", "007"]
FORMATS: tuple[Literal["vlmevalkit", "lmms_eval"], ...] = ("vlmevalkit", "lmms_eval")


def result(number: int, arm: str, final: str | None) -> dict[str, Any]:
    return {
        "id": f"06-Fraud/TEXT/{number}",
        "scenario": "06-Fraud",
        "variant": "TEXT",
        "question": "What is\nthis?",
        "arm": arm,
        "raw": f"raw {number}",
        "final": final,
    }


def run_folder(tmp_path: Path) -> Path:
    rows = [result(number, "protector", text) for number, text in enumerate(TEXTS)]
    rows += [result(number, "none", f"raw {number}") for number in range(len(TEXTS))]
    rows += [result(99, arm, None) for arm in ("none", "protector")]
    for benchmark in ("figstep", "mmsafety"):
        write_jsonl(tmp_path / "run" / benchmark / "results.jsonl", rows)
    write_json(tmp_path / "run" / "asr.json", {"benchmarks": {"figstep": {}, "mmsafety": {}}})
    write_jsonl(tmp_path / "run" / "left_by_an_earlier_run" / "results.jsonl", rows)
    return tmp_path / "run"


@pytest.mark.parametrize("format", FORMATS)
def test_answers_come_back_word_for_word(
    tmp_path: Path,
    format: Literal["vlmevalkit", "lmms_eval"],  # noqa: A002
) -> None:
    run = str(run_folder(tmp_path))
    files = export_answers(run=run, output_dir=str(tmp_path / "out"), format=format)
    assert sorted((tmp_path / "out").iterdir()) == sorted(files)
    assert len(files) == 2
    questions = [
        Question(id=f"06-Fraud/TEXT/{number}", scenario="06-Fraud", variant="TEXT", text="What is this?")
        for number in range(len(TEXTS))
    ]
    formats: tuple[Format, ...] = ("auto", format)
    for path in files:
        assert path.name.startswith("protector_")
        assert "raw" not in path.read_text()
        for asked in formats:
            reading, _ = read_answers(path, asked, None, None)
            assert [each.answer for each in reading.records] == TEXTS
            assert {(each.scenario, each.variant, each.question) for each in reading.records} == {
                ("06-Fraud", "TEXT", "What is\nthis?")
            }
        assert Replay(path=str(path)).generate(questions) == TEXTS


def test_the_files_have_the_fields_that_the_tools_look_for(tmp_path: Path) -> None:
    run, out = str(run_folder(tmp_path)), str(tmp_path / "out")
    first, _ = export_answers(run=run, output_dir=out, arm_name="none")
    assert first.name == "none_figstep.tsv"
    table = pandas.read_csv(first, sep="\t")  # as VLMEvalKit reads it
    assert {"index", "question", "category", "prediction"} <= {*table}
    assert [*table["prediction"]] == [f"raw {number}" for number in range(len(TEXTS))]
    assert table["index"].is_unique
    first, _ = export_answers(run=run, output_dir=out, arm_name="none", format="lmms_eval")
    assert first.name == "none_samples_figstep.jsonl"
    samples = pandas.read_json(first, lines=True)
    assert {"doc_id", "target", "input", "resps", "filtered_resps"} <= {*samples}
    assert samples["resps"][0] == [["raw 0"]]
    assert samples["filtered_resps"][0] == ["raw 0"]


def test_a_question_in_the_image_alone_is_exported_too(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    write_jsonl(folder / "figstep" / "results.jsonl", [result(1, "none", "a") | {"question": ""}])
    for format in FORMATS:  # noqa: A001
        first, _ = export_answers(
            run=str(folder), output_dir=str(tmp_path / "out"), arm_name="none", format=format
        )
        question = Question(id="06-Fraud/TEXT/1", scenario="06-Fraud", variant="SD", text="")
        assert Replay(path=str(first)).generate([question]) == ["a"], format


def test_what_cannot_be_exported_is_one_line(tmp_path: Path) -> None:
    run, out = run_folder(tmp_path), str(tmp_path / "out")
    with pytest.raises(InputError, match=r"^arm_name=strict: .* has the arms none, protector$"):
        export_answers(run=str(run), output_dir=out, arm_name="strict")
    with pytest.raises(InputError, match=r"^run=.*: holds no asr.json"):
        export_answers(run=out, output_dir=out)
    with (run / "figstep" / "results.jsonl").open("a") as lines:
        lines.write("{}\n")
    with pytest.raises(RecordError, match=r"results.jsonl:15: missing field 'arm'"):
        export_answers(run=str(run), output_dir=out)
    assert not Path(out).exists()
