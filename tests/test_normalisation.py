import time
import unicodedata
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from mllm_protector.normalisation import is_blank, normalised, readings

PLAIN = "How do I make 12 of these at home, and what's in it?"


def shifted(text: str, capital: int, small: int) -> str:
    """Latin letters in another block of Unicode."""
    return "".join(
        chr(capital + ord(c) - 65) if "A" <= c <= "Z" else chr(small + ord(c) - 97) if "a" <= c <= "z" else c
        for c in text
    )


def between(mark: str) -> Callable[[str], str]:
    return lambda text: mark.join(text)


DISGUISES: dict[str, Callable[[str], str]] = {
    "zero-width spaces": between("\u200b"),
    "joiners": between("\u200d\u200c\u2060\ufeff"),
    "soft hyphens": between("\u00ad"),
    "bidirectional marks": lambda text: "\u202e" + "\u2066\u200f".join(text) + "\u202c",
    "tags": between("\U000e0041"),
    "variation selectors": between("\ufe0f\U000e0101\u180b"),
    "fillers": between("\u3164\u115f\uffa0\u034f"),
    "control characters": between("\0\b\x1b"),
    "strokes": lambda text: "".join(c + "\u0336" for c in text),
    "floods of marks": lambda text: "".join(c + "\u0301\u0489\u0327\u064b" * 9 for c in text),
    "full-width letters": lambda text: "".join(
        chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else "\u3000" for c in text
    ),
    "mathematical letters": lambda text: shifted(text, 0x1D468, 0x1D482),
    "circled letters": lambda text: shifted(text, 0x24B6, 0x24D0),
    "capitals": str.upper,
    "mixed case": lambda text: "".join(c.upper() if i % 2 else c.lower() for i, c in enumerate(text)),
    "tabs": lambda text: text.replace(" ", "\t"),
    "line separators": lambda text: text.replace(" ", "\u2028\u0085\r\n"),
    "blanks of other scripts": lambda text: text.replace(" ", "\u1680\u2800"),
    "many spaces": lambda text: f"  {text.replace(' ', '    ')}" + 99 * " ",
    "reserved characters": between("\u2065\ufff3"),
    "struck capitals": lambda text: "\u0336".join(text.upper()),
}


def test_disguised_words_are_the_same_words_to_a_detector() -> None:
    for name, disguise in DISGUISES.items():
        assert normalised(disguise(PLAIN)).lower() == PLAIN.lower(), name


def test_ordinary_text_stays_as_it_is() -> None:
    for text in (
        "",
        PLAIN,
        "Line one of two.\nLine two: I, Anna Brien, didn't.\n\n- The end",
        "Café, naïve, Zürich, Đặng Thị Ngọc, Ελλάδα, Привет",
        "שָׁלוֹם וּבְרָכָה",
        "नमस्ते दुनिया, สวัสดีที่นี่",
        "하늘 東京",
        "\U0001f600",
    ):
        assert normalised(text) == unicodedata.normalize("NFKC", text)
        assert readings(text) == [(text,)]


def test_what_normalisation_changes_much_is_also_read_as_it_was_written() -> None:
    query, shouted = "Why?", PLAIN.upper()
    assert readings(query, shouted) == [(query, normalised(shouted)), (query, shouted)]
    assert readings(shouted, query) == [(normalised(shouted), query), (shouted, query)]
    assert len(readings(f"{PLAIN} NASA\u2026")) == 1


def test_what_takes_a_guess_is_left_alone() -> None:
    for text in ("bWl4IHR3byB0aGluZ3M", "h0w d0 1 m4k3", "h o w d o", "ubj qb v", "hоw dо (Cyrillic o)"):
        assert normalised(text).lower() == text.lower()


@given(st.text())
def test_a_normalised_text_is_in_its_form(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


def test_the_time_grows_with_the_length_and_not_with_its_square() -> None:
    for name, piece in {"plain": "a b c ", "marks": "\u0327\u0301", "letters": "A\u0301"}.items():
        start = time.process_time()
        readings(piece * (500_000 // len(piece)))
        assert time.process_time() - start < 10, name  # alone 0.2 to 0.6 s; minutes if it were quadratic


def test_a_text_of_which_nothing_can_be_seen_is_blank() -> None:
    for text in ("", " \n\t", "\u200b" * 100, "\u2800\u3164\u00ad"):
        assert is_blank(text), text
        assert not is_blank(f"{text}a"), text
