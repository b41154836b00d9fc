"""The benchmark: rounds of all arms in random order, a table, and ``benchmark.json``."""

import logging
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm

from mllm_protector.data.sources import Source
from mllm_protector.errors import InputError
from mllm_protector.files import write_json
from mllm_protector.models.backbone import pick_device
from mllm_protector.ranges import Count, Rate, Seed
from mllm_protector.reporting.tables import Table, print_tables
from speed import trl_peers
from speed.arms import ENTRIES, Arm, Bench, Entry, Settings, Task, choose
from speed.flops import forward_flops, generation_flops, language_head, score_head, training_flops
from speed.meter import Reading, matmul_speed
from speed.shape import Precision, Shape
from speed.workload import read_texts

log = logging.getLogger(__name__)

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}

LEGEND = (
    "Median [min, max] over rounds. Tokens without padding per CPU-second on a CPU, per second on a GPU.",
    "MFU: useful operations by the peak of a matrix product. Peak memory, beyond the model, on a GPU.",
    "Loss: of the last step; TRL's reward loss is pairwise, all others of a task agree.",
)


def run_benchmark(
    *,
    data: Source,
    model: Mapping[str, int | str],
    tasks: list[Task],
    arms: list[str] | None,
    rounds: Count,
    pairs: Count,
    max_length: Count,
    micro_batch_tokens: Count,
    slots: Count,
    new_tokens: Count,
    learning_rate: Rate,
    threads: Count | None,
    output_dir: str,
    seed: Seed,
) -> list[dict[str, Any]]:
    """Measure, print a table, and write ``benchmark.json``.

    Every arm does the same rounds of texts from the same weights; in each round the arms take turns in random
    order.

    Args:
        data: pairs of a harmless and a harmful answer.
        model: the size of a Llama of random weights, see ``shape.Shape``.
        tasks: what is measured.
        arms: by name; ``None`` for all.
        rounds: timed ones, after one that is not.
        pairs: in one round; a training makes one optimisation step of them.
        max_length: longest row in tokens.
        micro_batch_tokens: positions in one forward pass, where an arm counts tokens.
        slots: answers written at once; a round of generation has twice as many.
        new_tokens: the longest answer that is written.
        learning_rate: constant.
        threads: of PyTorch; ``None`` for PyTorch's choice.
        output_dir: where the file goes.
        seed: of weights and orders.

    Returns:
        The content of ``benchmark.json``: one object for each task and arm.

    Raises:
        InputError: the data or the settings cannot be used.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        shape = Shape(**model)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(f"model: {error}") from None
    settings = Settings(
        max_length=max_length,
        micro_batch_tokens=micro_batch_tokens,
        slots=slots,
        new_tokens=new_tokens,
        learning_rate=learning_rate,
        seed=seed,
    )
    entries = choose(tasks, arms, shape)
    if not trl_peers.available():
        log.warning(trl_peers.MISSING)
    texts = read_texts(data, shape, pairs=pairs, rewrites=2 * slots, max_length=max_length, seed=seed)
    bench = Bench(shape, texts, settings)
    readings, peaks = _measure(bench, entries, rounds, seed)
    results = [_result(bench, entry, readings, peaks[entry.computes_in(shape)]) for entry in entries]
    write_json(Path(output_dir) / "benchmark.json", results)
    _print(results)
    log.info("written: %s", output_dir)
    return results


def _measure(
    bench: Bench, entries: Sequence[Entry], rounds: int, seed: int
) -> tuple[dict[Entry, list[Reading]], dict[Precision, float]]:
    """The readings of each arm, and the device's peak in each precision, measured between them."""
    order = random.Random(seed)
    readings: dict[Entry, list[Reading]] = defaultdict(list)
    peaks: dict[Precision, float] = defaultdict(float)
    with tqdm(total=len(entries) * (rounds + 1), desc="rounds", unit="arm", disable=None) as bar:
        for task in dict.fromkeys(entry.task for entry in entries):
            arms: dict[Entry, Arm] = {entry: entry.build(bench) for entry in entries if entry.task == task}
            log.info("%s: %d arms take turns, %d rounds", task, len(arms), rounds)
            for number, rows in enumerate(bench.workload(task).rounds(rounds + 1)):
                for precision in {entry.computes_in(bench.shape) for entry in arms}:
                    peaks[precision] = max(peaks[precision], matmul_speed(DTYPE[precision], pick_device()))
                for entry in order.sample(list(arms), len(arms)):
                    reading = arms[entry].step(rows)
                    if number > 0:  # the first round warms up
                        readings[entry].append(reading)
                    bar.update()
    return readings, peaks


