"""The counts of data reports: of the toy data, and of a file with every kind of row that is set aside."""

import json
from pathlib import Path
from typing import Any

from tests.frozen.scripts import PAIRS, asked, harmful, harmless, run_script, write_rows

IGNORED = ("schema", "revision", "found", "examples")
"""Keys of a report that hold no counts, or none that can be compared: versions, digests and examples."""


def compute(home: Path) -> dict[str, Any]:
    """All numbers of each report, by their place in it."""
    path, long, questions = (home / f"{name}.jsonl" for name in ("rows", "long", "asked"))
    write_rows(path, _rows())
    path.write_text(path.read_text() + '{"query": "cut in the mid')
    write_rows(long, _long_rows())
    write_rows(questions, [{"question": _longer(number)} for number in (1, 3, 900)])
    some = ("data=labelled", "data.validation_fraction=0.25", "seed=3")
    own = (*some, f"data.path={path}", f"data.quarantine={home / 'bad.jsonl'}")
    asking = ("benchmark=[questions]", f"benchmarks.questions.path={questions}")
    mixture = (
        "data=mixture",
        "+data@data.sources.one=labelled",
        f"data.sources.one.path={path}",
        f"data.sources.one.quarantine={home / 'worse.jsonl'}",
        "+data@data.sources.two=toy",
        "data.weights={one: 3, two: 0.5}",
        "data.duplicates=exact",
    )
    return {
        "toy": _report(home / "toy-report", "data=toy"),
        "keep": _report(home / "keep", *own, *asking, "contaminated=keep", "data.duplicates=keep"),
        "exact": _report(home / "exact", *own, *asking, "contaminated=drop"),
        "near": _report(home / "near", *some, f"data.path={long}", "data.duplicates=near", "data.limit=24"),
        "mixture": _report(home / "mixture", *mixture),
    }


def _rows() -> list[dict[str, Any]]:
    rows = [
        {"query": asked(*pair), "answer": make(*pair), "harmful": make is harmful, "scenario": pair[0]}
        for pair in PAIRS
        for make in (harmless, harmful)
    ]
    turned = [row | {"harmful": not row["harmful"]} for row in rows[:5]]
    copies = [row | {"answer": row["answer"].upper() + " "} for row in rows[10:14]]
    bad = [{"query": "No answer?"}, {"query": "No label?", "answer": "None.", "harmful": "perhaps"}]
    return [*rows, *rows[20:26], *turned, *copies, *_long_rows(), *bad]


def _long_rows() -> list[dict[str, Any]]:
    """Every fifth again with one word less: near to the first by any measure, and to no other."""
    rows = [
        {"query": _longer(number), "answer": _longer(number + 50), "harmful": number % 3 == 0}
        for number in range(30)
    ]
    return rows + [row | {"answer": row["answer"].rpartition(" ")[0]} for row in rows[::5]]


def _longer(number: int) -> str:
    return " ".join(f"word{place}of{number}" for place in range(60))


def _report(folder: Path, *overrides: str) -> dict[str, Any]:
    run_script("prepare_data", *overrides, f"output_dir={folder}")
    found = _numbers(json.loads((folder / "data_report.json").read_text()))
    return dict(sorted(found.items()))


def _numbers(value: Any, place: str = "") -> dict[str, float | None]:
    """Numbers by their place; neither texts and digests nor the version of the layout."""
    if isinstance(value, list):
        value = {str(index): each for index, each in enumerate(value)}
    if isinstance(value, dict):
        below = (_numbers(each, f"{place}/{name}") for name, each in value.items() if name not in IGNORED)
        return {name: number for numbers in below for name, number in numbers.items()}
    return {place: value} if isinstance(value, int | float | None) else {}
