import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support

from mllm_protector.benchmarks.vqa import VisualQuestions
from mllm_protector.benchmarks.vqa_metrics import COGNITION
from mllm_protector.errors import InputError
from mllm_protector.prompts import REFUSAL
from mllm_protector.records import BENIGN, LoadedBenchmark
from tests.benchmarks.test_image_files import ESCAPES


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2)).save(path)


def lines(*rows: dict[str, Any] | str) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


def write_generic(root: Path) -> Path:
    picture(root / "images" / "a.png")
    path = root / "vqa.jsonl"
    path.write_text(
        lines(
            {"question": "what?", "image": "a.png", "answers": ["cat", "kitten"]},
            {"id": "x", "question": "two and two?", "answers": "four"},
        )
    )
    return path


def write_pope(root: Path) -> Path:
    picture(root / "images" / "COCO_val2014_000000000001.jpg")
    path = root / "coco_pope_random.json"
    row = {"question_id": 1, "image": "COCO_val2014_000000000001.jpg", "text": "Is there a dog?"}
    path.write_text(lines(row | {"label": "yes"}, row | {"question_id": 2, "label": "no"}))
    return path


def problem(**changes: Any) -> dict[str, Any]:
    return {
        "question": "Which is red?",
        "choices": ["a rose", "the sea"],
        "answer": 0,
        "hint": "",
        "image": None,
        "split": "test",
        "lecture": "",
    } | changes


def write_scienceqa(root: Path, *, key: str = "4", **changes: Any) -> Path:
    picture(root / "images" / "test" / "4" / "image.png")
    problems = {key: problem(image="image.png", hint="Look. ") | changes, "11": problem(answer=1)}
    (root / "problems.json").write_text(json.dumps(problems | {"12": problem(split="train")}))
    splits = {"train": ["12"], "val": [], "test": ["11", key], "minitest": [key]}
    (root / "pid_splits.json").write_text(json.dumps(splits))
    return root / "problems.json"


def write_mmvet(root: Path) -> Path:
    picture(root / "images" / "v1_0.png")
    row = {"imagename": "v1_0.png", "question": "What is x?", "capability": ["ocr"]}
    (root / "mm-vet.json").write_text(
        json.dumps({"v1_0": row | {"answer": "-1<AND>-5"}, "v1_1": row | {"answer": "dog<OR>hound"}})
    )
    return root / "mm-vet.json"


def write_gqa(root: Path) -> Path:
    picture(root / "images" / "n161313.jpg")
    row = {"question": "Is it cloudy?", "imageId": "n161313", "fullAnswer": "Yes, it is.", "isBalanced": True}
    questions = {"201": row | {"answer": "yes"}, "202": row | {"question": "Where?", "answer": "left"}}
    (root / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    return root / "testdev_balanced_questions.json"


def write_mme(root: Path) -> Path:
    folder = root / "MME_Benchmark"
    picture(folder / "OCR" / "0001.jpg")
    picture(folder / "artwork" / "images" / "10002.png")
    (folder / "artwork" / "questions_answers_YN").mkdir()
    text = 'Is the word "angie\'s"? Please answer yes or no.\tYes\r\nIs it "angle\'s"?\tNo\n\n'
    (folder / "OCR" / "0001.txt").write_bytes(text.encode())
    (folder / "artwork" / "questions_answers_YN" / "10002.txt").write_text("Is it glass?\tNo\n")
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "generic": write_generic,
    "pope": write_pope,
    "scienceqa": write_scienceqa,
    "mmvet": write_mmvet,
    "gqa": write_gqa,
    "mme": write_mme,
}


def load(path: Path, layout: str, **settings: Any) -> LoadedBenchmark:
    return VisualQuestions(path=str(path), format=layout, **settings).load()  # type: ignore[arg-type]


def scores(loaded: LoadedBenchmark, text: str) -> dict[str, float]:
    assert loaded.score is not None
    return {question.id: loaded.score(question, text) for question in loaded.questions}


