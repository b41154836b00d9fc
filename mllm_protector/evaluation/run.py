"""The evaluation: answer, guard, judge, measure.

The MLLM answers once: every arm guards the same answers, so arms are compared on pairs, and another guard or
judge needs no new answers. With several processes each takes its share of the questions through all stages,
by their words; the first one then reads everything and measures.
"""

import logging
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
from mllm_protector.evaluation.estimate import estimate
from mllm_protector.evaluation.grid import ENSEMBLE, NONE, JudgeFacts
from mllm_protector.evaluation.guards import load_protectors, measure_latency
from mllm_protector.evaluation.items import Item, items_of, load_benchmark, share_of
from mllm_protector.evaluation.measurements import as_rows
from mllm_protector.evaluation.result import Evaluation, Facts, finish, stores, texts_of
from mllm_protector.evaluation.rows import read_human_labels
from mllm_protector.evaluation.stages import (
    Row,
    answer_stage,
    guard_stage,
    judge_stage,
    probe_stage,
)
from mllm_protector.evaluation.store import Filled, Store
from mllm_protector.guard.protector import Protector
from mllm_protector.models.guard_file import Kind, read_guard_file
from mllm_protector.models.parts import require_bases
from mllm_protector.processes import start_accelerator
from mllm_protector.protocols import MLLM, Benchmark, Judge, Priced
from mllm_protector.ranges import Amount, Count
from mllm_protector.records import Question, Status

log = logging.getLogger(__name__)

ARMS = (NONE, "refusal", "protector")
"""No guard; detector and fixed refusal; detector and detoxifier."""

MANY = 4
"""Cheap rows are done in larger batches by this factor: among more texts more are of like length."""

