import io
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from mllm_protector.benchmarks.questions import QuestionFile
from mllm_protector.errors import InputError
from mllm_protector.records import BENIGN, LoadedBenchmark
from mllm_protector.scenarios import Criterion
from tests.benchmarks.test_image_files import ESCAPES


def write(folder: Path, *rows: dict[str, Any] | str) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def load(path: Path, **settings: Any) -> LoadedBenchmark:
    return QuestionFile(path=str(path), **settings).load()


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2)).save(path)


def test_a_question_needs_words_only(tmp_path: Path) -> None:
    [first, second] = load(write(tmp_path, {"question": "one?"}, {"question": "two?"})).questions
    assert (first.id, first.scenario, first.variant, first.text) == ("1", "all", "TEXT", "one?")
    assert (first.criterion, first.image, second.id) == (Criterion.HARM, None, "2")


def test_a_row_may_say_more(tmp_path: Path) -> None:
    picture(tmp_path / "pictures" / "a.png")
    row = {"question": "q", "id": "x-7", "image": "pictures/a.png", "scenario": "law", "criterion": "legal"}
    harmless = {"question": "q", "id": 8, "scenario": BENIGN}
    [first, second] = load(write(tmp_path, row, harmless)).questions
    assert (first.id, first.scenario, first.criterion, first.variant) == ("x-7", "law", Criterion.LEGAL, "SD")
    assert first.image is not None
    assert first.image.load().size == (3, 2)
    assert (second.id, second.scenario) == ("8", BENIGN)


def test_pictures_may_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "a.png")
    path = write(tmp_path, {"question": "q", "image": "a.png"})
    assert load(path).missing == ["1: no file a.png"]
    assert load(path, images=str(tmp_path / "elsewhere")).missing == []
    with pytest.raises(InputError, match=r"^images=.*nowhere: no such folder"):
        load(path, images=str(tmp_path / "nowhere"))


def test_csv_and_parquet_are_read_too(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "q.csv").write_text("id,question,image,criterion\n001,one?,a.png,\nb,two?,,health\n")
    questions = load(tmp_path / "q.csv").questions
    assert [(each.id, each.variant, each.criterion) for each in questions] == [
        ("001", "SD", Criterion.HARM),
        ("b", "TEXT", Criterion.HEALTH),
    ]
    out = io.BytesIO()
    Image.new("RGB", (5, 4)).save(out, "PNG")
    rows = [{"question": "one?", "image": {"bytes": out.getvalue(), "path": None}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "q.parquet")
    [question] = load(tmp_path / "q.parquet").questions
    assert question.image is not None
    assert question.image.load().size == (5, 4)


@pytest.mark.parametrize("name", [name for name in ESCAPES if name])
def test_a_picture_that_leads_elsewhere_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "outside.png")
    (tmp_path / "root").mkdir()
    path = write(tmp_path / "root", {"question": "q"}, {"question": "q", "image": name})
    with pytest.raises(InputError, match=r"questions\.jsonl:2: .*image") as refusal:
        load(path)
    assert str(refusal.value).isprintable()


def test_a_picture_that_links_out_is_refused_with_its_line(tmp_path: Path) -> None:
    picture(tmp_path / "outside.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(InputError, match=r"questions\.jsonl:1: a\.png is a link that leads out"):
        load(write(tmp_path / "root", {"question": "q", "image": "a.png"}))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ({"text": "q"}, "missing field 'question'"),
        ({"question": ""}, "field 'question' is empty"),
        ({"question": 7}, "field 'question' must be a text"),
        ({"question": "a\0b"}, "NUL"),
        ('{"question": "q", "question": "q"}', "stands there twice"),
        ('{"question": "q", "id": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "nested too deeply|not valid JSON"),
        ({"question": "q", "id": "first"}, "duplicate of line 1"),
        ({"question": "q", "id": ["x"]}, "field 'id' must be a text"),
        ({"question": "q", "id": "a\nb"}, "field 'id' must be one printable line"),
        ({"question": "q", "id": "a" * 300}, "field 'id' must be one printable line"),
        ({"question": "q", "scenario": "a\u202eb"}, "field 'scenario' must be one printable line"),
        ({"question": "q", "criterion": "evil"}, "field 'criterion' must be one of harm, lobbying"),
        ({"question": "q", "image": ["a.png"]}, "field 'image' must be a text"),
    ],
)
def test_a_broken_row_is_named_by_its_line(tmp_path: Path, row: dict[str, Any] | str, message: str) -> None:
    path = write(tmp_path, {"question": "q", "id": "first"}, row)
    with pytest.raises(InputError, match=rf"questions\.jsonl:2: .*({message})") as refusal:
        load(path)
    assert "\n" not in str(refusal.value)


def test_a_given_id_may_not_be_the_number_of_another_row(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2: duplicate of line 1"):
        load(write(tmp_path, {"question": "q", "id": "2"}, {"question": "q"}))


def test_missing_pictures_are_counted_and_the_rest_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, {"question": "q", "image": "gone.png"}, {"question": "q"})
    with caplog.at_level(logging.WARNING):
        loaded = load(path)
    assert loaded.missing == ["1: no file gone.png"]
    assert [question.id for question in loaded.questions] == ["2"]
    assert "1 of 2 questions have no picture" in caplog.text


def test_limit_draws_by_id_and_keeps_ids(tmp_path: Path) -> None:
    path = write(tmp_path, *[{"question": f"q{number}"} for number in range(40)])
    whole, part = load(path).questions, load(path, limit=5).questions
    assert len(part) == 5
    assert part == [question for question in whole if question in part]
    assert part != load(path, limit=5, seed=1).questions
    with pytest.raises(InputError, match=r"^limit must be at least 1"):
        QuestionFile(path="x", limit=0)


def test_the_identity_is_that_of_the_file_and_not_of_the_selection(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q"})
    before = QuestionFile(path=str(path)).identity()
    assert before == QuestionFile(path=str(path), limit=1, seed=2).identity()
    write(tmp_path, {"question": "r"})
    assert QuestionFile(path=str(path)).identity() != before