def test_generic_rows_have_pictures_or_none(tmp_path: Path) -> None:
    loaded = load(write_generic(tmp_path), "generic")
    assert [(each.id, each.variant, each.text) for each in loaded.questions] == [
        ("1", "SD", "what?"),
        ("x", "TEXT", "two and two?"),
    ]
    assert scores(loaded, "A kitten.") == {"1": 1, "x": 0}
    assert scores(loaded, "4") == {"1": 0, "x": 1}


def test_a_row_of_vqav2_has_the_answers_of_ten_people(tmp_path: Path) -> None:
    people = ["yes"] * 8 + ["no"] * 2
    told = [{"answer": answer, "answer_confidence": "yes", "answer_id": 1} for answer in people]
    blank = ["red"] * 9 + [""]
    path = tmp_path / "vqa.jsonl"
    path.write_text(lines(*[{"question": "q", "answers": answers} for answers in (people, told, blank)]))
    loaded = load(path, "generic")
    assert scores(loaded, "no") == {"1": pytest.approx(0.6), "2": pytest.approx(0.6), "3": 0}
    assert scores(loaded, "red")["3"] == 1


def test_pope_reports_what_its_own_script_does(tmp_path: Path) -> None:
    texts = ["yes", "There is none.", "A dog is there.", "no", "Yes.", "No.", REFUSAL, "It is not there."]
    labels = ["yes", "yes", "no", "no", "yes", "no", "yes", "no"]
    path = tmp_path / "pope.json"
    picture(tmp_path / "images" / "a.jpg")
    row = {"image": "a.jpg", "text": "Is there a dog?"}
    path.write_text(
        lines(*[row | {"question_id": place, "label": label} for place, label in enumerate(labels)])
    )
    loaded = load(path, "pope")
    assert loaded.metrics is not None
    found = loaded.metrics({str(place): text for place, text in enumerate(texts)})
    said_yes = [True, False, True, False, True, False, False, False]
    precision, recall, f1, _ = precision_recall_fscore_support(
        [label == "yes" for label in labels], said_yes, average="binary"
    )
    expected = {"precision": precision, "recall": recall, "f1": f1}
    assert found == pytest.approx(expected | {"accuracy": 5 / 8, "yes_ratio": 3 / 8, "neither": 1 / 8})
    assert loaded.metrics({"3": "no"}) == {
        "accuracy": 1,
        "precision": None,
        "recall": None,
        "f1": None,
        "yes_ratio": 0,
        "neither": 0,
    }


def test_mme_counts_images_of_which_both_questions_are_right(tmp_path: Path) -> None:
    answers = {}
    for category in COGNITION:
        for image in ("1", "2"):
            picture(tmp_path / "MME" / category / f"{image}.png")
            (tmp_path / "MME" / category / f"{image}.txt").write_text("Is it?\tYes\nIs it not?\tNo\n")
            answers |= {f"{category}/{image}/1": "Yes", f"{category}/{image}/2": "No"}
    answers["text_translation/2/2"] = "Yes"
    metrics = load(tmp_path / "MME", "mme").metrics
    assert metrics is not None
    found = metrics(answers)
    assert (found["accuracy"], found["accuracy+"]) == (15 / 16, 7 / 8)
    assert found["cognition"] == 3 * 200 + 75 + 50
    assert found["perception"] is None
    assert metrics({"text_translation/2/1": "Yes"})["accuracy+"] is None


def test_pope_is_json_lines_whatever_its_ending(tmp_path: Path) -> None:
    loaded = load(write_pope(tmp_path), "pope", instruction="Answer with yes or no.")
    assert loaded.questions[0].text == "Is there a dog?\nAnswer with yes or no."
    assert scores(loaded, "Yes, there is.") == {"1": 1, "2": 0}


def test_scienceqa_shows_hint_and_lettered_choices(tmp_path: Path) -> None:
    loaded = load(write_scienceqa(tmp_path), "scienceqa")
    words, shown = loaded.questions
    assert (words.id, words.variant) == ("11", "TEXT")
    assert words.text == "Which is red?\n(A) a rose\n(B) the sea"
    assert (shown.id, shown.variant) == ("4", "SD")
    assert shown.text == "Look.\nWhich is red?\n(A) a rose\n(B) the sea"
    assert scores(loaded, "A.") == {"11": 0, "4": 1}
    assert scores(loaded, "It is the sea.") == {"11": 1, "4": 0}


