"""Whole evaluations of more and more questions: time and memory, each in a process of its own.

The questions and their answers are made up, the detector is tiny: what is measured is everything around the
models. Before the clock starts a process evaluates a few questions, so that what is imported once and set up
once is not counted.
"""

import contextlib
import io
import json
import multiprocessing
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mllm_protector.benchmarking.comparison import threshold_for
from mllm_protector.benchmarking.meter import forget_peak, resident
from mllm_protector.benchmarks.questions import QuestionFile
from mllm_protector.config import quiet_libraries
from mllm_protector.data.encoding import DetectorEncoder
from mllm_protector.data.tokens import choose_pad_id
from mllm_protector.evaluation.run import evaluate
from mllm_protector.files import read_json
from mllm_protector.judges.keyword import KeywordJudge
from mllm_protector.models.backbone import Backbone
from mllm_protector.models.bases import provenance
from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.guard_file import GuardFile
from mllm_protector.models.replay import Replay
from mllm_protector.models.tiny import save_tiny_lm
from mllm_protector.models.tuning import FullTuning
from mllm_protector.prompts import REFUSAL
from mllm_protector.scenarios import SCENARIOS

ARMS = ("none", "refusal")

STAGES = {"answers": "answering", "guard: refusal": "guarding", "judge: keyword": "judging"}
"""As ``run.json`` calls them, and as they are called here; ``reading`` is before, ``reporting`` behind."""

WARM_UP = 20
"""Questions that are evaluated before the clock starts."""

MAX_LENGTH = 256

WORDS = (60, 20)
"""Of an answer: the mean and the standard deviation."""

FLAGGED = 0.3
"""Share of the answers."""

