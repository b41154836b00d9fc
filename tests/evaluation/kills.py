"""A real evaluation that is killed again and again and must end as if nothing had been.

``python -m tests.evaluation.kills --models outputs --benchmark MM-SafetyBench --kills 20 --processes 2``
measures the toy guard (made by ``make demo``) and three other arms on all questions as text and as rendered
text, once undisturbed in one process. Then it does so again with as many kills (SIGKILL to all processes) at
random moments, every other time on another number of processes, and compares what both leave behind.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from tqdm import tqdm

from mllm_protector.benchmarks.mmsafety import MMSafetyBench
from mllm_protector.evaluation.arms import JudgeArm, SafetyPrompt
from mllm_protector.evaluation.run import evaluate
from mllm_protector.judges.keyword import KeywordJudge
from mllm_protector.models.mllm import load_mllm
from tests.evaluation.builders import ARMS
from tests.killing import Group


def evaluation(models: Path, benchmark: Path, output_dir: Path, limit: int | None) -> None:
    """From where the last one stopped to the end."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    evaluate(
        benchmarks={
            "mmsafety": MMSafetyBench(
                root=str(benchmark), variants=["TEXT", "TYPO"], render_missing=True, limit=limit
            )
        },
        mllm=lambda: load_mllm(name=str(models / "toy_mllm"), batch_size=32, max_new_tokens=64),
        judges={"keyword": KeywordJudge},
        detector=str(models / "detector"),
        detoxifier=str(models / "detoxifier"),
        base=None,
        arms=ARMS
        | {
            "safety_prompt": SafetyPrompt(sentence="Refuse what may hurt people."),
            "keyword_refusal": JudgeArm(judge=KeywordJudge),
            "keyword_protector": JudgeArm(judge=KeywordJudge, rewrite=True),
        },
        threshold=None,
        rewrite_tokens=64,
        ensemble=[],
        labels=None,
        labelled_by="people",
        max_unjudged=1.0,
        repeats=1,
        batch_size=64,
        latency_rows=0,
        report_rows=0,
        dry_run=False,
        output_dir=str(output_dir),
    )


def left_behind(folder: Path) -> dict[str, Any]:
    """The numbers to the byte; of every row all but the last digits of its score."""
    rows = [json.loads(line) for line in (folder / "mmsafety" / "results.jsonl").open(encoding="utf-8")]
    for row in rows:
        row["harm"] = None if row["harm"] is None else round(row["harm"], 4)
    return {"asr.json": (folder / "asr.json").read_bytes(), "rows": rows}


def wasted(folder: Path) -> int:
    """Answers and replies that were made twice. (A verdict on the same words may be, once a process.)"""
    twice = 0
    for stage in ("answers", "replies"):
        keys = [
            json.loads(line)["key"]
            for path in (folder / "cache" / stage).glob("*.jsonl")
            for line in path.open(encoding="utf-8")
        ]
        twice += len(keys) - len(set(keys))
    return twice


def run(
    root: Path, models: Path, benchmark: Path, *, kills: int, seed: int, processes: int, limit: int | None
) -> bool:
    """Print a summary; whether all was as it should be."""
    torch.set_num_threads(1)
    # By itself it is a semaphore that all forks share, and a killed one would never give back.
    tqdm.set_lock(threading.RLock())

    def attempt(name: str, count: int, seconds: float) -> bool:
        return Group(lambda: evaluation(models, benchmark, root / name, limit), count).end_or_kill(
            seconds=seconds
        )

    begun = time.monotonic()
    assert not attempt("whole", 1, 3600)
    duration = time.monotonic() - begun
    expected = left_behind(root / "whole")
    draw = random.Random(seed)
    hits = 0
    for number in range(kills):
        count = processes if number % 2 == 0 else 3 - processes
        hits += attempt("killed", count, draw.uniform(0, duration / max(kills, 1)))
    assert not attempt("killed", processes, 3600)
    found, twice = left_behind(root / "killed"), wasted(root / "killed")
    same = {name: found[name] == expected[name] for name in expected}
    sys.stdout.write(
        f"{hits} of {kills} kills hit; the same as undisturbed: {same}; {len(found['rows']):,} rows,"
        f" {twice} made twice (a whole evaluation: {duration:.1f} s)\n"
    )
    return all(same.values()) and not twice


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, required=True, help="detector, detoxifier and toy_mllm")
    parser.add_argument("--benchmark", type=Path, required=True, help="MM-SafetyBench as published")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--limit", type=int, help="questions of each scenario")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    try:
        sys.exit(not run(root, **vars(arguments)))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