def test_a_split_and_a_kind_of_scienceqa_can_be_chosen(tmp_path: Path) -> None:
    path = write_scienceqa(tmp_path)
    assert [each.id for each in load(path, "scienceqa", split="minitest").questions] == ["4"]
    assert [each.id for each in load(path, "scienceqa", kinds=["TEXT"]).questions] == ["11"]
    assert [each.id for each in load(path, "scienceqa", kinds=["SD"]).questions] == ["4"]
    with pytest.raises(InputError, match=r"^split=nope: .*\(found: train, val, test, minitest\)"):
        load(path, "scienceqa", split="nope")


def test_mmvet_wants_all_elements_or_any_alternative(tmp_path: Path) -> None:
    loaded = load(write_mmvet(tmp_path), "mmvet")
    assert scores(loaded, "x is -1, and it is a hound") == {"v1_0": 0.5, "v1_1": 1}


def test_gqa_knows_yes_or_no_and_words(tmp_path: Path) -> None:
    loaded = load(write_gqa(tmp_path), "gqa")
    assert scores(loaded, "Yes, on the left.") == {"201": 1, "202": 1}
    assert scores(loaded, "No") == {"201": 0, "202": 0}


def test_mme_lies_in_both_of_its_layouts(tmp_path: Path) -> None:
    loaded = load(write_mme(tmp_path), "mme")
    assert scores(loaded, "no") == {"OCR/0001/1": 0, "OCR/0001/2": 1, "artwork/10002/1": 1}
    assert loaded.questions[0].text == 'Is the word "angie\'s"? Please answer yes or no.'
    assert loaded.missing == []


@pytest.mark.parametrize("layout", WRITERS)
def test_questions_are_harmless_have_their_pictures_and_unique_ids(tmp_path: Path, layout: str) -> None:
    loaded = load(WRITERS[layout](tmp_path), layout)
    assert loaded.missing == []
    assert len({question.id for question in loaded.questions}) == len(loaded.questions)
    for question in loaded.questions:
        assert question.scenario == BENIGN
        assert (question.image is None) == (question.variant == "TEXT")
        assert question.image is None or question.image.load().size == (3, 2)


@pytest.mark.parametrize("layout", WRITERS)
def test_a_repeated_question_has_the_score_of_the_first(tmp_path: Path, layout: str) -> None:
    loaded = load(WRITERS[layout](tmp_path), layout)
    assert loaded.score is not None
    for question in loaded.questions:
        again = replace(question, id=f"{question.id}#1", repeat=1)
        assert loaded.score(again, "yes A -1") == loaded.score(question, "yes A -1")


@pytest.mark.parametrize("layout", WRITERS)
def test_missing_pictures_are_counted(tmp_path: Path, layout: str) -> None:
    path = WRITERS[layout](tmp_path)
    pictures = [file for file in tmp_path.rglob("*") if file.suffix in (".png", ".jpg")]
    for file in pictures:
        file.unlink()
    loaded = load(path, layout)
    assert loaded.missing
    assert all(": no file " in reason for reason in loaded.missing)
    assert all(question.image is None for question in loaded.questions)


@pytest.mark.parametrize("layout", [layout for layout in WRITERS if layout != "mme"])
def test_a_missing_folder_of_pictures_is_told_at_once(tmp_path: Path, layout: str) -> None:
    path = WRITERS[layout](tmp_path)
    with pytest.raises(InputError, match=r"^images=.*nowhere: no such folder"):
        load(path, layout, images=str(tmp_path / "nowhere"))


def test_mme_takes_no_other_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^images: those of MME lie beside"):
        VisualQuestions(path="x", format="mme", images="y")


