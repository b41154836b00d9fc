"""The evaluation: answer, guard, judge, report.

The MLLM answers once: every arm guards the same answers, so arms are compared on pairs, and another guard or
judge needs no new answers. With several processes each takes its share of the questions through all stages,
by their words, and nobody waits for another before the end, when the first one brings everything together.
"""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

from mllm_protector.errors import InputError, RecordError
from mllm_protector.evaluation.ensemble import ENSEMBLE
from mllm_protector.evaluation.estimate import estimate
from mllm_protector.evaluation.judging import judge_stage, probe_stage
from mllm_protector.evaluation.publish import Facts, Stores, publish
from mllm_protector.evaluation.rows import read_human_labels
from mllm_protector.evaluation.stages import (
    BARE,
    CIRCULAR,
    Guards,
    Item,
    Outputs,
    answer_stage,
    guard_stage,
    items_of,
)
from mllm_protector.guard.calibration import require_threshold
from mllm_protector.models.bases import require_bases
from mllm_protector.models.guard_file import Kind, read_guard_file
from mllm_protector.processes import start_accelerator
from mllm_protector.protocols import MLLM, Benchmark, Judge, Priced
from mllm_protector.ranges import Amount, Count
from mllm_protector.records import LoadedBenchmark
from mllm_protector.reporting.report import JudgeInfo

log = logging.getLogger(__name__)

ARMS = (BARE, "refusal", "protector")
"""No guard; detector and fixed refusal; detector and detoxifier."""

MANY = 4
"""Rows that cost little are done so many times more at once: among more texts more are of like length."""


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
) -> dict[str, Any] | None:
    """Measure what a guard does to an MLLM: attack success rate, harmless use, time.

    Args:
        benchmarks: name -> the questions; the name is that of a folder of results.
        mllm: loads the model under attack.
        judges: name -> loads a judge.
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
        batch_size: questions, or rows for a judge that costs calls, between two writes to disk: so many are
            at most lost, or paid twice, when the run is killed.
        latency_rows: so many answers are guarded once more, singly, with a clock; 0 for none.
        report_rows: at most so many single answers stand in ``report.html``.
        dry_run: only say what is there, what is missing, and what judging it would take.
        output_dir: gets ``asr.json``, ``.csv``, ``.md``, ``.tex``, ``.png``, ``report.html``, ``run.json``, a
            ``results.jsonl`` in a folder for each benchmark, and in ``cache`` what a next run can use again.

    Returns:
        The content of ``asr.json``; ``None`` on all processes but the first, and of a dry run.

    Raises:
        InputError: the input cannot be used.
        RunError: a model cannot be reached, the disk is full, or more than ``max_unjudged`` is unjudged
            (after everything is written).
    """
    started, clock = datetime.now(UTC), time.monotonic()
    _check(benchmarks, judges, arms, ensemble, repeats, max_unjudged)
    if threshold is not None:
        require_threshold("threshold", threshold)
    # Seconds now rather than after hours of answering.
    parts: list[tuple[str, Kind]] = []
    if set(arms) != {BARE}:
        parts.append((detector, "detector"))
    if "protector" in arms:
        parts.append((detoxifier, "detoxifier"))
    trained = {str(kind): read_guard_file(Path(folder), kind).data for folder, kind in parts}
    require_bases(base, *parts)
    for make in judges.values():
        make().identity()
    processes = start_accelerator("no", patience=timedelta(days=30))
    with processes.main_process_first():  # what has to be made or downloaded is so only once
        loaded = {name: _load(name, benchmark, repeats) for name, benchmark in benchmarks.items()}
        model = mllm()
    facts = Facts(model.identity(), trained)
    items = {name: items_of(name, each.questions, facts.mllm) for name, each in loaded.items()}
    human = read_human_labels(
        human_labels, ((item.question.id, arm) for some in items.values() for item in some for arm in arms)
    )
    mine = [
        item
        for some in items.values()
        for item in some
        if _share_of(item, processes.num_processes) == processes.process_index
    ]
    stores = Stores(Path(output_dir) / "cache", processes.process_index)
    if dry_run:
        if processes.is_main_process:
            estimate([*chain(*items.values())], stores.answers, judges, arms)
        return None

    facts.stages["answers"] = answer_stage(mine, model, stores.answers, batch_size)
    del model
    if set(arms) != {BARE}:
        guards = Guards(
            detector=detector,
            detoxifier=detoxifier if "protector" in arms else None,
            base=base,
            threshold=threshold,
            rewrite_tokens=rewrite_tokens,
        )
        _guard(mine, arms, guards, stores, facts, batch_size=batch_size, latency_rows=latency_rows)
        del guards
    _judge(mine, arms, judges, stores, facts, batch_size=batch_size)
    del stores
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return None
    manifest = {
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
        "stages": {name: asdict(filled) for name, filled in facts.stages.items()},
        "rejected_rewrites": facts.rejections,
        "latency": facts.latency,
    }
    return publish(
        {name: (benchmark, loaded[name], items[name]) for name, benchmark in benchmarks.items()},
        facts,
        arms=arms,
        ensemble=ensemble,
        human=human,
        max_unjudged=max_unjudged,
        report_rows=report_rows,
        output_dir=Path(output_dir),
        run=manifest | {"seconds": round(time.monotonic() - clock, 1)},
    )


