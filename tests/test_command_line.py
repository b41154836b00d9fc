"""What a script answers to its command line, in this process."""

import runpy
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mllm_protector.config import CONFIGS

SCRIPTS = sorted((CONFIGS.parent / "scripts").glob("*.py"))


class Said:
    """Runs a script and remembers its output, its errors and its exit code."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, script: str, *arguments: str) -> tuple[int, str, str]:
        path = CONFIGS.parent / "scripts" / f"{script}.py"
        self.monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        code = 0
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        said = self.capsys.readouterr()
        return code, said.out, said.err


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Said:
    monkeypatch.chdir(tmp_path)
    return Said(monkeypatch, capsys)


def groups_of(text: str) -> set[str]:
    lines = text.partition("Groups")[2].partition("Keys of")[0].splitlines()[1:]
    return {line.partition("=")[0] for line in lines if line and not line.startswith(" ")}


def test_help_explains_the_keys_of_every_script_and_names_its_own_groups_alone(said: Said) -> None:
    expected = {
        "train_detector": "data benchmark tuning fit backbone tracker calibration experiment",
        "train_detoxifier": "data benchmark tuning fit backbone tracker experiment",
        "eval_mmsafety": "benchmark mllm judge experiment",
        "compare_runs": "",
    }
    for path in SCRIPTS:
        code, text, errors = said(path.stem, "--help")
        assert (code, errors) == (0, ""), path.stem
        assert "\nKeys of these options" in text, path.stem
        for word in ("hydra", "_target_", f"{path.stem}/"):
            assert word not in text, (path.stem, word)
        if path.stem in expected:
            assert groups_of(text) == set(expected[path.stem].split()), path.stem


def test_help_shows_the_words_of_the_yaml_beside_keys_groups_and_options(said: Said) -> None:
    _, text, _ = said("train_detector", "--help")
    lines = {line.partition("  #")[0].strip(): line.partition("  # ")[2] for line in text.splitlines()}
    assert lines["fit=tiny"].startswith("how to optimise")
    assert lines["adapter"] == "Adapters on a pretrained backbone, one GPU."
    assert lines["fit.batch_size: 32"] == "examples in one step, over all processes"
    assert lines["checkpoint:"].startswith("for continuing a stopped training")
    assert lines["checkpoint.every_steps: null"] == "steps between two; null: not by steps"


def test_help_is_that_of_the_given_command_line(said: Said) -> None:
    given = ("experiment=qwen", "judge=[chat]", "rewrite_tokens=7")
    _, text, _ = said("eval_mmsafety", *given, "--help")
    for line in ("mllm=llava_1_5_7b", "judge=chat", "chat@judges.chat.chat=served", "rewrite_tokens: 7"):
        assert f"\n{line} " in text, line
    assert "\nbenchmarks.mmsafety.tiny: false" in text


def test_the_version_is_that_of_this_package(said: Said) -> None:
    assert said("train_detector", "--version") == (0, f"mllm-protector {version('mllm-protector')}\n", "")


def test_a_key_without_its_beginning_is_led_to_the_whole_one(said: Said) -> None:
    safety = ("eval_mmsafety", "benchmark=[mmsafety]")
    cases = [
        ((*safety, "variants=[SD]"), "variants", "benchmarks.mmsafety.variants=..."),
        ((*safety, "+tiny=true"), "tiny", "benchmarks.mmsafety.tiny=..."),
        ((*safety, "benchmark.variants=[SD]"), "benchmark.variants", "benchmarks.mmsafety.variants=..."),
        (
            ("eval_mmsafety", "benchmark=[toy,mmsafety]", "benchmarks.mmsafety.kinds=[SD]"),
            "benchmarks.mmsafety.kinds",
            "benchmarks.mmsafety.variants=...",
        ),
        ((*safety, "kinds=[SD]"), "kinds", "benchmarks.mmsafety.variants=..."),
        (
            ("eval_mmsafety", "mllm=served", "judge=[chat]", "mllm.model=a", "base_url=x"),
            "base_url",
            "mllm.base_url=... or judges.chat.chat.base_url=...",
        ),
        (("generate_pairs", "model=m"), "model", "generator.model=... or judges.chat.chat.model=..."),
        (("train_detector", "epochs=3"), "epochs", "fit.epochs=..."),
    ]
    for arguments, key, whole in cases:
        code, text, errors = said(*arguments)
        expected = f"error: {key}: unknown config key; give {whole}\n"
        assert (code, text, errors) == (2, "", expected), arguments
