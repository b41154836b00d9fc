"""The three scripts as a user runs them: on toy data, with everything small, outside the repository.

All tests share the folder that the scripts leave, so they belong to one process of pytest-xdist.
"""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.data import toy
from mllm_protector.metrics import DETECTION_METRICS
from mllm_protector.outputs import MARKER, WRITES
from mllm_protector.training import toy_mllm
from mllm_protector.training.detoxifier import METRICS
from tests.forked import Ran, Started, main

REPOSITORY = Path(__file__).parents[1]
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


def small(name: str, *arguments: str) -> None:
    """A script, whose toy MLLM learns from a few of its turns."""
    turns = toy.mllm_turns()[::30]
    toy_mllm.mllm_turns = lambda: turns  # type: ignore[attr-defined]
    main(name, *arguments)


def run(name: str, *arguments: str, cwd: Path, processes: int = 1) -> Ran:
    return Started(small, name, *arguments, cwd=cwd, processes=processes).end()


def fresh(name: str, *arguments: str, cwd: Path) -> Ran:
    """In a fresh interpreter, which also shows what libraries say when they are imported."""
    code = "import sys; from tests.test_scripts import small; small(*sys.argv[1:])"
    ran = subprocess.run(
        [sys.executable, "-c", code, name, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def said_by(ran: Ran) -> str:
    assert ran.code == 0, ran.err
    return ran.out + ran.err


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the three scripts were run in their order, and what they said."""
    folder = tmp_path_factory.mktemp("home")
    said = {
        "train_detector": said_by(run("train_detector", *TRAINING, cwd=folder)),
        "train_detoxifier": said_by(run("train_detoxifier", *TRAINING, cwd=folder)),
        "eval_mmsafety": said_by(fresh("eval_mmsafety", *EVALUATION, cwd=folder)),
    }
    (folder / "said.json").write_text(json.dumps(said))
    return folder


def test_a_training_reports_its_data_progress_and_result_and_writes_weights_metrics_and_config(
    home: Path,
) -> None:
    for part, names in (("detector", DETECTION_METRICS), ("detoxifier", METRICS)):
        folder = home / "outputs" / part
        metrics = read(folder / "metrics.json")
        assert tuple(metrics)[: len(names)] == names
        assert (metrics["step"], metrics["steps"]) == (4, 4)
        assert read(folder / "guard.json")["kind"] == part
        assert (folder / "model.safetensors").is_file()
        assert "max_steps: 4" in (folder / "config.yaml").read_text()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert [row["kind"] for row in map(json.loads, lines)] == ["train", "validation"]
        said = read(home / "said.json")[f"train_{part}"]
        assert "data: toy data: read 1,200 = kept 1,200" in said
        assert "training: step 1 of 4, " in said
        assert "step 4 of 4: validation " in said
        assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
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
    facts = read(folder / "run.json")
    assert facts["stages"]["answers"]["new"] == facts["stages"]["answers"]["rows"] > 0
    [latency] = [
        row["value"]
        for row in facts["measurements"]
        if (row["arm"], row["metric"]) == ("protector", "latency_median_ms")
    ]
    assert latency > 0
    rows = [json.loads(line) for line in (folder / "toy" / "results.jsonl").open()]
    assert len(rows) == 3 * result["benchmarks"]["toy"]["questions"]["count"]


def test_an_evaluation_continues_where_it_stopped_and_gives_the_same_result(home: Path) -> None:
    folder = home / "outputs" / "mmsafety"
    before = (folder / "asr.json").read_bytes()
    answers = folder / "cache" / "answers" / "0.jsonl"
    rows = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join(rows[:-5]))  # as if it had been stopped there
    (folder / "asr.json").unlink()
    said = said_by(run("eval_mmsafety", *EVALUATION, cwd=home))
    assert f"answers: {len(rows)} rows, {len(rows) - 5} already there, 5 new" in said
    [judged] = re.findall(r"judge: keyword: (\d+) rows, (\d+) already there\n", said)
    assert judged[0] == judged[1]
    assert answers.read_bytes() == b"".join(rows)
    assert (folder / "asr.json").read_bytes() == before


def test_two_processes_measure_what_one_does(home: Path) -> None:
    again = "output_dir=outputs/on_two"
    toy = "benchmarks.toy.folder=outputs/mmsafety/toy_benchmark"
    said = said_by(run("eval_mmsafety", *EVALUATION, again, toy, cwd=home, processes=2))
    assert said.count("written: ") == 1
    on_two = home / "outputs" / "on_two"
    assert (on_two / "asr.json").read_bytes() == (home / "outputs" / "mmsafety" / "asr.json").read_bytes()
    shares = [(on_two / "cache" / "answers" / f"{rank}.jsonl").read_bytes() for rank in (0, 1)]
    assert all(share.count(b"\n") > 0 for share in shares)


@pytest.mark.parametrize(
    ("kills", "processes"), [("3", "1"), pytest.param("10", "2", marks=pytest.mark.slow)]
)
def test_an_evaluation_that_is_killed_again_and_again_ends_with_the_same_result(
    home: Path, kills: str, processes: str
) -> None:
    outputs = home / "outputs"
    folders = ["--models", str(outputs), "--benchmark", str(outputs / "mmsafety" / "toy_benchmark")]
    counts = ["--kills", kills, "--processes", processes]
    said_by(run("tests.evaluation.kills", *folders, *counts, cwd=REPOSITORY))


def test_runs_are_compared(home: Path) -> None:
    said = said_by(run("eval_mmsafety", *EVALUATION, "threshold=0.9", "output_dir=outputs/other", cwd=home))
    assert "written: outputs/other" in said
    runs = "runs=[outputs/mmsafety,outputs/other]"
    said_by(run("compare_runs", runs, "judges=[keyword]", cwd=home))
    assert {path.name for path in (home / "outputs" / "comparison").glob("[!.]*")} == {
        f"compare.{ending}" for ending in ("json", "md", "html")
    }


def test_libraries_keep_quiet(home: Path) -> None:
    for name, said in read(home / "said.json").items():
        for noise in ("Loading weights", "Writing model shards", "Warning", "LOAD REPORT", "it/s", "\r"):
            assert noise not in said, name


def test_the_scripts_leave_only_outputs_and_only_the_names_that_they_claim(home: Path) -> None:
    assert {path.name for path in home.iterdir()} == {"outputs", "said.json"}
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


def test_a_folder_takes_the_same_training_again_and_no_other(home: Path) -> None:
    ran = run("train_detector", *TRAINING, "seed=1", "fit.epochs=9", cwd=home)
    [line] = ran.err.splitlines()
    assert (ran.code, ran.out) == (2, "")
    assert line.startswith("error: outputs/detector: holds results of another configuration (changed: ")
    assert "fit.epochs" in line
    weights = (home / "outputs" / "detector" / "model.safetensors").read_bytes()
    said_by(run("train_detector", *TRAINING, "fit.log_every=1", cwd=home))
    assert (home / "outputs" / "detector" / "model.safetensors").read_bytes() == weights


def test_help_needs_no_more_than_a_second_of_cpu() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = str(REPOSITORY / "scripts" / "eval_mmsafety.py")
    said = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "output_dir: outputs/" in said.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 1.0


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    for name, override, line in (
        ("eval_mmsafety", "nope=1", "error: nope: unknown config key; --help lists the keys\n"),
        ("train_detector", "fit.batch_size=0", "error: fit.batch_size=0: must be at least 1\n"),
    ):
        assert run(name, override, cwd=tmp_path) == Ran(2, "", line)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_train_the_detector_of_one(home: Path, tmp_path: Path) -> None:
    said = said_by(run("train_detector", *TRAINING, cwd=tmp_path, processes=2))
    assert said.count("written: ") == 1
    two = read(tmp_path / "outputs" / "detector" / "metrics.json")
    one = read(home / "outputs" / "detector" / "metrics.json")
    assert {name: two[name] for name in DETECTION_METRICS} == pytest.approx(
        {name: one[name] for name in DETECTION_METRICS},
        abs=1e-4,  # scores differ by rounding, so a few of 76,000 pairs may change places
    )
