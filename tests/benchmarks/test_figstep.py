import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm_protector.benchmarks.figstep import CARRIER, FigStep
from mllm_protector.errors import InputError
from mllm_protector.images import ImageFile
from mllm_protector.records import LoadedBenchmark
from mllm_protector.rendering import RenderedList
from mllm_protector.scenarios import Criterion

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "figstep"
COLUMNS = ("dataset", "category_id", "task_id", "category_name", "question", "instruction")
ROWS = [
    ("ForbidQI", "1", "1", "Illegal Activity", "question 1", "Steps to do a placeholder."),
    ("ForbidQI", "1", "2", "Illegal Activity", "question 2", "Steps to do another."),
    ("ForbidQI", "10", "1", "Health Consultation", "question 3", "List of placeholders."),
]


@pytest.fixture
def published() -> Path:
    if not (PUBLISHED / "SafeBench-Tiny.csv").is_file():
        pytest.skip(f"no FigStep in {PUBLISHED}")
    return PUBLISHED / "SafeBench-Tiny.csv"


def write(folder: Path, rows: list[tuple[str, ...]] = ROWS, *, without: tuple[str, ...] = ()) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "table.csv").open("w", newline="") as out:
        csv.writer(out).writerows([COLUMNS, *rows])
    for row in rows:
        name = f"query_ForbidQI_{row[1]}_{row[2]}_6.png"
        if name not in without:
            Image.new("RGB", (7, 7)).save(folder / "images" / name)
    return folder / "table.csv"


def load(path: Path, **settings: Any) -> LoadedBenchmark:
    return FigStep(path=str(path), **settings).load()


def test_the_published_tiny_version_has_ten_topics_with_five_questions_in_two_variants(
    published: Path,
) -> None:
    loaded = load(published)
    assert len(loaded.questions) == 100
    assert loaded.missing == []
    scenarios = [*dict.fromkeys(question.scenario for question in loaded.questions)]
    assert (scenarios[0], scenarios[-1]) == ("01-Illegal Activity", "10-Health Consultation")
    assert loaded.groups == {"01-07": tuple(scenarios[:7]), "08-10": tuple(scenarios[7:])}
    criteria = {question.scenario: question.criterion for question in loaded.questions}
    assert list(criteria.values()) == [
        *[Criterion.HARM] * 7,
        Criterion.LEGAL,
        Criterion.FINANCIAL,
        Criterion.HEALTH,
    ]


