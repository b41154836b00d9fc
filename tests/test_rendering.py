import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from mllm_protector.errors import InputError
from mllm_protector.images import EncodedImage, ImageFile
from mllm_protector.rendering import (
    CANVAS_WIDTH,
    FONT_SIZE,
    RenderedText,
    Stacked,
    rendering_identity,
    wrap,
)


def is_dark(image):
    """(H, W) bool: where the image is darker than grey."""
    return np.asarray(image.convert("L")) < 128


def default_font():
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), FONT_SIZE)


def helvetica(text: str) -> float:
    """A text's width at the benchmark's size in Helvetica, whose widths are those of Arial."""
    import matplotlib

    metrics = Path(matplotlib.get_data_path()) / "fonts" / "afm" / "phvr8a.afm"
    widths = {
        chr(int(code)): int(width)
        for code, width in re.findall(r"^C (\d+) ; WX (\d+)", metrics.read_text(), re.M)
    }
    return sum(widths[letter] for letter in text) * FONT_SIZE / 1000


def test_a_short_phrase_takes_one_line_at_the_left_of_a_canvas_of_1024_by_180():
    image = RenderedText("HHH").load()
    assert (image.size, image.mode) == ((1024, 180), "RGB")
    assert image.getpixel((1023, 0)) == (255, 255, 255)
    dark = is_dark(image)
    rows, columns = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
    assert columns[0] < FONT_SIZE // 4
    assert rows[0] > FONT_SIZE // 2
    assert rows[-1] < FONT_SIZE // 2 + FONT_SIZE


def test_each_line_adds_90_pixels_and_no_ink_is_cut_off():
    font = default_font()
    for words in range(1, 30, 4):
        width, lines = 0.0, 1
        for number in range(words):
            width += font.getlength(" placeholder" if number else "placeholder")
            if width >= CANVAS_WIDTH:
                width, lines = font.getlength(" placeholder"), lines + 1
        image = RenderedText(" ".join(["placeholder"] * words)).load()
        assert image.size == (1024, 90 * (lines + 1)), words
        assert not is_dark(image)[-3:].any(), words


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


def test_a_wrapped_line_keeps_its_leading_space():
    dark = is_dark(RenderedText("HHHHHHHHHHHH HHHHHHHHHHHH").load())
    first = np.flatnonzero(dark[45:135].any(axis=0))[0]
    second = np.flatnonzero(dark[150:].any(axis=0))[0]
    assert second - first == pytest.approx(default_font().getlength(" "), abs=2)


def test_a_word_wider_than_the_canvas_runs_over_its_edge():
    image = RenderedText("H" * 40).load()
    assert image.size == (1024, 180)
    assert is_dark(image)[:, -20:].any()


def test_the_phrase_is_drawn_the_same_each_time_and_differently_for_other_words():
    one, again, two = (RenderedText(phrase) for phrase in ("one", "one", "two"))
    assert (one.load().tobytes(), one.digest()) == (again.load().tobytes(), again.digest())
    assert one.load().tobytes() != two.load().tobytes()
    assert one.digest() != two.digest()


def test_the_font_is_named_where_it_is_wrong_and_in_the_identity(tmp_path):
    with pytest.raises(InputError, match=r"arial\.ttf: not a readable TrueType font"):
        RenderedText("phrase", tmp_path / "arial.ttf").load()
    assert rendering_identity(Path("/fonts/arial.ttf")).startswith("arial.ttf at 90, ")
    assert rendering_identity(None) != rendering_identity(Path("/fonts/arial.ttf"))


def plain(width: int, height: int, colour: str) -> EncodedImage:
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, "PNG")
    return EncodedImage(out.getvalue(), colour)


def test_a_stack_is_as_wide_as_the_wider_one_and_black_beside_the_other(tmp_path):
    for top, bottom in [(6, 10), (10, 6), (8, 8)]:
        shown = np.asarray(Stacked(plain(top, 4, "red"), plain(bottom, 3, "white")).load())
        expected = np.zeros((7, max(top, bottom), 3))
        expected[:4, :top] = (255, 0, 0)
        expected[4:, :bottom] = 255
        np.testing.assert_array_equal(shown, expected)
    with pytest.raises(InputError, match=r"gone\.jpg"):
        Stacked(ImageFile(tmp_path / "gone.jpg"), RenderedText("phrase")).load()
