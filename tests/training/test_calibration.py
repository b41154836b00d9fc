import json
import logging
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from mllm_protector.config import CONFIGS, build, clear_errors
from mllm_protector.data.sources import Labelled, Toy
from mllm_protector.data.splits import Splits
from mllm_protector.errors import InputError, RunError
from mllm_protector.files import file_digest
from mllm_protector.guard.calibration import Aim, choose_threshold
from mllm_protector.locks import locked
from mllm_protector.metrics import expected_calibration_error
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.models.guard_file import FILE_NAME, GuardFile, read_guard_file
from mllm_protector.outputs import MARKER
from mllm_protector.records import LabelledAnswer
from mllm_protector.training.calibration import calibrate_detector

REPOSITORY = Path(__file__).parents[2]

F1 = Aim("f1", None)


@dataclass(frozen=True)
class Given:
    """A source of the records that it is given."""

    train: Sequence[LabelledAnswer]
    validation: Sequence[LabelledAnswer]
    fingerprint: str = "1" * 64

    def load(self) -> Splits[LabelledAnswer]:
        return Splits(
            train=list(self.train),
            validation=list(self.validation),
            account="records of a test",
            fingerprint=self.fingerprint,
        )


def answers(count: int, start: int = 0) -> list[LabelledAnswer]:
    """As many questions, each with a harmful and a harmless answer."""
    return [
        LabelledAnswer(query=f"How do I make thing {number}?", answer=answer, harmful=harmful)
        for number in range(start, start + count)
        for answer, harmful in ((f"[harmful placeholder] {number}", True), (f"No to {number}.", False))
    ]


DATA = Given(answers(60), answers(10, start=60))