@pytest.mark.parametrize("name", [name for name in ESCAPES if name])
@pytest.mark.parametrize("layout", ["generic", "pope", "mmvet"])
def test_a_picture_that_leads_elsewhere_is_refused_by_line_or_id(
    tmp_path: Path, layout: str, name: str
) -> None:
    path = WRITERS[layout](tmp_path / "root")
    picture(tmp_path / "root" / "outside.png")
    old = {"generic": "a.png", "pope": "COCO_val2014_000000000001.jpg", "mmvet": "v1_0.png"}[layout]
    path.write_text(path.read_text().replace(json.dumps(old), json.dumps(name)))
    with pytest.raises(InputError, match=rf"{path.name}:( id 'v1_0':|1:) .*image"):
        load(path, layout)


@pytest.mark.parametrize("layout", ["scienceqa", "gqa"])
@pytest.mark.parametrize("name", ["../../../outside", "x\0y", "http://x/y", "x" * 300])
def test_a_picture_within_a_made_up_path_cannot_lead_out(tmp_path: Path, layout: str, name: str) -> None:
    if layout == "scienceqa":
        path = write_scienceqa(tmp_path, image=name)
    else:
        path = write_gqa(tmp_path)
        path.write_text(path.read_text().replace(json.dumps("n161313"), json.dumps(name)))
    with pytest.raises(InputError, match=rf"{path.name}: id '(4|201)': .*(image|NUL)"):
        load(path, layout)


@pytest.mark.parametrize("layout", WRITERS)
def test_a_picture_that_links_out_is_refused(tmp_path: Path, layout: str) -> None:
    path = WRITERS[layout](tmp_path / "root")
    picture(tmp_path / "outside.png")
    [file, *_] = sorted(file for file in tmp_path.rglob("root/**/*") if file.suffix in (".png", ".jpg"))
    file.unlink()
    file.symlink_to(tmp_path / "outside.png")
    with pytest.raises(InputError, match="leads out of"):
        load(path, layout)


BROKEN: list[tuple[str, Any, str]] = [
    ("generic", lines({"question": "q"}), "1: field 'answers' must be a list"),
    ("generic", lines({"question": "q", "answers": []}), "1: field 'answers' must be a list"),
    ("generic", lines({"question": "q", "answers": [7]}), "1: field 'answers' must be a text"),
    ("generic", lines({"question": "q", "answers": ["yes", "no"]}), "1: both yes and no"),
    ("generic", lines({"answers": "x"}), "1: missing field 'question'"),
    ("generic", "{", "1: not valid JSON"),
    (
        "generic",
        lines({"id": 1, "question": "q", "answers": "a"}, {"id": "1", "question": "q", "answers": "a"}),
        "2: duplicate of line 1",
    ),
    ("pope", '\n{"question_id": 1}', "2: missing field 'text'"),
    (
        "pope",
        lines({"question_id": 1, "image": "x.jpg", "text": "q", "label": "maybe"}),
        "1: field 'label' must be yes or no",
    ),
    ("pope", "{", "1: not valid JSON"),
    ("pope", "", "the file is empty"),
    ("mmvet", "{}", "the file is empty"),
    ("mmvet", "[]", "must be a JSON object"),
    ("mmvet", '{"v": 7}', "id 'v': must be a JSON object"),
    ("mmvet", '{"v": {}, "v": {}}', "field 'v' stands there twice"),
    ("mmvet", json.dumps({"v": {"question": "q", "imagename": "x", "answer": "a<OR>"}}), "id 'v': .*words"),
    (
        "gqa",
        '{"1": {"question": "q", "imageId": 7, "answer": "a"}}',
        "id '1': field 'imageId' must be",
    ),
    ("gqa", '{"1": {"question": "q"', "not valid JSON"),
    (
        "gqa",
        '{"a\\nb": {"question": "q", "imageId": "7", "answer": "a"}}',
        "id .*: an id must be one",
    ),
]


