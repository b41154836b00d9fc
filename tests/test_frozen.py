"""What no change of the code may change unnoticed; ``python -m tests.frozen`` renews it on purpose."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.frozen.stored import NUMBERS, PUBLISHED, compare, compute, read

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all tests here, so that the guard is trained once."""
    return tmp_path_factory.mktemp("frozen")


def require_stored(name: str, found: Any, within: float = 1e-6) -> None:
    changed = compare(found, read(NUMBERS / f"{name}.json"), within=within)
    assert not changed, "\n".join([f"{name}: {len(changed)} numbers are not as stored", *changed[:20]])


def test_short_trainings_end_with_the_stored_weights_in_any_way_of_running_them(tmp_path: Path) -> None:
    # Its trainings are forked, which a process that has computed a gradient must not do.
    command = [sys.executable, "-m", "tests.frozen", "weights", "--to", str(tmp_path)]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = read(tmp_path / "weights.json")
    require_stored("weights", found, within=1e-4)
    ways = found["trainings"]
    for part in ("detector", "detoxifier"):
        whole = ways[f"{part}, lora"]
        assert ways[f"{part}, resumed"] == whole, part
        assert not compare(ways[f"{part}, two processes"]["tensors"], whole["tensors"], within=1e-5), part
        packed, padded = ways[f"{part}, packed"], ways[f"{part}, padded"]
        assert not compare(packed["tensors"], padded["tensors"], within=1e-5), part


def test_a_guard_stores_the_same_calibration_and_shows_the_same_texts(home: Path) -> None:
    require_stored("guard", compute("guard", home), within=1e-4)


def test_an_evaluation_gives_the_same_figures(home: Path) -> None:
    require_stored("evaluation", compute("evaluation", home))


def test_data_reports_count_the_same(home: Path) -> None:
    require_stored("data", compute("data", home))


def test_a_layout_as_mm_safetybench_publishes_it_gives_the_same_questions(home: Path) -> None:
    require_stored("questions", compute("questions", home))


@pytest.mark.skipif(PUBLISHED not in os.environ, reason=f"{PUBLISHED} names no folder of the published files")
def test_the_published_mm_safetybench_gives_the_same_6720_questions(home: Path) -> None:
    assert read(NUMBERS / "published.json")["all"]["count"] == 6720
    require_stored("published", compute("published", home))
