"""Sources from the configs, and files for them to read."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mllm_protector.config import CONFIGS, build

OPTIONS: dict[str, Any] = {
    "validation_fraction": 0.25,
    "seed": 0,
    "limit": None,
    "duplicates": "exact",
    "quarantine": None,
}
"""The keys that all sources of files share."""


def configured(option: str, **changes: Any) -> Any:
    """The source that ``data=<option>`` gives, with keys of its config changed."""

    def take(seed: int, data: Any) -> None: ...

    node = OmegaConf.merge(OmegaConf.load(CONFIGS / "data" / f"{option}.yaml"), changes)
    return build(OmegaConf.create({"seed": 0, "data": node}), take)["data"]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write a file of JSONL; its path comes back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def everything(splits: Any) -> list[Any]:
    """The records of both parts."""
    return [*splits.train, *splits.validation]


def texts(prefix: str, count: int) -> list[str]:
    """Texts of nine words that have no two words in common."""
    return [" ".join(f"{prefix}{number}word{place}" for place in range(9)) for number in range(count)]
