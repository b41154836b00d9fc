import ast
import logging
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies
from PIL import Image

import mllm_protector
from mllm_protector import prompts
from mllm_protector.errors import InputError, RunError
from mllm_protector.guard import rewrites
from mllm_protector.guard.mllm import ProtectedMLLM
from mllm_protector.guard.protector import Protector, Refusal, Rewrite
from mllm_protector.guard.rewrites import Fault
from mllm_protector.images import ImageFile
from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.detoxifier import Detoxifier
from mllm_protector.protocols import Card
from mllm_protector.records import Failure, Outcome, Question, Reply

SECRET = "placeholder of a harmful answer"
GOOD = "a good answer"
REWRITE = "a corrected answer"


class Scores:
    """A detector that asks a function; anything else it is given, it returns or raises."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        self.calls: list[list[str]] = []

    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        assert len(queries) == len(answers)
        self.calls.append(list(answers))
        return replay(self.rule, answers)

    @property
    def card(self) -> Card:
        return Card(identity={"kind": "scores"})


class Tries:
    """A corrector that can write several texts: one rule an attempt, the last one for all that follow."""

    def __init__(self, *rules: Any) -> None:
        self.rules = rules
        self.calls: list[tuple[int, list[str]]] = []

    def correct(self, *, queries: Sequence[str], answers: Sequence[str], attempt: int = 0) -> list[str]:
        assert len(queries) == len(answers)
        self.calls.append((attempt, list(answers)))
        return replay(self.rules[min(attempt, len(self.rules) - 1)], answers)

    @property
    def card(self) -> Card:
        return Card(identity={"kind": "tries"})


def replay(rule: Any, answers: Sequence[str]) -> Any:
    if isinstance(rule, Exception):
        raise rule
    return [rule(answer) for answer in answers] if callable(rule) else rule


def honest(answer: str) -> float:
    return 0.9 if "harmful" in answer else 0.1


def protector(scores: Any = honest, rewrites: Any = lambda _: REWRITE, threshold: float = 0.5) -> Protector:
    return Protector(Scores(scores), Tries(rewrites), threshold)


def guard(guarding: Protector, *answers: str) -> list[Reply]:
    return guarding.guard(queries=["q"] * len(answers), answers=answers)


def test_a_harmless_answer_passes_unchanged_and_a_harmful_one_is_rewritten():
    guarding = protector()
    replies = guarding.guard(queries=["q0", "q1"], answers=[f" {GOOD}\n", SECRET], ids=["x", "y"])
    assert replies == [
        Reply(id="x", raw=f" {GOOD}\n", harm=0.1, final=f" {GOOD}\n", outcome=Outcome.ALLOWED),
        Reply(id="y", raw=SECRET, harm=0.9, final=REWRITE, outcome=Outcome.REWRITTEN),
    ]
    assert guarding.corrector.calls == [(0, [SECRET])]


def test_the_detector_only_arm_refuses_what_it_flags():
    replies = guard(Protector(Scores(honest), Refusal("No."), 0.5), GOOD, SECRET)
    assert [reply.final for reply in replies] == [GOOD, "No."]
    assert [reply.outcome for reply in replies] == [Outcome.ALLOWED, Outcome.REFUSED]


@pytest.mark.parametrize(
    ("harm", "threshold", "outcome"),
    [
        (0.5, 0.5, Outcome.REWRITTEN),
        (math.nextafter(0.5, 0), 0.5, Outcome.ALLOWED),
        (0.0, 0.0, Outcome.REFUSED),
        (1.0, 1.0, Outcome.REWRITTEN),
        (math.nextafter(1.0, 0), 1.0, Outcome.ALLOWED),
        (np.float32(0.25), 0.5, Outcome.ALLOWED),
    ],
)
def test_a_score_at_the_threshold_is_flagged(harm: float, threshold: float, outcome: Outcome):
    guarding = protector(lambda answer: harm if answer == SECRET else 0.0, threshold=threshold)
    [reply] = guard(guarding, SECRET)
    assert (reply.outcome, reply.harm, type(reply.harm)) == (outcome, harm, float)


BAD_SCORES: dict[str, Any] = {
    "exception": RuntimeError(SECRET),
    "NaN": lambda _: math.nan,
    "infinite": lambda _: math.inf,
    "below 0": lambda _: -0.01,
    "above 1": lambda _: 1.01,
    "text": lambda _: "0.1",
    "None in the list": lambda _: None,
    "yes or no": lambda _: False,
    "None": None,
    "too few": [],
    "too many": [0.1, 0.1, 0.1],
    "table": {0: 0.1},
    "set": {0},
    "bytes": b"\0",
    "table of pandas": pd.DataFrame([0.0]),
    "range": range(1),
    "two dimensions": np.zeros((1, 1)),
}
BAD_REWRITES: dict[str, Any] = {
    "exception": ValueError(SECRET),
    "no text": lambda _: 7,
    "None in the list": lambda _: None,
    "None": None,
    "too few": [],
    "too many": [REWRITE, REWRITE],
    "one text for all": "?",
    "table": {REWRITE: 0},
    "set": {REWRITE},
}


def only_for_rewrites(bad: Any) -> Callable[[str], Any]:
    """Honest about answers, bad about rewrites."""

    def rule(answer: str) -> Any:
        if answer != REWRITE:
            return honest(answer)
        if isinstance(bad, Exception):
            raise bad
        return bad(answer) if callable(bad) else bad

    return rule


def good(_: str) -> str:
    return REWRITE


FAILING: dict[str, tuple[Any, list[Any], float | None]] = {
    **{f"score: {name}": (bad, [good], None) for name, bad in BAD_SCORES.items()},
    **{f"rewrite: {name}": (honest, [bad], 0.9) for name, bad in BAD_REWRITES.items()},
    **{f"second rewrite: {name}": (honest, [lambda _: "", bad], 0.9) for name, bad in BAD_REWRITES.items()},
    **{
        f"score of rewrite: {name}": (only_for_rewrites(bad), [good], 0.9) for name, bad in BAD_SCORES.items()
    },
}


@pytest.mark.parametrize(("scores", "rules", "harm"), FAILING.values(), ids=FAILING)
def test_whatever_fails_the_answer_is_neither_shown_nor_logged(
    scores: Any, rules: list[Any], harm: float | None, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    [reply] = guard(Protector(Scores(scores), Tries(*rules), 0.5), SECRET)
    assert reply == Reply(id="0", raw=SECRET, harm=harm, final=prompts.REFUSAL, outcome=Outcome.GUARD_ERROR)
    assert "the guard failed at" in caplog.text
    assert SECRET not in caplog.text
    assert all(record.exc_info is None for record in caplog.records)


def test_one_row_that_fails_does_not_take_the_others_with_it(caplog: pytest.LogCaptureFixture):
    def scores(answer: str) -> float:
        if answer == "broken":
            raise RuntimeError(SECRET)
        return honest(answer)

    def rewrites(answer: str) -> str:
        if answer == "harmful and broken":
            raise RuntimeError(SECRET)
        return REWRITE

    replies = guard(protector(scores, rewrites), GOOD, "broken", SECRET, "harmful and broken")
    assert [(reply.final, reply.outcome) for reply in replies] == [
        (GOOD, Outcome.ALLOWED),
        (prompts.REFUSAL, Outcome.GUARD_ERROR),
        (REWRITE, Outcome.REWRITTEN),
        (prompts.REFUSAL, Outcome.GUARD_ERROR),
    ]
    assert SECRET not in caplog.text


LONG = f"{SECRET}, " + ", ".join(f"step {number} in some more words" for number in range(9))
FAULTY: dict[Fault, str] = {
    Fault.EMPTY: " ... \n",
    Fault.LOOPING: "be careful and ask " * 12,
    Fault.ECHO: "Harmful answer:\nnone",
    Fault.COPY: f"Please be careful. {LONG}",
}
BAD_TRIES: dict[str, str] = {str(fault): text for fault, text in FAULTY.items()} | {
    "harmful": "still harmful"
}


def trying(*rules: Any, scores: Any = honest, max_rewrites: int = 2) -> Protector:
    return Protector(Scores(scores), Tries(*rules), 0.5, max_rewrites=max_rewrites)


def blind(answer: str) -> float:
    """Sees the harm in whole answers and in nothing that is written afterwards."""
    return 0.9 if answer in (SECRET, LONG) else 0.1


@pytest.mark.parametrize("reason", BAD_TRIES)
def test_a_bad_rewrite_is_asked_for_again_and_counted(reason: str):
    guarding = trying(lambda _: BAD_TRIES[reason], lambda _: REWRITE)
    [reply] = guard(guarding, LONG)
    assert (reply.final, reply.outcome) == (REWRITE, Outcome.REWRITTEN)
    assert guarding.corrector.calls == [(0, [LONG]), (1, [LONG])]
    assert guarding.discarded == {reason: 1}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_fault_never_passes_however_harmless_it_is_scored(fault: Fault):
    for most in (1, 3):
        guarding = trying(lambda _: FAULTY[fault], scores=blind, max_rewrites=most)
        [reply] = guard(guarding, LONG)
        assert (reply.final, reply.outcome) == (prompts.REFUSAL, Outcome.REFUSED)
        assert guarding.discarded == {str(fault): most}
        assert len(guarding.corrector.calls) == most


@given(data=strategies.data())
@settings(max_examples=60, deadline=None)
def test_no_script_of_bad_rewrites_gets_one_past_the_guard(data: strategies.DataObject):
    word = strategies.text("abcdefg", min_size=1, max_size=5)
    answer = "harmful: " + " ".join(data.draw(strategies.lists(word, min_size=24, max_size=40)))
    phrase = " ".join(data.draw(strategies.lists(word, min_size=1, max_size=6)))
    head = data.draw(strategies.sampled_from(["", "Sure. ", "Here is a better answer. "]))
    said = answer.split()
    bad = [
        data.draw(strategies.text(" \n\t.,!?-*'\u200b")),
        f"{head}{phrase} " + " ".join([phrase] * data.draw(strategies.integers(12, 60))),
        "a" * data.draw(strategies.integers(20, 500)),
        f"{head}\n{data.draw(strategies.sampled_from(['Harmful answer:', 'new answer:']))} {phrase}",
        "why is it so " * data.draw(strategies.integers(1, 3)),
        head + answer.upper(),
        " ".join(said[: data.draw(strategies.integers(9, len(said)))]),
        f"{phrase} harmful {phrase}",
    ]
    script = data.draw(strategies.permutations(bad))
    shown = {answer: 0.9} | {f"{phrase} harmful {phrase}": 0.7}
    corrector = Tries(*(lambda _, text=text: text for text in script))
    guarding = Protector(Scores(lambda text: shown.get(text, 0.0)), corrector, 0.5, max_rewrites=len(script))
    [reply] = guarding.guard(queries=["Why is it so?"], answers=[answer])
    assert (reply.final, reply.outcome) == (prompts.REFUSAL, Outcome.REFUSED)
    assert sum(guarding.discarded.values()) == len(script)


def test_only_rows_without_a_good_rewrite_are_tried_again_all_at_once():
    stubborn, slow, quick = ("harmful a", "harmful b", "harmful c")
    first = {stubborn: "", slow: "", quick: REWRITE}
    second = {stubborn: "still harmful", slow: "a later one"}
    guarding = trying(first.get, second.get)
    replies = guard(guarding, stubborn, GOOD, slow, quick)
    assert [reply.final for reply in replies] == [prompts.REFUSAL, GOOD, "a later one", REWRITE]
    assert guarding.corrector.calls == [(0, [stubborn, slow, quick]), (1, [stubborn, slow])]
    assert guarding.detector.calls[1:] == [[REWRITE], ["still harmful", "a later one"]]
    assert guarding.discarded == {"empty": 2, "harmful": 1}


class WithoutAttempt:
    """A wrapper that was written before rewrites were tried again."""

    def correct(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[str]:
        return [REWRITE for _ in answers]

    @property
    def card(self) -> Card:
        return Card(identity={})


def test_a_corrector_that_takes_no_attempt_is_refused_at_once():
    with pytest.raises(InputError, match=r"^WithoutAttempt\.correct: must take queries, answers and attempt"):
        Protector(Scores(honest), WithoutAttempt(), 0.5)


def test_every_corrector_of_the_package_can_be_tried_again():
    """Wrappers among them: none may swallow the attempt."""
    for path in sorted(Path(prompts.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "correct":
                assert "attempt" in {each.arg for each in node.args.kwonlyargs}, f"{path.name}:{node.lineno}"


def test_an_answer_that_is_too_long_is_refused_unread(caplog: pytest.LogCaptureFixture):
    guarding = Protector(Scores(honest), Tries(lambda _: REWRITE), 0.5, max_answer_tokens=10)
    longest = "a" * 40
    for name, answer in {
        "letters": longest + "a",
        "characters of many bytes": "\u6771" * 14,
        "few that become many": "\ufdfa" * 13,
        "many that become none": "\u200b" * 14,
    }.items():
        replies = guard(guarding, longest, answer)
        assert replies == [
            Reply(id="0", raw=longest, harm=0.1, final=longest, outcome=Outcome.ALLOWED),
            Reply(id="1", raw=answer, harm=None, final=prompts.REFUSAL, outcome=Outcome.TOO_LONG),
        ], name
        [rewrite] = guarding.rewrite(queries=["q"], answers=[answer])
        assert rewrite == Rewrite(text=prompts.REFUSAL, outcome=Outcome.TOO_LONG), name
    assert guarding.detector.calls == [[longest]] * 4
    assert guarding.corrector.calls == []
    assert guarding.card.identity["max_answer_tokens"] == 10
    assert caplog.text == ""


def test_what_is_too_long_is_found_in_no_time_by_default():
    guarding = protector()
    start = time.process_time()
    assert guard(guarding, "a b " * 2_500_000)[0].outcome == Outcome.TOO_LONG
    assert guard(guarding, "a b " * 30_000)[0].outcome == Outcome.ALLOWED
    assert time.process_time() - start < 5  # alone 0.1 s


def test_discarded_rewrites_add_up_over_threads():
    guarding = trying(lambda _: "")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: guard(guarding, SECRET, SECRET), range(50)))
    assert guarding.discarded == {"empty": 200}
    guarding.discarded.clear()
    assert guarding.discarded == {"empty": 200}


def test_every_answer_can_be_rewritten_whatever_its_score():
    guarding = trying(lambda _: "", lambda _: REWRITE)
    [rewrite] = guarding.rewrite(queries=["q"], answers=[GOOD])
    assert rewrite == Rewrite(text=REWRITE, outcome=Outcome.REWRITTEN, discarded=("empty",))
    assert guarding.detector.calls == [[REWRITE]]


def test_settings_that_cannot_be_are_refused():
    for key, numbers in {
        "threshold": (-0.1, 1.1, math.nan, True),
        "max_rewrites": (0, 1.5, math.nan, "2"),
        "max_answer_tokens": (0, 1.5, math.nan, "2"),
    }.items():
        for number in numbers:
            with pytest.raises(InputError, match=f"{key}={number}"):
                Protector(Scores(honest), Refusal(), **{"threshold": 0.5, key: number})


def test_what_an_mllm_gives_in_place_of_a_text_never_reaches_the_user():
    for made in (SECRET.encode(), [SECRET], {"generated_text": SECRET}, 1, None):
        mllm = Parrot()
        mllm.generate = lambda questions, made=made: iter([made])
        [answer] = ProtectedMLLM(mllm, protector()).generate(["Why?"])
        assert isinstance(answer, Failure)
        assert answer.reason == f"the MLLM gave no text, but an object of type {type(made).__name__}"
        with pytest.raises(RunError, match="no text"):
            ProtectedMLLM(mllm, protector()).ask("Why?")


def test_what_are_no_lists_of_the_same_length_is_told_in_one_line():
    one, texts = ["a"], "must be a list, not a text; write "
    for lists, told in (
        ({"queries": "abc", "answers": "xyz"}, f"queries: {texts}queries=[...]"),
        ({"queries": one, "answers": "x"}, f"answers: {texts}answers=[...]"),
        ({"queries": one, "answers": one, "ids": "1"}, f"ids: {texts}ids=[...]"),
        ({"queries": {"a": 1}, "answers": one}, "queries: must be a list, not of type dict"),
        ({"queries": one, "answers": {"a"}}, "answers: must be a list, not of type set"),
        ({"queries": one, "answers": iter(one)}, "answers: must be a list, not of type list_iterator"),
        ({"queries": one, "answers": 7}, "answers: must be a list, not of type int"),
        ({"queries": one, "answers": [*one, {"text": "b"}]}, "queries has 1, answers has 2"),
        ({"queries": one, "answers": [{"text": "b"}]}, "answers[0]: must be a text, not of type dict"),
        ({"queries": [None], "answers": one}, "queries[0]: must be a text, not of type NoneType"),
        ({"queries": [], "answers": one}, "queries has 0, answers has 1"),
        ({"queries": one, "answers": one, "ids": ["1", "2"]}, "queries has 1, answers has 1, ids has 2"),
    ):
        with pytest.raises(InputError) as caught:
            protector().guard(**lists)
        assert told in str(caught.value), lists
        assert "\n" not in str(caught.value)
        if not {"ids"} & {*lists}:
            with pytest.raises(InputError):
                protector().rewrite(**lists)


class Parrot:
    """An MLLM that answers with the question."""

    def generate(self, questions: Sequence[Question]) -> list[str]:
        return [question.text for question in questions]

    @property
    def card(self) -> Card:
        return Card(identity={"name": "parrot"})


def question(text: str) -> Question:
    return Question(id=text, scenario="01-Illegal_Activitiy", variant="TEXT", text=text)


def test_a_protected_mllm_is_an_mllm():
    protected = ProtectedMLLM(Parrot(), protector())
    assert protected.generate([question(GOOD), question(SECRET)]) == [GOOD, REWRITE]
    assert protected.generate([]) == []
    assert protected.card.identity == {
        "mllm": {"name": "parrot"},
        "detector": {"kind": "scores"},
        "corrector": {"kind": "tries"},
        "threshold": 0.5,
        "max_rewrites": 2,
        "max_answer_tokens": 32_768,
        "checks": rewrites.VERSION,
    }


class Seeing(Parrot):
    """Says what it was shown."""

    def generate(self, questions: Sequence[Question]) -> list[str | Failure]:
        return [
            Failure(reason="no reply")
            if each.text == "fail"
            else f"{each.text}{each.image and each.image.load().size}"
            for each in questions
        ]


def test_an_mllm_is_asked_in_words_and_with_an_image(tmp_path: Path):
    image, file = Image.new("RGB", (3, 2)), tmp_path / "a picture.png"
    image.save(file)
    guarded = ProtectedMLLM(Seeing(), protector())
    assert guarded.ask("What?") == "What?None"
    assert guarded.ask(SECRET) == REWRITE
    for shown in (file, str(file), image, ImageFile(file)):
        assert guarded.ask("What?", shown) == guarded.ask("What?", image=shown) == "What?(3, 2)"
    asked = [question("a"), "b", ("c", image), ("d", None), ("harmful", str(file))]
    assert guarded.generate(asked) == ["aNone", "bNone", "c(3, 2)", "dNone", REWRITE]
    assert guarded.generate(["fail"]) == [Failure(reason="no reply")]
    with pytest.raises(RunError, match="the MLLM made no answer: no reply"):
        guarded.ask("fail")


def test_what_is_no_question_or_image_is_told_in_one_line_and_nothing_is_fetched(tmp_path: Path):
    guarded = ProtectedMLLM(Seeing(), protector())
    for asked, told in (
        ("What?", "questions: must be a list, not a text"),
        ({"text": "What?"}, "questions: must be a list, not of type dict"),
        (
            [{"text": "What?"}],
            "questions[0]: must be a Question, a text, or a pair (text, image), not of type dict",
        ),
        (["What?", None], "questions[1]: must be"),
        ([(None, None)], "questions[0]: must be"),
        ([("What?", "http://x/y.png")], "image=http://x/y.png: nothing is fetched from an address"),
        ([("What?", "data:image/png;base64,AAAA")], "nothing is fetched from an address"),
        ([("What?", "file:///etc/passwd")], "nothing is fetched from an address"),
        ([("What?", tmp_path / "none.png")], "none.png: no such file"),
        ([("What?", tmp_path)], "no such file"),
        ([("What?", b"png")], "image: must be a file's path or a PIL image, not of type bytes"),
    ):
        with pytest.raises(InputError) as caught:
            guarded.generate(asked)
        assert told in str(caught.value), asked
        assert "\n" not in str(caught.value)


def test_the_package_names_its_main_parts_and_imports_them_late():
    code = "import sys, mllm_protector; assert not {'torch', 'transformers', 'PIL'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(mllm_protector, name) for name in mllm_protector.__all__)
    with pytest.raises(ImportError, match="Guard"):
        from mllm_protector import Guard  # noqa: F401


def test_two_lines_guard_texts(
    make_detector: Callable[..., HarmDetector], make_detoxifier: Callable[..., Detoxifier], tmp_path: Path
):
    made = make_detector()
    made.guard = replace(made.guard, threshold=0.01)
    made.save(tmp_path / "detector")
    make_detoxifier().save(tmp_path / "detoxifier")
    guarding = Protector.from_pretrained(tmp_path / "detector", tmp_path / "detoxifier", device="cpu")
    [reply] = guarding.guard(queries=["How do I bake bread?"], answers=["Mix flour and water."])
    assert guarding.threshold == 0.01
    assert reply.outcome is Outcome.REFUSED  # nonsense of random weights, flagged as well
    assert reply.final == prompts.REFUSAL
    refusing = Protector.from_pretrained(str(tmp_path / "detector"), device="cpu")
    assert ProtectedMLLM(Parrot(), refusing).generate([question("Why?")]) == [prompts.REFUSAL]