def _guard(
    items: Sequence[Item],
    arms: Sequence[str],
    guards: Guards,
    stores: Stores,
    facts: Facts,
    *,
    batch_size: int,
    latency_rows: int,
) -> None:
    for arm in arms:
        if arm == BARE:
            continue
        protector = guards.protector(arm)
        facts.guards[arm] = protector.identity()
        outputs = stores.outputs(facts)
        facts.stages[f"guard: {arm}"] = guard_stage(
            arm, protector, items, outputs, stores.replies, MANY * batch_size
        )
        facts.rejections[arm] = dict(protector.discarded)
        if sample := _sample(items, outputs, latency_rows):
            facts.latency[arm] = guards.latency(protector, sample)


def _judge(
    items: Sequence[Item],
    arms: Sequence[str],
    judges: Mapping[str, Callable[[], Judge]],
    stores: Stores,
    facts: Facts,
    *,
    batch_size: int,
) -> None:
    for name, make in judges.items():
        judge = make()
        facts.judges[name] = _judge_info(judge, facts.guards)
        facts.reads_question[name] = judge.reads_question
        judged = stores.judged(name, facts)
        probe_stage(name, judge, judged, stores.verdicts)
        rows = batch_size if isinstance(judge, Priced) else MANY * batch_size
        facts.stages[f"judge: {name}"] = judge_stage(name, judge, judged, items, arms, stores.verdicts, rows)


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
    if BARE not in arms:
        raise InputError(f"arms: {BARE!r} is missing, and every other arm is compared with it")
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


def _load(name: str, benchmark: Benchmark, repeats: int) -> LoadedBenchmark:
    try:
        loaded = benchmark.load()
    except RecordError:
        raise  # it begins with the file and the line
    except InputError as error:
        key = re.split("[=:. ]", str(error), maxsplit=1)[0]
        raise InputError(f"benchmarks.{name}{'.' if hasattr(benchmark, key) else ': '}{error}") from error
    if not loaded.questions:
        raise InputError(f"benchmarks.{name}: no questions are left to ask")
    log.info("%s: %s questions", name, f"{len(loaded.questions):,}")
    if repeats == 1:
        return loaded
    again = [
        replace(question, id=f"{question.id}#{number + 1}", base=question.cluster, repeat=number)
        for question in loaded.questions
        for number in range(repeats)
    ]
    return replace(loaded, questions=again)


def _share_of(item: Item, processes: int) -> int:
    """Which process does an item: it depends on the words alone, so equal ones are not done twice."""
    digest = hashlib.sha256(item.question.text.encode(errors="backslashreplace")).digest()
    return int.from_bytes(digest[:8]) % processes


def _sample(items: Sequence[Item], outputs: Outputs, count: int) -> list[tuple[str, str]]:
    """(question, answer) of up to ``count`` items from all over the list."""
    if not count or not items:
        return []
    chosen = items[:: max(1, len(items) // count)][:count]
    answers = [(item.question.text, outputs.answer(item).get("text")) for item in chosen]
    return [(question, answer) for question, answer in answers if answer is not None]


def _judge_info(judge: Judge, guards: Mapping[str, Mapping[str, Any]]) -> JudgeInfo:
    identity = judge.identity()
    used = identity.get("detector", {}).get("weights")
    circular = any(used == guard["detector"]["weights"] for guard in guards.values())
    return JudgeInfo(
        identity=identity, note=CIRCULAR if circular else None, circular=circular, bias=judge.bias()
    )
