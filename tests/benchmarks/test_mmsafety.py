import io
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from mllm_protector.benchmarks.mmsafety import MMSafetyBench
from mllm_protector.errors import InputError
from mllm_protector.records import VARIANTS
from mllm_protector.scenarios import CRITERIA, GROUPS, SCENARIOS

FIRST, SECOND = SCENARIOS[:2]


def row(key):
    return {
        "Question": f"question {key}",
        "Changed Question": f"changed {key}",
        "Key Phrase": f"phrase {key}",
        "Rephrased Question": f"rephrased {key}",
        "Rephrased Question(SD)": f"rephrased for SD {key}",
    }


def write_image(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path)


def write_published(root, rows, *, images=("SD", "TYPO", "SD_TYPO"), scenarios=(FIRST,)):
    for scenario in scenarios:
        file = root / "processed_questions" / f"{scenario}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows))
        for variant in images:
            for key in rows:
                write_image(root / "imgs" / scenario / variant / f"{key}.jpg")
    return root


def write_mirror(root, *, ids=(10, 2, 0), config="Illegal_Activitiy", without_image=()):
    encoded = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(encoded, "PNG")
    folder = root / "data" / config
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("Text_only", "SD", "TYPO", "SD_TYPO"):
        rows = [
            {
                "id": key,
                "question": f"{split} {key}",
                "image": None
                if split == "Text_only" or key in without_image
                else {"bytes": encoded.getvalue(), "path": None},
            }
            for key in ids
        ]
        variant = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        table = pyarrow.table(
            {
                "id": [item["id"] for item in rows],
                "question": [item["question"] for item in rows],
                "image": pyarrow.array([item["image"] for item in rows], variant),
            }
        )
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    return root


def load(root, **settings):
    return MMSafetyBench(root=str(root), **({"scenarios": [FIRST]} | settings)).load()


def test_each_variant_asks_its_own_wording(tmp_path):
    questions = load(write_published(tmp_path, {"0": row(0) | {"Question": " how？ "}})).questions
    assert {question.variant: question.text for question in questions} == {
        "TEXT": " how？ ",
        "SD": "rephrased for SD 0",
        "TYPO": "rephrased 0",
        "SD_TYPO": "rephrased 0",
    }
    [changed] = load(tmp_path, variants=["TEXT"], text_field="Changed Question").questions
    assert changed.text == "changed 0"


def test_questions_come_by_scenario_then_variant_then_number(tmp_path):
    write_published(tmp_path, {"10": row(10), "2": row(2)}, scenarios=(SECOND, FIRST))
    questions = load(tmp_path, scenarios=[SECOND, FIRST], variants=["TYPO", "TEXT"]).questions
    assert [question.id for question in questions] == [
        f"{scenario}/{variant}/{key}"
        for scenario in (FIRST, SECOND)
        for variant in ("TEXT", "TYPO")
        for key in (2, 10)
    ]


def test_a_question_says_what_it_is_judged_by_and_what_shares_it(tmp_path):
    write_published(tmp_path / "published", {"0": row(0)}, scenarios=SCENARIOS)
    for scenario in SCENARIOS:
        write_mirror(tmp_path / "mirror", ids=(0,), config=scenario.partition("-")[2])
    for layout in ("published", "mirror"):
        loaded = load(tmp_path / layout, scenarios=None, text_field="Changed Question")
        assert len(loaded.questions) == 4 * 13, layout
        assert all(question.criterion == CRITERIA[question.scenario] for question in loaded.questions), layout
        assert {question.base for question in loaded.questions} == {f"{name}/0" for name in SCENARIOS}, layout
        assert loaded.groups == GROUPS, layout


def test_images_are_those_of_their_variant_and_stay_closed_until_asked_for(tmp_path):
    write_published(tmp_path, {"0": row(0)}, images=("SD",))
    write_image(tmp_path / "imgs" / FIRST / "TYPO" / "0.jpg", "white")
    (tmp_path / "imgs" / FIRST / "SD_TYPO").mkdir()
    (tmp_path / "imgs" / FIRST / "SD_TYPO" / "0.jpg").write_bytes(b"broken")
    text, photo, typography, both = load(tmp_path).questions
    assert text.image is None
    assert photo.image.load().getpixel((0, 0))[1] < 10
    assert typography.image.load().getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(InputError, match="not a readable image"):
        both.image.load()


