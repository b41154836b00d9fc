"""What a client sees of answers that are streamed behind a detector."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.errors import InputError
from mllm_protector.evaluation import streaming
from mllm_protector.evaluation.streaming import Prefix, Seen, Stream, measure_streaming, replayed, seen_of
from mllm_protector.models.detector import HarmDetector
from mllm_protector.records import LabelledAnswer
from mllm_protector.reporting.streaming import report_streaming
from tests.training.parts import DATA, Given

SAFE, HARMFUL = -5.0, 5.0


def of(*scores: float) -> Stream:
    """A harmful answer with a prefix at every 10 characters; the last score is that of the whole."""
    found = [Prefix(10 * n, 10 * n, 2 * n, score) for n, score in enumerate(scores, 1)]
    return Stream(True, found[:-1], found[-1])


def test_what_is_seen_ends_with_the_last_prefix_that_passed() -> None:
    low, high = 0.1, 0.9
    for scores, hits, seen in (
        ((low, low, low), 2, Seen(30, True, 2)),
        ((low, low, high), 2, Seen(20, False, 2)),
        ((low, high, low, low), 2, Seen(40, True, 2)),
        ((low, high, high, low, low), 2, Seen(10, False, 2)),
        ((low, high, low, low), 1, Seen(10, False, 2)),
        ((high, low, high, low), 2, Seen(40, True, 4)),
        # Nothing was out when it was held, so the whole decides.
        ((high, high, low, low), 2, Seen(40, True, 8)),
        ((high, high, low, high), 2, Seen(0, False, 8)),
        ((high,), 2, Seen(0, False, 2)),
        ((low,), 2, Seen(10, True, 2)),
        ((high, low), None, Seen(20, True, 4)),
        ((low, high), None, Seen(0, False, 4)),
    ):
        assert seen_of(of(*scores), 0.5, hits) == seen, (scores, hits)
    assert not seen_of(of(0.5), 0.5, 2).is_whole


@pytest.fixture
def measured_with(
    tmp_path: Path, make_detector: Callable[..., HarmDetector], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, Any], Path]]:
    """Measures with a detector that goes by a word."""
    make_detector().save(tmp_path / "detector")

    def by_word(detector: HarmDetector, records: Sequence[LabelledAnswer]) -> list[float]:
        return [HARMFUL if "goes like" in record.answer else SAFE for record in records]

    def measure(**changes: Any) -> tuple[dict[str, Any], Path]:
        monkeypatch.setattr(streaming, "logits_of", by_word)
        arguments = {
            "data": DATA,
            "detector": str(tmp_path / "detector"),
            "base": None,
            "device": "cpu",
            "split": "all",
            "limit": None,
            "window_tokens": 2,
            "hits": [1, 2],
            "thresholds": [0.5],
            "false_cuts": 0.05,
            "output_dir": str(tmp_path / "out"),
            "seed": 0,
        }
        return measure_streaming(**arguments | changes)

    return measure


def values(result: dict[str, Any], group: str = "0.5") -> dict[tuple[str, str], float]:
    rows = [row for row in result["measurements"] if row["group"] == group]
    return {(row["arm"], row["metric"]): row["value"] for row in rows}


def test_harm_at_the_end_is_seen_up_to_there_and_hits_make_no_difference_to_it(
    measured_with: Callable[..., tuple[dict[str, Any], Path]],
) -> None:
    result, _ = measured_with()
    found = values(result)
    harmful = [pair.rejected for pair in (*DATA.train, *DATA.validation)]
    before = sum(text.index("goes like") + len("goes like") - 1 for text in harmful)
    everything = sum(map(len, harmful))
    for arm in ("window 1", "window 2"):
        assert 0.5 < found[arm, "harmful_shown"] <= before / everything
        assert found[arm, "shown_before_stop"] == found[arm, "harmful_shown"]
        assert found[arm, "never_stopped"] == found[arm, "false_cuts"] == 0
        assert 2 <= found[arm, "delay_tokens"] <= 8
    assert found["buffer", "harmful_shown"] == 0
    assert found["buffer", "delay_tokens"] > 8
    assert (result["answers"], result["harmful"], result["queries"]) == (42, 21, 21)


def test_a_threshold_is_chosen_that_stops_few_harmless_answers(
    measured_with: Callable[..., tuple[dict[str, Any], Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    result, folder = measured_with()
    assert set(result["chosen"]) == {"buffer", "window 1", "window 2"}
    for arm, threshold in result["chosen"].items():
        assert threshold < 0.05  # just above the score of harmless words
        assert values(result, f"{threshold:.4g}")[arm, "false_cuts"] == 0
    assert json.loads((folder / "streaming.json").read_text()) == result
    report_streaming((result, folder))
    shown = (folder / "streaming.md").read_text()
    assert "harmful text shown, %" in shown
    assert "At most 5 % of harmless answers stopped" in capsys.readouterr().out
    thresholds = {0.5, *result["chosen"].values()}
    assert (folder / "streaming.csv").read_text().count("harmful_shown") == 3 * len(thresholds)
    assert "[harmful placeholder]" not in shown


def test_prefixes_end_with_a_token_and_are_as_long_as_the_window(
    make_detector: Callable[..., HarmDetector],
) -> None:
    text = "I will not help with thing 5. " * 4
    [stream] = replayed(make_detector(), [LabelledAnswer(query="Why?", answer=text, harmful=False)], 4)
    ends = [0, *(prefix.size for prefix in stream.prefixes)]
    assert all(16 <= after - before < 32 for before, after in pairwise(ends))
    assert (stream.whole.size, stream.whole.characters) == (len(text), len(text))
    assert all(0 <= prefix.score <= 1 for prefix in (*stream.prefixes, stream.whole))


def test_fewer_answers_are_drawn_and_what_cannot_be_measured_is_refused(
    measured_with: Callable[..., tuple[dict[str, Any], Path]],
) -> None:
    assert measured_with(limit=30)[0]["answers"] == 30
    safe = Given(train=[LabelledAnswer(query="Why?", answer="So.", harmful=False)], validation=[])
    with pytest.raises(InputError, match="has no harmful answers"):
        measured_with(data=safe)
    with pytest.raises(InputError, match=r"hits=\[\]"):
        measured_with(hits=[])
