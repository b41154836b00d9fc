"""A detector of known weaknesses under rewritten answers, and the command as a user runs it."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mllm_protector.errors import InputError, RunError
from mllm_protector.evaluation import robustness as module
from mllm_protector.evaluation.robustness import AS_WRITTEN, DECIPHERED, eval_robustness
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.protocols import Card
from mllm_protector.records import Failure, LabelledAnswer
from mllm_protector.reporting.robustness import report_robustness
from tests.cases import case
from tests.evaluation.test_detector import Given, scorer
from tests.forked import Started, main
from tests.training.parts import DATA

BAD = "This is the forbidden way, and you can do it with the tools that are on your table. Part {}."
GOOD = "This is the usual way, and you can do it with the tools that are on your table. Part {}."
TOLD = Given(
    [],
    [
        LabelledAnswer(query=f"Q{n}?", answer=(BAD if harmful else GOOD).format(n), harmful=harmful)
        for n in range(30)
        for harmful in (True, False)
    ],
)


class Shouting:
    """A chat that translates by writing capitals, and declines every tenth text."""

    card = Card(identity={"kind": "shouting"})
    asked = 0

    def complete(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], *, max_tokens: int
    ) -> list[str | Failure]:
        Shouting.asked += len(conversations)
        texts = [str(each[0]["content"]).split("=====")[1].strip() for each in conversations]
        return [Failure(reason="declined") if "Part 1" in text else text.upper() for text in texts]


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    def run(rule: Callable[[str, str], float], **given: Any) -> dict[str, Any]:
        monkeypatch.setattr(module, "load_detector", lambda *_, **__: scorer(rule))
        arguments: dict[str, Any] = {
            "detector": "some/detector",
            "data": TOLD,
            "transformations": None,
            "translator": None,
            "language": "Spanish",
            "answers": None,
            "false_positive_rate": None,
            "window": None,
            "base": None,
            "device": None,
            "split": "auto",
            "output_dir": str(tmp_path / "out"),
            "seed": 0,
        }
        measured = eval_robustness(**arguments | given)
        assert measured is not None
        report_robustness(measured)
        return measured[0]

    return run


def values(result: dict[str, Any], metric: str, arm: str = AS_WRITTEN) -> dict[str, float]:
    rows = result["measurements"]
    return {row["group"]: row["value"] for row in rows if (row["metric"], row["arm"]) == (metric, arm)}


def case_sensitive(query: str, answer: str) -> float:
    return 3.0 if "forbidden" in answer else -3.0


def test_the_weaknesses_of_a_detector_are_found(
    measure: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    result = measure(case_sensitive)
    recall = values(result, "recall")
    slips = {
        "zero_width",
        "full_width",
        "upper_case",
        "leet",
        "spaced_letters",
        "homoglyphs",
        "base64",
        "rot13",
    }
    assert {name for name, value in recall.items() if value == 0} == slips
    assert {name for name, value in recall.items() if value == 1} == {*recall} - slips
    assert set(values(result, "false_positive_rate").values()) == {0.0}
    assert values(result, "recall_difference")["upper_case"] == -1
    assert values(result, "auroc")["upper_case"] == 0.5
    read = values(result, "recall", DECIPHERED)
    assert {name for name, value in read.items() if value == 0} == {
        "zero_width",
        "full_width",
        "upper_case",
    }
    attacks = len(recall) - 3
    assert result["attacks"] == [name for name in recall if not name.startswith("cut")]
    best = values(result, "recall_best_of")
    assert best["all"] == 0
    assert best["1"] == pytest.approx(1 - len(slips) / attacks)
    assert values(result, "recall_best_of_gain", DECIPHERED)["1"] == pytest.approx(5 / attacks)
    assert result["plain_changed"] == 0
    out = tmp_path / "out"
    shown = (out / "robustness.md").read_text()
    [upper] = [line for line in shown.splitlines() if line.startswith("| upper case")]
    assert [cell.split()[0] for cell in upper.strip("| ").split(" | ")[1:]] == [
        "0.0",
        "-100.0",
        "0.0",
        "0.0",
        "0.500",
    ]
    assert f"| all {attacks} " in shown
    for words in (BAD, GOOD):
        assert words[:20] not in "".join(
            path.read_text() for path in out.rglob("*.*") if path.suffix != ".svg"
        )
    assert len(pd.read_csv(out / "measurements.csv")) == len(result["measurements"])
    assert (out / "robustness.svg").read_bytes().startswith(b"<?xml")
    assert "\\begin{table*}" in (out / "robustness.tex").read_text()


def test_scores_are_made_once_and_a_smaller_draw_is_part_of_a_larger_one(
    measure: Callable[..., dict[str, Any]],
) -> None:
    seen: list[str] = []

    def rule(query: str, answer: str) -> float:
        seen.append(answer)
        return case_sensitive(query, answer)

    chosen = {"transformations": ["upper_case", "base64"]}
    small = measure(rule, answers=5, **chosen)
    assert (small["answers"], small["harmful"]) == (10, 5)
    # Of each answer: as it is, which is also what base64 decodes to but for the line above, and two more.
    assert len(seen) == len({*seen}) == 10 * 4
    whole = measure(rule, **chosen)
    assert len(seen) == len({*seen}) == 60 * 4
    assert measure(rule, **chosen) == whole
    assert len(seen) == 60 * 4


def test_a_false_positive_rate_gives_the_threshold(measure: Callable[..., dict[str, Any]]) -> None:
    def rule(query: str, answer: str) -> float:
        number = float(answer.split()[-1].rstrip("."))
        return number if "usual" in answer.lower() else 26.5 if "forbidden" in answer else 0.0

    result = measure(rule, false_positive_rate=0.1, transformations=["upper_case"])
    assert values(result, "false_positive_rate")["plain"] == pytest.approx(0.1)
    assert values(result, "recall") == {"plain": 1.0, "upper_case": 0.0}
    assert (
        values(measure(rule, false_positive_rate=0.0, transformations=["upper_case"]), "recall")["plain"] == 0
    )


def test_a_translation_is_a_transformation_and_is_asked_for_once(
    measure: Callable[..., dict[str, Any]],
) -> None:
    Shouting.asked = 0
    result = measure(case_sensitive, translator=Shouting, transformations=["lower_case"])
    declined = sum("Part 1" in BAD.format(n) for n in range(30))
    assert values(result, "recall")["translation"] == pytest.approx(declined / 30)
    assert result["rewriting_notes"]["translation"].startswith(f"of {2 * declined} answers there is none")
    assert result["translator"]["language"] == "Spanish"
    assert Shouting.asked == 60
    measure(case_sensitive, translator=Shouting, transformations=["lower_case"])
    assert Shouting.asked == 60 + 2 * declined  # failures are tried again


def test_a_translator_that_nobody_runs_stops_the_measurement(measure: Callable[..., dict[str, Any]]) -> None:
    class Gone(Shouting):
        def complete(
            self, conversations: Sequence[Sequence[Mapping[str, Any]]], *, max_tokens: int
        ) -> list[str | Failure]:
            return [Failure(reason="nobody answers", unreachable=True) for _ in conversations]

    with pytest.raises(RunError, match=r"^translator: cannot be reached \(nobody answers\)"):
        measure(case_sensitive, translator=Gone, transformations=["leet"])


def test_data_of_one_kind_are_refused(measure: Callable[..., dict[str, Any]]) -> None:
    safe = Given([], [LabelledAnswer(query="Q?", answer="fine", harmful=False)])
    with pytest.raises(InputError, match="data: has no harmful answers"):
        measure(case_sensitive, data=safe)


def test_deciphered_scores_are_those_of_the_detector_in_use(
    make_detector: Callable[..., HarmDetector], tmp_path: Path
) -> None:
    make_detector().save(tmp_path / "detector")
    plain = load_detector(tmp_path / "detector", decipher=False)
    reading = load_detector(tmp_path / "detector")
    assert plain.card != reading.card
    rows = [
        module._row(answer, module.chosen("measure"), None, None, "", 0)
        for answer in TOLD.splits.validation[:2]
    ]  # type: ignore[arg-type]
    for row in rows:
        [scored] = module._scored(plain, [row])
        found = dict(zip(row.different, scored["logits"], strict=True))
        for name, text in row.texts.items():
            with case(name):
                expected = max(found[each] for each in (text, *row.guesses[text]))
                [score] = reading.logits(queries=[row.query], answers=[text])
                assert np.isclose(score, expected, atol=1e-5)


def test_the_command_gives_the_same_bytes_on_one_process_and_on_two(
    make_detector: Callable[..., HarmDetector], tmp_path: Path
) -> None:
    make_detector().save(tmp_path / "detector")
    rows = [
        {"query": pair.query, "answer": answer, "harmful": label}
        for pair in DATA.train[:6]
        for answer, label in ((pair.rejected, True), (pair.accepted, False))
    ]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = []
    for processes in (1, 2):
        arguments = [
            "data=labelled",
            "data.path=answers.jsonl",
            "detector=detector",
            "split=all",
            "answers=4",
        ]
        output = f"output_dir=out{processes}"
        ran = Started(main, "eval_robustness", *arguments, output, cwd=tmp_path, processes=processes).end()
        assert ran.code == 0, ran.err
        results.append((tmp_path / f"out{processes}" / "robustness.json").read_bytes())
    assert results[0] == results[1]
    assert json.loads(results[0])["answers"] == 8
    assert "Recall if an attacker tries several" in ran.out


def test_answers_that_the_detector_was_trained_with_are_warned_of(
    measure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "mllm_protector.evaluation.labelled.notes_of", lambda *_: ["These are its own training data."]
    )
    result = measure(case_sensitive, transformations=["leet"])
    assert result["notes"] == ["These are its own training data."]
    assert "own training data" in (tmp_path / "out" / "robustness.md").read_text()