@pytest.mark.parametrize(("layout", "content", "message"), BROKEN)
def test_a_broken_file_is_one_clear_line(tmp_path: Path, layout: str, content: str, message: str) -> None:
    path = WRITERS[layout](tmp_path)
    path.write_text(content)
    with pytest.raises(InputError, match=rf"{path.name}: ?{message}") as refusal:
        load(path, layout)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 2}, "id '4': field 'answer' must be the index of one of 2 choices"),
        ({"answer": -1}, "id '4': field 'answer' must be the index"),
        ({"answer": True}, "id '4': field 'answer' must be the index"),
        ({"answer": "A"}, "id '4': field 'answer' must be the index"),
        ({"choices": ["one"]}, "id '4': field 'choices' must have from 2 to 26"),
        ({"choices": "ab"}, "id '4': field 'choices' must be a list"),
        ({"split": "../.."}, "id '4': an image must be a path"),
        ({"key": "../4"}, "id '../4': an id must be a number"),
    ],
)
def test_a_broken_problem_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"problems\.json: {message}"):
        load(write_scienceqa(tmp_path, **changes), "scienceqa")


def test_a_split_with_an_unknown_problem_is_refused(tmp_path: Path) -> None:
    path = write_scienceqa(tmp_path)
    (tmp_path / "pid_splits.json").write_text('{"test": ["99"]}')
    with pytest.raises(InputError, match=r"pid_splits\.json: problems\.json has no problem '99'"):
        load(path, "scienceqa")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"question without answer\n", "0001.txt:1: must be a question, a tab and Yes or No"),
        (b"q\tYes\nq\tMaybe\n", "0001.txt:2: field 'answer' must be yes or no"),
        (b"\n\nq\xff\tYes\n", "0001.txt:3: not UTF-8"),
        (b"\tYes\n", "0001.txt:1: must be a question"),
    ],
)
def test_a_broken_line_of_mme_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = write_mme(tmp_path)
    (path / "OCR" / "0001.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(path, "mme")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    for layout in ("generic", "pope", "mmvet", "gqa"):
        with pytest.raises(InputError, match=r"gone\.jsonl: "):
            load(tmp_path / "gone.jsonl", layout)
    with pytest.raises(InputError, match=r"pid_splits\.json: no such file"):
        load(tmp_path / "problems.json", "scienceqa")
    with pytest.raises(InputError, match=r"^path=.*gone: no such folder"):
        load(tmp_path / "gone", "mme")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"^path=.*empty: holds no MME categories"):
        load(tmp_path / "empty", "mme")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "popes"}, "^format: no 'popes'. Did you mean 'pope'"),
        ({"kinds": ["TYPO"]}, "^kinds: no 'TYPO'"),
        ({"limit": 0}, "^limit must be at least 1"),
    ],
)
def test_a_wrong_setting_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VisualQuestions(**({"path": "x"} | settings))


def test_limit_draws_by_id_and_keeps_ids(tmp_path: Path) -> None:
    path = tmp_path / "vqa.jsonl"
    path.write_text(lines(*[{"question": f"q{number}", "answers": "a"} for number in range(40)]))
    whole, part = load(path, "generic").questions, load(path, "generic", limit=5).questions
    assert len(part) == 5
    assert part == [question for question in whole if question in part]
    assert part != whole[:5]
    assert part != load(path, "generic", limit=5, seed=1).questions


@pytest.mark.parametrize("layout", WRITERS)
def test_the_identity_knows_the_texts_and_not_the_selection_or_the_place(tmp_path: Path, layout: str) -> None:
    def identity(path: Path, **settings: Any) -> dict[str, Any]:
        return VisualQuestions(path=str(path), format=layout, **settings).identity()  # type: ignore[arg-type]

    here, there = WRITERS[layout](tmp_path / "here"), WRITERS[layout](tmp_path / "there")
    plain = identity(here)
    assert plain == identity(there) == identity(here, limit=1, seed=3, kinds=["TEXT"], split="minitest")
    assert plain != identity(here, instruction="Be brief.")
    changed = here / "OCR" / "0001.txt" if layout == "mme" else here
    changed.write_bytes(changed.read_bytes() + b"\n")
    assert plain != identity(here)
    assert json.loads(json.dumps(plain)) == plain
