"""Judged rows for the tests of the numbers and of the reports."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mllm_protector.evaluation.arms import DetectorArm
from mllm_protector.evaluation.grid import Answers, JudgeFacts, make_answers
from mllm_protector.evaluation.measurements import as_rows
from mllm_protector.evaluation.run import evaluate
from mllm_protector.evaluation.summary import measure
from mllm_protector.judges.keyword import KeywordJudge
from mllm_protector.protocols import Card
from mllm_protector.records import BENIGN, Status
from mllm_protector.reporting.report import report
from mllm_protector.scenarios import CRITERIA, Criterion

Row = dict[str, Any]
ARMS = {"refusal": DetectorArm(), "protector": DetectorArm(rewrite=True)}
HARMFUL, SAFE = "harmful", "safe"


def row(base: str, scenario: str, variant: str, arm: str, **given: Any) -> Row:
    """One question and arm; ``given`` are other columns, and ``<judge>=<status>``."""
    fields = {
        "id": f"{scenario}/{variant}/{base}",
        "base": f"{scenario}/{base}",
        "twin": None,
        "scenario": scenario,
        "variant": variant,
        "criterion": str(CRITERIA.get(scenario, Criterion.HARM)),
        "arm": arm,
        "outcome": None,
        "harm": None,
        "changed": False,
        "repeated": False,
        "cut": False,
        "refused": None,
        "score": None,
        "truth": None,
        "raw_truth": None,
        "label": None,
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
    return pd.DataFrame(columns).astype({"harm": float, "score": float, "changed": bool, "repeated": bool})


def judges_of(table: Iterable[Row]) -> dict[str, JudgeFacts]:
    """What is known about the judges that occur: nothing."""
    names = dict.fromkeys(name for each in table for name in each if name.startswith("status:"))
    return {
        name.removeprefix("status:"): JudgeFacts(card=Card(identity={"name": name.removeprefix("status:")}))
        for name in names
    }


class Measured(list[Row]):
    """The measurements of made-up answers."""

    def all(self, metric: str, **where: Any) -> list[Row]:
        """Those of a metric, with these fields."""
        return [
            each
            for each in self
            if each["metric"] == metric and all(each[name] == value for name, value in where.items())
        ]

    def one(self, metric: str, **where: Any) -> Row:
        """The only one."""
        [found] = self.all(metric, **where)
        return found

    def value(self, metric: str, **where: Any) -> Any:
        """Its value."""
        return self.one(metric, **where)["value"]

    def limits(self, metric: str, **where: Any) -> tuple[Any, Any]:
        """Its interval."""
        found = self.one(metric, **where)
        return found["low"], found["high"]


def answers_of(
    table: Sequence[Row],
    *,
    arms: Sequence[str] | None = None,
    judges: Mapping[str, JudgeFacts] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    thresholds: Sequence[float] = (),
    labelled_by: str = "people",
) -> Answers:
    """Rows as the statistics want them."""
    judges = judges_of(table) if judges is None else judges
    judged = frame(table)
    for judge in judges:
        for column, nothing in ((f"status:{judge}", None), (f"cut:{judge}", False)):
            if column not in judged:
                judged[column] = nothing
    return make_answers(
        judged,
        arms=arms or list(dict.fromkeys(each["arm"] for each in table)) or ["none"],
        judges=judges,
        groups=groups or {},
        thresholds=thresholds,
        labelled_by=labelled_by,
    )


def measured(table: Sequence[Row], **given: Any) -> Measured:
    """What all statistics say of rows; ``given`` as for ``answers_of``."""
    return Measured(as_rows(measure("made_up", answers_of(table, **given))))


def evaluated(output_dir: Path, **changes: Any) -> Any:
    """A small evaluation with its reports; the content of ``asr.json``, or nothing after a dry run."""
    arguments: dict[str, Any] = {
        "judges": {"keyword": KeywordJudge},
        "detector": "detector",
        "detoxifier": "detoxifier",
        "base": None,
        "arms": ARMS,
        "threshold": None,
        "rewrite_tokens": 8,
        "ensemble": [],
        "labels": None,
        "labelled_by": "people",
        "max_unjudged": 0.0,
        "repeats": 1,
        "batch_size": 4,
        "latency_rows": 0,
        "report_rows": 10,
        "dry_run": False,
        "output_dir": str(output_dir),
    }
    done = evaluate(**arguments | changes)
    report(done)
    return done and done.result