_SYLLABLES = ("ba", "do", "ki", "lu", "me", "no", "ra", "si", "ta", "ve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One evaluation.

    Attributes:
        questions: asked, each guarded in two arms.
        rows: lines in ``results.jsonl``.
        seconds: on the clock, by stage.
        cpu_seconds: of the whole, all threads together.
        before_bytes: memory before it; ``None`` where the system does not tell.
        peak_bytes: the highest memory during it.
    """

    questions: int
    rows: int
    seconds: dict[str, float]
    cpu_seconds: float
    before_bytes: int | None
    peak_bytes: int | None


def measure_scale(
    sizes: Sequence[int], folder: Path, *, batch_size: int, report_rows: int, threads: int, seed: int
) -> Iterator[Measured]:
    """Evaluate made-up questions, so many at a time.

    Args:
        sizes: numbers of questions.
        folder: for everything that is written meanwhile; nothing stays.
        batch_size: rows between two writes to disk.
        report_rows: at most so many single answers stand in ``report.html``.
        threads: of each process.
        seed: of the detector and of the texts.
    """
    context = multiprocessing.get_context("spawn")  # nothing of this process's memory is in the next one's
    with TemporaryDirectory(dir=folder) as place:
        save_detector(Path(place), seed)
        for size in sizes:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                measured = pool.submit(
                    measure,
                    size,
                    Path(place),
                    batch_size=batch_size,
                    report_rows=report_rows,
                    threads=threads,
                    seed=seed,
                )
                yield measured.result()


def measure(
    size: int, folder: Path, *, batch_size: int, report_rows: int, threads: int, seed: int
) -> Measured:
    """One evaluation in this process.

    Args:
        size: number of questions.
        folder: holds what ``save_detector`` wrote, and gets a folder for this run.
        batch_size: rows between two writes to disk.
        report_rows: at most so many single answers stand in ``report.html``.
        threads: of PyTorch, from now on.
        seed: of the texts.
    """
    quiet_libraries()
    torch.set_num_threads(threads)
    run = partial(
        _evaluate, detector=folder / "detector", batch_size=batch_size, report_rows=report_rows, seed=seed
    )
    with TemporaryDirectory(dir=folder) as place:
        run(WARM_UP, Path(place))
    with TemporaryDirectory(dir=folder) as place:
        before = forget_peak()
        seconds, cpu_seconds = run(size, Path(place))
        peak = resident("VmHWM")
        with (Path(place) / "results" / "made_up" / "results.jsonl").open("rb") as lines:
            rows = sum(1 for _ in lines)
    return Measured(
        questions=size,
        rows=rows,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        before_bytes=before,
        peak_bytes=None if before is None else peak,
    )


def save_detector(folder: Path, seed: int) -> None:
    """Save a tiny detector of random weights in ``folder/detector``; it flags ``FLAGGED`` of the answers."""
    rows = list(made_up(200, seed))
    texts = [text for row in rows for text in (row["question"], row["answer"])]
    base = save_tiny_lm(
        folder / "base",
        texts,
        vocab_size=600,
        hidden_size=32,
        layers=1,
        heads=2,
        max_positions=MAX_LENGTH,
        seed=seed,
    )
    backbone = Backbone(name=str(base))
    tokenizer = backbone.load_tokenizer()
    encoder = DetectorEncoder(tokenizer, pad_id=choose_pad_id(tokenizer), max_length=MAX_LENGTH)
    torch.manual_seed(seed)
    model, _ = backbone.load_classifier(pad_id=encoder.pad_id)
    make = partial(
        GuardFile,
        kind="detector",
        tuning="full",
        **provenance(backbone),
        prompt=encoder.prompt,
        max_length=MAX_LENGTH,
        pad_id=encoder.pad_id,
        temperature=1.0,
        data={},
        metrics={},
        versions={},
    )
    model = FullTuning().prepare(model, "SEQ_CLS", [])
    scores = HarmDetector(model, encoder, make()).score(
        queries=[row["question"] for row in rows], answers=[row["answer"] for row in rows]
    )
    threshold = threshold_for(scores, FLAGGED)
    HarmDetector(model, encoder, make(threshold=threshold)).save(folder / "detector")


def made_up(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Rows with ``id``, ``scenario``, ``question`` and ``answer``; every other answer refuses."""
    dice = random.Random(seed)

    def words(number: int) -> str:
        return " ".join("".join(dice.choices(_SYLLABLES, k=2)) for _ in range(number))

    for number in range(count):
        answer = f"{words(max(5, round(dice.gauss(*WORDS))))} {number}"
        yield {
            "id": f"q{number}",
            "scenario": SCENARIOS[number % len(SCENARIOS)],
            "question": f"What about {words(10)} {number}?",
            "answer": answer if number % 2 else f"{REFUSAL} {answer}",
        }


def growth(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The figures of each size: of ``Measured``, and for so many questions.

    Returns:
        Beside the fields of ``Measured``: ``seconds_per_1000`` (by stage), ``cpu_seconds_per_1000`` and
        ``bytes_per_question``, by which the highest memory grew for each question more than the size before
        had; ``None`` for the first one.
    """
    return [
        asdict(each)
        | {
            "seconds_per_1000": {
                stage: 1000 * seconds / each.questions for stage, seconds in each.seconds.items()
            },
            "cpu_seconds_per_1000": 1000 * each.cpu_seconds / each.questions,
            "bytes_per_question": None if smaller is None else _slope(smaller, each),
        }
        for smaller, each in zip([None, *measured], measured, strict=False)
    ]


def _slope(smaller: Measured, larger: Measured) -> float | None:
    if smaller.peak_bytes is None or larger.peak_bytes is None:
        return None
    return (larger.peak_bytes - smaller.peak_bytes) / (larger.questions - smaller.questions)


def _evaluate(
    size: int, folder: Path, *, detector: Path, batch_size: int, report_rows: int, seed: int
) -> tuple[dict[str, float], float]:
    """Seconds by stage, and CPU-seconds of the whole."""
    questions, answers, results = folder / "questions.jsonl", folder / "answers.jsonl", folder / "results"
    with questions.open("w", encoding="utf-8") as asked, answers.open("w", encoding="utf-8") as said:
        for row in made_up(size, seed):
            said.write(json.dumps({"id": row["id"], "answer": row.pop("answer")}) + "\n")
            asked.write(json.dumps(row) + "\n")
    begun = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):  # the report of a run that never was
        evaluate(
            benchmarks={"made_up": QuestionFile(path=str(questions))},
            mllm=partial(Replay, path=str(answers)),
            judges={"keyword": KeywordJudge},
            detector=str(detector),
            base=None,
            detoxifier="",
            arms=ARMS,
            threshold=None,
            rewrite_tokens=1,
            ensemble=[],
            human_labels=None,
            max_unjudged=1.0,
            repeats=1,
            batch_size=batch_size,
            latency_rows=0,
            report_rows=report_rows,
            dry_run=False,
            output_dir=str(results),
        )
    seconds, cpu_seconds = time.perf_counter() - begun[0], time.process_time() - begun[1]
    # The last verdict is written when the last stage ends; run.json says so in tenths of a second only.
    reporting = time.time() - (results / "cache" / "verdicts" / "0.jsonl").stat().st_mtime
    filled = read_json(results / "run.json")["stages"]
    stages = {name: filled[found]["seconds"] for found, name in STAGES.items()}
    reading = seconds - sum(stages.values()) - reporting
    return {"reading": reading, **stages, "reporting": reporting, "all": seconds}, cpu_seconds
