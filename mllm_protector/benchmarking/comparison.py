"""Rounds of both ways through the stages, whether they agree, and how much faster ours is."""

import logging
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm.auto import tqdm

from mllm_protector.benchmarking.figures import spread
from mllm_protector.benchmarking.inference import end_some_answers, untrained_guard
from mllm_protector.benchmarking.shape import Kind, Shape
from mllm_protector.benchmarking.stages import ARMS, Cast, Done, one_at_a_time, ours
from mllm_protector.benchmarking.workload import Texts
from mllm_protector.errors import InputError
from mllm_protector.evaluation import store
from mllm_protector.evaluation.grid import NONE as BARE
from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.detoxifier import Detoxifier
from mllm_protector.records import labelled_answers

CLOCKS = ("cpu_seconds", "seconds")

WARM_UP = 8
"""Answers that go both ways before the clock starts."""

SCORE_TOLERANCE = 1e-5

DIFFERENT = 0.01
"""The largest share of texts or verdicts that may differ: where two tokens are almost equally likely, sums
that are rounded in another order may choose the other one."""


def distinct_answers(texts: Texts, count: int) -> list[tuple[str, str]]:
    """So many (query, answer), no two alike, harmless and harmful ones in turn.

    Raises:
        InputError: there are not so many.
    """
    rows = {(row.query, row.answer): None for row in labelled_answers(texts.pairs.rows)}
    if len(rows) < count:
        raise InputError(f"the data has only {len(rows)} different answers; {count} are to be guarded")
    return list(rows)[:count]


def make_cast(
    shape: Shape,
    texts: Texts,
    rows: Sequence[tuple[str, str]],
    *,
    flagged: float,
    new_tokens: int,
    seed: int,
) -> Cast:
    """Three models of random weights; the guard flags this share of the rows, and so does the judge.

    Args:
        shape: of each model.
        texts: with the encoders.
        rows: (query, answer).
        flagged: a share.
        new_tokens: the longest rewrite; half of it is the mean.
        seed: of the first model.
    """

    def build(kind: Kind, seed: int) -> torch.nn.Module:
        return shape.build(
            kind,
            pad_id=texts.pad_id,
            end_id=texts.detoxifier_encoder.end_id,
            positions=texts.detector_encoder.max_length,
            seed=seed,
        ).eval()

    def scorer(seed: int) -> tuple[HarmDetector, float]:
        encoder = texts.detector_encoder
        detector = HarmDetector(build("detector", seed), encoder, untrained_guard("detector", encoder))
        scores = detector.score(queries=[row[0] for row in rows], answers=[row[1] for row in rows])
        return detector, threshold_for(scores, flagged)

    detector, threshold = scorer(seed)
    judge, judge_threshold = scorer(seed + 1)
    encoder, writer = texts.detoxifier_encoder, build("detoxifier", seed + 2)
    end_some_answers(writer, end_id=encoder.end_id, mean=new_tokens / 2)
    return Cast(
        detector=detector,
        detoxifier=Detoxifier(
            writer, encoder, untrained_guard("detoxifier", encoder), max_new_tokens=new_tokens
        ),
        judge=judge,
        threshold=threshold,
        judge_threshold=judge_threshold,
    )


def threshold_for(scores: Sequence[float], share: float) -> float:
    """Halfway between two neighbouring scores, with this share of all scores above it.

    Args:
        scores: at least two.
        share: between 0 and 1; at least one score is above, and one is not.
    """
    ranked = sorted(scores, reverse=True)
    count = min(max(round(share * len(ranked)), 1), len(ranked) - 1)
    return (ranked[count - 1] + ranked[count]) / 2


def measure_rounds(
    cast: Cast, rows: Sequence[tuple[str, str]], rounds: int, folder: Path, *, batch_size: int, seed: int
) -> dict[str, list[Done]]:
    """What each way did in each round; in a round they go in random order.

    Args:
        cast: the models.
        rows: (query, answer), each once.
        rounds: timed ones.
        folder: for everything that is written meanwhile; nothing stays.
        batch_size: rows between two writes to disk.
        seed: of the order.

    Raises:
        RuntimeError: the ways came to different results.
    """
    ways: dict[str, Callable[..., Done]] = {
        "one_at_a_time": one_at_a_time,
        "ours": partial(ours, batch_size=batch_size),
    }
    order = random.Random(seed)
    done: dict[str, list[Done]] = {name: [] for name in ways}
    with _silent_stages(), tqdm(total=2 * rounds, desc="rounds", unit="way", disable=None) as bar:
        for number in range(rounds + 1):
            for name in order.sample(list(ways), len(ways)):
                with TemporaryDirectory(dir=folder) as place:
                    found = ways[name](cast, rows if number else rows[:WARM_UP], Path(place))
                if number:
                    done[name].append(found)
                    bar.update()
    for theirs, mine in zip(done["one_at_a_time"], done["ours"], strict=True):
        require_agreement(agreement(theirs, mine))
    return done


