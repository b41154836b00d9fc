import io
from pathlib import Path

import pytest
from PIL import Image

from mllm_protector.benchmarks.image_files import Found, find_image, image_file, image_of
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


@pytest.mark.parametrize("name", ["inside.png", "sub/deep.png", "./inside.png"])
def test_a_picture_within_the_folder_is_found(folder: Path, name: str) -> None:
    found = find_image(folder, name)
    assert isinstance(found.image, ImageFile)
    assert found.image.load().size == (3, 2)


def test_a_picture_that_is_not_there_is_missing(folder: Path) -> None:
    assert find_image(folder, "gone.png") == Found(missing="no file gone.png")
    assert find_image(folder, "sub") == Found(missing="no file sub")
    assert find_image(folder / "nowhere", "x.png") == Found(missing="no file x.png")


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_leads_elsewhere_is_refused_in_one_short_line(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="image") as refusal:
        image_file(folder, name)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 200


def test_a_link_out_of_the_folder_is_refused_and_one_within_is_followed(folder: Path) -> None:
    (folder / "out.png").symlink_to(folder.parent / "outside.png")
    (folder / "in.png").symlink_to(folder / "sub" / "deep.png")
    (folder / "up").symlink_to(folder.parent)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    for name in ("out.png", "up/outside.png"):
        with pytest.raises(ValueError, match="leads out of"):
            image_file(folder, name)
    assert image_file(folder, "in.png") is not None
    assert image_file(folder, "loop.png") is None


def test_the_folder_itself_may_be_a_link(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert image_file(link, "inside.png") is not None


def test_bytes_of_a_parquet_row_are_a_picture(folder: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (5, 4)).save(out, "PNG")
    found = image_of({"image": {"bytes": out.getvalue(), "path": None}}, folder, "row 1")
    assert isinstance(found.image, EncodedImage)
    assert found.image.load().size == (5, 4)
    assert image_of({"image": {"bytes": None}}, folder, "row 1").missing == "the row's image is empty"


def test_a_row_without_a_picture_is_a_question_in_words(folder: Path) -> None:
    assert image_of({}, folder, "") == image_of({"image": None}, folder, "") == Found()
    assert image_of({"image": ""}, folder, "") == Found()
    with pytest.raises(ValueError, match="field 'image' must be a text, not int"):
        image_of({"image": 7}, folder, "")
