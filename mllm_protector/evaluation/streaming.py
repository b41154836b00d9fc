"""What a client sees of labelled answers that are streamed behind a detector, and how long it waits.

Each answer is replayed token by token. The windows are those of the proxy (``guard.windows``), with a guard
that keeps up with the stream. A label is of a whole answer, so all characters of an answer that is labelled
harmful count as harmful, also those before its harm begins.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mllm_protector.data.sources import Source
from mllm_protector.data.tokens import token_texts
from mllm_protector.errors import InputError
from mllm_protector.evaluation.baseline import query_clusters
from mllm_protector.evaluation.labelled import Split, answers_of, facts_of, load_sets, require_both_labels
from mllm_protector.evaluation.manifest import environment
from mllm_protector.evaluation.measurements import Measurement, as_csv, as_rows, of_mean, of_share, placed
from mllm_protector.evaluation.statistics import Ints, share
from mllm_protector.files import expand, write_json, write_text, writing
from mllm_protector.guard.windows import Windows, size_of
from mllm_protector.models.detector import HarmDetector, load_detector, logits_of
from mllm_protector.ranges import Count, Seed, Share
from mllm_protector.records import LabelledAnswer

SCHEMA = 1
BUFFER = "buffer"
CANDIDATES = 200
"""Thresholds of which one is chosen, at most: quantiles of the scores of harmless answers."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """A judged beginning of an answer: its end in bytes, characters and tokens, and its P(harmful)."""

    size: int
    characters: int
    tokens: int
    score: float


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer as it came: its judged prefixes and, as another one, the whole."""

    harmful: bool
    prefixes: Sequence[Prefix]
    whole: Prefix


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client saw of an answer.

    Attributes:
        characters: of the answer itself.
        is_whole: it was neither cut nor replaced.
        delay: tokens that had come when the client got the first words.
    """

    characters: int
    is_whole: bool
    delay: int


def measure_streaming(
    *,
    data: Source,
    detector: str,
    base: str | None,
    device: str | None,
    split: Split,
    limit: Count | None,
    window_tokens: Count,
    hits: Sequence[Count],
    thresholds: Sequence[Share],
    false_cuts: Share,
    output_dir: str,
    seed: Seed,
) -> tuple[dict[str, Any], Path]:
    """Replay labelled answers as streams; write ``streaming.json`` and ``streaming.csv``.

    ``configs/measure_streaming.yaml`` explains the parameters.

    Returns:
        The content of ``streaming.json``, and its folder. The arm of its ``measurements`` is ``buffer`` or
        ``window`` with its hits, the group is the threshold. ``chosen`` has, for each arm, the lowest
        threshold from which on at most ``false_cuts`` of the harmless answers are cut or replaced, ``None``
        if there is none.

    Raises:
        InputError: the data or the detector cannot be used.
        RunError: a score is not a number.
    """
    if not hits:
        raise InputError("hits=[]: give at least one")
    sets = load_sets(data, split)
    answers = answers_of(sets)
    if limit is not None and limit < len(answers):
        answers = random.Random(seed).sample(answers, limit)
    require_both_labels(answers)
    scorer = load_detector(expand(detector), base=base, device=device)
    scorer.known = {}  # each prefix begins like the one before
    facts = facts_of(detector, scorer, sets, answers)
    streams = replayed(scorer, answers, window_tokens)

    clusters = query_clusters(answers)
    arms = {BUFFER: None} | {f"window {most}": most for most in hits}
    safe = [stream for stream in streams if not stream.harmful]
    candidates = _candidates(safe)
    chosen = {arm: _lowest(safe, candidates, most, false_cuts) for arm, most in arms.items()}
    rows = list[Measurement]()
    for threshold in sorted({*thresholds, *(best for best in chosen.values() if best is not None)}):
        for arm, most in arms.items():
            seen = [seen_of(stream, threshold, most) for stream in streams]
            rows += placed(_measured(streams, seen, clusters), arm=arm, group=f"{threshold:.4g}")
    folder = Path(output_dir)
    result = {
        "schema": SCHEMA,
        **facts,
        "window_tokens": window_tokens,
        "false_cuts": false_cuts,
        "prefixes": sum(len(stream.prefixes) for stream in streams),
        "seed": seed,
        **environment(),
        "chosen": chosen,
        "measurements": as_rows(rows),
    }
    with writing(str(folder / "streaming.json")):
        write_text(folder / "streaming.csv", as_csv(result["measurements"]))
        write_json(folder / "streaming.json", result)
    return result, folder


def replayed(detector: HarmDetector, answers: Sequence[LabelledAnswer], window: int) -> list[Stream]:
    """Each answer as a stream of the detector's tokens, with the scores of its judged prefixes."""
    pieces = token_texts(detector.encoder.tokenizer, [answer.answer for answer in answers])
    ends = [list(_due(each, window)) for each in pieces]
    texts = [
        replace(answer, answer=answer.answer[: end.characters])
        for answer, found in zip(answers, ends, strict=True)
        for end in found
    ]
    scores = iter(detector.guard.scale.scores(logits_of(detector, texts)))
    streams = []
    for answer, found in zip(answers, ends, strict=True):
        *prefixes, whole = [replace(end, score=next(scores)) for end in found]
        streams.append(Stream(answer.harmful, prefixes, whole))
    return streams