def agreement(theirs: Done, mine: Done) -> dict[str, float]:
    """``texts`` of all arms, how many of them and of their verdicts differ, how far the scores are apart."""
    places = [(arm, number) for arm in ARMS for number in range(len(theirs.harms))]
    return {
        "texts": len(places),
        "different_texts": sum(theirs.finals[arm][n] != mine.finals[arm][n] for arm, n in places),
        "different_verdicts": sum(theirs.harmful[arm][n] != mine.harmful[arm][n] for arm, n in places),
        "largest_score_difference": max(
            abs(one - other) for one, other in zip(theirs.harms, mine.harms, strict=True)
        ),
    }


def require_agreement(found: Mapping[str, float]) -> None:
    """Refuse to compare the times of what came to different results.

    Args:
        found: what ``agreement`` says.

    Raises:
        RuntimeError: scores differ by more than rounding, or more than ``DIFFERENT`` of texts or verdicts.
    """
    different = max(found["different_texts"], found["different_verdicts"])
    if found["largest_score_difference"] > SCORE_TOLERANCE or different > DIFFERENT * found["texts"]:
        raise RuntimeError(f"the two ways came to different results: {dict(found)}")


def comparison(done: Mapping[str, Sequence[Done]]) -> dict[str, Any]:
    """The figures of one size.

    Args:
        done: what ``one_at_a_time`` and ``ours`` did in each round.

    Returns:
        ``answers``, ``rounds``, ``flagged`` (answers), ``harmful`` (texts, by arm) and ``agreement`` (of the
        last round); by way and stage ``texts`` (that went through a model), ``cpu_seconds`` and ``seconds``
        (for 1,000 answers); ``speed_up``, theirs over ours round by round, by clock and stage; and
        ``speed_up_per_text``, the same for one text through a model, which leaves out what is gained by doing
        none twice. Times and their ratios are spreads.
    """
    mine, theirs = done["ours"], done["one_at_a_time"]
    last = mine[-1]
    texts = {
        name: {stage: took.texts for stage, took in found[-1].parts.items() if stage != "rest"}
        for name, found in done.items()
    }
    figures: dict[str, Any] = {
        "answers": len(last.harms),
        "rounds": len(mine),
        "flagged": sum(map(operator.ne, last.finals["refusal"], last.finals[BARE])),
        "harmful": {arm: sum(last.harmful[arm]) for arm in ARMS},
        "agreement": agreement(theirs[-1], last),
        "texts": texts,
        "speed_up": {},
        "speed_up_per_text": {},
    }
    for clock in CLOCKS:
        times = {name: _by_stage(found, clock) for name, found in done.items()}
        ratios = {
            stage: [slow / fast for slow, fast in zip(values, times["ours"][stage], strict=True)]
            for stage, values in times["one_at_a_time"].items()
            if stage != "rest"
        }
        figures[clock] = {
            name: {stage: spread(values) for stage, values in stages.items()}
            for name, stages in times.items()
        }
        figures["speed_up"][clock] = {stage: spread(values) for stage, values in ratios.items()}
        figures["speed_up_per_text"][clock] = {
            stage: spread([ratio * count / texts["one_at_a_time"][stage] for ratio in ratios[stage]])
            for stage, count in texts["ours"].items()
        }
    return figures


def _by_stage(found: Sequence[Done], clock: str) -> dict[str, list[float]]:
    """Of each stage and of all, the time for 1,000 answers in each round."""
    rounds = [{stage: getattr(took, clock) for stage, took in each.parts.items()} for each in found]
    rounds = [times | {"all": sum(times.values())} for times in rounds]
    return {
        stage: [1000 * times[stage] / len(each.harms) for times, each in zip(rounds, found, strict=True)]
        for stage in rounds[0]
    }


@contextmanager
def _silent_stages() -> Iterator[None]:
    """Inside, the stages do not say what they did; it is said once, of all rounds."""
    logger = logging.getLogger(store.__name__)
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
