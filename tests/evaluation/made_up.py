"""The results of a run that never was: rows as in ``results.jsonl``, and ``asr.json`` from them."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_protector.evaluation.grid import JudgeFacts
from mllm_protector.evaluation.measurements import SCHEMA, Measurement, as_rows
from mllm_protector.evaluation.summary import measure
from mllm_protector.protocols import Card
from mllm_protector.records import BENIGN, VARIANTS, Status
from mllm_protector.scenarios import GROUPS, SCENARIOS
from tests.evaluation.builders import answers_of

RATES = {"none": 0.7, "refusal": 0.04, "protector": 0.1}

RUN: dict[str, Any] = {
    "started": "2025-01-02T03:04:05+00:00",
    "seconds": 123.4,
    "versions": {"python": "3.11.9", "mllm-protector": "0.1.0", "torch": "2.13.0"},
    "hardware": {"cpu": "A processor", "cores": 2, "memory_mib": 8000, "gpus": []},
    "commit": {"id": "0123456789abcdef0123456789abcdef01234567", "dirty": True},
    "seed": 0,
    "processes": 1,
    "arguments": {"limit": None},
    "stages": {"answer": {"rows": 100, "new": 40, "seconds": 12.3}},
    "measurements": as_rows(
        [
            Measurement(arm="protector", metric="latency_median_ms", value=12.5, n=20),
            Measurement(arm="protector", metric="latency_p95_ms", value=80.25, n=20),
        ]
    ),
    "peak_memory_mib": {"process": 812.3},
}


def made_up_rows(
    *,
    scenarios: Sequence[str] = SCENARIOS,
    variants: Sequence[str] = VARIANTS,
    each: int = 12,
    benign: int = 20,
    judges: Sequence[str] = ("keyword", "chat"),
    benchmark: str = "mmsafety",
    seed: int = 0,
    rates: Mapping[str, float] = RATES,
) -> list[dict[str, Any]]:
    """``each`` questions of each scenario and variant, then ``benign`` harmless ones, in every arm."""
    chance = random.Random(seed)
    rows = []
    asked = [(name, kind, number) for name in scenarios for kind in variants for number in range(each)]
    asked += [(BENIGN, "TEXT", number) for number in range(benign)]
    for scenario, variant, number in asked:
        name = f"{scenario}/{variant}/{number}"
        draw = chance.random() * (0.8 if variant == "SD_TYPO" else 1.1)
        harmless = scenario == BENIGN
        for arm in rates:
            rate = rates[arm]
            guarded, harmful = arm != "none", draw < rate and not harmless
            flagged = guarded and (draw < rates["none"] if not harmless else number % 10 == 3)
            raw = f"Raw answer to {name}. " + "It goes on for a while. " * 6
            final = raw if not flagged else f"Reply of {arm} to {name}."
            verdicts = {}
            for place, judge in enumerate(() if harmless else judges):
                unknown = place == 1 and chance.random() < 0.03
                status = Status.UNPARSEABLE if unknown else Status.HARMFUL if harmful else Status.SAFE
                verdicts[judge] = {"status": str(status), "reason": f"{judge} says so"}
            rows.append(
                {
                    "id": name,
                    "benchmark": benchmark,
                    "scenario": scenario,
                    "variant": variant,
                    "base": f"{scenario}/{number}",
                    "twin": None,
                    "repeat": 0,
                    "criterion": "harm",
                    "question": f"Question {number} of {scenario}, asked as {variant}?",
                    "image": None if variant == "TEXT" else hashlib.sha256(name.encode()).hexdigest(),
                    "arm": arm,
                    "raw": raw,
                    "generation_error": None,
                    "harm": round(1 - draw / 1.1, 3) if guarded else None,
                    "final": final,
                    "outcome": None if not guarded else ("rewritten" if flagged else "allowed"),
                    "changed": flagged,
                    "repeated": guarded and not flagged,
                    "cut": False,
                    "refused": False if harmless else None,
                    "score": 1.0 if harmless and not flagged else 0.0 if harmless else None,
                    "truth": None,
                    "raw_truth": None,
                    "label": None,
                    "verdicts": verdicts,
                }
            )
    return rows


def made_up_result(rows: Sequence[Mapping[str, Any]], **given: Any) -> dict[str, Any]:
    """``asr.json`` of the rows of one benchmark; ``given`` are other values of its keys."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    names = list(dict.fromkeys(judge for row in rows for judge in row["verdicts"]))
    judges = {name: JudgeFacts(card=Card(identity={"name": name})) for name in names}
    table = [
        row
        | {f"status:{judge}": row["verdicts"].get(judge, {}).get("status") for judge in judges}
        | {f"cut:{judge}": row["verdicts"].get(judge, {}).get("cut", False) for judge in judges}
        for row in map(dict, rows)
    ]
    answers = answers_of(table, arms=arms, judges=judges, groups=GROUPS, thresholds=[0.5])
    name = rows[0]["benchmark"]
    return {
        "schema": SCHEMA,
        "mllm": {"name": "made-up-mllm", "revision": "1"},
        "arms": arms,
        "guard": {
            arm: {"detector": {"weights": "d1"}, "corrector": {"weights": arm}, "threshold": 0.5}
            for arm in arms
            if arm != "none"
        },
        "scored": [arm for arm in arms if arm != "none"],
        "asked_again": {},
        "judges": {
            judge: {"identity": {"name": judge}, "circular": False, "note": None, "bias": None}
            for judge in judges
        },
        "notes": [],
        "benchmarks": {
            name: {
                "identity": {"name": name},
                "questions": {
                    "count": len({row["id"] for row in rows}),
                    "fingerprint": "f" * 64,
                    "missing": {"count": 1, "first": ["01-Illegal_Activitiy/SD/99: no such file"]},
                },
                "contamination": {},
                "groups": {group: [*members] for group, members in answers.groups.items()},
            }
        },
        "measurements": as_rows(measure(name, answers)),
    } | given
