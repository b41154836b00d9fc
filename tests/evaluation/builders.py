"""Judged rows for the tests of the numbers and of the reports."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd


from mllm_protector.records import BENIGN, Status

from mllm_protector.scenarios import CRITERIA, Criterion

Row = dict[str, Any]
HARMFUL, SAFE = "harmful", "safe"


def row(base: str, scenario: str, variant: str, arm: str, **given: Any) -> Row:
    """One question and arm; ``given`` are other columns, and ``<judge>=<status>``."""
    fields = {
        "id": f"{scenario}/{variant}/{base}",
        "base": f"{scenario}/{base}",
        "scenario": scenario,
        "variant": variant,
        "criterion": str(CRITERIA.get(scenario, Criterion.HARM)),
        "arm": arm,
        "outcome": None,
        "harm": None,
        "changed": False,
        "cut": False,
        "refused": None,
        "score": None,
        "truth": None,
        "human": None,
    }
    columns = {name if name in fields else f"status:{name}": value for name, value in given.items()}
    return fields | columns


def rows(
    scenario: str,
    variant: str,
    arm: str,
    harmful: int,
    safe: int,
    unjudged: int = 0,
    *,
    judges: Sequence[str] = ("keyword",),
    status: Status = Status.UNPARSEABLE,
    **given: Any,
) -> list[Row]:
    """So many answers to different questions, numbered from 0, the harmful ones first."""
    statuses = [HARMFUL] * harmful + [SAFE] * safe + [str(status)] * unjudged
    return [
        row(str(number), scenario, variant, arm, **dict.fromkeys(judges, found), **given)
        for number, found in enumerate(statuses)
    ]


def benign_rows(arm: str, count: int, **given: Any) -> list[Row]:
    """Answers to harmless questions; a list in ``given`` has a value for each."""
    return [
        row(
            str(number),
            BENIGN,
            "TEXT",
            arm,
            **{"refused": False}
            | {name: value[number] if isinstance(value, list) else value for name, value in given.items()},
        )
        for number in range(count)
    ]


def frame(table: Iterable[Row]) -> pd.DataFrame:
    """Rows as the statistics want them; order does not matter."""
    names = list(dict.fromkeys(name for each in table for name in each)) or list(row("", "", "", ""))
    columns: dict[str, list[Any]] = {name: [each.get(name) for each in table] for name in names}
    return pd.DataFrame(columns).astype({"harm": float, "score": float, "changed": bool})


def judges_of(table: Iterable[Row]) -> dict[str, JudgeInfo]:
    """What is known about the judges that occur: nothing."""
    names = dict.fromkeys(name for each in table for name in each if name.startswith("status:"))
    return {
        name.removeprefix("status:"): JudgeInfo(identity={"name": name.removeprefix("status:")})
        for name in names
    }


def summary(
    table: list[Row],
    *,
    arms: Sequence[str] | None = None,
    judges: Mapping[str, JudgeInfo] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    missing: Sequence[str] = (),
    contamination: Mapping[str, Any] | None = None,
    thresholds: Sequence[float] = (),
) -> dict[str, Any]:
    """The entry of a benchmark."""
    judges = judges_of(table) if judges is None else judges
    rows_of_judges = frame(table)
    for judge in judges:
        for column, nothing in ((f"status:{judge}", None), (f"cut:{judge}", False)):
            if column not in rows_of_judges:
                rows_of_judges[column] = nothing
    return summarise_benchmark(
        rows_of_judges,
        arms=arms or list(dict.fromkeys(each["arm"] for each in table)) or ["none"],
        judges=judges,
        groups=groups or {},
        missing=missing,
        identity={"name": "made up"},
        fingerprint="f" * 64,
        contamination=contamination or {},
        thresholds=thresholds,
    )


def report(
    table: list[Row], *, name: str = "mmsafety", notes: Sequence[str] = (), **given: Any
) -> dict[str, Any]:
    """The content of ``asr.json`` with one benchmark."""
    judges = given.setdefault("judges", judges_of(table))
    arms = given.setdefault("arms", list(dict.fromkeys(each["arm"] for each in table)) or ["none"])
    entry = summary(table, **given)
    return assemble({name: entry}, mllm={"name": "toy"}, guard={}, arms=arms, judges=judges, notes=notes)
