"""The scripts as a user runs them: on toy data, with everything small, outside the repository."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.metrics import DETECTION_METRICS
from mllm_protector.outputs import MARKER, WRITES
from mllm_protector.training.detoxifier import METRICS

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = ("train_detector", "train_detoxifier", "eval_mmsafety")
TRAINING = (
    "backbone.vocab_size=600",
    "backbone.hidden_size=16",
    "backbone.layers=1",
    "backbone.heads=2",
    "fit.max_steps=4",
)
EVALUATION = (
    "mllm.epochs=1",
    "mllm.max_new_tokens=8",
    "rewrite_tokens=8",
    "benchmarks.toy.variants=[TEXT,SD]",
    "benchmarks.toy.per_scenario=1",
    "benchmarks.toy.benign=4",
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def command(name: str, *overrides: str, launcher: Sequence[str] = ()) -> list[str]:
    return [sys.executable, *launcher, str(REPOSITORY / "scripts" / f"{name}.py"), *overrides]


def run(
    name: str, *overrides: str, cwd: Path, launcher: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, *overrides, launcher=launcher),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_well(name: str, *overrides: str, cwd: Path, launcher: Sequence[str] = ()) -> str:
    ran = run(name, *overrides, cwd=cwd, launcher=launcher)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all three scripts were run in their order, and what they said."""
    folder = tmp_path_factory.mktemp("home")
    said = {
        "train_detector": run_well("train_detector", *TRAINING, cwd=folder),
        "train_detoxifier": run_well("train_detoxifier", *TRAINING, cwd=folder),
        "eval_mmsafety": run_well("eval_mmsafety", *EVALUATION, cwd=folder),
    }
    (folder / "said.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize(("part", "figures"), [("detector", DETECTION_METRICS), ("detoxifier", METRICS)])
def test_a_training_writes_weights_figures_and_its_config(
    home: Path, part: str, figures: tuple[str, ...]
) -> None:
    folder = home / "outputs" / part
    metrics = read(folder / "metrics.json")
    assert tuple(metrics)[: len(figures)] == figures
    assert (metrics["step"], metrics["steps"]) == (4, 4)
    assert read(folder / "guard.json")["kind"] == part
    assert (folder / "model.safetensors").is_file()
    assert "max_steps: 4" in (folder / "config.yaml").read_text()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [row["kind"] for row in map(json.loads, lines)] == ["train", "validation"]


@pytest.mark.parametrize("part", ["detector", "detoxifier"])
def test_a_training_tells_its_data_its_progress_and_its_result(home: Path, part: str) -> None:
    said = read(home / "said.json")[f"train_{part}"]
    assert "data: toy data: read 1,200 = kept 1,200" in said
    assert "step 1 of 4: loss " in said
    spoken = re.findall(r"validation (.*)", said)[-1].split(", ")
    assert "step 4 of 4: validation " in said
    assert spoken[0].startswith({"detector": "auroc", "detoxifier": "loss"}[part])
    assert len(spoken) <= 4
    assert f"written: outputs/{part} " in said


def test_an_evaluation_writes_its_report(home: Path) -> None:
    folder = home / "outputs" / "mmsafety"
    result = read(folder / "asr.json")
    rates = [row for row in result["measurements"] if row["metric"] == "asr" and row["group"] == "all"]
    # all images, text and one kind of image; 3 arms, 2 judges
    assert len(rates) == 3 * 3 * 2
    assert {path.name for path in folder.glob("asr.*")} == {
        f"asr.{end}" for end in ("json", "md", "tex", "png")
    }
    assert (folder / "measurements.csv").read_text().count("\n") == len(result["measurements"]) + 1
    assert "<html" in (folder / "report.html").read_text()
    run = read(folder / "run.json")
    assert run["stages"]["answers"]["new"] == run["stages"]["answers"]["rows"] > 0
    [latency] = [
        row["value"]
        for row in run["measurements"]
        if (row["arm"], row["metric"]) == ("protector", "latency_median_ms")
    ]
    assert latency > 0
    rows = [json.loads(line) for line in (folder / "toy" / "results.jsonl").open()]
    assert len(rows) == 3 * result["benchmarks"]["toy"]["questions"]["count"]


def test_an_evaluation_goes_on_where_it_stopped_and_says_the_same(home: Path) -> None:
    folder = home / "outputs" / "mmsafety"
    before = (folder / "asr.json").read_bytes()
    answers = folder / "cache" / "answers" / "0.jsonl"
    rows = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join(rows[:-5]))  # as if it had been stopped there
    (folder / "asr.json").unlink()
    said = run_well("eval_mmsafety", *EVALUATION, cwd=home)
    assert f"answers: {len(rows)} rows, {len(rows) - 5} already there, 5 new" in said
    [judged] = re.findall(r"judge: keyword: (\d+) rows, (\d+) already there\n", said)
    assert judged[0] == judged[1]
    assert answers.read_bytes() == b"".join(rows)
    assert (folder / "asr.json").read_bytes() == before


