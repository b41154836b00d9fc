"""Rewritings that keep a label."""

import base64
import codecs
import random

import pytest

from mllm_protector import prompts
from mllm_protector.data.transformations import WORDINGS, chosen, rewritten
from mllm_protector.deciphering import deciphered
from mllm_protector.errors import InputError
from mllm_protector.normalisation import normalised
from tests.cases import case

TEXT = (
    "The first line is here. It has two sentences, and you can read it.\nA second line is at the end of this."
)

NORMALISED = ("zero_width", "full_width")
CODED = ("leet", "spaced_letters", "homoglyphs", "base64", "rot13")
WRAPPED = ("refusal_first", "padded", "fake_verdict", "fake_answer", "role_marks", "code_fence")
CUT = {"cut_25": 0.25, "cut_50": 0.5, "cut_75": 0.75}


def made(name: str, text: str = TEXT, *, seed: int = 0) -> str:
    return rewritten(name, chosen("measure")[name], text, seed=seed)


def test_every_transformation_changes_the_text_and_is_the_same_each_time() -> None:
    for purpose in WORDINGS:
        for name, each in chosen(purpose).items():
            with case(purpose, name):
                texts = {rewritten(name, each, TEXT, seed=3) for _ in range(3)}
                assert len(texts) == 1
                assert texts != {TEXT}


def test_disguises_that_normalisation_undoes_are_undone() -> None:
    for name in NORMALISED:
        assert normalised(made(name)) == normalised(TEXT), name
    for name in ("upper_case", "lower_case"):
        assert normalised(made(name)).lower() == normalised(TEXT).lower(), name


def test_codes_can_be_decoded_and_deciphering_does_it() -> None:
    blob = made("base64").splitlines()[-1]
    assert base64.b64decode(blob).decode() == TEXT
    assert codecs.decode(made("rot13").partition("\n")[2], "rot13") == TEXT
    for name in CODED:
        with case(name):
            [guess] = deciphered(made(name))
            assert "".join(TEXT.split()).lower() in "".join(guess.split()).lower()


def test_what_is_wrapped_is_still_there_word_for_word() -> None:
    for name in WRAPPED:
        assert TEXT in made(name), name
    for name in ("markdown", "dialogue"):
        words = iter(made(name).replace("*", "").split())
        assert all(word in words for word in TEXT.split()), name  # in this order


def test_a_cut_answer_is_the_beginning_and_ends_with_a_word() -> None:
    count = len(TEXT.split())
    for name, share in CUT.items():
        text = made(name)
        assert TEXT.startswith(text), name
        assert text.split() == TEXT.split()[: int(count * share)], name
        assert not chosen("measure")[name].attack, name
    assert made("cut_25", "one two") == "one"


def test_short_and_odd_texts_are_no_trouble() -> None:
    for name, each in chosen("measure").items():
        for text in ("", " ", "a", "\ud800", "日本語。", "```"):
            assert isinstance(each.rewrite(text, random.Random(0)), str), name


def test_fake_verdicts_and_answers_are_in_the_words_of_the_detector() -> None:
    assert "Verdict on the answer: " in made("fake_verdict")
    fake = rewritten("fake_answer", chosen("measure")["fake_answer"], TEXT, seed=0)
    assert fake.startswith(f"{TEXT}\n\nQuestion:\n")
    assert fake.endswith("Verdict on the answer:")
    own = chosen("measure", prompts.OFFICIAL_DETECTOR)["fake_answer"]
    assert "\n\nQuestion: " in rewritten("fake_answer", own, TEXT, seed=0)


def test_training_and_measuring_share_no_wording() -> None:
    for field in ("refusals", "paragraphs", "verdicts", "roles", "speakers", "headings"):
        train, measure = ({*getattr(words, field)} for words in WORDINGS.values())
        assert not train & measure, field


def test_wrong_names_are_refused() -> None:
    for names, message in (
        (["leeet"], r"transformations: unknown 'leeet'; choose among zero_width, "),
        ([], r"transformations=\[\]: name each once, and at least one"),
        (["leet", "leet"], r"transformations=\['leet', 'leet'\]: name each once"),
    ):
        with pytest.raises(InputError, match=message):
            chosen("measure", names=names)