def ink(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L")) < 128


def test_a_rendered_image_has_the_lines_of_the_published_one_at_the_same_height(published: Path) -> None:
    rows = list(csv.DictReader(published.open()))
    for row in rows[::5]:
        name = f"images/query_ForbidQI_{row['category_id']}_{row['task_id']}_6.png"
        theirs = ImageFile(PUBLISHED / name).load()
        image = RenderedList(row["instruction"])
        ours = image.load()
        assert ours.size == theirs.size == (760, 760)
        lines = len(image.lines())
        for number in range(lines + 1):
            top, bottom = number * 75 + 24, number * 75 + 75
            there = [ink(image)[top:bottom].any() for image in (theirs, ours)]
            assert there == [bottom <= 760 and number < lines] * 2
        columns = [np.flatnonzero(ink(image).any(axis=0)) for image in (theirs, ours)]
        assert abs(columns[0][0] - columns[1][0]) <= 5
        assert abs(columns[0][-1] - columns[1][-1]) <= 12
        bottoms = [np.flatnonzero(ink(image).any(axis=1))[-1] for image in (theirs, ours)]
        assert abs(bottoms[0] - bottoms[1]) <= 2


def test_all_published_images_can_be_drawn(published: Path, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(published.read_bytes())
    loaded = load(tmp_path / "table.csv", variants=["TYPO"], render_missing=True)
    assert len(loaded.questions) == 50
    assert {question.image.load().size for question in loaded.questions if question.image} == {(760, 760)}


def test_an_image_stands_beside_the_carrier_and_the_plain_question_alone(tmp_path: Path) -> None:
    first, second, image, *_ = load(write(tmp_path)).questions
    assert (first.id, first.text, first.image) == ("01-Illegal Activity/TEXT/1", "question 1", None)
    assert (second.base, second.variant) == ("01-Illegal Activity/2", "TEXT")
    assert (image.id, image.text) == ("01-Illegal Activity/TYPO/1", CARRIER)
    assert image.base == first.base
    assert image.image is not None
    assert image.image.load().size == (7, 7)


def test_the_carrier_can_be_given(tmp_path: Path) -> None:
    [*_, last] = load(write(tmp_path), carrier="official words").questions
    assert last.text == "official words"


def test_topics_come_by_number_and_limit_counts_for_each_topic_and_variant(tmp_path: Path) -> None:
    path = write(tmp_path, [ROWS[2], ("ForbidQI", "9", "1", "Financial Advice", "q", "i"), ROWS[1], ROWS[0]])
    whole = [question.id for question in load(path).questions]
    assert [name for name in whole if "/TEXT/" in name] == [
        "01-Illegal Activity/TEXT/1",
        "01-Illegal Activity/TEXT/2",
        "09-Financial Advice/TEXT/1",
        "10-Health Consultation/TEXT/1",
    ]
    part = [question.id for question in load(path, limit=1).questions]
    assert part == [identifier for identifier in whole if identifier.endswith("/1")]


def test_a_missing_image_is_named_or_drawn(tmp_path: Path) -> None:
    write(tmp_path, without=("query_ForbidQI_1_2_6.png",))
    loaded = load(tmp_path / "table.csv")
    assert loaded.missing == ["01-Illegal Activity/TYPO/2: no file query_ForbidQI_1_2_6.png"]
    assert len(loaded.questions) == 5
    drawn = load(tmp_path / "table.csv", render_missing=True)
    assert drawn.missing == []
    sizes = [question.image.load().size for question in drawn.questions if question.image]
    assert sizes == [(7, 7), (760, 760), (7, 7)]


def test_an_image_that_links_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "root", without=("query_ForbidQI_1_2_6.png",))
    Image.new("RGB", (7, 7)).save(tmp_path / "outside.png")
    (tmp_path / "root" / "images" / "query_ForbidQI_1_2_6.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(InputError, match="leads out of"):
        load(tmp_path / "root" / "table.csv")


def test_a_broken_row_is_named_by_its_line(tmp_path: Path) -> None:
    cases: list[tuple[list[str], str]] = [
        (["../1", "1", "Fraud", "q", "i"], "2: field 'category_id' must be a number"),
        (["1", "1/2", "Fraud", "q", "i"], "2: field 'task_id' must be a number"),
        (["1", "1" * 300, "Fraud", "q", "i"], "2: field 'task_id' must be a number"),
        (["1", "1", "a\nb", "q", "i"], "3: field 'category_name' must be one"),
        (["1", "1", "x" * 300, "q", "i"], "2: field 'category_name' must be one"),
        (["1", "1", "Fraud", "", "i"], "2: field 'question' is empty"),
        (["1", "1", "Fraud", "q"], "2: another number of columns"),
    ]
    for row, message in cases:
        with (tmp_path / "table.csv").open("w", newline="") as out:
            csv.writer(out).writerows([COLUMNS, ["ForbidQI", *row]])
        with pytest.raises(InputError, match=rf"table\.csv:{message}") as refusal:
            load(tmp_path / "table.csv")
        assert "\n" not in str(refusal.value), row
    with pytest.raises(InputError, match=r"table\.csv:3: duplicate of line 2"):
        load(write(tmp_path, [ROWS[0], ROWS[0]]))


def test_a_wrong_setting_is_refused_by_its_key(tmp_path: Path) -> None:
    for settings, message in (
        ({"variants": ["SD"]}, "^variants: no 'SD'"),
        ({"limit": 0}, "^limit must be at least 1"),
        ({"carrier": " "}, "^carrier must not be empty"),
        ({"images": str(tmp_path / "nowhere")}, "^images=.*nowhere: no such folder"),
        ({"render_missing": True, "font": str(tmp_path / "gone.ttf")}, r"^font=.*gone\.ttf: no such file"),
        ({"path": str(tmp_path / "gone.csv")}, r"gone\.csv: no such file"),
    ):
        given: dict[str, Any] = {"path": str(write(tmp_path))} | settings
        with pytest.raises(InputError, match=message):
            FigStep(**given).load()


def test_the_identity_changes_with_texts_and_images_and_not_with_the_selection(tmp_path: Path) -> None:
    path = write(tmp_path, without=("query_ForbidQI_1_2_6.png",))
    plain = FigStep(path=str(path)).card.identity
    assert plain == FigStep(path=str(path), variants=["TEXT"], limit=1).card.identity
    assert json.loads(json.dumps(plain)) == plain
    rendered = FigStep(path=str(path), render_missing=True).card.identity
    carried = FigStep(path=str(path), carrier="other").card.identity
    write(tmp_path)
    fewer_rendered = FigStep(path=str(path), render_missing=True).card.identity
    write(tmp_path, ROWS[:2])
    edited = FigStep(path=str(path)).card.identity
    identities = [plain, rendered, carried, fewer_rendered, edited]
    assert all(a != b for i, a in enumerate(identities) for b in identities[:i])
