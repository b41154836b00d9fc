"""What commands may write over: what they wrote themselves."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mllm_protector.config import run
from mllm_protector.errors import InputError, RunError
from mllm_protector.outputs import MARKER, WRITES, claimed
from tests.test_config import FUNCTIONS as COMMANDS
from tests.test_config import composed, filled_in

FUNCTIONS = {name: each for name, each in COMMANDS.items() if "output_dir" in composed(name)}
"""Of the commands that write files."""

SOMEBODYS = "somebody's own words\n"
TINY = (
    "backbone.vocab_size=600",
    "backbone.hidden_size=16",
    "backbone.layers=1",
    "backbone.heads=2",
    "fit.max_steps=4",
)


def started(root: str, *overrides: str, **values: Any) -> None:
    """A command as its script runs it."""
    cfg = filled_in(composed(root, *overrides))
    for key, value in values.items():
        OmegaConf.update(cfg, key, str(value))
    run(cfg, FUNCTIONS[root])


def refusal(root: str, *overrides: str, **values: Any) -> str:
    with pytest.raises(InputError) as refused:
        started(root, *overrides, **values)
    return str(refused.value)


def rows(path: Path, count: int = 20) -> Path:
    lines = [
        f'{{"query": "question {number}", "accepted": "no {number}", "rejected": "yes {number}"}}\n'
        for number in range(count)
    ]
    path.write_text("".join(lines))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_no_command_replaces_a_file_that_it_did_not_write(tmp_path: Path) -> None:
    for root, function in FUNCTIONS.items():
        cfg = filled_in(composed(root))
        # calibrate_detector takes new folders only
        for number, name in enumerate(WRITES.get(function.__name__, ["README.md"])):
            folder = tmp_path / root / str(number)
            path = folder / name.replace("*", "x")
            path.parent.mkdir(parents=True)
            path.write_text(SOMEBODYS)
            cfg.output_dir = str(folder)
            with pytest.raises(InputError) as refused:
                run(cfg, function)
            assert str(folder) in str(refused.value), name
            assert "output_dir" in str(refused.value), name
            assert [item for item in folder.rglob("*") if item.is_file()] == [path], name
            assert path.read_text() == SOMEBODYS


def test_every_command_says_what_it_writes() -> None:
    assert COMMANDS.keys() - FUNCTIONS.keys() == {"serve"}
    unclaimed = {name for name, function in FUNCTIONS.items() if function.__name__ not in WRITES}
    assert unclaimed == {"calibrate_detector"}


def test_no_command_writes_to_a_place_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for root in FUNCTIONS:
        assert refusal(root, output_dir="").startswith("output_dir=: is empty; "), root
    for key in ("backbone.folder", "data.quarantine"):
        message = refusal("train_detector", "data=pairs", "data.path=x", output_dir="out", **{key: ""})
        assert message.startswith(f"{key}=: ")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    # Not even root can make a file in /proc.
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/self"), Path("/proc/self/new")):
        for root in FUNCTIONS:
            assert f"output_dir={place}: " in refusal(root, output_dir=place), root


def test_no_command_writes_over_what_it_reads(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export = ("data=pairs", "export=true")
    started("prepare_data", *export, **{"data.path": rows(tmp_path / "rows.jsonl"), "output_dir": folder})
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "train.jsonl").symlink_to(folder / "train.jsonl")
    before = contents(folder)
    for given in (
        folder / "train.jsonl",
        tmp_path / "link" / "train.jsonl",
        tmp_path / "train.jsonl",
        folder,
    ):
        for place in (folder, tmp_path / "link"):
            message = refusal("prepare_data", *export, **{"data.path": given, "output_dir": place})
            assert message == f"data.path={given}: this command would overwrite it; choose another output_dir"
    message = refusal(
        "train_detector",
        "backbone=hub",
        **{"backbone.name": tmp_path / "part", "output_dir": tmp_path / "part"},
    )
    assert message.startswith(f"backbone.name={tmp_path / 'part'}: this command would overwrite it")
    assert contents(folder) == before


def test_a_command_may_use_its_own_folder_again_and_no_other_ones(tmp_path: Path) -> None:
    data = {"data.path": rows(tmp_path / "rows.jsonl"), "output_dir": tmp_path / "out"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text(SOMEBODYS)
    for _ in range(2):
        started("prepare_data", "data=pairs", "export=true", **data)
    before = contents(tmp_path / "out")
    assert before["notes.txt"].decode() == SOMEBODYS
    message = refusal("train_detector", "data=pairs", **data)
    assert message.startswith(f"{tmp_path / 'out'}/data_report.")
    assert contents(tmp_path / "out") == before


def test_what_a_folder_is_claimed_for_without_a_word_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "new", "compare"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_of_several_processes_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with claimed(tmp_path / "alone", "compare"):
        assert (tmp_path / "alone").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with claimed(tmp_path / "new", "compare"):
        assert not (tmp_path / "new").exists()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InputError, match="RANK=first"), claimed(tmp_path / "new", "compare"):
        pass


def left_by_compare(folder: Path) -> Path:
    with claimed(folder, "compare"):
        (folder / "compare.md").write_text("ours")
    return folder


def test_what_was_put_or_changed_under_a_command_s_names_since_is_not_replaced(tmp_path: Path) -> None:
    changes: dict[str, Callable[[Path], object]] = {
        "changed": lambda folder: (folder / "compare.md").write_text(SOMEBODYS),
        "put": lambda folder: (folder / "compare.html").write_text(SOMEBODYS),
    }
    for name, change in changes.items():
        folder = left_by_compare(tmp_path / name)
        change(folder)
        before = contents(folder)
        with pytest.raises(InputError, match=r"compare\.\w+: differs from what this command left"):
            left_by_compare(folder)
        assert contents(folder) == before, name


def test_a_copied_folder_and_that_of_a_killed_run_are_still_the_command_s_own(tmp_path: Path) -> None:
    left_by_compare(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "copy", copy_function=shutil.copyfile)
    left_by_compare(tmp_path / "copy")
    marker = tmp_path / "copy" / MARKER
    marker.write_text('{"compare": null}')  # as while a run is at work
    (tmp_path / "copy" / "compare.html").write_text("half of it")
    left_by_compare(tmp_path / "copy")


def test_an_edited_marker_is_refused(tmp_path: Path) -> None:
    for content in ("[]", '"x"', "null", '{"compare": 3}', "{"):
        (tmp_path / MARKER).write_text(content)
        with pytest.raises(InputError, match=r"mllm_protector\.json"):
            left_by_compare(tmp_path)


def test_answers_in_a_list_of_questions_are_not_lost(tmp_path: Path) -> None:
    listing = ("benchmark=[toy]", f"benchmarks.toy.folder={tmp_path / 'toy'}")
    for _ in range(2):
        started("list_questions", *listing, output_dir=tmp_path / "out")
    questions = tmp_path / "out" / "questions.jsonl"
    questions.write_text(questions.read_text().replace("}\n", ', "answer": "Yes."}\n'))
    before = questions.read_bytes()
    assert "differs from what this command left" in refusal(
        "list_questions", *listing, output_dir=tmp_path / "out"
    )
    assert questions.read_bytes() == before


def test_one_of_two_runs_in_a_folder_is_refused(tmp_path: Path) -> None:
    with claimed(tmp_path, "train_detector"):
        assert "another run writes there (host " in refusal("train_detector", output_dir=tmp_path)


def test_bad_rows_replace_those_of_an_earlier_run_and_no_other_file(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl")
    with path.open("a") as lines:
        lines.write('{"query": "no answers"}\n')
    (tmp_path / "link.jsonl").symlink_to(path)
    (tmp_path / "hard.jsonl").hardlink_to(path)
    (tmp_path / "notes.txt").write_text(SOMEBODYS)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "other.jsonl").write_text('{"some": "rows"}\n')
    before = contents(tmp_path)
    keys = {"data.path": path, "output_dir": tmp_path / "out"}
    for name in before:
        message = refusal("prepare_data", "data=pairs", **keys | {"data.quarantine": tmp_path / name})
        assert message.startswith(f"data.quarantine={tmp_path / name}: "), message
        assert contents(tmp_path) == before
    os.mkfifo(tmp_path / "fifo")
    message = refusal("prepare_data", "data=pairs", **keys | {"data.quarantine": tmp_path / "fifo"})
    assert message.endswith("not a file; name one for bad rows")
    (tmp_path / "fifo").unlink()
    bad = keys | {"data.quarantine": tmp_path / "bad.jsonl"}
    for _ in range(2):
        started("prepare_data", "data=pairs", **bad)
    assert contents(tmp_path)["bad.jsonl"].count(b"\n") == 1
    message = refusal("prepare_data", "data=pairs", **bad | {"data.path": tmp_path / "bad.jsonl"})
    assert "is the file that is read" in message
    new = tmp_path / "new"
    keys |= {"data.quarantine": new / "data_report.md", "output_dir": new}
    message = refusal("prepare_data", "data=pairs", **keys)
    assert "would overwrite it" in message


def test_two_sources_have_no_quarantine_in_common(tmp_path: Path) -> None:
    sources = [f"+data@data.sources.{name}=pairs" for name in ("one", "two")]
    keys = {
        f"data.sources.{name}.{key}": tmp_path / value
        for name in ("one", "two")
        for key, value in (("path", f"{name}.jsonl"), ("quarantine", "bad.jsonl"))
    }
    message = refusal("prepare_data", "data=mixture", *sources, **keys)
    assert "sources.two.quarantine=" in message
    assert "is also that of data.sources.one.quarantine" in message


def test_a_training_that_failed_is_repeated_in_its_folder_with_a_lower_rate(tmp_path: Path) -> None:
    wild = ("fit.learning_rate=1e3", "fit.warmup=0", "fit.max_steps=40")
    with pytest.raises(RunError, match=r"Lower fit\.learning_rate"):
        started("train_detector", *TINY, *wild, output_dir=tmp_path / "out")
    started("train_detector", *TINY, "fit.learning_rate=1e-3", output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "guard.json").exists()
    message = refusal("train_detector", *TINY, "fit.learning_rate=1e-4", output_dir=tmp_path / "out")
    assert "(changed: fit.learning_rate)" in message
