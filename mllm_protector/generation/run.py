"""Generate pairs: read what is wanted, say what it takes, write what came of it."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from mllm_protector.errors import InputError, RunError, Stop
from mllm_protector.evaluation.store import Store
from mllm_protector.files import write_json, write_jsonl
from mllm_protector.generation.prompts import Prompts
from mllm_protector.generation.replies import NOT_SENT, Form, KeptChat
from mllm_protector.generation.scenario_file import Scenario, read_scenarios
from mllm_protector.generation.writing import Writer
from mllm_protector.judges.asking import AskingJudge
from mllm_protector.models.chat import ServedChat
from mllm_protector.protocols import Judge, Priced
from mllm_protector.ranges import Count, Seed
from mllm_protector.reporting.tables import Table, print_tables

log = logging.getLogger(__name__)


def generate_pairs(
    *,
    generator: Callable[[], ServedChat],
    judges: Mapping[str, Callable[[], Judge]],
    scenario_file: str,
    pairs: Count,
    questions_per_call: Count,
    dry_calls: Count,
    question_tokens: Count,
    answer_tokens: Count,
    question_format: Form,
    language: str,
    near_duplicate: Annotated[float, Interval(ge=0.51, le=1)],
    unconfirmed: Literal["drop", "mark"],
    min_share: Annotated[float, Interval(ge=1e-6, le=1)],
    prompts: Mapping[str, str | None],
    max_calls: Count | None,
    seed: Seed,
    dry_run: bool,
    output_dir: str,
) -> dict[str, Any] | None:
    """Let a model write questions and two answers to each, check the labels, and write training pairs.

    ``configs/generate_pairs.yaml`` explains the parameters. A pair is confirmed if all judges call the
    accepted answer safe and the rejected one harmful. ``output_dir`` gets ``pairs.jsonl``,
    ``generation.json``, and every reply in ``cache``.

    Returns:
        The content of ``generation.json``; ``None`` for a dry run.

    Raises:
        InputError: the input cannot be used.
        RunError: a server cannot be reached, or fewer than ``min_share`` of the wanted pairs were made (after
            everything is written).
        Stop: SIGTERM or SIGINT came; what is complete is written.
    """
    if not judges:
        raise InputError("judges: at least one judge is needed; judge=[keyword] needs no model")
    rules: dict[str, Any] = {
        "seed": seed,
        "questions_per_call": questions_per_call,
        "dry_calls": dry_calls,
        "question_tokens": question_tokens,
        "answer_tokens": answer_tokens,
        "question_format": question_format,
        "near_duplicate": near_duplicate,
        "unconfirmed": unconfirmed,
    }
    wording = Prompts(prompts, language, question_format)
    scenarios = read_scenarios(scenario_file, pairs)
    model = generator()
    made = {name: make() for name, make in judges.items()}
    if dry_run:
        _announce(scenarios, wording, questions_per_call, made)
        return None
    folder = Path(output_dir)
    replies = Store(folder / "cache" / "replies")
    if replies.lines:
        log.info("%s calls of earlier runs are kept", f"{replies.lines:,}")
    for judge in made.values():
        if isinstance(judge, AskingJudge) and isinstance(judge.chat, ServedChat):
            judge.chat = KeptChat(judge.chat, replies, max_calls)
    chat = KeptChat(model, replies, max_calls)
    writer = Writer(scenarios=scenarios, chat=chat, judges=made, prompts=wording, **rules)
    stop: Stop | None = None
    try:
        writer.run()
    except Stop as received:
        stop = received
    total = writer.account(scenarios)
    result: dict[str, Any] = {
        "complete": total["written"] == total["wanted"],
        "ended_by": str(stop) if stop else NOT_SENT.reason if writer.capped else None,
        "total": total,
        "scenarios": {each.name: writer.account([each]) for each in scenarios},
        "calls": replies.lines,
        "max_calls": max_calls,
        "generator": model.card.identity,
        "judges": {name: judge.card.identity for name, judge in made.items()},
        "wording": wording.identity(),
        "rules": rules,
    }
    write_json(folder / "generation.json", result)
    if total["written"]:
        pairs_made = (pair.row() for each in scenarios for pair in writer.pairs(each.name))
        write_jsonl(folder / "pairs.jsonl", pairs_made)
    else:
        (folder / "pairs.jsonl").unlink(missing_ok=True)  # of a run with other rules
    _print(result, folder)
    if stop:
        raise stop
    share = f"{total['written']:,} of {total['wanted']:,} wanted pairs were made"
    if total["written"] < min_share * total["wanted"]:
        raise RunError(
            f"{share}, fewer than min_share={min_share} requires; {folder}/generation.json says why"
        )
    log.info("%s", share)
    return result


def _announce(
    scenarios: Sequence[Scenario], wording: Prompts, per_call: int, judges: Mapping[str, Judge]
) -> None:
    """Log the calls that all pairs take if nothing is dropped or repeated, and the prompts."""
    wanted = sum(each.pairs for each in scenarios)
    missing = [max(0, each.pairs - len(each.questions)) for each in scenarios]
    calls = {"questions": sum(math.ceil(each / per_call) for each in missing), "answers": 2 * wanted}
    calls |= {f"judge {name}": 2 * wanted for name, judge in judges.items() if isinstance(judge, Priced)}
    for name, count in {**calls, "all": sum(calls.values())}.items():
        log.info("%s: %s calls", name, f"{count:,}")
    for name, prompt in (
        ("questions", wording.questions(scenarios[0], per_call, ())),
        ("accepted", wording.accepted(scenarios[0], "...")),
        ("rejected", wording.rejected("...")),
    ):
        log.info("prompts.%s for the first scenario:\n%s", name, prompt)


def _print(result: Mapping[str, Any], folder: Path) -> None:
    """Print what was written, and what became of every question."""
    total = result["total"]
    lines = [f"calls of all runs on this folder: {result['calls']:,}, max_calls={result['max_calls']}"]
    lines += [f"ended early: {result['ended_by']}"] if result["ended_by"] else []
    lines += [f"train with: data=pairs data.path={folder / 'pairs.jsonl'}"] if total["written"] else []
    rows = [
        [name, *(f"{each[count]:,}" for count in ("wanted", "asked", "written"))]
        for name, each in {**result["scenarios"], "total": total}.items()
    ]
    outcomes = [
        (what, outcome, f"{count:,}")
        for what, name in (("call for questions", "question_calls"), ("question", "outcomes"))
        for outcome, count in total[name].items()
    ]
    tables = [
        Table(title="By scenario", header=("scenario", "wanted", "asked", "written"), rows=rows),
        Table(title="Outcomes", header=("of each", "outcome", "count"), rows=outcomes, words=2),
    ]
    print_tables("New pairs", lines, tables)
