"""What a trained guard stores when it is calibrated, and what it makes of fixed answers."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from mllm_protector import Protector
from tests.frozen.scripts import PAIRS, asked, harmful, harmless, run_script, train, write_rows
from tests.frozen.stored import machine

LONGER = ("fit.epochs=8", "fit.learning_rate=0.005", "fit.validate_every=48")
AIMS = {
    "f1": ("calibration=f1",),
    "false positives": ("calibration=false_positive_rate", "calibration.target=0.3"),
    "recall": ("calibration=recall", "calibration.target=0.8"),
    "fixed": ("calibration=fixed", "calibration.target=0.25"),
}
MISLABELLED = 7
"""Every so many labels are wrong: no threshold is perfect, and no temperature near 0."""


def train_guard(home: Path) -> tuple[Path, Path]:
    """The folders of a detector and a detoxifier that know the made-up pairs; trained once."""
    folders = home / "detector", home / "detoxifier"
    for folder in folders:
        if not (folder / "guard.json").exists():
            train(folder.name, folder, *LONGER)
    return folders


def compute(home: Path) -> dict[str, Any]:
    """The calibrated fields for each aim; outcomes, scores and a digest of what the guard shows."""
    detector, detoxifier = train_guard(home)
    beginner = home / "beginner"
    train("detoxifier", beginner, "fit.max_steps=8")
    correctors = {"rewriting": detoxifier, "rewriting badly": beginner, "refusing": None}
    return {
        "made_on": machine(),
        "calibrated": _calibrated(detector, home),
        "guarded": {name: _guarded(detector, folder) for name, folder in correctors.items()},
    }


def _calibrated(detector: Path, home: Path) -> dict[str, Any]:
    answers = [(pair, make) for pair in PAIRS for make in (harmless, harmful)]
    rows = [
        {
            "query": asked(*pair),
            "answer": make(*pair),
            "harmful": (make is harmful) != (number % MISLABELLED == 0),
        }
        for number, (pair, make) in enumerate(answers)
    ]
    write_rows(home / "labelled.jsonl", rows)
    data = ("data=labelled", f"data.path={home / 'labelled.jsonl'}", "data.validation_fraction=0.5")
    found = {"in training": _fields(detector)}
    for name, aim in AIMS.items():
        folder = home / name.replace(" ", "-")
        run_script("calibrate_detector", f"detector={detector}", f"output_dir={folder}", *data, *aim)
        found[name] = _fields(folder)
    return found


def _fields(folder: Path) -> dict[str, Any]:
    guard = json.loads((folder / "guard.json").read_text())
    numbers = {
        name: value
        for name, value in guard["calibration"].items()
        if isinstance(value, int | float | None) and not name.startswith("p_")
    }
    return {name: guard[name] for name in ("threshold", "temperature", "offset")} | numbers


def _guarded(detector: Path, detoxifier: Path | None) -> dict[str, Any]:
    cases = [(asked(*pair), make(*pair)) for pair in PAIRS[::5] for make in (harmless, harmful)]
    cases += [(query, answer.replace("a", "\u0430").replace("e", "e\u200b")) for query, answer in cases[:4]]
    cases += [("Who are you?", answer) for answer in ("", "!" * 4000, harmful("tent", "sail"))]
    protector = Protector.from_pretrained(detector, detoxifier, max_answer_tokens=500)
    queries, answers = zip(*cases, strict=True)
    replies = protector.guard(queries=[*queries], answers=[*answers])
    # The wording of the package's own refusal is no part of this.
    shown = [
        (outcome := str(reply.outcome), reply.final if outcome in ("allowed", "rewritten") else "")
        for reply in replies
    ]
    return {
        "outcomes": dict(sorted(Counter(outcome for outcome, _ in shown).items())),
        "rejected rewrites": dict(sorted(protector.discarded.items())),
        "harm": [-1.0 if reply.harm is None else reply.harm for reply in replies],
        "sha256": hashlib.sha256(json.dumps(shown).encode()).hexdigest(),
    }
