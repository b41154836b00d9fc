"""The evaluation: load, answer, guard, judge, measure, write.

The MLLM answers once: every arm guards the same answers, so arms are compared on pairs, and another guard or
judge needs no new answers. With several processes each takes its share of the questions through all stages;
the first one then reads everything and measures.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

from mllm_protector.arguments import require_threshold
from mllm_protector.calls import make
from mllm_protector.errors import InputError
from mllm_protector.evaluation.arms import Arm, DetectorArm, JudgeArm, SafetyPrompt, folders, is_recorded
from mllm_protector.evaluation.estimate import estimate
from mllm_protector.evaluation.grid import ENSEMBLE, NONE, JudgeFacts
from mllm_protector.evaluation.items import items_of, load_benchmark, share_of
from mllm_protector.evaluation.measurements import as_rows
from mllm_protector.evaluation.models import Models
from mllm_protector.evaluation.result import Asked, Evaluation, Facts, finish, stores, texts_of
from mllm_protector.evaluation.rows import read_labels
from mllm_protector.evaluation.stages import Row, answer_stage, guard_stage, judge_stage, probe_stage
from mllm_protector.evaluation.timing import guard_latency
from mllm_protector.models.guard_file import read_guard_file
from mllm_protector.models.parts import require_bases
from mllm_protector.processes import start_accelerator
from mllm_protector.protocols import MLLM, Benchmark, Card, Judge, Priced
from mllm_protector.ranges import Amount, Count, Share

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
    arms: Mapping[str, Arm | SafetyPrompt],
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
    results. The arm ``none`` is always there and need not be given.

    Of two adapters on different models, the one that was trained on ``base`` takes it. At most
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
    prompts = {name: arm for name, arm in arms.items() if isinstance(arm, SafetyPrompt)}
    guarding = {name: arm for name, arm in arms.items() if not isinstance(arm, SafetyPrompt)}
    recorded: dict[str, MLLM] = {}
    for name, prompt in prompts.items():
        prompt.check(name, mllm)
        if prompt.mllm is not None and is_recorded(prompt.mllm):
            recorded[name] = make(f"arms.{name}.mllm", prompt.mllm)
    # Broken folders are reported in seconds, not after hours of answering.
    parts = {
        part: place
        for name, arm in guarding.items()
        for part, place in folders(name, arm, detector, detoxifier).items()
    }
    trained = {part: read_guard_file(Path(folder), kind).data for part, (folder, kind) in parts.items()}
    require_bases(base, *parts.values())
    models = Models(
        run_detector=detector if "detector" in parts else None,
        run_detoxifier=detoxifier if "detoxifier" in parts else None,
        base=base,
        threshold=threshold,
        rewrite_tokens=rewrite_tokens,
    )
    made = {name: make(f"judges.{name}", judge) for name, judge in judges.items()}
    guarding |= {name: arm.made(name) for name, arm in guarding.items() if isinstance(arm, JudgeArm)}
    judging = {name: arm.judge() for name, arm in guarding.items() if isinstance(arm, JudgeArm)}
    processes = start_accelerator("no", patience=timedelta(days=30))
    with processes.main_process_first():  # only one process downloads or renders
        loaded = {name: load_benchmark(name, benchmark, repeats) for name, benchmark in benchmarks.items()}
        model = make("mllm", mllm)
    identity = model.card.identity
    items = {name: items_of(name, each.questions, identity) for name, each in loaded.items()}
    everything = [*chain.from_iterable(items.values())]
    names = [NONE, *arms]
    labelled = read_labels(labels, ((item.question.id, arm) for item in everything for arm in names))
    answered, replied, judged = stores(Path(output_dir) / "cache", processes.process_index)
    if dry_run:
        if processes.is_main_process:
            anew = {
                name: prompt.items(everything, {} if prompt.other_model else identity)
                for name, prompt in prompts.items()
                if name not in recorded
            }
            estimate(everything, answered, made, names, again=anew, guards=judging)
        return None

    stages = {}
    mine = [item for item in everything if share_of(item, processes.num_processes) == processes.process_index]
    plain, stages["answers"] = answer_stage(mine, answered, model, batch_size=batch_size)
    answers = dict.fromkeys(names, plain)
    asked_again = {}
    for name, prompt in sorted(prompts.items(), key=lambda each: each[1].other_model):
        if prompt.other_model:
            del model  # before another one takes its memory
            model = recorded.pop(name) if name in recorded else prompt.model(mllm)
        asked_again[name] = model.card.identity
        again = prompt.items(mine, asked_again[name])
        answers[name], stages[f"answers: {name}"] = answer_stage(
            again, answered, model, batch_size=batch_size
        )
    del model

    replies: dict[str, Sequence[Row | None]] = {name: [None] * len(mine) for name in names}
    for name, judge in judging.items():
        probe_stage(f"arms.{name}.judge", judge, judged)
    protectors = {name: arm.protector(models) for name, arm in guarding.items()}
    guards = {}
    for name, protector in protectors.items():
        guards[name] = protector.card.identity
        replies[name], stages[f"guard: {name}"] = guard_stage(
            name, mine, plain, replied, guards[name], protector, batch_size=MANY * batch_size
        )
    discarded = {name: dict(protector.discarded) for name, protector in protectors.items()}
    texts = [
        (item.question.text, answer["text"])
        for item, answer in zip(mine, plain, strict=True)
        if "text" in answer
    ]
    sample = texts[:: max(1, len(texts) // max(1, latency_rows))][:latency_rows]
    latency = [row for name, each in protectors.items() for row in guard_latency(name, each, sample)]
    scored = _sharing_a_detector(guarding, guards)
    del protectors, models, guarding, judging

    shown = texts_of(mine, answers, replies)
    facts: dict[str, JudgeFacts] = {}
    for name in judges:
        judge = made.pop(name)
        facts[name] = JudgeFacts(card=judge.card, circular=_is_circular(judge.card, guards))
        probe_stage(f"judges.{name}", judge, judged)
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
        arms=names,
        prompts={name: (prompt, asked_again[name]) for name, prompt in prompts.items()},
        guards=guards,
        scored=scored,
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
            "arms": names,
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
    asked: Asked = {name: (benchmarks[name], loaded[name], items[name]) for name in benchmarks}
    return finish(asked, known, Path(output_dir), run=run, max_unjudged=max_unjudged, report_rows=report_rows)


def _is_circular(card: Card, guards: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a judge is a guard that it judges, or the detector of one."""
    own = card.identity.get("detector", card.identity)
    detectors = [guard["detector"] for guard in guards.values()]
    same_weights = ("weights" in each and each["weights"] == own.get("weights") for each in detectors)
    return own in detectors or any(same_weights)


