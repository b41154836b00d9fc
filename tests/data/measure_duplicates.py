"""What the checks for near duplicates and contamination find, and what they cost.

    python -m tests.data.measure_duplicates --data <hh_rlhf, xstest, mm_safetybench> [--rows 1000000]

Recall and false alarms are counted on 10,000 rows of real sentences in random combinations, of which 2,000
are changed copies of others. Time and memory are taken on synthetic rows that are made when they are read:
once of random words with one row in ten a changed copy, once with 300,000 in a million of one template or
nearly empty.
"""

import argparse
import csv
import gzip
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from mllm_protector.data.contamination import QuestionIndex, check_contamination
from mllm_protector.data.duplicates import THRESHOLD, near_duplicates
from mllm_protector.data.queries import words

ORIGINALS, CHANGED = 8_000, 2_000


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def recased(text: str, draw: random.Random) -> str:
    text = draw.choice([str.upper, str.title, str.lower])(text)
    return draw.choice([" - ", "  ", ", ", "\n\t"]).join(text.split()) + draw.choice(["!!", " ...", "\u3002"])


def changed(text: str, draw: random.Random, *, place: int, by: str) -> str:
    split = text.split()
    at = draw.choice(single_words(split))
    split[at : at + place] = [by] if by else []
    return " ".join(split)


def scattered(text: str, draw: random.Random, *, share: float) -> str:
    split = text.split()
    for at in draw.sample(single_words(split), int(share * len(words(text)))):
        split[at] = "altered"
    return " ".join(split)


def single_words(split: Sequence[str]) -> list[int]:
    """Where one word stands as the checks count them ("well-known" are two)."""
    return [place for place, text in enumerate(split) if len(words(text)) == 1]


CHANGES: dict[str, Callable[[str, random.Random], str]] = {
    "copied": lambda text, _: text,
    "other case, punctuation": recased,
    "one word replaced": partial(changed, place=1, by="altered"),
    "one word inserted": partial(changed, place=0, by="altered"),
    "one word left out": partial(changed, place=1, by=""),
}
FAR = {
    "5 % replaced": partial(scattered, share=0.05),
    "10 % replaced": partial(scattered, share=0.10),
    "14 % replaced": partial(scattered, share=0.14),
}