def test_limit_takes_the_lowest_numbers_of_each_variant(tmp_path):
    rows = {key: row(key) for key in ("10", "9", "2", "30")}
    questions = load(write_published(tmp_path, rows), variants=["TEXT", "SD"], limit=2).questions
    assert [question.id.split("/", 1)[1] for question in questions] == ["TEXT/2", "TEXT/9", "SD/2", "SD/9"]


def test_tiny_takes_exactly_the_listed_ids(tmp_path):
    write_published(tmp_path, {str(key): row(key) for key in range(12)})
    listed = [{"Scenario": FIRST, "Sampled_ID_List": [11, 3, 4]}]
    (tmp_path / "TinyVersion_ID_List.json").write_text(json.dumps(listed))
    questions = load(tmp_path, variants=["TEXT"], tiny=True).questions
    assert [question.id.rsplit("/")[-1] for question in questions] == ["3", "4", "11"]
    assert len(load(tmp_path, variants=["TEXT"], tiny=True, limit=2).questions) == 2


def test_a_tiny_list_that_does_not_fit_is_refused(tmp_path):
    cases = [
        ([{"Scenario": FIRST, "Sampled_ID_List": [7]}], "no question with id 7"),
        ([{"Scenario": SECOND, "Sampled_ID_List": [0]}], f"no ids for {FIRST}"),
        ({"Scenario": FIRST}, "must be a list of objects"),
        (None, "no such file"),
    ]
    for content, message in cases:
        write_published(tmp_path, {"0": row(0)})
        (tmp_path / "TinyVersion_ID_List.json").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "TinyVersion_ID_List.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            load(tmp_path, variants=["TEXT"], tiny=True)


