"""The generation of pairs: read what is wanted, write what came of it."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from signal import Signals
from typing import Any, Literal

from mllm_protector.data.duplicates import require_share
from mllm_protector.errors import InputError, RunError
from mllm_protector.evaluation.store import Store
from mllm_protector.files import write_json, write_jsonl
from mllm_protector.generation import language as languages
from mllm_protector.generation.estimate import estimate
from mllm_protector.generation.ledger import STOPPED, Budget, Ledger, total
from mllm_protector.generation.paid import PaidChat
from mllm_protector.generation.pairs import together
from mllm_protector.generation.printed import print_account
from mllm_protector.generation.replies import Form
from mllm_protector.generation.scenario_file import read_scenarios
from mllm_protector.generation.wording import Wording
from mllm_protector.generation.writing import Rules, Writer, pairs_of, spent_in_words
from mllm_protector.judges.asking import AskingJudge
from mllm_protector.models.chat import ServedChat
from mllm_protector.protocols import Judge
from mllm_protector.ranges import Seed, Share
from mllm_protector.training.interruption import Interruption

log = logging.getLogger(__name__)


class Stopped(RunError):
    """A generation that was stopped and wrote what is complete (exit code 128 + the signal's number)."""

    def __init__(self, received: Signals, pairs: int) -> None:
        """With so many pairs written."""
        super().__init__(
            f"stopped by {received.name} with {pairs:,} pairs written; repeat the command to go on"
        )
        self.exit_code = 128 + received


def generate_pairs(
    *,
    generator: Callable[[], ServedChat],
    judges: Mapping[str, Callable[[], Judge]],
    scenario_file: str,
    pairs: int,
    questions_per_call: int,
    dry_calls: int,
    question_tokens: int,
    answer_tokens: int,
    question_format: Form,
    language: str,
    check_language: bool,
    near_duplicate: Share,
    unconfirmed: Literal["drop", "mark"],
    min_share: float,
    prompts: Mapping[str, str | None],
    budget: Budget,
    seed: Seed,
    dry_run: bool,
    output_dir: str,
) -> dict[str, Any] | None:
    """Let a model write questions and two answers to each, check the labels, and write training pairs.

    Args:
        generator: makes the model that writes.
        judges: name -> makes a judge; a pair is confirmed if all call the accepted answer safe and the
            rejected one harmful. Calls of a judge that is a served model count in the budget.
        scenario_file: what is wanted (see the module of this name).
        pairs: wanted of each scenario that does not say so itself.
        questions_per_call: questions in one reply.
        dry_calls: a scenario is given up after so many calls for questions in a row without a pair.
        question_tokens: longest list of questions.
        answer_tokens: longest answer.
        question_format: ``json``, or ``lines`` for models that write none.
        language: that of all texts.
        check_language: drop texts in another one.
        near_duplicate: questions that share so much of their words are one (see ``data.duplicates``).
        unconfirmed: ``drop`` pairs whose labels no judge confirms, or write them with ``verified: false``.
        min_share: the smallest share of the wanted pairs that is a success, above 0.
        prompts: wording that replaces ours: ``questions``, ``accepted``, ``rejected``; ``None`` keeps ours.
        budget: of all runs on this folder together.
        seed: of the replies, for servers that know seeds.
        dry_run: only say what would be asked and what it would take.
        output_dir: gets ``pairs.jsonl``, ``generation.json``, and in ``cache`` every reply and the ledger.

    Returns:
        The content of ``generation.json``; ``None`` of a dry run.

    Raises:
        InputError: the input cannot be used.
        RunError: nobody answers, or fewer than ``min_share`` of the wanted pairs were made (after everything
            is written).
        Stopped: SIGTERM or SIGINT came; what is complete is written.
    """
    _check(judges, pairs, questions_per_call, dry_calls, question_tokens, answer_tokens)
    require_share(near_duplicate=near_duplicate)
    if not 0 < min_share <= 1:
        raise InputError(f"min_share={min_share}: must lie above 0 and not above 1")
    rules = Rules(
        seed=seed,
        per_call=questions_per_call,
        dry_calls=dry_calls,
        question_tokens=question_tokens,
        answer_tokens=answer_tokens,
        form=question_format,
        language=languages.check_language(language) if check_language else None,
        near_duplicate=near_duplicate,
        unconfirmed=unconfirmed,
    )
    wording = Wording(prompts, language, question_format)
    wanted = read_scenarios(scenario_file, pairs)
    model = generator()
    made = {name: make() for name, make in judges.items()}
    cache = Path(output_dir) / "cache"
    with Interruption() as interruption:
        ledger = Ledger(cache / "ledger", budget, stopped=lambda: interruption.signal is not None)
        if dry_run:
            estimate(wanted, wording, rules, made, ledger)
            return None
        replies = Store(cache / "replies")
        for name, judge in made.items():
            if isinstance(judge, AskingJudge) and isinstance(judge.chat, ServedChat):
                judge.chat = PaidChat(judge.chat, replies, ledger, f"judge {name}")
        if ledger.calls:
            log.info("going on: %s", spent_in_words(ledger))
        chat = PaidChat(model, replies, ledger, "generator")
        writer = Writer(wanted, chat=chat, judges=made, wording=wording, rules=rules, ledger=ledger)
        writer.run()
        replies.close()
    accounts = {each.scenario.name: each.account() for each in writer.progress}
    result: dict[str, Any] = {
        "complete": all(each.missing == 0 for each in writer.progress),
        "ended_by": ledger.denied,
        "total": together(accounts.values()),
        "scenarios": accounts,
        "spent": {
            "total": dict(total(ledger.spent)),
            "by_purpose": {purpose: asdict(spent) for purpose, spent in ledger.spent.items()},
            "requests_without_an_end": ledger.unfinished,
        },
        "budget": asdict(budget),
        "generator": model.identity(),
        "judges": {name: judge.identity() for name, judge in made.items()},
        "wording": wording.identity(),
        "rules": asdict(rules),
    }
    found = pairs_of(writer.progress)
    folder = Path(output_dir)
    write_json(folder / "generation.json", result)
    if found:
        write_jsonl(folder / "pairs.jsonl", (candidate.row() for candidate in found))
    else:
        (folder / "pairs.jsonl").unlink(missing_ok=True)  # of a run with other rules
    print_account(result, folder)
    if interruption.signal is not None and ledger.denied == STOPPED:
        raise Stopped(interruption.signal, len(found))
    share = f"{len(found):,} of {result['total']['wanted']:,} wanted pairs were made"
    if len(found) < min_share * result["total"]["wanted"]:
        raise RunError(
            f"{share}, fewer than min_share={min_share} asks for ({_main_reason(result)}); "
            f"{folder}/generation.json counts why"
        )
    log.info("%s", share)
    return result


def _check(
    judges: Mapping[str, Callable[[], Judge]],
    pairs: int,
    questions_per_call: int,
    dry_calls: int,
    question_tokens: int,
    answer_tokens: int,
) -> None:
    if not judges:
        raise InputError("judges: at least one judge is needed; judge=[keyword] costs nothing")
    for name, number in (
        ("pairs", pairs),
        ("questions_per_call", questions_per_call),
        ("dry_calls", dry_calls),
        ("question_tokens", question_tokens),
        ("answer_tokens", answer_tokens),
    ):
        if number < 1:
            raise InputError(f"{name}={number}: must be at least 1")


def _main_reason(result: Mapping[str, Any]) -> str:
    counts = {**result["total"]["question_calls"], **result["total"]["dropped"]}
    counts.pop("a list of questions", None)
    return max(counts, key=lambda reason: counts[reason], default=result["ended_by"] or "nothing was asked")
