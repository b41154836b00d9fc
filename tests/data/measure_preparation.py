"""Time and memory from a file to splits: ``python -m tests.data.measure_preparation --pairs 1000000``.

The pairs are made of random words, about 60 each. Linux only: memory is read from ``/proc``.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

from mllm_protector.data.preparation import prepare
from mllm_protector.data.sources import Pairs
from mllm_protector.data.table import VARIABLE
from tests.data.builders import OPTIONS

WORDS = [hashlib.sha256(str(number).encode()).hexdigest()[: 3 + number % 6] for number in range(5000)]
KINDS = ("RssAnon", "RssFile")


def memory() -> dict[str, float]:
    """MiB of this process's own pages, and of mapped files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) / 1024 for words in lines if words[0][:-1] in KINDS}


def write_pairs(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            dice = random.Random(number)
            texts = {
                name: " ".join(dice.choices(WORDS, k=k)) for name, k in (("query", 12), ("accepted", 24))
            }
            file.write(json.dumps(texts | {"rejected": " ".join(dice.choices(WORDS, k=24))}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=100_000)
    count = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ[VARIABLE] = str(folder / "cache")
        write_pairs(folder / "pairs.jsonl", count)
        changes = {"validation_fraction": 0.02, "duplicates": "near"}
        source = Pairs(path=str(folder / "pairs.jsonl"), **OPTIONS | changes)
        start, peak, done = memory(), dict.fromkeys(KINDS, 0.0), threading.Event()

        def watch() -> None:
            while not done.wait(0.1):
                for kind, size in memory().items():
                    peak[kind] = max(peak[kind], size - start[kind])

        watcher = threading.Thread(target=watch)
        watcher.start()
        for what in ("first", "again, from the cache"):
            wall, cpu = time.monotonic(), time.process_time()
            account = prepare(source, {}, contaminated="keep", folder=folder / "report").splits.account
            wall, cpu = time.monotonic() - wall, time.process_time() - cpu
            sys.stdout.write(f"{what}: {wall:.0f} s, {cpu:.0f} CPU-seconds; {account}\n")
        done.set()
        watcher.join()
        sizes = ", ".join(f"{kind} {size:.0f} MiB" for kind, size in peak.items())
        sys.stdout.write(f"beyond the start, at most: {sizes}\n")


if __name__ == "__main__":
    main()
