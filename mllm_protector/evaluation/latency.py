"""What a guard adds to the time of an answer, by the answer's length."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mllm_protector.data.sources import Source
from mllm_protector.data.tokens import encode_texts
from mllm_protector.errors import InputError
from mllm_protector.evaluation.manifest import environment, peak_memory
from mllm_protector.evaluation.measurements import Measurement, as_rows
from mllm_protector.evaluation.timing import in_milliseconds
from mllm_protector.files import expand, write_json, writing
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.models.shared import load_parts
from mllm_protector.progress import followed
from mllm_protector.ranges import Count, Seed
from mllm_protector.records import labelled_answers

SCHEMA = 1

Pair = tuple[str, str]


def measure_latency(
    *,
    data: Source,
    detector: str,
    detoxifier: str | None,
    base: str | None,
    lengths: Sequence[Count],
    answers: Count,
    rewrite_tokens: Count,
    threads: Count | None,
    output_dir: str,
    seed: Seed,
) -> tuple[dict[str, Any], Path]:
    """Guard answers of given lengths one by one with a clock, and write ``latency.json``.

    ``configs/measure_latency.yaml`` explains the parameters. The answers of the data are joined and cut to
    so many tokens of the detector. One answer of each length warms up and is not counted.

    Returns:
        The content of ``latency.json``, and its folder. The ``measurements`` are milliseconds, ``group`` is
        the length; the arm ``detector`` is one score, which every answer costs, and ``rewriting`` is one
        rewrite and its score, which only a flagged answer costs.

    Raises:
        InputError: the data or a model cannot be used.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if not lengths:
        raise InputError("lengths=[]: give at least one")
    splits = data.load()
    records = [
        (each.query, each.answer)
        for part in (splits.train, splits.validation)
        for each in labelled_answers(part)
    ]
    if not any(answer.strip() for _, answer in records):
        raise InputError("data: has no answers with words")
    random.Random(seed).shuffle(records)
    folder = Path(output_dir)
    if detoxifier is None:
        scorer, writer = load_detector(expand(detector), base=base), None
    else:
        scorer, writer = load_parts(
            expand(detector), expand(detoxifier), base=base, max_new_tokens=rewrite_tokens
        )

    def score(query: str, answer: str) -> None:
        scorer.score(queries=[query], answers=[answer])

    def rewrite(query: str, answer: str) -> None:
        if writer is not None:
            score(query, *writer.correct(queries=[query], answers=[answer], attempt=0))

    rows: list[Measurement] = []
    for length in dict.fromkeys(lengths):
        some = list(_of_length(scorer, records, length, answers + 1))
        rows += _timed("detector", length, score, some)
        if writer is not None:
            rows += _timed("rewriting", length, rewrite, some)
    result = {
        "schema": SCHEMA,
        "detector": scorer.card.identity,
        "detoxifier": writer and writer.card.identity,
        "rewrite_tokens": rewrite_tokens,
        "data": splits.account,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "device": str(next(scorer.model.parameters()).device),
        "peak_memory_mib": peak_memory(),
        **environment(),
        "measurements": as_rows(rows),
    }
    with writing(str(folder / "latency.json")):
        write_json(folder / "latency.json", result)
    return result, folder


def _of_length(detector: HarmDetector, records: Sequence[Pair], length: int, count: int) -> Iterator[Pair]:
    """So many questions with an answer of so many tokens: their own and, where it is short, the next ones."""
    tokenizer = detector.encoder.tokenizer
    place = 0
    for _ in range(count):
        query, ids = records[place % len(records)][0], list[int]()
        while len(ids) < length:
            [more] = encode_texts(tokenizer, [records[place % len(records)][1] + "\n"])
            ids += more
            place += 1
        yield query, tokenizer.decode(ids[:length])


def _timed(arm: str, length: int, run: Callable[[str, str], None], rows: Sequence[Pair]) -> list[Measurement]:
    seconds = []
    for query, answer in followed(rows, f"{arm}, {length} tokens", "answer"):
        begun = time.perf_counter()
        run(query, answer)
        seconds.append(time.perf_counter() - begun)
    return [*in_milliseconds(seconds[1:], arm=arm, group=str(length))]
