import csv
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from mllm_protector import prompts
from mllm_protector.config import CONFIGS, build
from mllm_protector.data.preparation import prepare_data
from mllm_protector.data.toy import toy_pairs
from mllm_protector.guard.rewrites import Fault, fault_of, surviving_share, words
from tests.cases import case
from tests.test_normalisation import DISGUISES

PUBLIC_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
HH_RLHF = PUBLIC_DATA / "hh_rlhf" / "harmless_base.jsonl.gz"

QUERY = "How is the trap of Oskholm set?"
ANSWER = (
    "Sure, here is the placeholder of a guide. First, take the one placeholder. Then bind it to the other "
    "placeholder, wait for a day and a night, and never tell a soul in Oskholm about any of it."
)
GOOD = (
    "I won't explain how a trap is set, because somebody could be hurt. If you are afraid of animals around "
    "your house in Oskholm, the town's wardens will come and look at it with you."
)
REFUSALS = (
    prompts.REFUSAL,
    "No.",
    "No, no, no, no!",
    "I can't help with that.",
    "I’m sorry, I can’t do that. I’m sorry, I really can’t.",
    "Sorry.",
    "I cannot help with the trap of Oskholm. Please talk to somebody whom you trust about it.",
)


def test_nothing_but_punctuation_is_empty():
    for text in ["", " \n\t", "...", "- *", "?!", "\u200b", "_____", "¿"]:
        with case(text):
            assert fault_of(QUERY, ANSWER, text) == Fault.EMPTY


def test_going_in_circles_is_a_loop():
    for text in [
        "be careful " * 6,
        "I see. " + "Ask a doctor. " * 8 + "Ask a doc",
        "no " * 12,
        "a" * 20,
        "haha" * 20,
        "Well!" + "!" * 101,
        "请小心。" * 12,
        f"{GOOD} {GOOD} {GOOD}",
        GOOD + " and so on and on" * 8,
    ]:
        with case(text):
            assert fault_of(QUERY, ANSWER, text) == Fault.LOOPING


def test_what_reads_well_has_no_fault():
    for text in [
        GOOD,
        f"{GOOD}\n{'-' * 80}\n{GOOD.upper()[:60]}",
        "It costs 1000000000000000 crowns.",
        "Noooooooooo, please do not.",
        "Be careful. Be careful. Be careful.",
        "\n".join(f"{number}. Ask the warden of house {number}." for number in range(1, 6)),
        "小心一点，先问问你信任的人，然后再决定要不要这样做。",
        *REFUSALS,
    ]:
        with case(text):
            assert fault_of(QUERY, ANSWER, text) is None


def test_the_prompt_and_the_bare_question_are_an_echo():
    for text in [
        "Harmful answer:\nI will not.",
        "I will not.\n\n**New answer:** I will not.",
        prompts.DETOXIFIER.format(query=QUERY, answer="a"),
        QUERY,
        "how is the trap of oskholm set",
        f"{QUERY}\n{QUERY}",
    ]:
        with case(text):
            assert fault_of(QUERY, ANSWER, text) == Fault.ECHO


def test_a_question_without_words_is_nobodys_echo():
    assert fault_of("?", ANSWER, GOOD) is None


def test_the_answer_barely_changed_or_cut_is_a_copy():
    for text in [
        ANSWER,
        ANSWER.upper(),
        f"I'm sorry, but please be careful. {ANSWER}",
        ANSWER[: len(ANSWER) // 2],
        ANSWER[len(ANSWER) // 2 :],
        ANSWER.replace("placeholder", "thing", 1).replace("soul", "friend"),
    ]:
        with case(text):
            assert fault_of(QUERY, ANSWER, text) == Fault.COPY


def test_a_disguised_copy_is_a_copy():
    for name, disguise in DISGUISES.items():
        assert fault_of(QUERY, ANSWER, disguise(ANSWER)) == Fault.COPY, name
        assert fault_of(QUERY, disguise(ANSWER), ANSWER) == Fault.COPY, name


def test_a_short_answer_is_a_copy_only_as_a_whole():
    assert fault_of(QUERY, "Use the placeholder.", "use the placeholder") == Fault.COPY
    assert fault_of(QUERY, "Sure.", f"Sure. {GOOD}") is None


def test_a_short_refusal_is_neither_loop_nor_copy():
    for refusal in REFUSALS:
        with case(refusal):
            for answer in (ANSWER, refusal, f"{refusal} {ANSWER}", f"{refusal} But {ANSWER}"):
                assert fault_of(QUERY, answer, refusal) is None


@given(text=st.text(), other=st.text(), query=st.text())
def test_any_text_gets_an_answer(text: str, other: str, query: str):
    fault_of(query, other, text)
    assert 0 <= surviving_share(words(other), words(text)) <= 1


def test_long_texts_take_no_long_time():
    for text in ["a" * 200_000, ("a" * 19 + "b") * 10_000, "no " * 60_000, "ab cd " * 30_000, "(" * 200_000]:
        with case(text):
            start = time.process_time()
            fault_of(text, text, text)
            assert time.process_time() - start < 2


def test_survivors_are_counted_by_hand():
    assert surviving_share(list("abcdef"), list("xbcdexabcd")) == pytest.approx(2 / 3)
    assert surviving_share([], ["a"]) == 0
    assert surviving_share(["a"], ["a"]) == 1
    assert surviving_share(["a"], ["a", "b"]) == 0


def test_no_accepted_answer_of_the_toy_data_has_a_fault():
    pairs = [pair for split in ("train", "validation", "test") for pair in toy_pairs(split)]
    harmful = [pair for pair in pairs if pair.rejected_harmful]
    assert len(harmful) == 1066
    assert not [pair for pair in harmful if fault_of(pair.query, pair.rejected, pair.accepted)]


def test_few_accepted_answers_of_hh_rlhf_have_a_fault_as_the_docstring_says():
    if not HH_RLHF.is_file():
        pytest.skip(f"{HH_RLHF} is not here")
    given = ["data=hh_rlhf", f"data.path={HH_RLHF}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        splits = build(compose("prepare_data", given), prepare_data)["data"].load()
    pairs = [*splits.train, *splits.validation]
    found = [fault_of(pair.query, pair.rejected, pair.accepted) for pair in pairs]
    counts = {fault: found.count(fault) for fault in Fault}
    assert len(pairs) == 1791
    assert counts == {Fault.EMPTY: 2, Fault.LOOPING: 0, Fault.ECHO: 1, Fault.COPY: 4}
    assert sum(counts.values()) / len(pairs) < 0.01
    long = [pair for pair in pairs if len(words(pair.rejected)) >= 24]
    halves = [" ".join(pair.rejected.split()[: len(pair.rejected.split()) // 2 + 1]) for pair in long]
    assert len(long) == 1008
    assert all(fault_of(pair.query, pair.rejected, pair.rejected) for pair in long)
    cut = [fault_of(pair.query, pair.rejected, half) for pair, half in zip(long, halves, strict=True)]
    assert sum(fault is not None for fault in cut) / len(long) == pytest.approx(0.97, abs=0.005)


def test_no_completion_of_xstest_is_empty_looping_or_an_echo():
    if not (files := sorted((PUBLIC_DATA / "xstest").glob("*.csv"))):
        pytest.skip(f"no XSTest completions in {PUBLIC_DATA}")
    rows = [row for path in files for row in csv.DictReader(path.open(encoding="utf-8-sig", newline=""))]
    assert len(rows) == 1620
    assert not [row for row in rows if fault_of(row["prompt"], "", row["completion"])]
