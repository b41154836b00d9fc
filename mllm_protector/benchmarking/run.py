"""The benchmark: rounds of all arms in random order, then memory, then loss curves."""

import logging
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from mllm_protector.benchmarking import memory, report, trl_peers
from mllm_protector.benchmarking.arms import ENTRIES, Arm, Bench, Entry, Settings, Task, choose
from mllm_protector.benchmarking.figures import figures
from mllm_protector.benchmarking.flops import forward_flops, generation_flops, matmul_speed, score_head
from mllm_protector.benchmarking.meter import Reading
from mllm_protector.benchmarking.shape import Precision, Shape
from mllm_protector.benchmarking.workload import Workload, read_texts, useful_training_flops
from mllm_protector.data.sources import Source
from mllm_protector.errors import InputError
from mllm_protector.files import write_bytes, write_json
from mllm_protector.models.backbone import pick_device
from mllm_protector.ranges import Amount, Count, Rate, Seed

log = logging.getLogger(__name__)

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run_benchmark(
    *,
    data: Source,
    model: Shape,
    tasks: list[Task],
    arms: list[str] | None,
    rounds: int,
    pairs: int,
    max_length: Count,
    micro_batch_tokens: Count,
    slots: Count,
    new_tokens: Count,
    learning_rate: Rate,
    curve_steps: Amount,
    curve_pairs: int,
    threads: Count | None,
    output_dir: str,
    seed: Seed,
) -> list[dict[str, Any]]:
    """Measure, print a table, and write ``benchmark.json``, ``loss_curves.json`` and ``loss_curves.png``.

    Every arm does the same rounds of texts; in each round the arms take turns in random order. On a CPU the
    main figure is CPU-seconds, which other work on the machine disturbs less; on a GPU it is the clock.

    Args:
        data: pairs of a harmless and a harmful answer.
        model: the size of a Llama of random weights.
        tasks: what is measured.
        arms: by name; ``None`` for all.
        rounds: timed ones, behind one that is not.
        pairs: in one round; a training makes one optimisation step of them.
        max_length: longest row in tokens.
        micro_batch_tokens: positions in one forward pass, where an arm goes by tokens.
        slots: answers written at once; a round of generation has twice as many.
        new_tokens: the longest answer that is written.
        learning_rate: constant.
        curve_steps: steps of the loss curves; 0 for none.
        curve_pairs: in one of those steps.
        threads: of PyTorch; ``None`` leaves them alone.
        output_dir: where the files go.
        seed: of weights and orders.

    Returns:
        The content of ``benchmark.json``: one object for each task and arm.

    Raises:
        InputError: the data or the settings cannot be used.
    """
    for name, value in (("rounds", rounds), ("pairs", pairs), ("curve_pairs", curve_pairs)):
        if value < 1:
            raise InputError(f"{name}={value}: must be at least 1")
    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings(
        max_length=max_length,
        micro_batch_tokens=micro_batch_tokens,
        slots=slots,
        new_tokens=new_tokens,
        learning_rate=learning_rate,
        seed=seed,
    )
    entries = choose(tasks, arms, model)
    if not trl_peers.available():
        log.warning(trl_peers.MISSING)
    folder = Path(output_dir)
    texts = read_texts(data, model, pairs=pairs, rewrites=2 * slots, max_length=max_length, seed=seed)
    bench = Bench(model, texts, settings)
    measured, peaks = _measure(bench, entries, rounds, seed)

    def write(memories: Mapping[Entry, Sequence[int | None]]) -> list[dict[str, Any]]:
        results = [
            _result(bench, entry, measured, peaks[entry.computes_in(model)], memories.get(entry, ()))
            for entry in entries
        ]
        write_json(folder / "benchmark.json", results)
        return results

    write({})  # what is measured by now stays, whatever happens to the rest
    results = write(_memories(bench, entries, measured))
    report.print_table(results)
    curves = _curves(bench, entries, curve_steps, curve_pairs)
    if curves:
        write_json(folder / "loss_curves.json", curves)
        write_bytes(folder / "loss_curves.png", report.chart(curves))
    log.info("written: %s", folder)
    return results


