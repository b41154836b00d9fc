"""The evaluation: load, answer, guard, judge, measure, write.

The MLLM answers once: every arm guards the same answers, so arms are compared on pairs, and another guard or
judge needs no new answers. With several processes each takes its share of the questions through all stages;
the first one then reads everything and measures.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

from mllm_protector.arguments import require_threshold
from mllm_protector.errors import InputError
from mllm_protector.evaluation.grid import ENSEMBLE, NONE, JudgeFacts
from mllm_protector.evaluation.guards import load_protectors, measure_latency
from mllm_protector.evaluation.items import items_of, load_benchmark, share_of
from mllm_protector.evaluation.measurements import as_rows
from mllm_protector.evaluation.result import Evaluation, Facts, finish, stores, texts_of
from mllm_protector.evaluation.rows import read_labels
from mllm_protector.evaluation.stages import (
    Row,
    answer_stage,
    estimate,
    guard_stage,
    judge_stage,
    probe_stage,
)
from mllm_protector.models.guard_file import Kind, read_guard_file
from mllm_protector.models.parts import require_bases
from mllm_protector.processes import start_accelerator
from mllm_protector.protocols import MLLM, Benchmark, Card, Judge, Priced
from mllm_protector.ranges import Amount, Count, Share

ARMS = (NONE, "refusal", "protector")
"""No guard; detector and fixed refusal; detector and detoxifier."""

MANY = 4
"""Batches of cheap rows are larger by this factor: among more texts more are of like length."""


def evaluate(
    *,
    benchmarks: Mapping[str, Benchmark],
    mllm: Callable[[], MLLM],
    judges: Mapping[str, Callable[[], Judge]],
    detector: str,
    detoxifier: str,
    base: str | None,
    arms: Sequence[str],
    threshold: float | None,
    rewrite_tokens: Count,
    ensemble: Sequence[str],
    labels: str | None,
    labelled_by: str,
    max_unjudged: Share,
    repeats: Count,
    batch_size: Count,
    latency_rows: Amount,
    report_rows: Amount,
    dry_run: bool,
    output_dir: str,
) -> Evaluation | None:
    """Measure the effect of a guard on an MLLM: attack success rate, harmless use, time.

    ``configs/eval_mmsafety.yaml`` explains the parameters. A benchmark's name is that of its folder of
    results. Of two adapters on different models, the one that was trained on ``base`` takes it. At most
    ``batch_size`` questions, or paid verdicts, are lost when the run is killed.

    ``output_dir`` gets ``asr.json``, ``measurements.csv``, ``run.json``, a ``results.jsonl`` in a folder for
    each benchmark, and in ``cache`` the rows that a next run can use again.

    Returns:
        The input of ``reporting.report``; ``None`` on all processes but the first, and of a dry run.

    Raises:
        InputError: the input cannot be used.
        RunError: a model cannot be reached, or the disk is full.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    _check(benchmarks, judges, arms, ensemble)
    if threshold is not None:
        require_threshold("threshold", threshold)
    # Broken folders are reported in seconds, not after hours of answering.
    parts: list[tuple[str, Kind]] = []
    if set(arms) != {NONE}:
        parts.append((detector, "detector"))
    if "protector" in arms:
        parts.append((detoxifier, "detoxifier"))
    trained = {str(kind): read_guard_file(Path(folder), kind).data for folder, kind in parts}
    require_bases(base, *parts)
    made = {name: make() for name, make in judges.items()}
    processes = start_accelerator("no", patience=timedelta(days=30))
    with processes.main_process_first():  # only one process downloads or renders
        loaded = {name: load_benchmark(name, benchmark, repeats) for name, benchmark in benchmarks.items()}
        model = mllm()
    identity = model.card.identity
    items = {name: items_of(name, each.questions, identity) for name, each in loaded.items()}
    everything = [*chain.from_iterable(items.values())]
    labelled = read_labels(labels, ((item.question.id, arm) for item in everything for arm in arms))
    answered, replied, judged = stores(Path(output_dir) / "cache", processes.process_index)
    if dry_run:
        if processes.is_main_process:
            estimate(everything, answered, made, arms)
        return None

    stages = {}
    mine = [item for item in everything if share_of(item, processes.num_processes) == processes.process_index]
    answers, stages["answers"] = answer_stage(mine, answered, model, batch_size=batch_size)
    del model

    protectors = load_protectors(arms, detector, detoxifier, base, threshold, rewrite_tokens)
    replies: dict[str, Sequence[Row | None]] = {NONE: [None] * len(mine)}
    guards = {}
    for arm, protector in protectors.items():
        guards[arm] = protector.card.identity
        replies[arm], stages[f"guard: {arm}"] = guard_stage(
            arm, mine, answers, replied, guards[arm], protector, batch_size=MANY * batch_size
        )
    discarded = {arm: dict(protector.discarded) for arm, protector in protectors.items()}
    texts = [
        (item.question.text, answer["text"])
        for item, answer in zip(mine, answers, strict=True)
        if "text" in answer
    ]
    sample = texts[:: max(1, len(texts) // max(1, latency_rows))][:latency_rows]
    latency = [row for arm, each in protectors.items() for row in measure_latency(arm, each, sample)]
    del protectors

    shown = texts_of(mine, answers, replies)
    facts: dict[str, JudgeFacts] = {}
    for name in judges:
        judge = made.pop(name)
        facts[name] = JudgeFacts(card=judge.card, circular=_is_circular(judge.card, guards))
        probe_stage(name, judge, judged)
        rows = batch_size if isinstance(judge, Priced) else MANY * batch_size
        _, stages[f"judge: {name}"] = judge_stage(
            name, shown, judged, facts[name].card, judge, batch_size=rows
        )
        del judge
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return None

    if ensemble:
        members = {name: facts[name].card.identity for name in ensemble}
        facts[ENSEMBLE] = JudgeFacts(
            card=Card(identity={"majority_of": members}),
            circular=any(facts[name].circular for name in ensemble),
        )
    known = Facts(
        mllm=identity,
        arms=arms,
        guards=guards,
        judges=facts,
        ensemble=ensemble,
        trained=trained,
        labels=labelled,
        labelled_by=labelled_by,
    )
    run = {
        "started": started.isoformat(timespec="seconds"),
        "processes": processes.num_processes,
        "arguments": {
            "arms": [*arms],
            "threshold": threshold,
            "rewrite_tokens": rewrite_tokens,
            "ensemble": [*ensemble],
            "repeats": repeats,
            "batch_size": batch_size,
            "max_unjudged": max_unjudged,
        },
        "stages": {name: asdict(took) for name, took in stages.items()},
        "discarded_rewrites": discarded,
        "measurements": as_rows(latency),
        "seconds": round(time.monotonic() - clock, 1),
    }
    asked = {name: (benchmarks[name], loaded[name], items[name]) for name in benchmarks}
    return finish(asked, known, Path(output_dir), run=run, max_unjudged=max_unjudged, report_rows=report_rows)


def _is_circular(card: Card, guards: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a judge is the detector of a guard that it judges."""
    weights = card.identity.get("detector", {}).get("weights")
    return any(weights == guard["detector"]["weights"] for guard in guards.values())


def _check(
    benchmarks: Mapping[str, Benchmark],
    judges: Mapping[str, Callable[[], Judge]],
    arms: Sequence[str],
    ensemble: Sequence[str],
) -> None:
    if not benchmarks:
        raise InputError("benchmarks: at least one benchmark is needed")
    if not judges:
        raise InputError("judges: at least one judge is needed")
    for name in benchmarks:
        if not re.fullmatch(r"\w[\w-]{0,63}", name) or name == "cache":
            raise InputError(f"benchmarks: {name!r} cannot name a folder of results; use letters and digits")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise InputError(f"arms: unknown arm {unknown[0]!r}; choose among {', '.join(ARMS)}")
    if len(set(arms)) < len(arms) or not arms:
        raise InputError(f"arms={[*arms]}: name each arm once, and at least one")
    if NONE not in arms:
        raise InputError(f"arms: {NONE!r} is missing, and every other arm is compared with it")
    if unknown := [name for name in ensemble if name not in judges]:
        raise InputError(f"ensemble: no judge {unknown[0]!r}; there are {', '.join(judges)}")
    if ensemble and len(set(ensemble)) < 2:
        raise InputError("ensemble: a majority needs two different judges at least")
    if ensemble and ENSEMBLE in judges:
        raise InputError(f"judges: the name {ENSEMBLE!r} is that of the majority; choose another")
