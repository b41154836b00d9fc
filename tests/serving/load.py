"""A load test: ``python -m tests.serving.load --clients 200 --seconds 60 --fronts 2``.

Tiny models of random weights guard an upstream that says each question again; every question has a token of
its own, so that a lost or swapped answer is seen. The same is measured with one request at a time, and with
the upstream asked directly.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

import numpy
import psutil

from tests.models.builders import save_tiny_classifier_base
from tests.models.fixtures import random_detector, random_detoxifier
from tests.serving.http_peers import Peer, echoing
from tests.serving.processes import Server, started

WORDS = "and a plain answer of a dozen words or so, which the guard allows."
MEGABYTE = 1_000_000


@dataclass
class Run:
    """What a number of clients have seen, each of which asks again as soon as it has its answer."""

    clients: int
    seconds: float
    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    swapped: int = 0
    lost: int = 0

    @property
    def per_second(self) -> float:
        """Answers in a second."""
        return len(self.latencies) / self.seconds

    def milliseconds(self, percent: float) -> float:
        """A percentile of the latencies."""
        return float(numpy.percentile(self.latencies, percent)) * 1000


@dataclass(kw_only=True)
class Report:
    """The figures; latencies in ms, memory in MB."""

    fronts: int
    clients: int
    answers: int
    errors: dict[str, int]
    lost: int
    swapped: int
    unscanned_bytes: float
    per_second: float
    per_second_one_at_a_time: float
    speedup: float
    p50: float
    p95: float
    added_p50: float
    added_p95: float
    added_p50_one_at_a_time: float
    added_p95_one_at_a_time: float
    memory_middle_third: float
    memory_last_third: float
    cpu_seconds_per_1000: dict[str, float]


def measure(clients: int, seconds: float, fronts: int, upstream_s: float = 0.0) -> Report:
    """Run it all: the load, and before it, for a sixth of its time each, what it is compared with."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save_tiny_classifier_base("llama", folder / "base")
        random_detector(base).save(folder / "detector")
        random_detoxifier(base).save(folder / "detoxifier")
        return asyncio.run(_measure(folder, clients, seconds, fronts, upstream_s))


async def _measure(folder: Path, clients: int, seconds: float, fronts: int, upstream_s: float) -> Report:
    async with echoing(upstream_s) as upstream:
        given = [f"url=http://127.0.0.1:{upstream}/v1", f"fronts={fronts}", "guard.device=cpu"]
        given += [f"guard.{part}={folder}/{part}" for part in ("detector", "detoxifier")]
        context = started(folder, *given, "policy.threshold=1.0")
        server = await asyncio.to_thread(context.__enter__)
        try:
            short = seconds / 6
            await _load(server.port, clients, 1.0)  # warms up
            direct_one = await _load(upstream, 1, short)
            direct = await _load(upstream, clients, short)
            one = await _load(server.port, 1, short)
            memory: list[float] = []
            sampling = asyncio.create_task(_sample(server, memory, seconds / 60))
            before = _cpu(server)
            run = await _load(server.port, clients, seconds)
            after = _cpu(server)
            sampling.cancel()
            unscanned = await asyncio.to_thread(server.count, "unscanned_bytes_total")
        finally:
            await asyncio.to_thread(context.__exit__, None, None, None)
    third = len(memory) // 3
    return Report(
        fronts=fronts,
        clients=clients,
        answers=len(run.latencies),
        errors=dict(run.errors + one.errors),
        lost=run.lost + one.lost,
        swapped=run.swapped + one.swapped,
        unscanned_bytes=unscanned,
        per_second=run.per_second,
        per_second_one_at_a_time=one.per_second,
        speedup=run.per_second / one.per_second,
        p50=run.milliseconds(50),
        p95=run.milliseconds(95),
        added_p50=run.milliseconds(50) - direct.milliseconds(50),
        added_p95=run.milliseconds(95) - direct.milliseconds(95),
        added_p50_one_at_a_time=one.milliseconds(50) - direct_one.milliseconds(50),
        added_p95_one_at_a_time=one.milliseconds(95) - direct_one.milliseconds(95),
        memory_middle_third=mean(memory[third : 2 * third]),
        memory_last_third=mean(memory[2 * third :]),
        cpu_seconds_per_1000={
            name: (after[name] - before[name]) / len(run.latencies) * 1000 for name in after
        },
    )


async def _load(port: int, clients: int, seconds: float) -> Run:
    run, end = Run(clients, seconds), time.perf_counter() + seconds

    async def client(number: int) -> None:
        count = 0
        async with Peer(port) as peer:
            while time.perf_counter() < end:
                count += 1
                text = f"token-{number}-{count} {WORDS}"
                begun = time.perf_counter()
                try:
                    answer = await asyncio.wait_for(peer.ask(text), 60)
                except (OSError, TimeoutError, asyncio.IncompleteReadError):
                    run.lost += 1
                    return
                if "error" in answer:
                    run.errors[answer["error"]["code"]] += 1
                else:
                    run.latencies.append(time.perf_counter() - begun)
                    run.swapped += answer["choices"][0]["message"]["content"] != text

    await asyncio.gather(*map(client, range(clients)))
    run.seconds = time.perf_counter() - (end - seconds)
    return run


async def _sample(server: Server, memory: list[float], every: float) -> None:
    """Megabytes of fronts and model worker."""
    while True:
        with suppress(psutil.Error):
            family = (*server.fronts, server.worker)
            memory.append(sum(each.memory_info().rss for each in family) / MEGABYTE)
        await asyncio.sleep(every)


def _cpu(server: Server) -> dict[str, float]:
    def spent(processes: Sequence[psutil.Process]) -> float:
        return sum(sum(each.cpu_times()[:2]) for each in processes)

    own = psutil.Process()
    return {"fronts": spent(server.fronts), "worker": spent([server.worker]), "clients": spent([own])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--fronts", type=int, default=1)
    parser.add_argument("--upstream-s", type=float, default=0.0, help="that the upstream takes for an answer")
    given = parser.parse_args()
    report = measure(given.clients, given.seconds, given.fronts, given.upstream_s)
    print(json.dumps(asdict(report), indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