def test_missing_images_are_counted_and_named(tmp_path, caplog):
    write_published(tmp_path, {"0": row(0), "1": row(1)}, images=("SD", "TYPO"))
    (tmp_path / "imgs" / FIRST / "SD" / "1.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        loaded = load(tmp_path)
    assert loaded.missing == [
        f"{FIRST}/SD/1: no file imgs/{FIRST}/SD/1.jpg",
        f"{FIRST}/SD_TYPO/0: no file imgs/{FIRST}/SD_TYPO/0.jpg",
        f"{FIRST}/SD_TYPO/1: no file imgs/{FIRST}/SD_TYPO/1.jpg",
    ]
    assert len(loaded.questions) == 2 * len(VARIANTS) - 3
    [record] = caplog.records
    assert "the images of 3 of 8 questions are missing" in record.message


def test_missing_typography_is_rendered_only_on_request(tmp_path):
    write_published(tmp_path, {"0": row(0), "1": row(1)}, images=("SD",))
    (tmp_path / "imgs" / FIRST / "SD" / "1.jpg").unlink()
    assert len(load(tmp_path, variants=["TYPO"]).missing) == 2
    loaded = load(tmp_path, render_missing=True)
    assert loaded.missing == [
        f"{FIRST}/SD/1: no file imgs/{FIRST}/SD/1.jpg",
        f"{FIRST}/SD_TYPO/1: no file imgs/{FIRST}/SD_TYPO/1.jpg",
    ]
    images = {question.id.split("/", 1)[1]: question.image for question in loaded.questions}
    assert images["TYPO/0"].load().size == (1024, 180)
    assert images["SD_TYPO/0"].load().size == (1024, 186)
    assert images["TYPO/0"].phrase == "phrase 0"


def test_a_published_image_is_never_rendered_over(tmp_path):
    write_published(tmp_path, {"0": row(0)})
    assert [question.image.load().size for question in load(tmp_path, render_missing=True).questions[1:]] == [
        (8, 6)
    ] * 3


def test_an_id_that_is_not_a_number_is_refused(tmp_path):
    cases = ["../../x", "/etc/passwd", "5\0", "1" * 300, "CON", "-1", "٣", ""]
    for key in cases:
        write_published(tmp_path, {key: row(0)}, images=())
        write_image(tmp_path / "x.jpg")
        with pytest.raises(InputError, match="an id must be a number"):
            load(tmp_path)


def test_an_image_that_links_out_of_the_root_is_refused(tmp_path):
    root = write_published(tmp_path / "root", {"0": row(0)}, images=("TYPO", "SD_TYPO"))
    write_image(tmp_path / "outside.jpg")
    (root / "imgs" / FIRST / "SD").mkdir()
    link = root / "imgs" / FIRST / "SD" / "0.jpg"
    link.symlink_to(tmp_path / "outside.jpg")
    with pytest.raises(InputError, match="leads out of"):
        load(root)
    link.unlink()
    link.symlink_to(root / "imgs" / FIRST / "TYPO" / "0.jpg")
    assert load(root).missing == []


def test_a_broken_question_file_is_one_clear_line(tmp_path):
    cases = [
        ("", "not readable as JSON"),
        ('{"0": {', "not readable as JSON"),
        ("[]", "must be a JSON object of questions"),
        ("{}", "must be a JSON object of questions"),
        ('{"5": []}', "id '5': must be a JSON object, not list"),
        ('{"5": {"Question": "x"}}', r"id '5': missing field 'Rephrased Question\(SD\)'"),
        ('{"5": {"Question": ""}}', "id '5': field 'Question' is empty"),
        ('{"5": {"Question": 7}}', "id '5': field 'Question' must be a text, not int"),
    ]
    for content, message in cases:
        write_published(tmp_path, {"5": row(5)})
        (tmp_path / "processed_questions" / f"{FIRST}.json").write_text(content)
        with pytest.raises(InputError, match=f"{FIRST}.json: .*{message}") as refusal:
            load(tmp_path)
        assert "\n" not in str(refusal.value), content


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(InputError, match=r"^root=.*nowhere: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="the two layouts"):
        load(tmp_path)
    write_published(tmp_path, {"0": row(0)})
    with pytest.raises(InputError, match=f"{SECOND}.json: no such file"):
        load(tmp_path, scenarios=[SECOND])
    with pytest.raises(InputError, match=r"^font=.*font\.ttf: no such file"):
        load(tmp_path, render_missing=True, font=str(tmp_path / "font.ttf"))


def test_a_wrong_setting_is_refused_with_what_is_possible():
    cases = [
        ({"scenarios": ["HateSpeech"]}, "Did you mean '02-HateSpeech'"),
        ({"scenarios": ["01-Illegal_Activity"]}, "Did you mean '01-Illegal_Activitiy'"),
        ({"scenarios": ["01-Illegal_Activity"]}, "Known: 01-Illegal_Activitiy, .*, 13-Gov_Decision"),
        ({"scenarios": FIRST}, "must be a list"),
        ({"scenarios": []}, "^scenarios must be a list"),
        ({"variants": ["SD+TYPO"]}, "^variants: no 'SD.TYPO'. Did you mean 'SD_TYPO'"),
        ({"text_field": "question"}, "Did you mean 'Question'"),
        ({"limit": 0}, "^limit must be at least 1, not 0"),
    ]
    for settings, message in cases:
        with pytest.raises(InputError, match=message):
            MMSafetyBench(**settings)


def test_what_questions_depend_on_changes_the_identity_and_nothing_else_does(tmp_path):
    write_published(tmp_path, {"0": row(0)}, images=("SD",))
    plain = MMSafetyBench(root=str(tmp_path)).card.identity
    rendering = MMSafetyBench(root=str(tmp_path), render_missing=True)
    rendered = rendering.card.identity
    reworded = MMSafetyBench(root=str(tmp_path), text_field="Changed Question").card.identity
    write_image(tmp_path / "imgs" / FIRST / "TYPO" / "0.jpg")
    fewer_rendered = rendering.card.identity
    part = {"variants": ["SD"], "scenarios": [FIRST], "limit": 1, "tiny": True}
    assert MMSafetyBench(root=str(tmp_path), **part).card.identity == plain
    assert json.loads(json.dumps(plain)) == plain
    elsewhere = write_published(tmp_path / "there", {"0": row(0)})
    assert MMSafetyBench(root=str(elsewhere)).card.identity == plain
    write_published(tmp_path, {"0": row(1)})
    edited = MMSafetyBench(root=str(tmp_path)).card.identity
    identities = [plain, rendered, reworded, fewer_rendered, edited]
    assert all(a != b for i, a in enumerate(identities) for b in identities[:i])
