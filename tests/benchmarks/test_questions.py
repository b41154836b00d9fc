import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image

from mllm_protector.benchmarks.questions import QuestionFile
from mllm_protector.config import build
from mllm_protector.errors import InputError
from mllm_protector.protocols import Benchmark
from mllm_protector.records import BENIGN, LoadedBenchmark
from mllm_protector.scenarios import Criterion
from tests.benchmarks.test_shared import ESCAPES


def write(folder: Path, *rows: dict[str, Any] | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "questions.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def load(path: Path, **settings: Any) -> LoadedBenchmark:
    return QuestionFile(path=str(path), **settings).load()


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2)).save(path)


def evaluated(benchmarks: Mapping[str, Benchmark]) -> None:
    """Stands for a script that takes benchmarks."""


def scores(loaded: LoadedBenchmark, text: str) -> dict[str, float]:
    assert loaded.score is not None
    return {question.id: loaded.score(question, text) for question in loaded.questions}


def test_a_question_needs_words_only(tmp_path: Path) -> None:
    [first, second] = load(write(tmp_path, {"question": " one? "}, {"question": "two?"})).questions
    assert (first.id, first.scenario, first.variant, first.text) == ("1", "all", "TEXT", " one? ")
    assert (first.criterion, first.image, second.id) == (Criterion.HARM, None, "2")


def test_a_row_may_say_more(tmp_path: Path) -> None:
    image(tmp_path / "pictures" / "a.png")
    row = {"question": "q", "id": "x-7", "image": "pictures/a.png", "scenario": "law", "criterion": "legal"}
    harmless = {"question": "q", "id": 8, "scenario": BENIGN}
    [first, second] = load(write(tmp_path, row, harmless)).questions
    assert (first.id, first.scenario, first.criterion, first.variant) == ("x-7", "law", Criterion.LEGAL, "SD")
    assert first.image is not None
    assert first.image.load().size == (3, 2)
    assert (second.id, second.scenario) == ("8", BENIGN)


def test_a_new_benchmark_with_columns_of_its_own_takes_one_yaml(tmp_path: Path) -> None:
    option = OmegaConf.create(
        """
        _target_: mllm_protector.benchmarks.questions.QuestionFile
        path: ???
        columns:
          id: number
          question: prompt
          context: story
          image: '{set}/{number}.png'
          options: choices
          answers: gold
        where: {split: test}
        scorer: option
        instruction: One letter.
        """
    )
    row = {"number": 7, "prompt": "Who?", "story": "Once.", "choices": ["a cat", "a dog"], "split": "test"}
    path = write(
        tmp_path,
        row | {"set": "s", "gold": 1},
        row | {"number": 8, "set": None, "story": "", "gold": "A"},
        row | {"number": 9, "set": "s", "gold": 1, "split": "train"},
    )
    image(tmp_path / "s" / "7.png")
    option.path = str(path)
    made = build(OmegaConf.create({"benchmarks": {"mine": option}}), evaluated)
    loaded = made["benchmarks"]["mine"].load()
    first, second = loaded.questions
    assert (first.id, first.scenario, first.variant) == ("7", BENIGN, "SD")
    assert first.text == "Once.\nWho?\n(A) a cat\n(B) a dog\nOne letter."
    assert (second.id, second.variant) == ("8", "TEXT")
    assert second.text == "Who?\n(A) a cat\n(B) a dog\nOne letter."
    assert scores(loaded, "(B) a dog") == {"7": 1, "8": 0}


def test_answers_of_several_people_are_texts_or_objects(tmp_path: Path) -> None:
    people = ["yes"] * 8 + ["no"] * 2
    told = [{"answer": answer, "answer_confidence": "yes", "answer_id": 1} for answer in people]
    rows = [{"question": "q", "answers": answers} for answers in (people, told, ["red"] * 9 + [""])]
    loaded = load(write(tmp_path, *rows), scorer="consensus")
    assert scores(loaded, "no") == {"1": pytest.approx(0.6), "2": pytest.approx(0.6), "3": 0}
    assert scores(loaded, "red")["3"] == 1


def test_images_may_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    image(tmp_path / "elsewhere" / "a.png")
    path = write(tmp_path, {"question": "q", "image": "a.png"})
    assert load(path).missing == ["1: no file a.png"]
    assert load(path, images=str(tmp_path / "elsewhere")).missing == []
    with pytest.raises(InputError, match=r"^images=.*nowhere: no such folder"):
        load(path, images=str(tmp_path / "nowhere"))


