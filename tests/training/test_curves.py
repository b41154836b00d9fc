"""The image of a training."""

import json
from pathlib import Path

from PIL import Image

from mllm_protector.training.curves import IMAGE, draw_training

ROWS = [
    {"step": 1, "kind": "train", "loss": 0.9, "learning_rate": 0.1},
    {"step": 2, "kind": "train", "loss": 0.7, "learning_rate": 0.1},
    {"step": 2, "kind": "validation", "auroc": 0.8, "f1": 0.5},
]


def drawn(folder: Path, rows: list[dict[str, object]], names: list[str], kept: int = 2) -> bytes:
    folder.mkdir()
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_training(path, names, kept)
    return (folder / IMAGE).read_bytes()


def test_the_image_shows_losses_the_named_metrics_and_the_kept_step(tmp_path: Path) -> None:
    first = drawn(tmp_path / "a", ROWS, ["auroc", "f1"])
    assert Image.open(tmp_path / "a" / IMAGE).size == (960, 810)
    assert drawn(tmp_path / "b", ROWS, ["auroc", "f1"]) == first
    changes = (
        ("c", [{**ROWS[0], "loss": 0.5}, *ROWS[1:]], ["auroc", "f1"], 2),
        ("d", [*ROWS[:2], {**ROWS[2], "f1": 0.6}], ["auroc", "f1"], 2),
        ("e", ROWS, ["auroc"], 2),
        ("f", ROWS, ["auroc", "f1"], 1),
        ("g", [*ROWS[:2], {**ROWS[2], "loss": 0.6}], ["auroc", "f1"], 2),
    )
    images = [drawn(tmp_path / name, rows, names, kept) for name, rows, names, kept in changes]
    assert len({first, *images}) == 1 + len(changes)


def test_speed_is_not_in_it(tmp_path: Path) -> None:
    faster = [{**row, "tokens_per_second": 5.0} for row in ROWS]
    assert drawn(tmp_path / "a", ROWS, ["f1"]) == drawn(tmp_path / "b", faster, ["f1"])


def test_a_training_that_only_validates_has_one_too(tmp_path: Path) -> None:
    assert drawn(tmp_path / "a", ROWS[2:], ["loss", "auroc"])
