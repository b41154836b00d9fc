import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from mllm_protector.config import CONFIGS
from mllm_protector.data.sources import Toy
from mllm_protector.data.splits import Splits
from mllm_protector.errors import InputError, RunError
from mllm_protector.evaluation import detoxifier as module
from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.detoxifier import Detoxifier
from mllm_protector.prompts import REFUSAL
from mllm_protector.records import AnswerPair, LabelledAnswer, corrections
from mllm_protector.reporting.parts import report_detoxifier as report
from tests.evaluation.builders import Measured

LIMIT = 12


@pytest.fixture(scope="module")
def parts(
    make_detector: Callable[..., HarmDetector],
    make_detoxifier: Callable[..., Detoxifier],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folders ``detector``, ``judge`` and ``detoxifier`` of parts with random weights."""
    root = tmp_path_factory.mktemp("parts")
    make_detector().save(root / "detector")
    make_detector("qwen2").save(root / "judge")
    make_detoxifier().save(root / "detoxifier")
    return root


def settings(parts: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "data": Toy(),
        "both_harmful": "drop",
        "limit": LIMIT,
        "detoxifier": str(parts / "detoxifier"),
        "base": None,
        "detector": str(parts / "detector"),
        "judge_detector": str(parts / "judge"),
        "max_rewrites": 2,
        "rewrite_tokens": 8,
        "batch_size": 4,
        "output_dir": str(out),
        "seed": 0,
    } | more


def eval_detoxifier(**given: Any) -> dict[str, Any]:
    """With its report, as the script does it."""
    done = module.eval_detoxifier(**given)
    report(done)
    return done[0]


@pytest.fixture(scope="module")
def run(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """Figures, folder and print of a run."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("rich.console.Console.print", lambda _, *what, **__: said.extend(map(str, what)))
        metrics = eval_detoxifier(**settings(parts, out))
    return metrics, out, "\n".join(said)


def test_all_arms_are_measured_beside_each_other(run: tuple[dict[str, Any], Path, str]):
    metrics, out, _ = run
    assert json.loads((out / "metrics.json").read_text()) == metrics
    found = Measured(metrics["measurements"])
    arms = ["protector", "unchecked", "refusal", "base", "accepted", "rejected"]
    assert list(dict.fromkeys(row["arm"] for row in found)) == arms
    for arm in arms:
        low, high = found.limits("safe", arm=arm)
        assert (found.one("safe", arm=arm)["n"], low <= found.value("safe", arm=arm) <= high) == (LIMIT, True)
        for name in ("refused", "on_query", "on_query_control", "copied", "perplexity"):
            assert len(found.all(name, arm=arm)) == 1, (name, arm)
    assert found.value("canned", arm="refusal") == 1
    assert found.value("on_accepted", arm="accepted") == pytest.approx(1)
    assert found.value("copied", arm="rejected") == 1
    assert found.value("faulty", arm="protector") == 0
    assert metrics["notes"] == []


def test_the_rows_hold_every_text_and_the_pairs_are_held_out(run: tuple[dict[str, Any], Path, str]):
    metrics, out, _ = run
    rows = [json.loads(line) for line in (out / "rewrites.jsonl").open()]
    assert len(rows) == LIMIT
    held_out = {(each.query, each.rejected) for each in corrections(Toy().load().validation)}
    assert {(row["query"], row["arms"]["rejected"]["text"]) for row in rows} <= held_out
    for row in rows:
        shown = row["arms"]["protector"]["text"]
        assert shown == {"refused": REFUSAL, "rewritten": shown}[row["outcome"]]
        assert row["arms"]["protector"]["fault"] is None
        assert len(row["discarded"]) == 2 or row["outcome"] == "rewritten"
        if not row["discarded"]:
            assert shown == row["arms"]["unchecked"]["text"]
    found = Measured(metrics["measurements"])
    discarded = sum(row["value"] for row in found if row["metric"].startswith("discarded_"))
    assert discarded == sum(len(row["discarded"]) for row in rows)
    assert found.value("retried") == sum(bool(row["discarded"]) for row in rows) / LIMIT
    assert found.value("refused_in_the_end") == sum(row["outcome"] == "refused" for row in rows) / LIMIT


def test_people_get_tables(run: tuple[dict[str, Any], Path, str]):
    _, out, said = run
    text = (out / "rewrites.md").read_text()
    assert re.search(r"\| +refusal \| +base \|", text)
    assert "12 harmful answers to 12 queries" in text
    assert "12 harmful answers to 12 queries" in said


def rounded(folder: Path) -> list[dict[str, Any]]:
    """The rows; batches of another size change the last digits of a score."""
    rows = [json.loads(line) for line in (folder / "rewrites.jsonl").open()]
    for row in rows:
        for arm in row["arms"].values():
            arm["harm"] = round(arm["harm"], 4)
    return rows


def test_another_batch_size_gives_the_same(
    run: tuple[dict[str, Any], Path, str], parts: Path, tmp_path: Path
):
    eval_detoxifier(**settings(parts, tmp_path, batch_size=3))
    assert rounded(tmp_path) == rounded(run[1])
    assert (tmp_path / "rewrites.md").read_text() == (run[1] / "rewrites.md").read_text()


def test_the_judge_its_place_and_its_threshold_stand_wherever_its_figures_do(
    run: tuple[dict[str, Any], Path, str], parts: Path
):
    metrics, out, said = run
    folder, threshold = str(parts / "judge"), metrics["judge"]["threshold"]
    assert (metrics["judge"]["folder"], metrics["judge"]["circular"]) == (folder, False)
    for line in (out / "rewrites.jsonl").open():
        assert json.loads(line)["judge"] == {"folder": folder, "threshold": threshold, "circular": False}
    text = (out / "rewrites.md").read_text().replace("\\", "")
    for name, shown in (("rewrites.md", text), ("print", said)):
        assert f"Judge: the detector in {folder} (base " in shown, name
        assert f"threshold {threshold:.4g}" in shown, name
        assert "ircular" not in shown, name


def test_a_judge_that_is_the_guards_own_detector_is_called_circular(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    metrics = eval_detoxifier(**settings(parts, tmp_path, limit=2, judge_detector=str(parts / "detector")))
    assert metrics["judge"]["circular"]
    for shown in ((tmp_path / "rewrites.md").read_text(), capsys.readouterr().out):
        assert "Circular: it is the guard's own" in " ".join(shown.split())
        assert "safe \u2191 (circular)" in shown


def test_the_judge_is_the_guards_detector_unless_another_one_is_given():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert compose("eval_detoxifier", ["detector=elsewhere"]).judge_detector == "elsewhere"
        other = compose("eval_detoxifier", ["detector=elsewhere", "judge_detector=other"])
    assert (other.detector, other.judge_detector) == ("elsewhere", "other")


def test_data_that_the_detoxifier_has_seen_are_told(parts: Path, tmp_path: Path):
    folder = tmp_path / "detoxifier"
    folder.mkdir()
    for path in (parts / "detoxifier").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    guard = json.loads((folder / "guard.json").read_text())
    guard["data"] = {"account": Toy().load().account, "fingerprint": "of another split"}
    (folder / "guard.json").write_text(json.dumps(guard))
    metrics = eval_detoxifier(**settings(parts, tmp_path / "out", limit=2, detoxifier=str(folder)))
    assert "has seen some of these" in metrics["notes"][0]


class Given:
    """A source of these validation records."""

    def __init__(self, *records: Any) -> None:
        self.records = list(records)

    def load(self) -> Splits[Any]:
        return Splits(train=[], validation=self.records, account="given", fingerprint="")


PAIR = AnswerPair(query="q", accepted="a", rejected="b")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": Given(LabelledAnswer(query="q", answer="a", harmful=True))}, "single labelled answers"),
        ({"data": Given(PAIR)}, "fewer than two harmful answers"),
        ({"limit": 1}, "limit=1"),
        ({"base": "no/such/folder"}, "no/such/folder"),
        ({"judge_detector": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    changes: dict[str, Any], reason: str, parts: Path, tmp_path: Path
):
    with pytest.raises(InputError, match=reason):
        eval_detoxifier(**settings(parts, tmp_path, **{"limit": 2, **changes}))
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_trained_part_is_not_written_to(parts: Path):
    with pytest.raises(InputError, match="holds a trained part"):
        eval_detoxifier(**settings(parts, parts / "detector"))


def test_a_judge_that_gives_no_number_stops_the_run(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    score = HarmDetector.score

    def broken(self: HarmDetector, **texts: Any) -> list[float]:
        return [math.nan if REFUSAL in texts["answers"] else harm for harm in score(self, **texts)]

    monkeypatch.setattr(HarmDetector, "score", broken)
    with pytest.raises(RunError, match="judge: a score is not a number"):
        eval_detoxifier(**settings(parts, tmp_path, limit=2))
    assert not list(tmp_path.iterdir())
