"""The end of an evaluation: all processes' rows together, counted and written for people and programs."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_protector.errors import InputError, RunError
from mllm_protector.evaluation.contamination import seen_in_training
from mllm_protector.evaluation.ensemble import ENSEMBLE
from mllm_protector.evaluation.judging import Judged
from mllm_protector.evaluation.pairing import SEED
from mllm_protector.evaluation.rows import (
    HumanLabels,
    own_metrics,
    read_rows,
    result_rows,
    write_rows,
)
from mllm_protector.evaluation.stages import CIRCULAR, Item, Outputs
from mllm_protector.evaluation.store import Filled, Store
from mllm_protector.evaluation.summary import summarise_benchmark
from mllm_protector.files import file_digest, write_json, write_text
from mllm_protector.protocols import Benchmark
from mllm_protector.records import LoadedBenchmark
from mllm_protector.reporting.manifest import environment, peak_memory
from mllm_protector.reporting.page import page
from mllm_protector.reporting.report import JudgeInfo, assemble, write_report
from mllm_protector.reporting.sentences import contamination_notes
from mllm_protector.reporting.terminal import print_report

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Facts:
    """What stands beside the numbers, gathered while the stages run.

    Attributes:
        mllm: the identity of the guarded model.
        trained: part of the guard -> what its guard file says of its training data.
        guards: arm -> what its replies depend on.
        judges: what is known about each judge.
        reads_question: judge -> whether its verdicts depend on the question's words.
        stages: what each stage did.
        latency: arm -> what the guard adds to the time of one answer.
        rejections: arm -> why the rewrites of this run were rejected, counted.
    """

    mllm: dict[str, Any]
    trained: Mapping[str, Mapping[str, Any]]
    guards: dict[str, dict[str, Any]] = field(default_factory=dict)
    judges: dict[str, JudgeInfo] = field(default_factory=dict)
    reads_question: dict[str, bool] = field(default_factory=dict)
    stages: dict[str, Filled] = field(default_factory=dict)
    latency: dict[str, dict[str, float]] = field(default_factory=dict)
    rejections: dict[str, dict[str, int]] = field(default_factory=dict)


class Stores:
    """The tables of all stages, as a process sees them when it opens them."""

    def __init__(self, folder: Path, process: int) -> None:
        """Open the tables in a folder.

        Raises:
            InputError: a file cannot be read, or a row is broken.
        """
        self.answers = Store(folder / "answers", process)
        self.replies = Store(folder / "replies", process)
        self.verdicts = Store(folder / "verdicts", process)

    def outputs(self, facts: Facts) -> Outputs:
        """What the MLLM and the guards known so far said."""
        return Outputs(self.answers, self.replies, facts.guards)

    def judged(self, name: str, facts: Facts) -> Judged:
        """What a judge said of it."""
        return Judged(
            facts.judges[name].identity,
            reads_question=facts.reads_question[name],
            verdicts=self.verdicts,
            outputs=self.outputs(facts),
        )


def publish(
    asked: Mapping[str, tuple[Benchmark, LoadedBenchmark, Sequence[Item]]],
    facts: Facts,
    *,
    arms: Sequence[str],
    ensemble: Sequence[str],
    human: HumanLabels,
    max_unjudged: float,
    report_rows: int,
    output_dir: Path,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """Write ``results.jsonl`` of each benchmark, then everything that is made from it.

    Args:
        asked: name -> a benchmark, what it held, and its items.
        facts: what stands beside the numbers; the ensemble is added to its judges.
        arms: in the order of the tables.
        ensemble: judges whose majority is one more judge.
        human: people's labels.
        max_unjudged: the largest share of unjudged answers that is a success.
        report_rows: at most so many single answers stand in ``report.html``.
        output_dir: where everything goes.
        run: for ``run.json``.

    Returns:
        The content of ``asr.json``.

    Raises:
        RunError: a row is missing, or too many answers are unjudged (after everything is written).
    """
    stores = Stores(output_dir / "cache", 0)
    judged = {name: stores.judged(name, facts) for name in facts.judges}
    if ensemble:
        facts.judges[ENSEMBLE] = _ensemble(facts.judges, ensemble)
    notes = [facts.mllm["note"]] if "note" in facts.mllm else []
    summaries = {}
    for name, (benchmark, loaded, items) in asked.items():
        rows = result_rows(
            items,
            loaded,
            arms=arms,
            outputs=stores.outputs(facts),
            judged=judged,
            ensemble=ensemble,
            human=human,
        )
        frame = write_rows(rows, output_dir / name / "results.jsonl", [*facts.judges])
        seen = seen_in_training([item.question for item in items], name, facts.trained)
        notes += [*contamination_notes(name, seen), *_truth_note(name, frame)]
        summaries[name] = summarise_benchmark(
            frame,
            arms=arms,
            judges=facts.judges,
            groups=loaded.groups,
            missing=loaded.missing,
            identity=benchmark.identity(),
            fingerprint=_fingerprint(items),
            contamination=seen,
            thresholds=[guard["threshold"] for guard in facts.guards.values()],
        ) | {"own_metrics": own_metrics(loaded, read_rows(output_dir / name / "results.jsonl"))}
    result = assemble(
        summaries, mllm=facts.mllm, guard=facts.guards, arms=arms, judges=facts.judges, notes=notes
    )
    write_report(result, output_dir)
    made = [output_dir / "asr.json", *(output_dir / name / "results.jsonl" for name in asked)]
    manifest = {
        **run,
        **environment(),
        "seed": SEED,
        "sha256": {path.relative_to(output_dir).as_posix(): file_digest(path) for path in made},
        "peak_memory_mib": peak_memory(),
    }
    write_json(output_dir / "run.json", manifest)
    html = page(
        result,
        lambda: chain.from_iterable(read_rows(output_dir / name / "results.jsonl") for name in asked),
        run=manifest,
        pictures=_Pictures(asked),
        max_rows=report_rows,
    )
    write_text(output_dir / "report.html", html)
    print_report(result)
    log.info("written: %s (report.html, asr.json, asr.csv, asr.md, asr.tex, asr.png)", output_dir)
    _require_judged(result, max_unjudged)
    return result


class _Pictures:
    """The picture of a question, for the report."""

    def __init__(self, asked: Mapping[str, tuple[Benchmark, LoadedBenchmark, Sequence[Item]]]) -> None:
        self._found = {
            (name, item.question.id): item.question.image
            for name, (_, _, items) in asked.items()
            for item in items
            if item.question.image is not None
        }

    def __call__(self, benchmark: str, identifier: str) -> "Image.Image | None":
        picture = self._found.get((benchmark, identifier))
        try:
            return None if picture is None else picture.load()
        except InputError:
            return None


def _ensemble(judges: Mapping[str, JudgeInfo], members: Sequence[str]) -> JudgeInfo:
    circular = any(judges[name].circular for name in members)
    return JudgeInfo(
        identity={"majority_of": {name: judges[name].identity for name in members}},
        note=CIRCULAR if circular else None,
        circular=circular,
        bias=None,
    )


def _fingerprint(items: Sequence[Item]) -> str:
    """A hash of the questions, whoever answered them: runs of the same fingerprint can be compared."""
    digest = hashlib.sha256()
    for item in sorted(items, key=lambda item: item.question.id):
        asked = (item.question.id, item.question.text, item.image or "", str(item.question.criterion))
        digest.update("\0".join(asked).encode(errors="backslashreplace") + b"\n")
    return digest.hexdigest()


def _truth_note(name: str, frame: "pd.DataFrame") -> list[str]:
    """Where it is known by construction what is harmful: how well the detector tells."""
    from sklearn.metrics import roc_auc_score

    scored = frame[(frame["outcome"].notna()) & frame["harm"].notna() & frame["raw_truth"].notna()]
    scored = scored[scored["arm"] == scored["arm"].iloc[0]] if len(scored) else scored
    if scored["raw_truth"].nunique() < 2:
        return []
    auroc = roc_auc_score(scored["raw_truth"].astype(bool), scored["harm"])
    return [
        f"{name}: whether an answer is harmful is known by construction. The detector's AUROC on the MLLM's"
        f" {len(scored)} answers is {auroc:.4f}."
    ]


def _require_judged(result: Mapping[str, Any], max_unjudged: float) -> None:
    """Of each benchmark, judge and arm; all kinds of question together."""
    for name, summary in result["benchmarks"].items():
        totals: dict[tuple[str, str], list[int]] = {}
        for cell in summary["cells"]:
            total = totals.setdefault((cell["judge"], cell["arm"]), [0, 0])
            total[0] += cell["unjudged"]
            total[1] += cell["judged"] + cell["unjudged"]
        for (judge, arm), (unjudged, answers) in totals.items():
            if unjudged > max_unjudged * answers:
                raise RunError(
                    f"{name}: the judge {judge} left {unjudged:,} of {answers:,} answers of the arm {arm}"
                    f" unjudged, more than max_unjudged={max_unjudged}; everything is written, and the same"
                    " command tries those again"
                )
