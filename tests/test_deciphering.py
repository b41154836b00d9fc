"""What an answer seems to say in a code."""

import base64
import codecs
import time

from mllm_protector.deciphering import deciphered
from tests.cases import case

TEXT = (
    "This is the answer that you asked for, and it is long enough to be read. All of it can be put in a code."
)

ORDINARY = (
    "",
    TEXT,
    TEXT.upper(),
    "Take 2 cups of H2O, 3 of MP3, B2B and the 4th of COVID-19; it's 12:30 on 2024-05-01.",
    "A. B. C. D. are the options, e.g. i.e. a b c",
    "Привет, это обычный ответ на русском языке. Ελληνικά επίσης.",
    "See https://example.org/a/very/long/path/with/many/parts?and=keys and 0123456789abcdef0123456789abcdef",
    "have been that this with from your mind when they come back home",
    "def f(x):\n    return x1 + y2 * z3",
    "日本語の文章。",
)


def test_ordinary_texts_have_no_guess() -> None:
    for text in ORDINARY:
        with case(text):
            assert deciphered(text) == []


def test_codes_are_read_within_other_words_and_over_lines() -> None:
    coded = base64.b64encode(f"{TEXT} Grüße, 日本語.".encode() * 3).decode()
    lines = "\n".join(coded[start : start + 76] for start in range(0, len(coded), 76))
    for name, text in {
        "behind words": f"with this code {base64.b64encode(TEXT.encode()).decode()} and more",
        "for addresses": base64.urlsafe_b64encode(TEXT.encode()).decode().rstrip("="),
        "in lines": lines,
        "rot13 behind a plain line": f"This is in the code that you know:\n{codecs.encode(TEXT, 'rot13')}",
        "letters with dots": " ".join(".".join(word) for word in TEXT.split()),
        "other digits": TEXT.replace("a", "@").replace("s", "$").replace("o", "0").replace("e", "3"),
        "Greek letters": TEXT.replace("o", "ο").replace("a", "α"),
    }.items():
        with case(name):
            assert any("asked" in guess and "long enough" in guess for guess in deciphered(text))
    assert (
        "code that you know"
        in deciphered(f"This is in the code that you know:\n{codecs.encode(TEXT, 'rot13')}")[0]
    )


def test_the_time_grows_with_the_length_and_not_with_its_square() -> None:
    for name, piece in {
        "plain": "word and ",
        "spaced": "a b ",
        "blob": "aB3/",
        "leet": "h3ll0 ",
        "dots": "a.",
    }.items():
        start = time.process_time()
        deciphered(piece * (300_000 // len(piece)))
        assert time.process_time() - start < 10, name