def _measure(
    bench: Bench, entries: Sequence[Entry], rounds: int, seed: int
) -> tuple[dict[Entry, list[Reading]], dict[Precision, float]]:
    """The readings of each arm, and the peak of the device in each precision, measured between them."""
    order = random.Random(seed)
    readings: dict[Entry, list[Reading]] = defaultdict(list)
    peaks: dict[Precision, float] = defaultdict(float)
    device = pick_device()
    with tqdm(total=len(entries) * (rounds + 1), desc="rounds", unit="arm", disable=None) as bar:
        for task in dict.fromkeys(entry.task for entry in entries):
            arms: dict[Entry, Arm] = {entry: entry.build(bench) for entry in entries if entry.task == task}
            log.info("%s: %d arms take turns, %d rounds", task, len(arms), rounds)
            for number, rows in enumerate(bench.workload(task).rounds(rounds + 1)):
                for precision in {entry.computes_in(bench.shape) for entry in arms}:
                    peaks[precision] = max(peaks[precision], matmul_speed(DTYPE[precision], device))
                for entry in order.sample(list(arms), len(arms)):
                    _, reading = arms[entry].step(rows)
                    if number > 0:  # the first round warms up
                        readings[entry].append(reading)
                    bar.update()
    return readings, peaks


def _memories(
    bench: Bench, entries: Sequence[Entry], measured: dict[Entry, list[Reading]]
) -> dict[Entry, list[int | None]]:
    if torch.cuda.is_available():
        return {entry: [reading.peak_memory_bytes for reading in measured[entry]] for entry in entries}
    log.info("memory: each of %d arms once more, in a process of its own", len(entries))
    names = [(entry.task, entry.name) for entry in entries]
    found = memory.peaks(names, bench.shape, bench.texts, bench.settings, torch.get_num_threads())
    return {entry: [peak] for entry, peak in zip(entries, found, strict=True)}


def _result(
    bench: Bench,
    entry: Entry,
    measured: dict[Entry, list[Reading]],
    peak: float,
    memories: Sequence[int | None],
) -> dict[str, Any]:
    readings = measured[entry]
    rounds = list(bench.workload(entry.task).rounds(len(readings) + 1))[1:]
    earlier = ENTRIES[: ENTRIES.index(entry)] if entry.ours else ()
    others = {
        other.name: measured[other] for other in earlier if other.task == entry.task and other in measured
    }
    return {
        "task": entry.task,
        "arm": entry.name,
        "ours": entry.ours,
        "precision": entry.computes_in(bench.shape),
        **figures(
            readings,
            others,
            flops=[
                _useful(bench, entry.task, rows, taken) for rows, taken in zip(rounds, readings, strict=True)
            ],
            peak=peak,
            memory=memories,
        ),
        "matmul_flops_per_second": peak,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "model": asdict(bench.shape),
    }


def _useful(bench: Bench, task: Task, rows: Sequence[Any], reading: Reading) -> int:
    """The operations that a round cannot do without."""
    if task == "generation":
        prompts = bench.texts.detoxifier_encoder.encode(
            queries=[row.query for row in rows],
            answers=[row.rejected for row in rows],
            reserve=bench.settings.new_tokens,
        )
        return generation_flops(bench.shape, [len(ids) for ids in prompts], reading.real_tokens)
    if task == "scoring":
        return forward_flops(bench.shape, [len(row) for row in rows], head=score_head(bench.shape, len(rows)))
    return useful_training_flops(bench.shape, rows)


def _curves(
    bench: Bench, entries: Sequence[Entry], steps: int, pairs: int
) -> dict[str, dict[str, list[float]]]:
    """The loss of each step: task, arm, losses. All from the same weights and on the same texts."""
    curves: dict[str, dict[str, list[float]]] = defaultdict(dict)
    trainings = [entry for entry in entries if entry.task in ("detector", "detoxifier")]
    for entry in tqdm(trainings if steps else [], desc="loss curves", unit="arm", disable=None):
        rows = bench.workload(entry.task).rows
        each = pairs * (2 if entry.task == "detector" else 1)
        arm = entry.build(bench)
        losses = [arm.step(chosen)[0] for chosen in Workload(rows=rows, per_round=each).rounds(steps)]
        curves[entry.task][entry.name] = [float(loss) for loss in losses if loss is not None]
    return dict(curves)