@pytest.fixture(scope="module")
def saved(make_detector: Callable[..., HarmDetector], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector as a training leaves it, with what stands beside its weights."""
    folder = tmp_path_factory.mktemp("saved") / "detector"
    detector = make_detector()
    detector.guard = replace(detector.guard, data={"account": "none", "fingerprint": "0" * 64})
    detector.save(folder)
    (folder / "last").mkdir()
    (folder / "metrics.json").write_text("{}")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A detector that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "detector"))


def redo(folder: Path, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "detector": str(folder),
        "data": DATA,
        "calibration": F1,
        "base": None,
        "device": "cpu",
        "output_dir": None,
        "seed": 0,
    }
    return calibrate_detector(**arguments | changes)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scores_of(folder: Path, records: Sequence[LabelledAnswer]) -> list[float]:
    return load_detector(folder, device="cpu").score(
        queries=[record.query for record in records], answers=[record.answer for record in records]
    )


def test_only_the_guard_file_changes_and_the_detector_loads_with_what_was_found(
    folder: Path, saved: Path
) -> None:
    found = redo(folder)
    before, after = content(saved), content(folder)
    assert [name for name in after if after[name] != before.get(name)] == [FILE_NAME]
    assert after.keys() == before.keys()
    old, new = read_guard_file(saved, "detector"), read_guard_file(folder, "detector")
    changed = {"threshold", "threshold_how", "temperature", "offset", "calibration"}
    keep = {name: getattr(old, name) for name in changed}
    assert replace(new, **keep) == old
    for name in ("threshold", "temperature", "offset"):
        assert getattr(new, name) == found[name]
    assert load_detector(folder, device="cpu").threshold == found["threshold"]
    assert new.calibration is not None
    assert (new.calibration["aim"], new.calibration["n"], new.calibration["negatives"]) == ("f1", 140, 70)
    assert new.calibration["data"] == {
        "account": "records of a test",
        "fingerprint": "1" * 64,
        "part": "all",
    }


def test_the_figures_are_those_of_the_detector_in_use(folder: Path) -> None:
    records = [*DATA.train, *DATA.validation]
    labels = [record.harmful for record in records]
    found = redo(folder)
    scores = scores_of(folder, records)
    assert found["ece_after_calibration"] == pytest.approx(expected_calibration_error(labels, scores))
    flagged = [score >= found["threshold"] for score in scores]
    alarms = sum(flag and not label for flag, label in zip(flagged, labels, strict=True))
    hits = sum(flag and label for flag, label in zip(flagged, labels, strict=True))
    assert (alarms, hits) == (found["false_positive_rate"] * 70, found["recall"] * 70)


def test_with_a_detectors_own_scores_the_promise_holds_in_95_of_100_resampled_splits(saved: Path) -> None:
    records = answers(150)
    scores, labels = np.array(scores_of(saved, records)), np.array([record.harmful for record in records])
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(100):
        drawn = rng.integers(len(records), size=400)
        choice = choose_threshold(
            list(map(bool, labels[drawn])), list(scores[drawn]), Aim("false_positive_rate", 0.2)
        )
        assert choice.facts["promised"] is True
        kept += np.mean(scores[~labels] >= choice.threshold) <= 0.2
    assert kept >= 95


def test_a_table_shows_the_old_calibration_and_the_new_one(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [*DATA.train, *DATA.validation]
    error = expected_calibration_error([record.harmful for record in records], scores_of(folder, records))
    with caplog.at_level(logging.INFO):
        found = redo(folder)
    lines = [re.split(" {2,}", line) for line in caplog.text.splitlines()]
    rows = {line[0]: line[1:] for line in lines if len(line) == 3}
    assert rows["threshold"] == ["0.4000", f"{found['threshold']:.4f}"]
    assert rows["temperature"] == ["1.5000", f"{found['temperature']:.4f}"]
    assert rows["offset"] == ["0.0000", f"{found['offset']:.4f}"]
    assert rows["calibration error (ECE)"] == [f"{error:.4f}", f"{found['ece_after_calibration']:.4f}"]
    assert found["scale_how"] in caplog.text
    for name in (
        "false positive rate, 70 harmless",
        "at most, at confidence 0.95",
        "recall, 70 harmful",
        "at least, at confidence 0.95",
    ):
        assert len(rows[name]) == 2


def test_repeating_it_changes_nothing(folder: Path) -> None:
    assert redo(folder) == redo(folder)


def test_scores_that_are_all_too_high_get_an_offset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def logits(self: HarmDetector, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Of each kind, one answer in five is on the wrong side; all are 4 too high."""
        own = [2 * ("harmful" in answer) - 1 for answer in answers]
        wrong = [-1 if place // 2 % 5 == 0 else 1 for place in range(len(answers))]
        return [math.log(4) * one * other + 4.0 for one, other in zip(own, wrong, strict=True)]

    monkeypatch.setattr(HarmDetector, "logits", logits)
    found = redo(folder)
    records = [*DATA.train, *DATA.validation]
    scores = load_detector(folder).score(queries=["?"] * 140, answers=[r.answer for r in records])
    error = expected_calibration_error([record.harmful for record in records], scores)
    assert found["ece_after_calibration"] == pytest.approx(error)
    assert error < 0.03
    assert found["offset"] == pytest.approx(-4.0, abs=0.1)
    assert found["scale_how"] == "temperature and offset with the least log loss on 140 answers"
    assert found["ece_before_calibration"] > 0.3


def test_a_copy_is_whole_and_the_original_stays(folder: Path, tmp_path: Path, saved: Path) -> None:
    target = tmp_path / "new" / "calibrated"
    found = redo(folder, output_dir=str(target))
    assert content(folder) == content(saved)
    assert read_guard_file(target, "detector").threshold == found["threshold"]
    assert load_detector(target, device="cpu").threshold == found["threshold"]
    assert not (target / "last").exists()
    assert [path.name for path in target.parent.iterdir()] == ["calibrated"]


def test_a_copy_that_breaks_off_leaves_no_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GuardFile, "write", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        redo(folder, output_dir=str(tmp_path / "new" / "calibrated"))
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_with_something_in_it_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match=r"output_dir=.*full: is not empty; choose another one, or null"):
        redo(folder, output_dir=str(tmp_path / "full"))


def test_a_copy_within_the_detector_s_own_folder_is_refused(folder: Path) -> None:
    for name in ("copy", "last/copy"):
        with pytest.raises(InputError, match=f"output_dir=.*{name}: lies within"):
            redo(folder, output_dir=str(folder / name))


def test_a_detector_that_is_being_trained_is_not_calibrated(folder: Path) -> None:
    before = content(folder)
    with locked(folder, "output_dir"), pytest.raises(InputError, match="another run writes there"):
        redo(folder)
    assert content(folder) == before


def test_a_calibrated_detector_is_still_that_of_its_training(folder: Path) -> None:
    marker = folder / MARKER
    marker.write_text(json.dumps({"train_detector": {}}))
    redo(folder)
    assert json.loads(marker.read_text()) == {"train_detector": {}}  # it was none of it
    marker.write_text(json.dumps({"train_detector": {FILE_NAME: "another"}}))
    redo(folder)
    assert json.loads(marker.read_text()) == {"train_detector": {FILE_NAME: file_digest(folder / FILE_NAME)}}


def test_answers_that_it_was_trained_on_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = redo(folder, data=replace(DATA, fingerprint="0" * 64))
    assert (found["n"], found["data"]["part"]) == (20, "validation")
    assert "was trained on this data, so only its validation part is used" in caplog.text


def promises_broken(caplog: pytest.LogCaptureFixture) -> list[str]:
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return [warning for warning in warnings if "promised" in warning]


def test_a_promise_that_cannot_be_kept_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = redo(folder, calibration=Aim("false_positive_rate", 0.01))
    assert found["promised"] is False
    [warning] = promises_broken(caplog)
    assert warning == found["threshold_how"]
    assert "at least 299 harmless answers are needed" in warning


def test_a_promise_that_can_be_kept_is_not(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Given(answers(300), answers(10, start=300))
    found = redo(folder, data=data, calibration=Aim("recall", 0.5))
    assert found["promised"] is True
    assert found["recall_bound"] >= 0.5
    assert not promises_broken(caplog)


def test_scores_that_tell_nothing_are_warned_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def turned(self: HarmDetector, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [-3.0 if "harmful" in answer else 3.0 for answer in answers]

    monkeypatch.setattr(HarmDetector, "logits", turned)
    redo(folder)
    assert "the scores do not tell harmful answers from harmless ones" in caplog.text


def test_answers_of_one_kind_only_are_refused(folder: Path, saved: Path) -> None:
    for harmful in (True, False):
        one_kind = [record for record in answers(5) if record.harmful == harmful]
        with pytest.raises(InputError, match="both kinds are needed to calibrate"):
            redo(folder, data=Given(one_kind, one_kind))
        assert content(folder) == content(saved), harmful


def test_a_score_that_is_no_number_stops_it_and_nothing_is_written(
    folder: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HarmDetector, "logits", lambda self, queries, answers: [float("nan")] * len(queries))
    with pytest.raises(RunError, match="a score is not a number"):
        redo(folder)
    assert content(folder) == content(saved)


def test_what_is_no_detector_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder; train the detector first"):
        redo(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no guard\.json, so this is not a trained detector"):
        redo(tmp_path)


def test_what_cannot_be_written_is_refused_before_anything_is_read(folder: Path) -> None:
    class Unread:
        def load(self) -> Splits[Any]:
            raise AssertionError("the data was read")

    nowhere = Path("/proc/self")  # not even root can make a file there
    with pytest.raises(InputError, match=r"^/proc/self: cannot be written to .*give output_dir=<a new fold"):
        redo(nowhere, data=Unread())
    with pytest.raises(InputError, match=r"^output_dir=/proc/self/copy: cannot be written to"):
        redo(folder, data=Unread(), output_dir=str(nowhere / "copy"))


def test_a_write_that_fails_is_one_line_and_leaves_the_detector_as_it_was(
    folder: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refuse)
        with pytest.raises(
            InputError, match=r"cannot be written \(Permission denied\); the detector is unch"
        ):
            redo(folder)
    assert content(folder) == content(saved)


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return build(compose("calibrate_detector", list(overrides)), calibrate_detector)


def complaint(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    with pytest.raises(SystemExit), clear_errors():
        composed(*overrides)
    return capsys.readouterr().err


def test_every_aim_is_an_option() -> None:
    for aim in ("f1", "false_positive_rate", "recall", "fixed"):
        assert composed(f"calibration={aim}")["calibration"].kind == aim


def test_a_wrong_aim_is_one_line_that_names_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, message in (
        (("calibration=precision",), "error: calibration=precision: unknown option; choose one of f1, "),
        (("calibration=recall", "calibration.target=1.5"), "error: calibration.target=1.5: recall takes"),
        (("calibration=recall", "calibration.target=null"), "error: calibration.target=None: recall takes"),
        (("calibration.kind=precision",), "error: calibration.kind=precision: must be 'false_positive_rate'"),
        (("calibration.confidence=95",), "error: calibration.confidence=95: must be at least 0.5"),
    ):
        said = complaint(capsys, *overrides)
        assert said.startswith(message)
        assert said.count("\n") == 1, message


def test_the_script_calibrates_on_the_validation_part_of_the_toy_data(folder: Path, tmp_path: Path) -> None:
    guard = read_guard_file(folder, "detector")
    replace(guard, data={"fingerprint": Toy().load().fingerprint}).write(folder)
    overrides = [f"detector={folder}", "data=toy", "calibration=false_positive_rate", "output_dir=copy"]
    ran = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "calibrate_detector.py"), *overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert re.search("old calibration +new calibration\n", ran.stdout)
    assert "written: copy/guard.json (" in ran.stdout
    found = read_guard_file(tmp_path / "copy", "detector").calibration
    assert found is not None
    assert (found["aim"], found["n"]) == ("false_positive_rate", 400)


def test_a_labelled_source_is_read_whole(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"query": r.query, "answer": r.answer, "harmful": r.harmful} for r in answers(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"limit": None, "duplicates": "exact", "quarantine": None}
    source = Labelled(path=str(path), validation_fraction=0.1, seed=0, **options)
    assert redo(folder, data=source)["n"] == 40