def test_csv_is_read_too(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "q.csv").write_text("id,question,image,criterion\n001,one?,a.png,\nb,two?,,health\n")
    questions = load(tmp_path / "q.csv").questions
    assert [(each.id, each.variant, each.criterion) for each in questions] == [
        ("001", "SD", Criterion.HARM),
        ("b", "TEXT", Criterion.HEALTH),
    ]


def test_an_image_that_leads_elsewhere_is_refused_with_its_line(tmp_path: Path) -> None:
    image(tmp_path / "outside.png")
    cases = [("image", name) for name in ESCAPES if name]
    cases += [("{image}.png", name) for name in ("../outside", "x\0y", "http://x/y", "x" * 300)]
    for column, name in cases:
        path = write(tmp_path / "root", {"question": "q"}, {"question": "q", "image": name})
        with pytest.raises(InputError, match=r"questions\.jsonl:2: .*image") as refusal:
            load(path, columns={"image": column})
        assert str(refusal.value).isprintable(), name


def test_a_broken_row_is_named_by_its_line(tmp_path: Path) -> None:
    options = {"question": "q", "options": ["a", "b"]}
    cases: list[tuple[str | None, dict[str, Any] | str, str]] = [
        (None, "{", "not valid JSON"),
        (None, "[]", "must be a JSON object"),
        (None, {"text": "q"}, "missing field 'question'"),
        (None, {"question": ""}, "field 'question' is empty"),
        (None, {"question": 7}, "field 'question' must be a text"),
        (None, {"question": "a\0b"}, "NUL"),
        (None, '{"question": "q", "question": "q"}', "stands there twice"),
        (None, '{"question": "q", "id": NaN}', "NaN is not JSON"),
        (None, "[" * 100_000, "nested too deeply|not valid JSON"),
        (None, {"question": "q", "id": "first"}, "duplicate of line 1"),
        (None, {"question": "q", "id": ["x"]}, "field 'id' must be a text"),
        (None, {"question": "q", "id": "a\nb"}, "field 'id' must be one printable line"),
        (None, {"question": "q", "id": "a" * 300}, "field 'id' must be one printable line"),
        (None, {"question": "q", "scenario": "a\u202eb"}, "field 'scenario' must be one printable line"),
        (None, {"question": "q", "criterion": "evil"}, "field 'criterion' must be one of harm, lobbying"),
        (None, {"question": "q", "image": ["a.png"]}, "field 'image' must be a text"),
        (None, {"question": "q", "options": "ab"}, "field 'options' must be a list of 2 to 26"),
        (None, {"question": "q", "options": ["one"]}, "field 'options' must be a list of 2 to 26"),
        ("exact", {"question": "q"}, "missing field 'answers'"),
        ("exact", {"question": "q", "answers": []}, "field 'answers' must be a text or a list"),
        ("exact", {"question": "q", "answers": [7]}, "field 'answer' must be a text"),
        ("exact", {"question": "q", "answers": "a<OR>"}, "field 'answers' has an alternative without words"),
        ("exact", {"question": "q", "answers": ["yes", "no"]}, "both yes and no.* scorer=consensus"),
        ("yes_no", {"question": "q", "answers": "maybe"}, "field 'answers' must be yes or no"),
        ("option", {"question": "q", "answers": 0}, "field 'answers' must be the place .* of 0 options"),
        ("option", options | {"answers": 2}, "field 'answers' must be the place .* of 2 options"),
        ("option", options | {"answers": -1}, "field 'answers' must be the place"),
        ("option", options | {"answers": True}, "field 'answers' must be the place"),
        ("option", options | {"answers": "C"}, "field 'answers' must be the place"),
    ]
    answers = {"yes_no": "yes", "option": "B"}
    for scorer, row, message in cases:
        first = options | {"id": "first", "answers": answers.get(str(scorer), "a")}
        with pytest.raises(InputError, match=rf"questions\.jsonl:2: .*({message})") as refusal:
            load(write(tmp_path, first, row), scorer=scorer)
        assert "\n" not in str(refusal.value), message


def test_a_file_that_is_no_set_of_questions_is_one_clear_line(tmp_path: Path) -> None:
    cases = [
        ("", "set.json: the file is empty"),
        ("{}", "set.json:1: missing field 'question'"),
        ("[7]", "set.json:1: must be a JSON object"),
        ('{"v": 7}', "set.json:1: missing field 'question'"),
        ('{"v": {"question": ""}}', "set.json:1: field 'question' is empty"),
        ('{"v": {"question": "q"}, "w": {"image": "../x"}}', "set.json:2: an image must be a path"),
    ]
    for content, message in cases:
        (tmp_path / "set.json").write_text(content)
        with pytest.raises(InputError, match=message):
            load(tmp_path / "set.json")
    with pytest.raises(InputError, match=r"gone\.jsonl: no such file"):
        load(tmp_path / "gone.jsonl")