def dialogues(data: Path) -> list[list[str]]:
    """Each of hh-rlhf as its turns."""
    with gzip.open(data / "hh_rlhf/harmless_base.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)[side] for line in lines for side in ("chosen", "rejected")]
    split = (re.split("\n\n(?:Human|Assistant):", text) for text in texts)
    return [[turn.strip() for turn in turns if turn.strip()] for turns in split]


def xstest(data: Path, column: str) -> list[str]:
    return [
        row[column]
        for path in sorted((data / "xstest").glob("*.csv"))
        for row in csv.DictReader(path.open(encoding="utf-8", newline=""))
    ]


def mm_safetybench(data: Path) -> list[str]:
    return [
        question["Question"]
        for path in sorted((data / "mm_safetybench/processed_questions").glob("*.json"))
        for question in json.loads(path.read_text(encoding="utf-8")).values()
    ]


def sentences(texts: Sequence[str]) -> list[str]:
    """The different ones of at least three words."""
    split = (sentence for text in texts for sentence in re.split(r"(?<=[.!?])\s+|\n+", text))
    return sorted({" ".join(sentence.split()) for sentence in split if len(words(sentence)) >= 3})


def combined(pool: Sequence[str], draw: random.Random) -> str:
    """At least two of the sentences and at least 8 words."""
    length = draw.choice([8, 12, 20, 40, 80, 160, 400])
    text = f"{draw.choice(pool)} {draw.choice(pool)}"
    while len(words(text)) < length:
        text += f" {draw.choice(pool)}"
    return text


def duplicates_of_real_text(data: Path, seed: int) -> None:
    draw = random.Random(seed)
    spoken = [turn for turns in dialogues(data) for turn in turns]
    pool = sentences(spoken + xstest(data, "completion") + mm_safetybench(data))
    texts = [combined(pool, draw) for _ in range(ORIGINALS)]
    sources = draw.sample(range(ORIGINALS), CHANGED)
    kinds = [name for name in (CHANGES | FAR) for _ in range(CHANGED // len(CHANGES | FAR))]
    texts += [(CHANGES | FAR)[kind](texts[source], draw) for source, kind in zip(sources, kinds, strict=True)]
    begun = time.monotonic()
    first = near_duplicates(texts, threshold=THRESHOLD)
    seconds = time.monotonic() - begun
    say(f"near duplicates: {len(texts):,} rows of {len(pool):,} real sentences, {seconds:.1f} s")
    found: Counter[str] = Counter()
    for place, (source, kind) in enumerate(zip(sources, kinds, strict=True), start=ORIGINALS):
        found[kind] += first[place] == first[source]
    for kind in CHANGES | FAR:
        say(f"  {kind}: {found[kind]} of {kinds.count(kind)} found")
    alarms = np.flatnonzero(first[:ORIGINALS] != np.arange(ORIGINALS))
    say(f"  false alarms: {len(alarms)} of {ORIGINALS:,}")
    for row in alarms[:5]:
        say(f"    {texts[row][:90]!r} as {texts[first[row]][:90]!r}")


def contamination_of_real_text(data: Path, seed: int) -> None:
    draw = random.Random(seed)
    turns = dialogues(data)
    pool = sentences([turn for each in turns for turn in each])
    benchmark = sorted({question for question in mm_safetybench(data) if len(words(question)) >= 7})
    rows = [combined(pool, draw) for _ in range(ORIGINALS)]
    kinds = [name for name in CHANGES for _ in range(CHANGED // len(CHANGES))]
    targets = draw.choices(range(len(benchmark)), k=CHANGED)
    for target, kind in zip(targets, kinds, strict=True):
        text = CHANGES[kind](benchmark[target], draw)
        if draw.random() < 0.5:
            text = f"{combined(pool, draw)} {text} {combined(pool, draw)}"
        rows.append(text)
    begun = time.monotonic()
    matches = list(QuestionIndex(benchmark, threshold=THRESHOLD).find(rows))
    seconds = time.monotonic() - begun
    say(f"contamination: {len(rows):,} rows, {len(benchmark):,} questions of MM-SafetyBench, {seconds:.1f} s")
    by_row = {(match.row, match.question) for match in matches}
    for kind in CHANGES:
        hits = [
            (place, target) in by_row
            for place, (target, its) in enumerate(zip(targets, kinds, strict=True), start=ORIGINALS)
            if its == kind
        ]
        say(f"  {kind}: {sum(hits)} of {len(hits)} found")
    say(f"  false alarms: {len({match.row for match in matches if match.row < ORIGINALS})} of {ORIGINALS:,}")
    others = sum(
        match.question != targets[match.row - ORIGINALS] for match in matches if match.row >= ORIGINALS
    )
    say(f"  other questions found in the {CHANGED:,} changed ones: {others}")
    benchmarks = {"MM-SafetyBench": mm_safetybench(data), "XSTest": sorted(set(xstest(data, "prompt")))}
    for name, texts in {
        "hh-rlhf, first queries": sorted({each[0] for each in turns}),
        "hh-rlhf, whole dialogues": [" ".join(each) for each in turns],
        "XSTest": benchmarks["XSTest"],
        "MM-SafetyBench": sorted(set(benchmarks["MM-SafetyBench"])),
    }.items():
        report = check_contamination(texts, benchmarks)
        for benchmark_name, finding in report.findings.items():
            say(
                f"  in {len(texts):,} texts of {name}: {finding.questions:,} questions of {benchmark_name},"
                f" {len(finding.found):,} found in {finding.rows:,} rows"
            )
            if name != benchmark_name:
                for example in finding.examples[:4]:
                    say(f"    {example['question'][:90]!r} in {example['text'][:120]!r}")
    by_words = {tuple(words(question)): question for question in benchmarks["MM-SafetyBench"]}
    distinct = sorted(by_words.values())
    pairs = [match for match in QuestionIndex(distinct).find(distinct) if match.row != match.question]
    say(f"  pairs of different MM-SafetyBench questions taken for one another: {len(pairs)}")
    for match in pairs[:: max(1, len(pairs) // 5)][:5]:
        say(f"    {distinct[match.row][:90]!r} as {distinct[match.question][:90]!r}")


class Synthetic(Sequence[str]):
    """About 60 words a row, made when it is read: frequent and rare ones, as in any language."""

    def __init__(self, count: int, *, template: bool) -> None:
        self._count = count
        self._words = [f"w{number:x}" for number in range(30_000)]
        self._weights = list(accumulate(1 / (rank + 10) for rank in range(len(self._words))))
        self._template = self._draw(random.Random("template"), 45) if template else None

    def _draw(self, draw: random.Random, count: int) -> list[str]:
        return draw.choices(self._words, cum_weights=self._weights, k=count)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> str:  # type: ignore[override]
        if row >= self._count:
            raise IndexError(row)
        draw = random.Random(row)
        if self._template is not None and row % 10 < 3:
            if row % 10 == 0:
                return " ".join(self._draw(draw, draw.randrange(3)))
            own = self._draw(draw, 15)
            return " ".join([*self._template[:25], *own, *self._template[25:]])
        if row % 10 == 9:
            original = self[row - 1].split()
            original[draw.randrange(len(original))] = "altered"
            return " ".join(original)
        return " ".join(self._draw(draw, draw.randrange(40, 80)))


def resident(kind: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since the last reset."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{kind}:")[1].split()[0]) * 1024


def costs(rows: int) -> None:
    def timed(name: str, work: Callable[[], str]) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        start, begun, cpu = resident("VmRSS"), time.monotonic(), time.process_time()
        result = work()
        seconds, cpu = time.monotonic() - begun, time.process_time() - cpu
        peak = (resident("VmHWM") - start) / 2**20
        say(f"  {name}: {seconds:.0f} s, {cpu:.0f} s of CPU, {peak:.0f} MiB above the start; {result}")

    def groups(template: bool) -> str:
        first = near_duplicates(Synthetic(rows, template=template), threshold=THRESHOLD)
        planted = np.arange(9, rows, 10)
        hits = (first[planted] == first[planted - 1]).sum()
        dropped = (first != np.arange(rows)).sum()
        return f"{hits:,} of {len(planted):,} planted found, {dropped:,} dropped"

    def questions() -> str:
        asked = {"synthetic": [" ".join(text.split()[:14]) for text in Synthetic(2_000, template=False)]}
        report = check_contamination(Synthetic(rows, template=False), asked)
        found = report.findings["synthetic"].found
        return f"{len(report.rows):,} rows, {len(found):,} of 2,000 questions found"

    say(f"costs of {rows:,} rows:")
    timed("making the rows alone", lambda: f"{sum(map(len, Synthetic(rows, template=False))):,} characters")
    timed("near duplicates", partial(groups, False))
    timed("near duplicates, templates", partial(groups, True))
    timed("contamination", questions)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, help="the folder of hh_rlhf, xstest and mm_safetybench")
    parser.add_argument("--rows", type=int, default=0, help="also measure the cost of so many")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.data:
        duplicates_of_real_text(arguments.data, arguments.seed)
        contamination_of_real_text(arguments.data, arguments.seed)
    if arguments.rows:
        costs(arguments.rows)


if __name__ == "__main__":
    main()
