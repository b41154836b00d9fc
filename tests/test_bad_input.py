"""What a user types wrongly ends in one line that names the key as it was typed, before any work."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mllm_protector.config import build, clear_errors
from mllm_protector.errors import InputError
from mllm_protector.reading import read_records
from tests.test_config import FUNCTIONS, composed, filled_in
from tests.test_scripts import run

MISTAKES = {
    "train_detector": ("seed=-1", f"seed={10**23}", "backbone.hidden_size=0", "max_length=0", "prefixes=2"),
    "train_detoxifier": ("max_length=0", "fit.batch_size=0", "fit.learning_rate=0"),
    "eval_mmsafety": (
        "rewrite_tokens=0",
        "batch_size=0",
        "latency_rows=-1",
        "threshold=2",
        "max_unjudged=2",
        "repeats=0",
    ),
    "eval_detoxifier": ("batch_size=0", "limit=0"),
    "benchmark_evaluation": ("batch_size=0",),
    "generate_pairs": ("pairs=0",),
}


def test_a_number_out_of_range_is_refused_by_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    for root, mistakes in MISTAKES.items():
        for mistake in mistakes:
            with pytest.raises(SystemExit) as stopped, clear_errors():
                build(filled_in(composed(root, mistake)), FUNCTIONS[root])
            assert stopped.value.code == 2, mistake
            assert capsys.readouterr().err.startswith(f"error: {mistake}: must be "), mistake


def test_no_number_of_any_command_may_be_as_large_as_it_likes(capsys: pytest.CaptureFixture[str]) -> None:
    for root, function in FUNCTIONS.items():
        cfg = filled_in(composed(root))
        for key, value in cfg.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                wrong = cfg.copy()
                OmegaConf.update(wrong, str(key), 10**23)
                with pytest.raises(InputError, match=re.escape(f"{key}=")):
                    build(wrong, function)


def test_groups_and_awkward_paths_are_told_in_one_line(tmp_path: Path) -> None:
    for script, mistake, words in (
        ("train_detector", "data=null", "data=null: name an option"),
        ("eval_mmsafety", "judge=[]", "judge has no value; give judge=[...]"),
        ("train_detector", "backbone.heads=3", "backbone.heads=3: "),
        ("prepare_data", "data.path=a=b.csv", "data.path=a=b.csv: put quotes around"),
    ):
        ran = run(script, mistake, cwd=tmp_path)
        assert ran.returncode == 2, mistake
        assert ran.stderr.splitlines()[-1].startswith(f"error: {words}"), (mistake, ran.stderr)


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ran = run("prepare_data", "data=pairs", "data.path=~/none.jsonl", cwd=tmp_path)
    assert ran.stderr.splitlines()[-1] == f"error: {tmp_path}/none.jsonl: no such file"


def test_a_file_in_utf_16_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("query,answer\nx,y\n", encoding="utf-16")
    with pytest.raises(InputError, match=r"rows.csv: is UTF-16; save it as UTF-8"):
        list(read_records(path, lambda value: value))