def test_a_given_id_may_not_be_the_number_of_another_row(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2: duplicate of line 1"):
        load(write(tmp_path, {"question": "q", "id": "2"}, {"question": "q"}))


def test_missing_images_are_counted_and_the_rest_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, {"question": "q", "image": "gone.png"}, {"question": "q"})
    with caplog.at_level(logging.WARNING):
        loaded = load(path)
    assert loaded.missing == ["1: no file gone.png"]
    assert [question.id for question in loaded.questions] == ["2"]
    assert "the images of 1 of 2 questions are missing" in caplog.text


def test_limit_draws_by_id_and_keeps_ids(tmp_path: Path) -> None:
    path = write(tmp_path, *[{"question": f"q{number}"} for number in range(40)])
    whole, part = load(path).questions, load(path, limit=5).questions
    assert len(part) == 5
    assert part == [question for question in whole if question in part]
    assert part != whole[:5]
    assert part != load(path, limit=5, seed=1).questions


def test_a_wrong_setting_is_refused_at_once() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"scorer": "yesno"}, "^scorer: no 'yesno'. Did you mean 'yes_no'"),
        ({"columns": {"answer": "x"}}, "^columns: no 'answer'. Did you mean 'answers'"),
        ({"variants": ["TYPOS"]}, "^variants: no 'TYPOS'"),
        ({"fixed": {"harm": True}}, "^fixed: no 'harm'. Did you mean 'harmless'"),
        ({"parts": {"safe": {"file": "x"}}}, "^parts.safe: no 'file'. Did you mean 'files'"),
        ({"columns": {"id": ["a", "b"]}}, "^columns.id: must be one name"),
        ({"path": None}, "^path: has no value"),
        ({"limit": 0}, "^limit must be at least 1"),
    ]
    for settings, message in cases:
        with pytest.raises(InputError, match=message):
            QuestionFile(**{"path": "x"} | settings)


def test_the_identity_is_that_of_the_texts_and_not_of_the_selection(tmp_path: Path) -> None:
    def identity(**settings: Any) -> dict[str, Any]:
        return QuestionFile(path=str(path), **settings).card.identity

    path = write(tmp_path, {"question": "q"})
    before = identity()
    assert before == identity(limit=1, seed=2, variants=["TEXT"], where={"a": "b"}, columns={"id": None})
    others = [identity(instruction="Be brief."), identity(scorer="exact"), identity(columns={"id": "x"})]
    write(tmp_path, {"question": "r"})
    different = [before, *others, identity()]
    assert all(a != b for place, a in enumerate(different) for b in different[:place])
    assert json.loads(json.dumps(others)) == others


def test_a_dot_leads_into_objects_and_lists(tmp_path: Path) -> None:
    row = {"meta": {"kind": "law", "id": 3}, "turns": [{"x": 1}, {"asked": "q?"}], "a.b": "own"}
    columns = {"id": "meta.id", "scenario": "meta.kind", "question": "turns.asked", "base": "a.b"}
    [question] = load(write(tmp_path, row), columns=columns).questions
    assert (question.id, question.scenario, question.text, question.base) == ("3", "law", "q?", "own")
    with pytest.raises(InputError, match=r":1: missing field 'turns\.said'"):
        load(write(tmp_path, row), columns=columns | {"question": "turns.said"})


def test_a_folder_of_files_is_one_set_in_which_rows_know_their_file(tmp_path: Path) -> None:
    for name in ("law", "art"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"0": {"question": f"{name}?"}}))
    (tmp_path / "README.md").write_text("no questions")
    columns = {"id": "{file}/{id}", "scenario": "file"}
    questions = load(tmp_path, columns=columns).questions
    assert [(each.id, each.scenario, each.text) for each in questions] == [
        ("art/0", "art", "art?"),
        ("law/0", "law", "law?"),
    ]
    with pytest.raises(InputError, match=r"^columns\.id: two files have a question '0'"):
        load(tmp_path)
    assert [each.id for each in load(tmp_path, files="l*").questions] == ["0"]
    with pytest.raises(InputError, match=r"no .*\.parquet file there that fits 'x\*'"):
        load(tmp_path, files="x*")


