"""A writing model and a judge in one scripted server: what they say depends on the request alone."""

import json
import random
from pathlib import Path
from typing import Any

from mllm_protector.generation.run import generate_pairs
from mllm_protector.judges.chat import ChatJudge
from mllm_protector.models.chat import ServedChat
from tests.servers import Reply, Request, text

SYLLABLES = ("ba", "do", "fi", "gu", "ke", "lo", "mi", "nu", "pa", "re", "so", "tu")


def is_for_questions(request: Request) -> bool:
    return "different questions of this kind" in request.text


def is_for_judging(request: Request) -> bool:
    return "VERDICT" in request.text


def is_for_rejected(request: Request) -> bool:
    return "Write only the outline" in request.text


def question(request: Request, number: int) -> str:
    draw = random.Random(f"{request.body.get('seed')}/{request.text.partition('These ')[0]}/{number}")
    first, second = ("".join(draw.choices(SYLLABLES, k=4)) for _ in range(2))
    return f"What is {first} {second} for?"


def asked(request: Request) -> str:
    """The question that an answer is asked for."""
    return request.text.partition("[BEGIN QUESTION")[2].splitlines()[1]


def well(request: Request, *, seconds: float = 0.0, unsafe: str = "left out") -> Reply:
    """What a good model replies; as a judge it knows what is unsafe by these words."""
    if is_for_judging(request):
        line = next(line for line in request.text.splitlines() if line.startswith("VERDICT"))
        shown = request.text.partition("[BEGIN ANSWER")[2].partition("[END ANSWER")[0]
        verdict = "unsafe" if unsafe in shown else "safe"
        return text(line.replace("unsafe", "safe").replace("safe", verdict), seconds=seconds)
    if is_for_questions(request):
        count = int(request.text.partition("Write ")[2].split()[0])
        return text(json.dumps([question(request, number) for number in range(count)]), seconds=seconds)
    if is_for_rejected(request):
        words = f"Sure! As to '{asked(request)}': first [left out], then [left out]."
        return text(words, seconds=seconds)
    return text(f"I would rather leave '{asked(request)}' alone. Ask a friend instead.", seconds=seconds)


def served(address: str, **changes: Any) -> ServedChat:
    settings: dict[str, Any] = {
        "model": "m",
        "base_url": address,
        "api_key_env": None,
        "concurrency": 4,
        "timeout": 20.0,
        "max_retries": 1,
        "temperature": 1.0,
    }
    return ServedChat(**settings | changes)


def scenario_file(folder: Path, *, scenarios: int = 2, **fields: Any) -> str:
    path = folder / "scenarios.jsonl"
    rows = [
        {"name": f"made up {number}", "description": f"harmless made-up things {number}"} | fields
        for number in range(scenarios)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def generate(address: str, folder: Path, **changes: Any) -> dict[str, Any] | None:
    """A small run with a chat judge; ``chat`` changes both models, ``scenarios`` is a scenario file."""
    chat = changes.pop("chat", {})

    def judge() -> ChatJudge:
        asked_with = chat | {"temperature": 0.0}
        return ChatJudge(chat=lambda: served(address, **asked_with), max_tokens=32, show_question=False)

    arguments: dict[str, Any] = {
        "generator": lambda: served(address, **chat),
        "judges": {"chat": judge},
        "scenario_file": changes.pop("scenarios", None) or scenario_file(folder),
        "pairs": 6,
        "questions_per_call": 4,
        "dry_calls": 2,
        "question_tokens": 200,
        "answer_tokens": 50,
        "question_format": "json",
        "language": "English",
        "near_duplicate": 0.85,
        "unconfirmed": "drop",
        "min_share": 0.01,
        "prompts": {},
        "max_calls": None,
        "seed": 0,
        "dry_run": False,
        "output_dir": str(folder / "pairs"),
    }
    return generate_pairs(**arguments | changes)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pairs" / "pairs.jsonl").open()]
