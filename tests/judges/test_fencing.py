import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_protector.judges import asking as fencing
from mllm_protector.judges.asking import checked, fenced, filled, nonce, readable
from tests.judges.payloads import PAYLOADS

SPECIAL = re.compile(r"<\||<s>|</s>|\[/?INST\]|<(?:start|end)_of_turn>|<</?SYS>>|<image>|</?think>")


def test_there_are_enough_payloads() -> None:
    assert len(PAYLOADS) == len(set(PAYLOADS)) >= 30


def test_an_answer_cannot_close_its_fence() -> None:
    for payload in PAYLOADS:
        shown = readable(payload)
        mark = nonce("settings", [shown])
        assert mark not in shown, payload
        lines = fenced("ANSWER", shown, mark).split("\n")
        assert [line for line in lines if mark in line] == [
            f"[BEGIN ANSWER {mark}]",
            f"[END ANSWER {mark}]",
        ], payload
        assert not any(
            re.match(r"\W*(?:BEGIN|END)\W*ANSWER", line) for line in lines[1:-1] if line[:1] == "["
        ), payload


def test_a_prompt_shows_no_invisible_characters_and_no_special_tokens() -> None:
    for payload in PAYLOADS:
        shown = readable(payload)
        assert not re.search(
            r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\x00-\x08\x0b-\x1f]", shown
        ), payload
        assert not re.search(r"[\ud800-\udfff\U000e0000-\U000e007f\u2028\u2029]", shown), payload
        assert not SPECIAL.search(shown), payload


def test_ordinary_text_is_shown_as_it_is() -> None:
    text = "Résumé:\n\t1 < 2 | 3 > 2, [see END of list], <b>fett</b> 好 🙂 {braces} 100%"
    assert readable(text) == text


def test_the_nonce_depends_on_the_texts_and_the_settings_alone() -> None:
    assert nonce("a", ["text"]) == nonce("a", ["text"])
    assert len({nonce("a", ["text"]), nonce("b", ["text"]), nonce("a", ["other"])}) == 3


def test_a_nonce_that_occurs_in_the_text_is_lengthened(monkeypatch: pytest.MonkeyPatch) -> None:
    class Digest:
        def hexdigest(self) -> str:
            return "0123456789abcdef" * 4

    monkeypatch.setattr(fencing.hashlib, "sha256", lambda _: Digest())
    assert nonce("a", ["nothing"]) == "01234567"
    assert nonce("a", ["x 01234567 89"]) == "0123456789ab"
    assert nonce("a", ["x 0123456789AB", "y"]) == "0123456789abcdef"


@given(st.text())
def test_any_text_can_be_fenced(text: str) -> None:
    shown = readable(text)
    assert nonce("a", [shown]) not in shown
    assert SPECIAL.search(shown) is None


def test_a_template_needs_the_answer_and_may_show_the_question() -> None:
    cases: list[str] = ["{answer}", "Q: {question} A: {answer}", '{"a": 1} {answer}']
    for template in cases:
        assert checked(template) == template, template


def test_a_template_with_other_fields_is_refused() -> None:
    for template in ["", "{question}", "{answer} {answer}", "{answer} {image}"]:
        with pytest.raises(ValueError, match="must have the fields"):
            checked(template)


def test_fields_within_a_text_are_not_filled() -> None:
    assert filled("{question}|{answer}", question="{answer}", answer="{question} {}") == (
        "{answer}|{question} {}"
    )