def test_parts_differ_in_what_they_say_and_put_their_name_before_ids(tmp_path: Path) -> None:
    rows = [{"safe": "s?", "bad": "b?", "n": number, "kind": kind} for number, kind in enumerate("xyz")]
    parts = {
        "safe": {"columns": {"question": "safe"}, "fixed": {"harmless": True}, "where": {"kind": ["x", "y"]}},
        "bad": {"columns": {"question": "bad"}, "fixed": {"scenario": "law"}},
    }
    path = write(tmp_path, *rows)
    questions = load(path, columns={"id": "n", "twin": "n"}, parts=parts).questions
    assert [(each.id, each.scenario, each.text, each.twin) for each in questions] == [
        ("safe/0", BENIGN, "s?", "0"),
        ("safe/1", BENIGN, "s?", "1"),
        *((f"bad/{number}", "law", "b?", str(number)) for number in range(3)),
    ]


def test_a_pair_of_twins_has_one_question_of_each_kind(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q", "twin": "t"}, {"question": "r", "twin": "t"})
    with pytest.raises(InputError, match=r"^columns\.twin: 't' stands at 2 unsafe questions"):
        load(path)


def test_a_limit_keeps_pairs_of_twins_whole(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "twin": str(number), "harmless": harmless}
        for harmless in (True, False)
        for number in range(20)
    ]
    for limit in (10, 11):
        chosen = load(write(tmp_path, *rows), limit=limit).questions
        assert len({each.twin for each in chosen}) == 5, limit
        assert sum(each.scenario == BENIGN for each in chosen) == 5, limit


def test_a_named_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q", "label": True}, {"question": "q", "topic": {"of": "law"}})
    for given, key in (
        ({"columns": {"harmless": "lable"}}, r"columns\.harmless"),
        ({"columns": {"twin": "topic.off"}}, r"columns\.twin"),
        ({"columns": {"image": ["picture", "{number}.png"]}}, r"columns\.image"),
        ({"where": {"lable": True}}, r"where\.lable"),
        ({"parts": {"safe": {"columns": {"id": "nr"}}}}, r"parts\.safe\.columns\.id"),
    ):
        with pytest.raises(
            InputError, match=rf"^{key}: no row of .* has a field '.*\(found: 'file', 'label'"
        ):
            load(path, **given)
    loaded = load(path, columns={"scenario": "topic.of", "harmless": "label", "image": ["x", "{file}.png"]})
    assert len(loaded.missing) == 2


def test_a_filter_that_no_row_fits_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q", "topic": "law"})
    for given, message in (
        ({"where": {"topic": "lwa"}}, "where: no row has topic=lwa"),
        (
            {"parts": {"a": {"fixed": {"id": 1}}, "b": {"where": {"topic": "x"}}}},
            r"parts\.b\.where: no row has topic=x",
        ),
    ):
        with pytest.raises(InputError, match=f"^{message}$"):
            load(path, **given)


def test_a_filter_reads_yes_and_no_and_numbers_as_tables_write_them(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_text("question,safe,level\na,TRUE,1.0\nb,FALSE,2.0\n", encoding="utf-8-sig")
    for where in ({"safe": True}, {"level": 1}, {"safe": "true"}):
        assert [each.text for each in load(path, where=where).questions] == ["a"], where


def test_a_variant_is_named_by_a_column_and_fits_the_image(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    row = {"question": "q", "image": "a.png", "variant": "TYPO"}
    [question] = load(write(tmp_path, row)).questions
    assert question.variant == "TYPO"
    assert load(write(tmp_path, row, {"question": "q"}), variants=["TEXT"]).questions[0].id == "2"
    cases = [
        (row | {"variant": "TEXT"}, "field 'variant' is TEXT, but there is an image"),
        ({"question": "q", "variant": "SD"}, "field 'variant' is SD, but there is no image"),
        (row | {"variant": "sd"}, "field 'variant' must be one of TEXT, SD"),
    ]
    for wrong, message in cases:
        with pytest.raises(InputError, match=message):
            load(write(tmp_path, wrong))


def test_of_several_image_columns_the_first_that_is_there_is_taken(tmp_path: Path) -> None:
    image(tmp_path / "1.png")
    columns = {"image": ["picture", "{n}.jpg", "{n}.png"]}
    loaded = load(write(tmp_path, {"question": "q", "n": 1}, {"question": "q", "n": 2}), columns=columns)
    assert [each.id for each in loaded.questions] == ["1"]
    assert loaded.missing == ["2: no file 2.jpg"]


def test_words_may_be_absent_beside_an_image(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    [question] = load(write(tmp_path, {"question": "", "image": "a.png"})).questions
    assert question.text == ""
    [question] = load(write(tmp_path, {"question": "q"}), fixed={"image": "a.png"}).questions
    assert question.image is not None
