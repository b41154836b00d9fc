"""What a script or a command answers to its command line, in this process."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from mllm_protector import commands
from mllm_protector.config import CONFIGS

SCRIPTS = sorted((CONFIGS.parent / "scripts").glob("*.py"))


class Said:
    """Runs a script and remembers its output, its errors and its exit code."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, script: str, *arguments: str) -> tuple[int, str, str]:
        path = CONFIGS.parent / "scripts" / f"{script}.py"
        self.monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        return self.end(lambda: runpy.run_path(str(path), run_name="__main__"))

    def end(self, work: Callable[[], object]) -> tuple[int, str, str]:
        code = 0
        try:
            work()
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
        "eval_mmsafety": "benchmark mllm judge arm experiment",
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


class Typed(Said):
    """Runs ``mllm-protector`` in this process."""

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["mllm-protector", *arguments])
        return self.end(commands.main)


@pytest.fixture
def typed(said: Said) -> Typed:
    return Typed(said.monkeypatch, said.capsys)


def test_every_command_has_a_line_a_script_and_the_help_of_its_script(said: Said, typed: Typed) -> None:
    _, listed, _ = typed()
    assert typed("--help") == (0, listed, "")
    lines = [line.split(maxsplit=1) for line in listed.splitlines() if line.startswith("  ")]
    assert lines == [[name, command.summary] for name, command in commands.COMMANDS.items()]
    configs = [command.config for command in commands.COMMANDS.values()]
    assert sorted([*configs, "benchmark"]) == [path.stem for path in SCRIPTS]
    for name, command in commands.COMMANDS.items():
        _, of_script, _ = said(command.config, "--help")
        code, text, errors = typed(name, "--help")
        assert (code, errors) == (0, ""), name
        assert text.splitlines()[0].startswith(f"{command.summary}: mllm-protector {name} "), name
        assert text.splitlines()[1:] == of_script.splitlines()[1:], name


def test_a_wrong_command_is_one_line_with_the_likely_one(typed: Typed) -> None:
    for given, advice in (
        ("train_detector", " (did you mean train-detector?)"),
        ("eval_mmsafety", " (did you mean eval?)"),
        ("trian", " (did you mean train-detector?)"),
        ("xyzzy", ""),
    ):
        line = f"error: {given}: unknown command{advice}; mllm-protector --help lists them\n"
        assert typed(given) == (2, "", line)


def test_the_list_of_commands_needs_neither_hydra_nor_torch() -> None:
    code = "import sys; from mllm_protector.commands import main; main(); print(sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = ran.stdout.splitlines()[-1]
    assert not [name for name in ("hydra", "pydantic", "torch", "yaml") if f"'{name}'" in modules]


MINE = """\
# @package benchmarks.my_set
# Questions of my own.
_target_: mllm_protector.benchmarks.questions.QuestionFile
path: ???         # where they are
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "my configs" / "benchmark" / "my_set.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(MINE)
    return path


def test_options_of_the_users_own_are_listed_explained_checked_and_used(own: Path, typed: Typed) -> None:
    mine = ("eval", "--config-dir", "my configs", "benchmark=[my_set]")
    _, text, _ = typed(*mine, "--help")
    lines = {line.partition("  #")[0].strip(): line.partition("  # ")[2] for line in text.splitlines()}
    assert lines["my_set"] == "Questions of my own."
    assert lines["benchmark=my_set"]
    assert lines["benchmarks.my_set.path: ???"] == "where they are"
    code, text, errors = typed(*mine, "benchmarks.my_set.path=a=b.csv", "--cfg", "job")
    assert (code, errors) == (0, "")
    assert "path: a=b.csv" in text
    for given, line in (
        (mine, "benchmarks.my_set.path has no value; give benchmarks.my_set.path=..."),
        (
            (*mine, "benchmarks.my_set.pth=a"),
            "benchmarks.my_set.pth: unknown config key (did you mean pa",
        ),
        (
            ("list-questions", *mine[1:], "benchmarks.my_set.path=none.csv"),
            "benchmarks.my_set: none.csv: no such",
        ),
        ((*mine, "path=a"), "path: unknown config key; give benchmarks.my_set.path=..."),
        (("eval", "benchmark=3", *mine[1:3]), "benchmark=3: unknown option; choose one of figstep, "),
        (("eval", "benchmark=[my]", *mine[1:3]), "benchmark=my: unknown option; choose one of figstep, "),
        (("eval", "--config-dir", "nowhere"), f"--config-dir={own.parents[2]}/nowhere: no such folder"),
        (("eval", "--config-dir"), "argument --config-dir/-cd: expected one argument; --help explains"),
        (("eval", "--nope"), "unrecognized arguments: --nope; --help explains"),
    ):
        code, _, errors = typed(*given)
        assert code == 2, given
        assert errors.startswith(f"error: {line}"), given
        assert errors.count("\n") == 1, given
        assert "choose one of" not in errors or "my_set" in errors, given


def test_an_option_of_the_users_own_may_not_have_the_name_of_one_of_ours(own: Path, typed: Typed) -> None:
    for name, command in (("benchmark/toy", "eval"), ("experiment/paper", "train-detector")):
        path = own.parents[1] / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(MINE)
        line = f"error: {path}: the package has an option {name}.yaml of its own; rename the file\n"
        assert typed(command, "--config-dir", "my configs") == (2, "", line)
        path.unlink()