def _sharing_a_detector(arms: Mapping[str, Arm], guards: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The arms with the detector of the first one that has a detector; a judge gives no scores."""
    own = [name for name, arm in arms.items() if isinstance(arm, DetectorArm)]
    return [name for name in own if guards[name]["detector"] == guards[own[0]]["detector"]]


def _check(
    benchmarks: Mapping[str, Benchmark],
    judges: Mapping[str, Callable[[], Judge]],
    arms: Iterable[str],
    ensemble: Sequence[str],
) -> None:
    if not benchmarks:
        raise InputError("benchmarks: at least one benchmark is needed")
    if not judges:
        raise InputError("judges: at least one judge is needed")
    for name in benchmarks:
        if not re.fullmatch(r"\w[\w-]{0,63}", name) or name == "cache":
            raise InputError(f"benchmarks: {name!r} cannot name a folder of results; use letters and digits")
    for name in arms:
        if name == NONE or not re.fullmatch(r"\w[\w-]{0,63}", name):
            raise InputError(f"arms: {name!r} cannot name an arm; none is there anyway, others take letters")
    if unknown := [name for name in ensemble if name not in judges]:
        raise InputError(f"ensemble: no judge {unknown[0]!r}; there are {', '.join(judges)}")
    if ensemble and len(set(ensemble)) < 2:
        raise InputError("ensemble: a majority needs two different judges at least")
    if ensemble and ENSEMBLE in judges:
        raise InputError(f"judges: the name {ENSEMBLE!r} is that of the majority; choose another")
