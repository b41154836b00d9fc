import io
from pathlib import Path

import pytest
from PIL import Image

from mllm_protector.benchmarks.shared import (
    Found,
    check_limit,
    check_names,
    files_digest,
    find_image,
    image_field,
    question_digest,
    sample,
)
from mllm_protector.errors import InputError
from mllm_protector.images import EncodedImage, ImageFile

ESCAPES = [
    "../outside.png",
    "sub/../../outside.png",
    "/etc/passwd",
    "..",
    "..\\outside.png",
    "C:\\outside.png",
    "in\0side.png",
    "in\nside.png",
    "x" * 300,
    "x" * 300 + "/inside.png",
    "é" * 130,
    "http://localhost/x.png",
    "https://localhost/x.png",
    "file:///etc/passwd",
    "data:image/png;base64,AAAA",
    "DATA:,x",
    "",
    ".",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for name in ("outside.png", "folder/inside.png", "folder/sub/deep.png"):
        Image.new("RGB", (3, 2)).save(tmp_path / name)
    return tmp_path / "folder"


def test_an_image_within_the_folder_is_found_and_another_is_missing(folder: Path) -> None:
    for name in ("inside.png", "sub/deep.png", "./inside.png"):
        found = find_image(folder, name)
        assert isinstance(found.image, ImageFile), name
        assert found.image.load().size == (3, 2), name
    for name in ("gone.png", "sub", "nowhere/x.png"):
        assert find_image(folder, name) == Found(missing=f"no file {name}")


def test_a_name_that_leads_elsewhere_is_refused_in_one_short_line(folder: Path) -> None:
    for name in ESCAPES:
        with pytest.raises(ValueError, match="image") as refusal:
            find_image(folder, name)
        assert str(refusal.value).isprintable(), name
        assert len(str(refusal.value)) < 200, name


def test_a_link_out_of_the_folder_is_refused_and_one_within_is_followed(folder: Path) -> None:
    (folder / "out.png").symlink_to(folder.parent / "outside.png")
    (folder / "in.png").symlink_to(folder / "sub" / "deep.png")
    (folder / "up").symlink_to(folder.parent)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder.parent / "link").symlink_to(folder)
    for name in ("out.png", "up/outside.png"):
        with pytest.raises(ValueError, match="leads out of"):
            find_image(folder, name)
    assert find_image(folder, "in.png").image is not None
    assert find_image(folder, "loop.png").image is None
    assert find_image(folder.parent / "link", "inside.png").image is not None


def test_bytes_of_a_parquet_row_are_an_image(folder: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (5, 4)).save(out, "PNG")
    found = image_field({"shown": {"bytes": out.getvalue(), "path": None}}, "shown", folder, "row 1")
    assert isinstance(found.image, EncodedImage)
    assert found.image.load().size == (5, 4)
    empty = image_field({"shown": {"bytes": None}}, "shown", folder, "row 1")
    assert empty.missing == "the row's image is empty"


def test_a_row_without_an_image_is_a_question_in_words(folder: Path) -> None:
    for row in ({}, {"image": None}, {"image": ""}):
        assert image_field(row, "image", folder, "") == Found()
    with pytest.raises(ValueError, match="field 'image' must be a text, not int"):
        image_field({"image": 7}, "image", folder, "")


ITEMS = [f"item {number}" for number in range(100)]


def drawn(limit: int | None, seed: int = 0, items: list[str] = ITEMS) -> list[str]:
    return sample(items, limit, seed, str)


def test_a_sample_keeps_the_order_and_does_not_take_the_first() -> None:
    chosen = drawn(10)
    assert len(chosen) == 10
    assert chosen == [item for item in ITEMS if item in chosen]
    assert chosen != ITEMS[:10]
    for limit in (None, 100, 101):
        assert drawn(limit) == ITEMS, limit


def test_a_sample_depends_on_keys_and_seed_only_and_is_part_of_a_larger_one() -> None:
    assert set(drawn(10)) == set(drawn(10, items=ITEMS[::-1]))
    assert set(drawn(10)) != set(drawn(10, seed=1))
    assert set(drawn(10)) < set(drawn(40))


def test_a_limit_that_leaves_nothing_is_refused() -> None:
    for limit in [0, -1]:
        with pytest.raises(InputError, match=f"^limit must be at least 1, not {limit}"):
            check_limit(limit)


def test_a_wrong_name_is_refused_with_the_key_in_front() -> None:
    check_names("variants", ["TEXT"], ("TEXT", "TYPO"))
    with pytest.raises(InputError, match=r"^variants: no 'TYP'\. Did you mean 'TYPO'\? Known: TEXT, TYPO"):
        check_names("variants", ["TYP"], ("TEXT", "TYPO"))


def test_a_digest_knows_names_and_bytes_but_not_the_place(tmp_path: Path) -> None:
    digests = []
    for folder, name, content in [("a", "x", "1"), ("b", "x", "1"), ("c", "y", "1"), ("d", "x", "2")]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(content)
        digests.append(files_digest((tmp_path / folder).iterdir(), tmp_path / folder))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    with pytest.raises(InputError, match="gone: cannot be read"):
        question_digest(tmp_path / "gone")