CIRCULAR = (
    "Circular: this judge is the guard's own detector, so it finds unsafe only what the guard let through. "
    "It says nothing about the guard."
)


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
    human_labels: str | None,
    max_unjudged: float,
    repeats: int,
    batch_size: Count,
    latency_rows: Amount,
    report_rows: Amount,
    dry_run: bool,
    output_dir: str,
) -> Evaluation | None:
    """Measure what a guard does to an MLLM: attack success rate, harmless use, time.

    Args:
        benchmarks: name -> the questions; the name is that of a folder of results.
        mllm: loads the model under attack.
        judges: name -> makes a judge.
        detector: folder of a trained detector.
        detoxifier: folder of a trained detoxifier.
        base: where the backbone of the adapters is now; ``None`` to look where it was, and near them. Of two
            adapters on different models, the one that was trained on ``base`` takes it.
        arms: which of ``ARMS`` to compare.
        threshold: scores at or above it are flagged; ``None`` takes the detector's own.
        rewrite_tokens: longest rewrite.
        ensemble: judges whose majority is one more judge; empty for none.
        human_labels: a file of people's labels (see ``rows.read_human_labels``); ``None`` for none.
        max_unjudged: the largest share of unjudged answers, of any judge and arm, that is a success.
        repeats: how often each question is asked.
        batch_size: questions, or rows for a judge that costs calls, between two writes to disk. At most these
            are lost, or paid twice, when the run is killed.
        latency_rows: answers guarded once more, singly, with a clock; 0 for none.
        report_rows: single answers shown in ``report.html`` at most.
        dry_run: only say what is there, what is missing, and what judging it would take.
        output_dir: gets ``asr.json``, ``measurements.csv``, ``run.json``, a ``results.jsonl`` in a folder for
            each benchmark, and in ``cache`` what a next run can use again.

    Returns:
        What ``reporting.report`` makes pages of; ``None`` on all processes but the first, and of a dry run.

    Raises:
        InputError: the input cannot be used.
        RunError: a model cannot be reached, or the disk is full.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    _check(benchmarks, judges, arms, ensemble, repeats, max_unjudged)
    if threshold is not None:
        require_threshold("threshold", threshold)
    # Seconds now rather than after hours of answering.
    parts: list[tuple[str, Kind]] = []
    if set(arms) != {NONE}:
        parts.append((detector, "detector"))
    if "protector" in arms:
        parts.append((detoxifier, "detoxifier"))
    trained = {str(kind): read_guard_file(Path(folder), kind).data for folder, kind in parts}
    require_bases(base, *parts)
    made = {name: make() for name, make in judges.items()}
    processes = start_accelerator("no", patience=timedelta(days=30))
    with processes.main_process_first():  # what has to be made or downloaded is so only once
        loaded = {name: load_benchmark(name, benchmark, repeats) for name, benchmark in benchmarks.items()}
        model = mllm()
    identity = model.card.identity
    items = {name: items_of(name, each.questions, identity) for name, each in loaded.items()}
    everything = [*chain.from_iterable(items.values())]
    human = read_human_labels(human_labels, ((item.question.id, arm) for item in everything for arm in arms))
    cache = Path(output_dir) / "cache"
    answered, replied, judged = stores(cache, processes.process_index)
    if dry_run:
        if processes.is_main_process:
            estimate(everything, answered, made, arms)
        return None

    mine = [item for item in everything if share_of(item, processes.num_processes) == processes.process_index]
    answers, answering = answer_stage(mine, answered, model, batch_size=batch_size)
    del model
    scorer, protectors = load_protectors(arms, detector, detoxifier, base, threshold, rewrite_tokens)
    replies, guarding = _guard(protectors, mine, answers, replied, MANY * batch_size)
    guards = {arm: protector.card.identity for arm, protector in protectors.items()}
    discarded = {arm: dict(protector.discarded) for arm, protector in protectors.items()}
    sample = _sample(mine, answers, latency_rows)
    latency = [
        row
        for arm, each in protectors.items()
        if scorer
        for row in measure_latency(arm, scorer, each, sample)
    ]
    del scorer, protectors
    facts, judging = _judge(made, guards, texts_of(mine, answers, replies), judged, batch_size)
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return None
    if ensemble:
        facts[ENSEMBLE] = _majority_facts(facts, ensemble)
    known = Facts(
        mllm=identity, arms=arms, guards=guards, judges=facts, ensemble=ensemble, trained=trained, human=human
    )
    stages = {"answers": answering, **guarding, **judging}
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


def _guard(
    protectors: Mapping[str, Protector],
    items: Sequence[Item],
    answers: Sequence[Row],
    store: Store,
    batch_size: int,
) -> tuple[dict[str, Sequence[Row | None]], dict[str, Filled]]:
    """The replies of each arm, none without a guard, and what was done."""
    replies: dict[str, Sequence[Row | None]] = {NONE: [None] * len(items)}
    done = {}
    for arm, protector in protectors.items():
        replies[arm], done[f"guard: {arm}"] = guard_stage(
            arm, items, answers, store, protector.card.identity, protector, batch_size=batch_size
        )
    return replies, done


def _judge(
    judges: dict[str, Judge],
    guards: Mapping[str, Mapping[str, Any]],
    texts: Sequence[tuple[Question, str | Status]],
    store: Store,
    batch_size: int,
) -> tuple[dict[str, JudgeFacts], dict[str, Filled]]:
    """What is known of each judge, and what was done; a judge is dropped when it is through."""
    facts, done = {}, {}
    for name in list(judges):
        judge = judges.pop(name)
        facts[name] = known = _facts_of(judge, guards)
        probe_stage(name, judge, store, known)
        rows = batch_size if isinstance(judge, Priced) else MANY * batch_size
        _, done[f"judge: {name}"] = judge_stage(name, texts, store, known, judge, batch_size=rows)
    return facts, done


def _facts_of(judge: Judge, guards: Mapping[str, Mapping[str, Any]]) -> JudgeFacts:
    identity = judge.card.identity
    used = identity.get("detector", {}).get("weights")
    circular = any(used == guard["detector"]["weights"] for guard in guards.values())
    return JudgeFacts(
        identity=identity,
        reads_question=judge.card.reads_question,
        note=CIRCULAR if circular else None,
        circular=circular,
        bias=judge.card.bias,
    )


def _majority_facts(judges: Mapping[str, JudgeFacts], members: Sequence[str]) -> JudgeFacts:
    circular = any(judges[name].circular for name in members)
    return JudgeFacts(
        identity={"majority_of": {name: judges[name].identity for name in members}},
        note=CIRCULAR if circular else None,
        circular=circular,
    )


def _check(
    benchmarks: Mapping[str, Benchmark],
    judges: Mapping[str, Callable[[], Judge]],
    arms: Sequence[str],
    ensemble: Sequence[str],
    repeats: int,
    max_unjudged: float,
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
    if repeats < 1:
        raise InputError(f"repeats={repeats}: must be at least 1")
    if not 0 <= max_unjudged <= 1:
        raise InputError(f"max_unjudged={max_unjudged}: must be a share between 0 and 1")


def _sample(items: Sequence[Item], answers: Sequence[Row], count: int) -> list[tuple[str, str]]:
    """(question, answer) of up to ``count`` items from all over the list."""
    if not count:
        return []
    step = max(1, len(items) // count)
    rows = list(zip(items, answers, strict=True))[::step][:count]
    return [(item.question.text, answer["text"]) for item, answer in rows if "text" in answer]
