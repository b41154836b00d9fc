"""Pairs from a real OpenAI-compatible server: ``python -m tests.generation.real --pairs 200``.

The model is a tiny one with random weights, so what it writes is nonsense, and the checks say so.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from mllm_protector.errors import RunError
from mllm_protector.judges.chat import ChatJudge
from tests.generation.scripted import generate, scenario_file, served
from tests.models.builders import save_tiny_classifier_base
from tests.real_server import RealServer, real_server


def nonsense(root: Path, server: RealServer, *, pairs: int, unconfirmed: str) -> dict[str, Any]:
    """The account of so many pairs of nonsense, one question in each call."""
    model = {"model": str(root / "model"), "concurrency": 2, "timeout": 60.0}
    arguments: dict[str, Any] = {
        "chat": model,
        "scenarios": scenario_file(root, scenarios=1),
        "pairs": pairs,
        "questions_per_call": 1,
        "dry_calls": 20,
        "question_tokens": 12,
        "answer_tokens": 12,
        "question_format": "lines",
        "check_language": False,
        "near_duplicate": 1.0,
        "unconfirmed": unconfirmed,
        "judges": {
            "chat": lambda: ChatJudge(
                chat=lambda: served(server.base_url, **model | {"temperature": 0.0}),
                max_tokens=8,
                show_question=False,
            )
        },
    }
    with suppress(RunError):  # not one pair is confirmed
        generate(server.base_url, root, **arguments)
    result: dict[str, Any] = json.loads((root / "pairs" / "generation.json").read_text())
    return result


def save_model(folder: Path) -> None:
    """One that samples, as chat models do by their own settings."""
    save_tiny_classifier_base("llama", folder)
    settings = GenerationConfig.from_pretrained(folder)
    settings.do_sample = True
    settings.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=200)
    pairs = parser.parse_args().pairs
    root = Path(tempfile.mkdtemp())
    try:
        save_model(root / "model")
        with real_server(root / "server.log") as server:
            begun = time.monotonic()
            marked = nonsense(root, server, pairs=pairs, unconfirmed="mark")
            seconds, calls = time.monotonic() - begun, server.answered()
            rows = [json.loads(line) for line in (root / "pairs" / "pairs.jsonl").open(encoding="utf-8")]
            dropped = nonsense(root, server, pairs=pairs, unconfirmed="drop")
        sys.stdout.write(
            f"{len(rows)} pairs in {seconds:.0f} s, {sum(row['verified'] for row in rows)} verified; "
            f"{calls} calls answered, {marked['spent']['total']['calls']} counted; "
            f"labels: {marked['total']['verification']}; "
            f"with unconfirmed=drop {dropped['total']['written']} pairs\n"
        )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
