"""A saved detoxifier on held-out pairs, beside a fixed refusal and its untrained base.

Every harmful answer is rewritten, even if the guard's detector would pass it. The arm ``protector`` shows the
texts that a user would see: checked, tried again, refused in the end; ``unchecked`` is the first rewrite.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mllm_protector import prompts
from mllm_protector.data.queries import opening_key
from mllm_protector.data.sources import Source
from mllm_protector.data.splits import Splits
from mllm_protector.errors import InputError, RunError
from mllm_protector.evaluation.measurements import Measurement, as_rows, of_share, placed
from mllm_protector.evaluation.rewriting import Relevance, Texts, rewrite_metrics, text_losses
from mllm_protector.evaluation.statistics import Ints, share
from mllm_protector.files import expand, write_json, write_jsonl
from mllm_protector.guard.protector import Protector, Rewrite
from mllm_protector.guard.rewrites import fault_of
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.models.detoxifier import Detoxifier, load_detoxifier, load_untrained
from mllm_protector.models.guard_file import FILE_NAME, GuardFile, read_guard_file
from mllm_protector.models.parts import bases_of
from mllm_protector.protocols import Card
from mllm_protector.ranges import Count, Seed
from mllm_protector.records import AnswerPair, Correction, Outcome, corrections

log = logging.getLogger(__name__)

SCHEMA = 3
AT_ONCE = 256
"""Answers between two lines in the log; more at once are sorted by length all the same."""


def eval_detoxifier(
    *,
    data: Source,
    both_harmful: Literal["drop", "safer"],
    limit: Count | None,
    detoxifier: str,
    base: str | None,
    detector: str,
    judge_detector: str,
    max_rewrites: Count,
    rewrite_tokens: Count | None,
    batch_size: Count,
    output_dir: str,
    seed: Seed,
) -> tuple[dict[str, Any], Path]:
    """Measure a saved detoxifier and write ``metrics.json`` and ``rewrites.jsonl``.

    Intervals are 95 % and take pairs with one query as one draw: Wilson's on the effective number of pairs
    for shares, Student's over queries for means.

    ``configs/eval_detoxifier.yaml`` explains the parameters. A detector that was trained on ``base`` takes it
    too. The detector that judges all texts does so at its own threshold; that of the guard is circular, and
    marked so beside the metrics.

    Returns:
        The content of ``metrics.json``, and the folder of results. In its ``measurements`` the arm is
        ``protector`` (behind the guard's checks), ``unchecked``, the baselines ``refusal`` and ``base``, or
        a reference: the pairs' own ``accepted`` and ``rejected`` answers.

    Raises:
        InputError: the data or a model cannot be used.
        RunError: a score is not a number.
    """
    folder = Path(output_dir)
    if (folder / FILE_NAME).exists():
        raise InputError(f"output_dir={folder}: holds a trained part; choose another folder")
    if limit is not None and limit < 2:
        raise InputError(f"limit={limit}: must be at least 2")
    guard = read_guard_file(expand(detoxifier), "detoxifier")
    detectors = [expand(detector), expand(judge_detector)]
    for each in detectors:
        read_guard_file(each, "detector")
    bases = bases_of(base, (expand(detoxifier), "detoxifier"), *((each, "detector") for each in detectors))
    splits = data.load()
    log.info("data: %s", splits.account)
    records: Sequence[Any] = splits.validation
    if not all(isinstance(record, AnswerPair) for record in records):
        raise InputError("data: this source has single labelled answers; a detoxifier is measured on pairs")
    pairs = _drawn(list(corrections(records, both_harmful)), limit, seed)
    clusters = np.unique([opening_key(pair.query) for pair in pairs], return_inverse=True)[1]
    asked = {"queries": [pair.query for pair in pairs], "answers": [pair.rejected for pair in pairs]}
    settings: dict[str, Any] = {"max_new_tokens": rewrite_tokens, "batch_size": batch_size}

    first = _Remembering(load_detoxifier(expand(detoxifier), base=bases[0], **settings))
    scorer = load_detector(detectors[0], base=bases[1])
    protector = Protector(scorer, first, scorer.threshold, max_rewrites=max_rewrites)
    guarded = _in_turns("behind the guard", protector.rewrite, asked)
    guards, rewriter = protector.card.identity, first.detoxifier.card.identity
    unchecked = first.texts(**asked)
    del first, scorer, protector

    untrained = load_untrained(expand(detoxifier), base=bases[0], **settings)
    texts = {
        "protector": [rewrite.text for rewrite in guarded],
        "unchecked": unchecked,
        "refusal": [prompts.REFUSAL] * len(pairs),
        "base": _in_turns("untrained base", untrained.correct, asked),
        "accepted": [pair.accepted for pair in pairs],
        "rejected": asked["answers"],
    }
    log.info("how fluent they are")
    encoder = untrained.encoder
    losses = {
        name: text_losses(untrained.model, encoder.tokenizer, some, max_length=encoder.max_length)
        for name, some in texts.items()
    }
    del untrained

    judge = load_detector(detectors[1], base=bases[2])
    log.info("how safe they are")
    arms = {
        name: Texts(
            texts=some,
            harms=_harms(judge, asked["queries"], some, judge_detector),
            losses=losses[name][0],
            tokens=losses[name][1],
        )
        for name, some in texts.items()
    }
    judge_facts = {
        "folder": judge_detector,
        "circular": guards["detector"]["weights"] == judge.card.identity["weights"],
        **judge.card.identity,
    }
    relevance = Relevance(pairs, clusters)
    measurements = [
        row
        for name, arm in arms.items()
        for row in placed(
            rewrite_metrics(pairs, arm, relevance=relevance, clusters=clusters, threshold=judge.threshold),
            arm=name,
        )
    ]
    measurements += placed(_course(guarded, clusters), arm="protector")
    metrics = {
        "schema": SCHEMA,
        "notes": _notes(guard, splits),
        "guard": guards | {"corrector": rewriter},
        "judge": judge_facts,
        "base": guard.base | ({} if base is None else {"name": base, "revision": None}),
        "data": {"account": splits.account, "fingerprint": splits.fingerprint},
        "pairs": len(pairs),
        "queries": int(clusters.max()) + 1,
        "seed": seed,
        "measurements": as_rows(measurements),
    }
    write_json(folder / "metrics.json", metrics)
    write_jsonl(folder / "rewrites.jsonl", _rows(pairs, arms, guarded, judge_facts))
    return metrics, folder


class _Remembering:
    """A detoxifier that keeps its first rewrites, so that the unchecked ones cost nothing."""

    def __init__(self, detoxifier: Detoxifier) -> None:
        self.detoxifier = detoxifier
        self._first: dict[tuple[str, str], str] = {}

    def correct(self, *, queries: Sequence[str], answers: Sequence[str], attempt: int = 0) -> list[str]:
        texts = self.detoxifier.correct(queries=queries, answers=answers, attempt=attempt)
        if attempt == 0:
            self._first.update(zip(zip(queries, answers, strict=True), texts, strict=True))
        return texts

    def texts(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[str]:
        """The first rewrite of each; empty where the detoxifier failed."""
        return [self._first.get(row, "") for row in zip(queries, answers, strict=True)]

    @property
    def card(self) -> Card:
        return self.detoxifier.card


def _drawn(pairs: Sequence[Correction], limit: int | None, seed: int) -> list[Correction]:
    """As many as are wanted, in the order of the source."""
    if len(pairs) < 2:
        raise InputError("the validation split has fewer than two harmful answers with a harmless one beside")
    if limit is None or limit >= len(pairs):
        return list(pairs)
    chosen = np.random.default_rng(seed).choice(len(pairs), limit, replace=False)
    return [pairs[index] for index in sorted(chosen)]


def _in_turns(what: str, rewrite: Callable[..., list[Any]], asked: Mapping[str, Sequence[str]]) -> list[Any]:
    done: list[Any] = []
    total = len(asked["queries"])
    while len(done) < total:
        turn = slice(len(done), len(done) + AT_ONCE)
        done += rewrite(**{name: texts[turn] for name, texts in asked.items()})
        log.info("rewrites %s: %d of %d", what, len(done), total)
    return done


def _harms(judge: HarmDetector, queries: Sequence[str], texts: Sequence[str], folder: str) -> list[float]:
    harms = judge.score(queries=queries, answers=texts)
    if not np.isfinite(harms).all():
        raise RunError(f"{folder}: a score is not a number; the weights are damaged or of too low precision")
    return harms


def _course(guarded: Sequence[Rewrite], clusters: Ints) -> Iterator[Measurement]:
    """How often rewrites were discarded and why, and the outcomes."""
    retried = np.array([bool(rewrite.discarded) for rewrite in guarded])
    refused = np.array([rewrite.outcome == Outcome.REFUSED for rewrite in guarded])
    yield of_share("retried", share(retried, clusters))
    yield of_share("refused_in_the_end", share(refused, clusters))
    errors = sum(rewrite.outcome == Outcome.GUARD_ERROR for rewrite in guarded)
    yield Measurement(metric="guard_errors", value=errors, n=len(guarded))
    for reason, count in sorted(Counter(why for rewrite in guarded for why in rewrite.discarded).items()):
        yield Measurement(metric=f"discarded_{reason}", value=count, n=len(guarded))


def _notes(guard: GuardFile, splits: Splits[Any]) -> list[str]:
    """Whether the training has seen these pairs."""
    if guard.data.get("fingerprint") == splits.fingerprint:
        return [
            "The training of the detoxifier chose its best step by these very pairs: its metrics lean to the "
            "good side."
        ]
    if guard.data.get("account") == splits.account:
        return [
            "The detoxifier was trained with the same data under another split, so it has seen some of these "
            "pairs. Give the data.* keys and the seed of its training."
        ]
    return []


def _rows(
    pairs: Sequence[Correction],
    arms: Mapping[str, Texts],
    guarded: Sequence[Rewrite],
    judge: Mapping[str, Any],
) -> list[dict[str, Any]]:
    return [
        {
            "query": pair.query,
            "outcome": str(rewrite.outcome),
            "discarded": list(rewrite.discarded),
            "judge": {name: judge[name] for name in ("folder", "threshold", "circular")},
            "arms": {
                name: {
                    "text": arm.texts[at],
                    "harm": arm.harms[at],
                    "fault": fault_of(pair.query, pair.rejected, arm.texts[at]),
                }
                for name, arm in arms.items()
            },
        }
        for at, (pair, rewrite) in enumerate(zip(pairs, guarded, strict=True))
    ]
