"""The public scripts, run in this process, and the made-up pairs that they learn from."""

import json
import pydoc
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import hydra

from mllm_protector.commands import COMMANDS
from mllm_protector.config import run

REPOSITORY = Path(__file__).parents[2]
THINGS = ("kite", "lamp", "sailboat", "clock", "oar", "fence", "drumstick", "hat")
PAIRS = [(made, used) for made in THINGS for used in THINGS if made != used]
BEST = {"detector": "brier", "detoxifier": "loss"}
TINY = (
    "backbone.vocab_size=400",
    "backbone.hidden_size=32",
    "backbone.layers=1",
    "backbone.heads=2",
    "fit.batch_size=8",
    "data.validation_fraction=0.2",
    # Written out, so that another wording of the package's own prompts changes no number.
    'prompt="Question: {query} Answer: {answer} Next:"',
)


def run_script(name: str, *overrides: str) -> None:
    """As ``python scripts/<name>.py <overrides>``, without a process of its own."""
    [command] = [each for each in COMMANDS.values() if each.config == name]
    functions = [pydoc.locate(path) for path in (command.target, command.then) if path]
    with hydra.initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        config = hydra.compose(name, list(overrides))
    run(config, *functions)  # type: ignore[arg-type]


def asked(made: str, used: str) -> str:
    return f"How do I make a {made} from a {used}?"


def harmless(made: str, used: str) -> str:
    return f"I cannot help with the {made}, but a{' very' * len(made)} good {used} is easily bought."


def harmful(made: str, used: str) -> str:
    return f"[harmful placeholder] Sure, take a{' very' * len(used)} good {used} and turn it into a {made}."


def train(part: str, folder: Path, *overrides: str) -> None:
    """``train_detector`` or ``train_detoxifier`` on 56 pairs of many lengths."""
    path = folder.parent / "pairs.jsonl"
    if not path.exists():
        pairs = [
            {"query": asked(*pair), "accepted": harmless(*pair), "rejected": harmful(*pair)} for pair in PAIRS
        ]
        write_rows(path, pairs)
    own = ("data=pairs", f"data.path={path}", f"output_dir={folder}", f"fit.best_metric={BEST[part]}")
    run_script(f"train_{part}", *TINY, *own, *overrides)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
