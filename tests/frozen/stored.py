"""The stored numbers: each name is a module beside this one and a file in ``numbers``."""

import importlib
import json
import math
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

NUMBERS = Path(__file__).parent / "numbers"
NAMES = ("weights", "guard", "evaluation", "data", "questions", "published")
"""Weights come first: no training can be forked once this process has computed a gradient."""

PUBLISHED = "MM_SAFETYBENCH"
"""The environment variable with the folder of MM-SafetyBench's published files, for ``published``."""


def compute(name: str, home: Path) -> Any:
    """What the code gives now, as JSON; files are made in ``home``."""
    return importlib.import_module(f"tests.frozen.{name}").compute(home)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def write(path: Path, numbers: Any) -> None:
    """Lists get a line for each element; mappings are indented."""
    if isinstance(numbers, list):
        text = "[\n" + ",\n".join(map(json.dumps, numbers)) + "\n]"
    else:
        text = json.dumps(numbers, indent=1)
    path.write_text(text + "\n")


def machine() -> dict[str, str]:
    """What the last bits of a sum depend on."""
    import torch

    processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    facts = dict(line.replace("\t", "").split(": ", 1) for line in processor.splitlines() if ": " in line)
    cpu = ", ".join(facts.get(name, "?") for name in ("model name", "cpu family", "model"))
    return {"cpu": cpu, "capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


def compare(found: Any, stored: Any, *, within: float) -> list[str]:
    """A line for each difference; digests count only where ``stored`` was made on a machine like this.

    Args:
        found: what the code gives now.
        stored: what it gave.
        within: how far two numbers may lie apart, as a share of the stored one and at least by itself.
    """
    same_machine = not isinstance(stored, dict) or stored.get("made_on") in (None, machine())
    ignored = {"made_on"} if same_machine else {"made_on", "sha256"}
    return list(_differences(found, stored, within, ignored, ""))


def _differences(found: Any, stored: Any, within: float, ignored: Set[str], place: str) -> Iterator[str]:
    one, other = _by_name(found), _by_name(stored)
    if one is not None and other is not None:
        for name in sorted(one.keys() - ignored | other.keys() - ignored):
            if name in one and name in other:
                yield from _differences(one[name], other[name], within, ignored, f"{place}/{name}")
            else:
                yield f"{place}/{name}: {'gone' if name in other else 'new'}"
    elif not _close(found, stored, within):
        yield f"{place}: {found}, stored {stored}"


def _by_name(value: Any) -> dict[str, Any] | None:
    """A mapping as it is; a list by position, or by the texts in its rows. ``None`` for anything else."""
    if isinstance(value, list):
        texts = [
            [each for each in row if isinstance(each, str)] if isinstance(row, list) else [] for row in value
        ]
        return {
            " ".join(words) or str(place): row
            for place, (words, row) in enumerate(zip(texts, value, strict=True))
        }
    return value if isinstance(value, dict) else None


def _close(found: Any, stored: Any, within: float) -> bool:
    if isinstance(found, float) and isinstance(stored, int | float):
        return math.isclose(found, stored, rel_tol=within, abs_tol=within)
    return bool(found == stored)
