import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.data.mixture import Mixture
from mllm_protector.data.splits import Origin, SourceAccount, Splits
from mllm_protector.errors import InputError, RunError
from mllm_protector.files import file_digest
from mllm_protector.guard.calibration import Aim
from mllm_protector.locks import locked
from mllm_protector.metrics import expected_calibration_error
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.models.guard_file import FILE_NAME, GuardFile, read_guard_file
from mllm_protector.outputs import MARKER
from mllm_protector.records import LabelledAnswer
from mllm_protector.training.recalibration import calibrate_detector
from tests.training.parts import Given, Unread

F1 = Aim("f1", None)


def answers(count: int, start: int = 0) -> list[LabelledAnswer]:
    """As many questions, each with a harmful and a harmless answer."""
    return [
        LabelledAnswer(query=f"How do I make thing {number}?", answer=answer, harmful=harmful)
        for number in range(start, start + count)
        for answer, harmful in ((f"[harmful placeholder] {number}", True), (f"No to {number}.", False))
    ]


DATA = Given(answers(60), answers(10, start=60))
LEARNT = Given(answers(30), answers(10, start=60))


@pytest.fixture(scope="module")
def saved(make_detector: Callable[..., HarmDetector], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector as a training leaves it, with the files beside its weights."""
    folder = tmp_path_factory.mktemp("saved") / "detector"
    detector = make_detector()
    detector.guard = replace(
        detector.guard, data={"account": "none", "fingerprint": LEARNT.load().fingerprint}
    )
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
        "fingerprint": DATA.load().fingerprint,
        "part": "all",
    }


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
    found = redo(folder, data=LEARNT)
    assert (found["n"], found["data"]["part"]) == (20, "validation")
    assert "was trained on this data, so only its validation part is used" in caplog.text


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


def test_a_folder_that_cannot_take_the_result_is_refused_before_anything_is_read(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for detector, target, message in (
        (folder, tmp_path / "full", r"^output_dir=.*full: is not empty; choose another one, or null"),
        (folder, folder / "copy", r"^output_dir=.*copy: lies within"),
        (folder, folder / "last" / "copy", r"^output_dir=.*last/copy: lies within"),
        # not even root can make a file there
        (folder, Path("/proc/self/copy"), r"^output_dir=/proc/self/copy: cannot be written to"),
        (Path("/proc/self"), None, r"^/proc/self: cannot be written to .*give output_dir=<a new fold"),
    ):
        with pytest.raises(InputError, match=message):
            redo(detector, data=Unread(), output_dir=target and str(target))


def test_a_promise_is_warned_of_only_if_it_cannot_be_kept(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for data, aim, promised in (
        (DATA, Aim("false_positive_rate", 0.01), False),
        (Given(answers(300), answers(10, start=300)), Aim("recall", 0.5), True),
    ):
        caplog.clear()
        found = redo(folder, data=data, calibration=aim)
        assert found["promised"] is promised
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert (
            [each for each in warnings if "promised" in each] == [] if promised else [found["threshold_how"]]
        )


def test_several_sources_give_one_threshold_that_serves_each(folder: Path) -> None:
    calm = Given([each for each in answers(40, start=100) if not each.harmful], answers(2, start=200))
    mixture = Mixture(sources={"own": DATA, "calm": calm}, weights=None, duplicates="keep", seed=0)
    found = redo(folder, data=mixture, calibration=Aim("false_positive_rate", 0.4))
    guard = read_guard_file(folder, "detector")
    assert guard.calibration is not None
    assert guard.calibration["sources"].keys() == {"own", "calm"}
    assert (found["aim"], found["target"]) == ("false_positive_rate", 0.4)
    assert "on each of 2 sources" in str(guard.threshold_how)
    for name, records in (
        ("own", [*DATA.train, *DATA.validation]),
        ("calm", [*calm.train, *calm.validation]),
    ):
        harmless = [record for record in records if not record.harmful]
        flagged = [score >= found["threshold"] for score in scores_of(folder, harmless)]
        facts = guard.calibration["sources"][name]
        assert facts["negatives"] == len(harmless)
        assert facts["false_positive_rate"] == pytest.approx(sum(flagged) / len(flagged))


def test_what_was_learnt_under_another_split_is_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = Origin(name="a set", licence="none", files={"a.csv": "1"})
    account = SourceAccount(name="a set", origin=origin, read=140, kept=140, train=120, validation=20)
    guard = read_guard_file(folder, "detector")
    replace(guard, data=guard.data | {"sources": [account.as_json()]}).write(folder)

    class Again(Given):
        def load(self) -> Splits[Any]:
            return replace(super().load(), sources=[account])

    again = Again(DATA.train, DATA.validation)  # LEARNT has half of it in its training part
    place = "mllm_protector.training.recalibration.recorded_data"
    monkeypatch.setattr(place, lambda _folder, _fingerprint: LEARNT.load())
    assert redo(folder, data=again)["n"] == 2 * (70 - 30)
    monkeypatch.undo()  # the folder has no config.yaml
    with pytest.raises(InputError, match="which part cannot be told"):
        redo(folder, data=again)
