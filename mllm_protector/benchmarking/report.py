"""The benchmark's figures on the terminal, and its loss curves as a picture."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_protector.benchmarking.arms import ENTRIES

WIDTH = 110
"""Columns of the terminal print at most; exactly so many in a file or a pipe."""

COLUMNS = ("arm", "real tokens/s", "padded/real", "MFU", "peak memory", "steps")

LEGEND = (
    "Median [min, max] over rounds. Real tokens per CPU-second on a CPU, per second on a GPU; MFU: useful",
    "operations by the peak of a matrix product; peak memory: beyond the model; steps: forward passes.",
    "TRL's reward loss is pairwise; that of the other detectors is the binary cross-entropy of each answer.",
    "by_length: batches of rows of like length, TRL's train_sampling_strategy=group_by_length.",
)

PAIRWISE = {(entry.task, entry.name) for entry in ENTRIES if entry.pairwise}


def print_table(results: Sequence[Mapping[str, Any]]) -> None:
    """Print a table for each task, and how much faster our arms are than the others, round by round.

    Args:
        results: the content of ``benchmark.json``.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    console.print(Text("\n".join(LEGEND)))
    for task in dict.fromkeys(result["task"] for result in results):
        chosen = [result for result in results if result["task"] == task]
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for name in COLUMNS:
            table.add_column(name, justify="left" if name == "arm" else "right")
        for result in chosen:
            table.add_row(*map(Text, row(result)))
        console.print(f"\n{task}", style="bold")
        console.print(table)
        for line in comparisons(chosen):
            console.print(Text(line))


def row(result: Mapping[str, Any]) -> list[str]:
    """The cells of one arm."""
    speed = "real_tokens_per_cpu_second" if result["device"] == "cpu" else "real_tokens_per_second"
    memory = result["peak_memory_bytes"]
    return [
        result["arm"],
        _spread(result[speed], "{:,.0f}"),
        f"{result['padded_over_real']['median']:.2f}",
        f"{result['mfu']['median']:.2f}",
        "-" if memory is None else f"{memory['median'] / 2**20:,.0f} MiB",
        f"{result['forward_steps']['median']:,.0f}",
    ]


def comparisons(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each of our arms: how many times as fast it is as each arm before it."""
    return [
        f"{result['arm']}, times as fast: "
        + ", ".join(f"{_spread(values, '{:.2f}')} as {name}" for name, values in over.items())
        for result in results
        if (over := result["speed_up_over"])
    ]


def chart(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """A PNG with the loss of each step: a panel for each task, a line for each arm.

    Arms whose loss is another one (pairwise) are left out.

    Args:
        curves: task, arm, losses.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(8, 3.2 * len(curves)), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (task, arms) in zip(
            figure.subplots(len(curves), squeeze=False)[:, 0], curves.items(), strict=True
        ):
            for number, (name, losses) in enumerate(arms.items()):
                if (task, name) not in PAIRWISE:
                    # Lines that lie on each other stay visible: the first is the widest.
                    width = 1.5 * (len(arms) - number)
                    axes.plot(range(1, len(losses) + 1), losses, label=name, linewidth=width)
            axes.set_title(f"{task}: training loss, same weights and same texts")
            axes.set_xlabel("step")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_ylabel("mean loss")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def _spread(values: Mapping[str, float], form: str) -> str:
    return f"{form} [{form}, {form}]".format(values["median"], values["min"], values["max"])