def test_two_processes_measure_what_one_does(home: Path) -> None:
    again = "output_dir=outputs/on_two"
    toy = "benchmarks.toy.folder=outputs/mmsafety/toy_benchmark"
    said = run_well("eval_mmsafety", *EVALUATION, again, toy, cwd=home, launcher=TORCHRUN)
    assert said.count("written: ") == 1
    on_two = home / "outputs" / "on_two"
    assert (on_two / "asr.json").read_bytes() == (home / "outputs" / "mmsafety" / "asr.json").read_bytes()
    shares = [(on_two / "cache" / "answers" / f"{rank}.jsonl").read_bytes() for rank in (0, 1)]
    assert all(share.count(b"\n") > 0 for share in shares)


@pytest.mark.parametrize(
    ("kills", "processes"), [("3", "1"), pytest.param("10", "2", marks=pytest.mark.slow)]
)
def test_an_evaluation_that_is_killed_again_and_again_ends_as_if_nothing_had_been(
    home: Path, kills: str, processes: str
) -> None:
    outputs = home / "outputs"
    folders = ["--models", str(outputs), "--benchmark", str(outputs / "mmsafety" / "toy_benchmark")]
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.evaluation.kills",
            *folders,
            "--kills",
            kills,
            "--processes",
            processes,
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]


def test_runs_are_compared_and_what_cannot_be_is_refused(home: Path) -> None:
    said = run_well("eval_mmsafety", *EVALUATION, "threshold=0.9", "output_dir=outputs/other", cwd=home)
    assert "written: outputs/other" in said
    runs = "runs=[outputs/mmsafety,outputs/other]"
    run_well("compare_runs", runs, "judges=[keyword]", cwd=home)
    assert {path.name for path in (home / "outputs" / "comparison").glob("[!.]*")} == {
        f"compare.{ending}" for ending in ("json", "md", "html")
    }
    less = ("benchmarks.toy.variants=[TEXT]", "output_dir=outputs/less")
    run_well("eval_mmsafety", *EVALUATION, *less, cwd=home)
    ran = run("compare_runs", "runs=[outputs/mmsafety,outputs/less]", cwd=home)
    assert ran.returncode == 2
    [line] = ran.stderr.splitlines()
    assert line.startswith("error: outputs/less")


@pytest.mark.parametrize("name", SCRIPTS)
def test_libraries_keep_quiet(home: Path, name: str) -> None:
    said = read(home / "said.json")[name]
    for noise in ("Loading weights", "Writing model shards", "Warning", "LOAD REPORT", "it/s", "\r"):
        assert noise not in said


def test_the_scripts_leave_nothing_but_their_outputs(home: Path) -> None:
    assert {path.name for path in home.iterdir()} == {"outputs", "said.json"}


def test_all_that_a_command_leaves_is_among_the_names_that_it_claims(home: Path) -> None:
    commands = {
        "detector": "train_detector",
        "detoxifier": "train_detoxifier",
        "mmsafety": "evaluate",
        "toy_mllm": "toy_mllm",
    }
    for name, command in commands.items():
        folder = home / "outputs" / name
        claimed = {path for pattern in WRITES[command] for path in folder.glob(pattern)}
        # Those two have markers of their own.
        files = {path for path in folder.rglob("*") if path.is_file()} - set(folder.glob("backbone/*"))
        files -= {path for path in files if "toy_benchmark" in path.parts}
        left = {path for path in files if not claimed & {path, *path.parents}}
        assert left <= {folder / MARKER}, name


def test_the_same_training_may_be_repeated_but_no_other_one_in_its_folder(home: Path) -> None:
    ran = run("train_detector", *TRAINING, "seed=1", "fit.epochs=9", cwd=home)
    assert (ran.returncode, ran.stdout) == (2, "")
    [line] = ran.stderr.splitlines()
    assert line.startswith("error: outputs/detector: holds what another configuration made (changed: ")
    assert "fit.epochs" in line
    weights = (home / "outputs" / "detector" / "model.safetensors").read_bytes()
    run_well("train_detector", *TRAINING, "fit.log_every=1", cwd=home)
    assert (home / "outputs" / "detector" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_needs_no_more_than_a_second_of_cpu(tmp_path: Path, name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = run_well(name, "--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "output_dir: outputs/" in said
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 1.0


@pytest.mark.parametrize(
    ("name", "override", "line"),
    [
        ("eval_mmsafety", "nope=1", "error: nope: unknown config key; --help lists the keys"),
        (
            "train_detector",
            "fit.batch_size=0",
            "error: fit.batch_size=0: must be at least 1",
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path, name: str, override: str, line: str
) -> None:
    ran = run(name, override, cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", line + "\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_train_the_detector_of_one(home: Path, tmp_path: Path) -> None:
    said = run_well("train_detector", *TRAINING, cwd=tmp_path, launcher=TORCHRUN)
    assert said.count("written: ") == 1
    two = read(tmp_path / "outputs" / "detector" / "metrics.json")
    one = read(home / "outputs" / "detector" / "metrics.json")
    assert {name: two[name] for name in DETECTION_METRICS} == pytest.approx(
        {name: one[name] for name in DETECTION_METRICS}, abs=1e-5
    )