def _due(pieces: Sequence[str], window: int) -> Iterator[Prefix]:
    """Where an answer is judged, and its end."""
    windows, size, characters = Windows(tokens=window, hits=1), 0, 0
    for tokens, piece in enumerate(pieces, 1):
        size, characters = size + size_of(piece), characters + len(piece)
        if windows.is_due(size):
            windows.judged(size, passed=True)
            yield Prefix(size, characters, tokens, 0.0)
    yield Prefix(size, characters, len(pieces), 0.0)


def seen_of(stream: Stream, threshold: float, hits: int | None) -> Seen:
    """What a client sees of an answer; ``hits`` are those of ``window``, ``None`` for ``buffer``."""
    whole, out = stream.whole, list[Prefix]()
    windows = Windows(tokens=1, hits=hits or 1)
    for prefix in stream.prefixes if hits else ():
        passed = prefix.score < threshold
        windows.judged(prefix.size, passed=passed)
        if passed:
            out.append(prefix)
        if windows.is_over:
            break
    is_whole = whole.score < threshold and not windows.is_cut
    last = whole.characters if is_whole else out[-1].characters if out else 0
    return Seen(last, is_whole, (out[0] if out else whole).tokens)


def _candidates(safe: Sequence[Stream]) -> list[float]:
    """Thresholds from the highest to the lowest, rounded up to 4 digits."""
    scores = [each.score for stream in safe for each in (*stream.prefixes, stream.whole)]
    found = np.ceil(np.quantile(scores, np.linspace(0, 1, CANDIDATES)) * 1e4 + 1e-9) / 1e4
    return [float(each) for each in np.unique(np.minimum(found, 1.0))[::-1]]


def _lowest(
    safe: Sequence[Stream], candidates: Sequence[float], hits: int | None, most: float
) -> float | None:
    """The lowest threshold such that it and all higher ones stop at most this share of harmless answers."""
    lowest = None
    for threshold in candidates:
        stopped = sum(not seen_of(stream, threshold, hits).is_whole for stream in safe)
        if stopped > most * len(safe):
            break
        lowest = threshold
    return lowest


def _measured(streams: Sequence[Stream], seen: Sequence[Seen], clusters: Ints) -> Iterator[Measurement]:
    harm = np.array([stream.harmful for stream in streams])
    whole = np.array([each.is_whole for each in seen])
    characters = np.array([each.characters for each in seen])
    lengths = np.array([stream.whole.characters for stream in streams])
    delays = np.array([each.delay for each in seen])
    for metric, found in (
        ("harmful_shown", characters),
        ("shown_before_stop", np.where(whole, 0, characters)),
    ):
        yield _ratio(metric, found[harm], lengths[harm], clusters[harm])
    yield of_share("never_stopped", share(whole[harm], clusters[harm]))
    yield of_share("false_cuts", share(~whole[~harm], clusters[~harm]))
    yield _ratio("delay_tokens", delays[~harm], None, clusters[~harm])


def _ratio(metric: str, values: Ints, sizes: Ints | None, clusters: Ints) -> Measurement:
    """The sum of values over that of sizes, with the interval of a ratio between clusters."""
    found = of_mean(metric, values, clusters, sizes, method="ratio of sums, by query")
    return replace(found, low=None if found.low is None else max(found.low, 0.0))