def _result(
    bench: Bench, entry: Entry, measured: Mapping[Entry, Sequence[Reading]], peak: float
) -> dict[str, Any]:
    readings = measured[entry]
    rounds = list(bench.workload(entry.task).rounds(len(readings) + 1))[1:]
    useful = [_useful(bench, entry.task, *each) for each in zip(rounds, readings, strict=True)]
    earlier = [other for other in ENTRIES[: ENTRIES.index(entry)] if other.task == entry.task]
    others = {other.name: measured[other] for other in earlier if other in measured and entry.is_ours}
    memory = [each.peak_memory_bytes for each in readings if each.peak_memory_bytes is not None]
    return {
        "task": entry.task,
        "arm": entry.name,
        "precision": entry.computes_in(bench.shape),
        "real_tokens_per_second": _spread([each.real_tokens / each.cost for each in readings]),
        "padded_over_real": _spread([each.positions / each.real_tokens for each in readings]),
        "forward_steps": _spread([each.forward_steps for each in readings]),
        "mfu": _spread([count / (each.cost * peak) for count, each in zip(useful, readings, strict=True)]),
        "peak_memory_bytes": _spread(memory) if memory else None,
        "losses": [each.loss for each in readings if each.loss is not None],
        "speed_up_over": {
            name: _spread([theirs.cost / each.cost for theirs, each in zip(other, readings, strict=True)])
            for name, other in others.items()
        },
        "matmul_flops_per_second": peak,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "model": asdict(bench.shape),
    }


def _useful(bench: Bench, task: Task, rows: Sequence[Any], reading: Reading) -> int:
    """The operations that a round cannot do without."""
    shape = bench.shape
    if task == "generation":
        prompts = bench.texts.detoxifier_encoder.encode(
            queries=[row.query for row in rows],
            answers=[row.rejected for row in rows],
            reserve=bench.settings.new_tokens,
        )
        return generation_flops(shape, [len(ids) for ids in prompts], reading.real_tokens)
    lengths = [len(row) for row in rows]
    if task == "scoring":
        return forward_flops(shape, lengths, head=score_head(shape, len(rows)))
    if task == "detector":
        return training_flops(shape, lengths, head=score_head(shape, len(rows)), head_trained=True)
    head = language_head(shape, sum(len(row.target) for row in rows))
    return training_flops(shape, lengths, head=head, head_trained=False)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _print(results: Sequence[Mapping[str, Any]]) -> None:
    """Print a table for each task, and how much faster our arms are than the others, round by round."""
    header = ("arm", "tokens/s", "padded/real", "MFU", "peak memory", "steps", "loss")
    tables, lines = [], list(LEGEND)
    for task in dict.fromkeys(result["task"] for result in results):
        chosen = [result for result in results if result["task"] == task]
        tables.append(Table(title=task, header=header, rows=[_row(result) for result in chosen]))
        lines += [
            f"{task}: {result['arm']} is {_words(ratio, '{:.2f}')} times as fast as {name}"
            for result in chosen
            for name, ratio in result["speed_up_over"].items()
        ]
    print_tables("Speed", lines, tables)


def _row(result: Mapping[str, Any]) -> list[str]:
    memory = result["peak_memory_bytes"]
    return [
        result["arm"],
        _words(result["real_tokens_per_second"], "{:,.0f}"),
        f"{result['padded_over_real']['median']:.2f}",
        f"{result['mfu']['median']:.2f}",
        "-" if memory is None else f"{memory['median'] / 2**20:,.0f} MiB",
        f"{result['forward_steps']['median']:,.0f}",
        f"{result['losses'][-1]:.4f}" if result["losses"] else "-",
    ]


def _words(values: Mapping[str, float], form: str) -> str:
    return f"{form} [{form}, {form}]".format(values["median"], values["min"], values["max"])
