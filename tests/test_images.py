import io
import re
import struct
import zlib
from pathlib import Path

import numpy
import numpy as np
import pytest
from PIL import Image, ImageFont

from mllm_protector.errors import InputError
from mllm_protector.images import (
    CANVAS_WIDTH,
    FONT_SIZE,
    MAX_PIXELS,
    EncodedImage,
    ImageFile,
    RenderedText,
    Stacked,
    rendering_identity,
    wrap,
)

FIGSTEP = Path(__file__).parents[1].parent / "shared" / "data" / "figstep" / "images"


def encoded(image, kind="PNG", **settings):
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def png_of_zeros(width, height):
    """A 1-bit PNG that is small on disk, whatever its size in pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    line = b"\0" * (1 + (width + 7) // 8)
    packed = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def is_dark(image):
    """(H, W) bool: where the picture is darker than grey."""
    return numpy.asarray(image.convert("L")) < 128


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(Image.effect_noise((40, 30), 50)))
    return path


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png: cannot read the image \(No such file"):
        ImageFile(tmp_path / "gone.png").load()


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot read the image"):
        ImageFile(tmp_path).load()


def test_an_empty_file_is_called_empty(tmp_path):
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(InputError, match=r"empty\.png: the image file is empty"):
        ImageFile(path).load()


@pytest.mark.parametrize("kept", [4, 40, 0.5, 0.98])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_a_truncated_file_is_refused_not_half_shown(kind, kept):
    data = encoded(Image.effect_noise((64, 64), 50), kind)
    size = kept if kept > 1 else int(len(data) * kept)
    with pytest.raises(InputError, match="cut: not a readable image"):
        EncodedImage(data[:size], "cut").load()


@pytest.mark.parametrize("data", [b"<svg></svg>", b"GIF89a", b"\xff\xd8\xff\xe0junk", b"\0" * 100])
def test_something_that_is_no_image_is_refused_by_name(data):
    with pytest.raises(InputError, match="row 7: not a readable image"):
        EncodedImage(data, "row 7").load()


def test_the_content_decides_not_the_ending(tmp_path, photo):
    renamed = tmp_path / "photo.jpg"
    renamed.write_bytes(photo.read_bytes())
    assert ImageFile(renamed).load().tobytes() == ImageFile(photo).load().tobytes()


@pytest.mark.parametrize("size", [(20_000, 20_000), (12_000, 12_000), (10_000, 5_001)])
def test_a_bomb_is_refused_before_it_unfolds(size, monkeypatch):
    bomb = png_of_zeros(*size)
    assert len(bomb) < 100_000
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match=f"bomb: .*{MAX_PIXELS:,}"):
        EncodedImage(bomb, "bomb").load()


def test_a_picture_of_just_the_allowed_size_is_read():
    assert EncodedImage(png_of_zeros(10_000, 5_000), "large").load().size == (10_000, 5_000)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_png_mode_becomes_rgb(mode):
    image = EncodedImage(encoded(Image.new(mode, (5, 4))), "picture").load()
    assert (image.mode, image.size) == ("RGB", (5, 4))


@pytest.mark.parametrize(
    ("mode", "kind"), [("CMYK", "JPEG"), ("L", "JPEG"), ("F", "TIFF"), ("I", "TIFF"), ("YCbCr", "JPEG")]
)
def test_modes_of_other_files_become_rgb(mode, kind):
    image = EncodedImage(encoded(Image.new(mode, (5, 4)), kind), "picture").load()
    assert (image.mode, image.size) == ("RGB", (5, 4))


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1)])
def test_extreme_shapes_are_read_as_they_are(size):
    assert EncodedImage(encoded(Image.new("RGB", size)), "thin").load().size == size


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert EncodedImage(data, "animation").load().getpixel((0, 0)) == (255, 0, 0)


def test_exif_does_not_keep_a_picture_from_being_read():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    data = encoded(Image.new("RGB", (8, 4), "red"), "JPEG", exif=exif)
    image = EncodedImage(data, "rotated").load()
    assert sorted(image.size) == [4, 8]


def test_a_file_is_read_when_it_is_asked_for(photo):
    picture = ImageFile(photo)
    photo.write_bytes(encoded(Image.new("RGB", (40, 30), "red")))
    assert picture.load().getpixel((0, 0)) == (255, 0, 0)


def test_a_short_phrase_takes_one_line_on_a_canvas_of_1024_by_180():
    image = RenderedText("short phrase").load()
    assert (image.size, image.mode) == ((1024, 180), "RGB")
    assert image.getpixel((1023, 0)) == (255, 255, 255)
    assert is_dark(image).any()


def test_text_starts_at_the_left_and_half_a_line_down():
    dark = is_dark(RenderedText("HHH").load())
    rows, columns = numpy.flatnonzero(dark.any(axis=1)), numpy.flatnonzero(dark.any(axis=0))
    assert columns[0] < FONT_SIZE // 4
    assert rows[0] > FONT_SIZE // 2
    assert rows[-1] < FONT_SIZE // 2 + FONT_SIZE


@pytest.mark.parametrize("words", range(1, 30, 4))
def test_each_line_adds_90_pixels(words):
    width, lines, font = 0.0, 1, default_font()
    for number in range(words):
        width += font.getlength(" placeholder" if number else "placeholder")
        if width >= CANVAS_WIDTH:
            width, lines = font.getlength(" placeholder"), lines + 1
    assert RenderedText(" ".join(["placeholder"] * words)).load().size == (1024, 90 * (lines + 1))


def helvetica(text: str) -> float:
    """A text's width at the benchmark's size in Helvetica, whose widths are those of Arial."""
    import matplotlib

    metrics = Path(matplotlib.get_data_path()) / "fonts" / "afm" / "phvr8a.afm"
    widths = {
        chr(int(code)): int(width)
        for code, width in re.findall(r"^C (\d+) ; WX (\d+)", metrics.read_text(), re.M)
    }
    return sum(widths[letter] for letter in text) * FONT_SIZE / 1000


def test_the_first_word_is_measured_without_a_space_and_every_later_one_with_it():
    cases = [  # phrase, width of a letter, lines
        ("aaaaa bbbb", 102, ["aaaaa bbbb"]),  # 1020 wide; a space in front would make it 1122
        ("aaaaa bbbbb", 102, ["aaaaa", " bbbbb"]),
        ("aaaaaaaaa b cccccc d", 102, ["aaaaaaaaa", " b cccccc", " d"]),  # " b cccccc d" is 1122 wide
        ("aaaa bbb", 128, ["aaaa", " bbb"]),  # exactly as wide as the canvas
        ("aaaaaaaaaaaa b", 102, ["aaaaaaaaaaaa", " b"]),
        ("", 102, [""]),
    ]
    for phrase, width, lines in cases:
        assert wrap(phrase, lambda text, width=width: width * len(text)).split("\n") == lines, phrase
    assert wrap("engage in child abduction", helvetica) == "engage in child abduction"


def test_no_ink_is_cut_off_below_the_last_line():
    tall = RenderedText(" ".join(["placeholder"] * 12)).load()
    assert not is_dark(tall)[-3:].any()


def test_a_wrapped_line_keeps_its_leading_space():
    font = default_font()
    phrase = "HHHHHHHHHHHH HHHHHHHHHHHH"
    dark = is_dark(RenderedText(phrase).load())
    first = numpy.flatnonzero(dark[45:135].any(axis=0))[0]
    second = numpy.flatnonzero(dark[150:].any(axis=0))[0]
    assert second - first == pytest.approx(font.getlength(" "), abs=2)


def test_a_word_wider_than_the_canvas_runs_over_its_edge():
    image = RenderedText("H" * 40).load()
    assert image.size == (1024, 180)
    assert is_dark(image)[:, -20:].any()


def test_the_phrase_is_drawn_the_same_each_time_and_differently_for_other_words():
    assert RenderedText("one").load().tobytes() == RenderedText("one").load().tobytes()
    assert RenderedText("one").load().tobytes() != RenderedText("two").load().tobytes()


def test_a_font_that_is_none_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"arial\.ttf: not a readable TrueType font"):
        RenderedText("phrase", tmp_path / "arial.ttf").load()


def test_the_rendering_identity_names_the_font_and_the_library():
    assert rendering_identity(Path("/fonts/arial.ttf")).startswith("arial.ttf at 90, ")
    assert rendering_identity(None) != rendering_identity(Path("/fonts/arial.ttf"))


@pytest.mark.parametrize(("top_width", "bottom_width"), [(6, 10), (10, 6), (8, 8)])
def test_a_stack_is_as_wide_as_the_wider_one_and_black_beside_the_other(top_width, bottom_width):
    top = EncodedImage(encoded(Image.new("RGB", (top_width, 4), "red")), "top")
    bottom = EncodedImage(encoded(Image.new("RGB", (bottom_width, 3), "white")), "bottom")
    image = Stacked(top, bottom).load()
    width = max(top_width, bottom_width)
    assert image.size == (width, 7)
    expected = [
        [(255, 0, 0) if x < top_width else (0, 0, 0) for x in range(width)],
        [(255, 255, 255) if x < bottom_width else (0, 0, 0) for x in range(width)],
    ]
    for y in range(7):
        assert [image.getpixel((x, y)) for x in range(width)] == expected[y >= 4]


def test_a_stack_with_a_broken_part_names_that_part(tmp_path):
    with pytest.raises(InputError, match=r"gone\.jpg"):
        Stacked(ImageFile(tmp_path / "gone.jpg"), RenderedText("phrase")).load()


def test_published_pictures_can_be_read():
    files = sorted(FIGSTEP.glob("*.png"))[:3]
    if not files:
        pytest.skip(f"no FigStep images in {FIGSTEP}")
    for file in files:
        image = ImageFile(file).load()
        assert (image.size, image.mode) == ((760, 760), "RGB")


def default_font():
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), FONT_SIZE)


def test_a_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(1, 256)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    shown = np.asarray(ImageFile(tmp_path / "ramp.png").load())[0, :, 0]
    assert np.abs(shown.astype(int) - np.arange(256)).max() <= 1


def test_transparent_parts_are_white_and_a_turned_picture_stands_upright(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert ImageFile(tmp_path / "clear.png").load().getpixel((0, 0)) == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=turned)
    assert ImageFile(tmp_path / "turned.jpg").load().size == (2, 4)
