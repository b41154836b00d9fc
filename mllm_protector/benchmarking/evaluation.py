"""The speed of an evaluation: against one answer at a time, and as the number of questions grows."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mllm_protector.benchmarking.comparison import comparison, distinct_answers, make_cast, measure_rounds
from mllm_protector.benchmarking.report import WIDTH
from mllm_protector.benchmarking.scale import growth, measure_scale
from mllm_protector.benchmarking.shape import Shape
from mllm_protector.benchmarking.stages import ARMS
from mllm_protector.benchmarking.workload import read_texts
from mllm_protector.data.sources import Source
from mllm_protector.errors import InputError
from mllm_protector.files import write_json
from mllm_protector.ranges import Amount, Count, Seed

log = logging.getLogger(__name__)

FILE = "evaluation_speed.json"


def run_benchmark_evaluation(
    *,
    data: Source,
    small: Shape,
    large: Shape,
    small_answers: Amount,
    large_answers: Amount,
    rounds: int,
    flagged: float,
    max_length: Count,
    new_tokens: Count,
    batch_size: Count,
    scale: Sequence[int],
    report_rows: Amount,
    threads: Count | None,
    output_dir: str,
    seed: Seed,
) -> dict[str, Any]:
    """Measure, print tables, and write ``evaluation_speed.json`` after each part.

    Args:
        data: pairs of a harmless and a harmful answer, which are guarded and judged.
        small: the size of the small models, Llamas of random weights.
        large: the size of the large ones.
        small_answers: that the small models guard and judge in a round; 0 leaves them out.
        large_answers: the same for the large models.
        rounds: timed ones.
        flagged: share of the answers that the guard replaces, and of those that the judge finds harmful.
        max_length: longest row in tokens.
        new_tokens: the longest rewrite; half of it is the mean.
        batch_size: rows between two writes to disk.
        scale: numbers of made-up questions, each for a whole evaluation; in rising order.
        report_rows: at most so many single answers stand in the ``report.html`` of those.
        threads: of PyTorch; ``None`` leaves them alone.
        output_dir: where the file goes.
        seed: of weights, texts and orders.

    Returns:
        The content of ``evaluation_speed.json``: ``device``, ``threads``, ``compare`` (see
        ``comparison.comparison``) and ``scale`` (see ``scale.growth``).

    Raises:
        InputError: the data or the settings cannot be used.
        RuntimeError: the two ways came to different results, so their times say nothing.
    """
    sizes = {"small": (small, small_answers), "large": (large, large_answers)}
    _check(rounds, flagged, {name: answers for name, (_, answers) in sizes.items()}, scale)
    if threads is not None:
        torch.set_num_threads(threads)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "compare": [],
        "scale": [],
    }
    for name, (shape, answers) in sizes.items():
        if not answers:
            continue
        log.info("%s: %s answers go two ways, %d rounds", name, f"{answers:,}", rounds)
        texts = read_texts(data, shape, pairs=-(-answers // 2), rewrites=1, max_length=max_length, seed=seed)
        rows = distinct_answers(texts, answers)
        cast = make_cast(shape, texts, rows, flagged=flagged, new_tokens=new_tokens, seed=seed)
        done = measure_rounds(cast, rows, rounds, folder, batch_size=batch_size, seed=seed)
        results["compare"].append({"size": name, "model": asdict(shape)} | comparison(done))
        write_json(folder / FILE, results)
    measured = []
    for each in measure_scale(
        scale,
        folder,
        batch_size=batch_size,
        report_rows=report_rows,
        threads=torch.get_num_threads(),
        seed=seed,
    ):
        log.info("scale: %s questions in %.0f s", f"{each.questions:,}", each.seconds["all"])
        measured.append(each)
        results["scale"] = growth(measured)
        write_json(folder / FILE, results)
    print_tables(results)
    log.info("written: %s", folder / FILE)
    return results


def print_tables(results: Mapping[str, Any]) -> None:
    """Print a table for each size of models, and one of the growing evaluations.

    Args:
        results: the content of ``evaluation_speed.json``.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH

    def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(Text(f"\n{title}", style="bold"))
        console.print(table)

    for each in results["compare"]:
        show(*comparison_table(each, results["device"]))
    if results["scale"]:
        show(*scale_table(results["scale"]))


def comparison_table(found: Mapping[str, Any], device: str) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: by stage the texts, the time, and how much faster ours is.

    How much faster is said of all texts, of one text through a model, and of all by the clock.

    Args:
        found: of one size.
        device: of the models; on a CPU the time is CPU-seconds, which other work disturbs less.
    """
    clock, unit = ("cpu_seconds", "CPU-s") if device == "cpu" else ("seconds", "s")
    texts, ways = found["texts"], ("one_at_a_time", "ours")
    rows = [
        [
            stage,
            *(f"{texts[way][stage]:,}" if stage in texts[way] else "" for way in ways),
            *(_spread(found[clock][way][stage], "{:.1f}") for way in ways),
            _spread(found["speed_up"][clock][stage], "{:.2f}") if stage in found["speed_up"][clock] else "",
            *(
                f"{ratios[stage]['median']:.2f}" if stage in ratios else ""
                for ratios in (found["speed_up_per_text"][clock], found["speed_up"]["seconds"])
            ),
        ]
        for stage in found[clock]["ours"]
    ]
    title = (
        f"{found['size']} models: {found['answers']:,} answers, {found['flagged']:,} flagged,"
        f" {len(ARMS)} arms; {unit} for 1,000 answers, median [min, max] of {found['rounds']} rounds"
    )
    columns = ["stage", "texts singly", "ours", f"{unit} singly", "ours", "faster by", "per text", "clock"]
    return title, columns, rows


def scale_table(found: Sequence[Mapping[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: by number of questions the seconds of each stage, and the memory.

    Args:
        found: sizes in rising order, at least one.
    """
    stages = list(found[0]["seconds_per_1000"])
    rows = [
        [
            f"{each['questions']:,}",
            *(f"{each['seconds_per_1000'][stage]:.2f}" for stage in stages),
            f"{each['cpu_seconds_per_1000']:.2f}",
            "-" if each["peak_bytes"] is None else f"{each['peak_bytes'] / 2**20:,.0f}",
            "-" if each["bytes_per_question"] is None else f"{each['bytes_per_question']:,.0f}",
        ]
        for each in found
    ]
    title = "whole evaluations, two arms, a tiny detector, the keyword judge: seconds for 1,000 questions"
    return title, ["questions", *stages, "CPU-s", "peak MiB", "bytes/question"], rows


def _spread(values: Mapping[str, float], form: str) -> str:
    return f"{form} [{form}, {form}]".format(values["median"], values["min"], values["max"])


def _check(rounds: int, flagged: float, answers: Mapping[str, int], scale: Sequence[int]) -> None:
    if rounds < 1:
        raise InputError(f"rounds={rounds}: must be at least 1")
    if not 0 < flagged < 1:
        raise InputError(f"flagged={flagged}: must be a share between 0 and 1")
    for name, count in answers.items():
        if count and count < 2:
            raise InputError(f"{name}_answers={count}: must be at least 2, or 0 for none")
    if any(count < 1 for count in scale) or list(scale) != sorted(set(scale)):
        raise InputError(f"scale={[*scale]}: must be rising numbers of questions, each at least 1")
