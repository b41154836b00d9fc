"""The stage of an evaluation that judges: first what every judge must tell apart, then the answers.

Verdicts are known by the judge and the words judged, so the same words are judged once, whichever arms and
questions they stand in.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm_protector.errors import RunError
from mllm_protector.evaluation.stages import CUT, Item, Outputs, cut_field, required
from mllm_protector.evaluation.store import FAILED, Filled, Store, fill
from mllm_protector.files import content_key
from mllm_protector.judges.probes import Probe
from mllm_protector.protocols import Judge
from mllm_protector.records import BENIGN, JUDGED, TO_REPEAT, Answer, Question, Status, Verdict


class Judged:
    """What a judge said, by item and arm."""

    def __init__(
        self, identity: Mapping[str, Any], *, reads_question: bool, verdicts: Store, outputs: Outputs
    ) -> None:
        """Look into stores.

        Args:
            identity: what the judge's verdicts depend on.
            reads_question: whether the question's words are among that.
            verdicts: of all judges.
            outputs: what was judged.
        """
        self._identity = content_key(identity)
        self._reads_question = reads_question
        self._verdicts = verdicts
        self._outputs = outputs

    def key(self, question: Question, text: str) -> str:
        """What a verdict is known by."""
        asked = question.text if self._reads_question else None
        return content_key(self._identity, question.criterion, asked, text)

    def verdict(self, item: Item, arm: str) -> dict[str, Any]:
        """``status`` and ``reason``, and ``cut`` where the judge's reply was.

        Raises:
            RunError: there is none.
        """
        final = self._outputs.final(item, arm)
        if isinstance(final, Status):
            return {"status": str(final), "reason": ""}
        row = self._verdicts.get(self.key(item.question, final))
        row = required(row, item.question.id, "verdict")
        return {"status": row["status"], "reason": row["reason"], **cut_field(row.get(CUT, False))}

    def wanted(
        self, items: Sequence[Item], arms: Sequence[str]
    ) -> Iterator[tuple[str, tuple[Question, str]]]:
        """The texts to judge; harmless questions are not judged."""
        for item in items:
            for arm in arms:
                if item.question.scenario == BENIGN:
                    continue
                final = self._outputs.final(item, arm)
                if not isinstance(final, Status):
                    yield self.key(item.question, final), (item.question, final)


def judge_stage(
    name: str,
    judge: Judge,
    judged: Judged,
    items: Sequence[Item],
    arms: Sequence[str],
    store: Store,
    batch_size: int,
) -> Filled:
    """Judge every different text once, whichever arms and questions it stands in."""
    return fill(
        store,
        judged.wanted(items, arms),
        lambda rows: verdict_rows(judge, rows),
        total=sum(item.question.scenario != BENIGN for item in items) * len(arms),
        batch_size=batch_size,
        title=f"judge: {name}",
    )


def verdict_rows(judge: Judge, rows: Sequence[tuple[Question, str]]) -> list[dict[str, Any]]:
    """A judge's verdicts on answers, as rows of a store."""
    verdicts = judge.judge(
        [question for question, _ in rows],
        [Answer(id=question.id, text=text) for question, text in rows],
    )
    return [
        {"question": verdict.id, "status": str(verdict.status), "reason": verdict.reason}
        | ({FAILED: _why(verdict)} if verdict.status in TO_REPEAT else {})
        | cut_field(verdict.cut)
        for verdict in verdicts
    ]


def _why(verdict: Verdict) -> str:
    """Why there is no verdict, in words that quote no reply."""
    if verdict.status == Status.JUDGE_ERROR:
        return verdict.reason
    what = "the judge declined" if verdict.status == Status.JUDGE_REFUSED else "the reply is no verdict"
    return f"{what}, it was cut at its longest length" if verdict.cut else what


def probes_of(judge: Judge) -> Sequence[Probe]:
    """What a judge is asked first; nothing for most."""
    return getattr(judge, "probes", ())


def probe_stage(name: str, judge: Judge, judged: Judged, store: Store) -> None:
    """Ask a judge about its probes; once it got all of them right, it is not asked again.

    Raises:
        RunError: a verdict is wrong. Having none is left to the accounts of the run.
    """
    probes = probes_of(judge)
    if not probes:
        return
    key = content_key("probe", *(judged.key(probe.question, probe.answer) for probe in probes))

    def work(_: Sequence[None]) -> list[dict[str, Any]]:
        rows = verdict_rows(judge, [(probe.question, probe.answer) for probe in probes])
        row: dict[str, Any] = {"question": "probe", "verdicts": rows}
        wrong = [f"{probe.name} is {each['status']}" for probe, each in _misjudged(probes, rows)]
        return [row | {FAILED: ", ".join(wrong)} if wrong else row]

    fill(store, [(key, None)], work, total=1, batch_size=1, title=f"probe of the judge {name}")
    for probe, row in _misjudged(probes, required(store.get(key), name, "probe")["verdicts"]):
        if row["status"] in JUDGED:
            raise RunError(
                f"judge {name}: calls {probe.name} {row['status']}, so its verdicts mean nothing; a chat"
                " template that shows the model the user's message only does that. Serve the model with the"
                f" chat template of its publisher, or give its prompt as judges.{name}.template; with"
                f" judges.{name}.probe=false it judges all the same"
            )


def _misjudged(probes: Sequence[Probe], rows: Sequence[Mapping[str, Any]]) -> list[tuple[Probe, Any]]:
    return [pair for pair in zip(probes, rows, strict=True) if pair[1]["status"] != pair[0].status]
