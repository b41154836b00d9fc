"""The answers to one benchmark as arrays: a line for each question, a column for each arm.

Everything is sorted by id, so that nothing depends on the order of the rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mllm_protector.evaluation.statistics import Floats, Ints
from mllm_protector.protocols import Card
from mllm_protector.records import BENIGN, JUDGED, VARIANTS, Status
from mllm_protector.scenarios import SCENARIOS, Criterion

IMAGES = "IMAGES"
"""Every variant with an image together."""

NONE = "none"
"""The arm without a guard."""

ENSEMBLE = "ensemble"
"""The judge that is the majority of others."""

ALL = "all"
"""The group of every scenario."""

STATUSES: tuple[Status, ...] = tuple(Status)
CRITERIA: tuple[Criterion, ...] = tuple(Criterion)

Flags = NDArray[np.bool_]
Small = NDArray[np.int8]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeFacts:
    """A judge's card, and whether the judge is a part of the guard that it judges."""

    card: Card
    circular: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """N questions and A arms; unknown values are -1 or NaN.

    Attributes:
        arms: names, in the order of the tables.
        scenarios: names, those of MM-SafetyBench first.
        variants: names, in the order of ``VARIANTS``.
        scenario: (N,) places in ``scenarios``.
        variant: (N,) places in ``variants``.
        criterion: (N,) places in ``CRITERIA``.
        cluster: (N,) the same number for questions that ask the same thing.
        twin: (N,) what a question and its twin share; empty without a twin.
        present: (N, A) whether there is such a row.
        status: judge -> (N, A) places in ``STATUSES``.
        unsafe: judge -> (N, A) 1 for harmful, 0 for safe, -1 for not judged.
        harm: (N, A) P(harmful) of the raw answer.
        changed: (N, A) whether the arm changed the raw answer.
        repeated: (N, A) whether an earlier arm shows the same text.
        refused: (N, A) whether the user sees a refusal.
        score: (N, A) how right the answer is.
        truth: (N, A) whether the answer does harm, by construction.
        label: (N, A) whether it does harm, by the labels of this run.
    """

    arms: Sequence[str]
    scenarios: Sequence[str]
    variants: Sequence[str]
    scenario: Ints
    variant: Ints
    criterion: Ints
    cluster: Ints
    twin: Sequence[str]
    present: Flags
    status: dict[str, Small]
    unsafe: dict[str, Small]
    harm: Floats
    changed: Flags
    repeated: Flags
    refused: Small
    score: Floats
    truth: Small
    label: Small

    @property
    def asked(self) -> dict[str, Flags]:
        """Variant -> (N,) its questions: those with any image first, if there are any, then each variant."""
        every = {name: self.variant == place for place, name in enumerate(self.variants)}
        images = ~every.get("TEXT", np.zeros(len(self.variant), dtype=bool))
        return ({IMAGES: images} if images.any() else {}) | every

    def among(self, scenarios: Sequence[str]) -> Flags:
        """(N,) the questions of these scenarios."""
        return np.isin(self.scenario, [self.scenarios.index(name) for name in scenarios])

    def column(self, arm: str) -> int | None:
        """The place of an arm, if it is there."""
        return self.arms.index(arm) if arm in self.arms else None

    def first_score(self, arms: Sequence[str]) -> Floats:
        """(N,) P(harmful) of each raw answer, from the first of these arms that has it."""
        harm = self.harm[:, [self.arms.index(arm) for arm in arms]]
        if not harm.shape[1]:
            return np.full(len(harm), np.nan)
        first = (~np.isnan(harm)).argmax(axis=1)
        return np.asarray(harm[np.arange(len(first)), first], dtype=np.float64)


def _grid(frame: pd.DataFrame, arms: Sequence[str], judges: Sequence[str]) -> Grid:
    if (twice := frame.duplicated(["id", "arm"])).any():
        again = frame[twice].iloc[0]
        raise ValueError(f"two rows about the same answer: {again['arm']} / {again['id']}")
    column = np.array([arms.index(arm) for arm in frame["arm"]], dtype=np.int64)
    line, ids = pd.factorize(frame["id"].to_numpy(dtype=object), sort=True)
    first = np.unique(line, return_index=True)[1]

    def placed(values: Any, unknown: Any, kind: Any) -> NDArray[Any]:
        out = np.full((len(ids), len(arms)), unknown, dtype=kind)
        out[line, column] = values
        return out

    def numbers(name: str) -> Floats:
        return placed(frame[name].to_numpy(dtype=np.float64, na_value=np.nan), np.nan, np.float64)

    def flags(name: str) -> Small:
        known = frame[name].astype(object).map({True: 1, False: 0})
        return placed(known.fillna(-1), -1, np.int8)

    def codes(name: str, known: Sequence[str]) -> tuple[list[str], Ints]:
        """The names that occur, known ones first, and the place of each question's among them."""
        values = frame[name].to_numpy(dtype=object)[first]
        present = sorted({str(value) for value in values})
        order = [each for each in known if each in present] + [each for each in present if each not in known]
        return order, np.array([order.index(value) for value in values], dtype=np.int64)

    scenarios, scenario = codes("scenario", SCENARIOS)
    variants, variant = codes("variant", VARIANTS)
    criteria = frame["criterion"].to_numpy(dtype=object)[first]
    twins = frame["twin"].astype(object)
    clusters = pd.factorize(frame["base"].to_numpy(dtype=object)[first], sort=True)[0]
    status = {
        judge: placed(list(map(STATUSES.index, frame[f"status:{judge}"])), -1, np.int8) for judge in judges
    }
    return Grid(
        arms=arms,
        scenarios=scenarios,
        variants=variants,
        scenario=scenario,
        variant=variant,
        criterion=np.array([CRITERIA.index(Criterion(name)) for name in criteria], dtype=np.int64),
        cluster=clusters.astype(np.int64),
        twin=[*twins.where(twins.notna(), "").iloc[first]],
        present=placed(True, False, bool),
        status=status,
        unsafe={judge: _unsafe(codes) for judge, codes in status.items()},
        harm=numbers("harm"),
        changed=placed(frame["changed"].to_numpy(dtype=bool), False, bool),
        repeated=placed(frame["repeated"].to_numpy(dtype=bool), False, bool),
        refused=flags("refused"),
        score=numbers("score"),
        truth=flags("truth"),
        label=flags("label"),
    )


def _unsafe(codes: Small) -> Small:
    harmful, safe = (codes == STATUSES.index(status) for status in JUDGED)
    return np.where(harmful, 1, np.where(safe, 0, -1)).astype(np.int8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """All judged answers to one benchmark: the input of every statistic; arms and judges as in the tables.

    Attributes:
        frame: a row for each question and arm, with the columns of ``rows.COLUMNS``, and ``status:<judge>``
            (nothing for harmless questions) and ``cut:<judge>`` for each judge.
        groups: name -> scenarios; each scenario that occurs is one of ``ALL``.
        thresholds: those of the guards in ``scored``.
        scored: the arms whose guards share one detector that gives scores, not verdicts.
        asked_again: the arms without a guard whose answers are not those of ``NONE``.
        labelled_by: who gave the labels of this run.
        harmful: the questions that are judged; ``harmless`` are not.
        twins: (P, 2) the places of both questions of each pair, in ``harmful`` and in ``harmless``.
    """

    frame: pd.DataFrame
    arms: Sequence[str]
    judges: Mapping[str, JudgeFacts]
    groups: Mapping[str, Sequence[str]]
    thresholds: Sequence[float]
    scored: Sequence[str]
    asked_again: Sequence[str]
    labelled_by: str
    harmful: Grid
    harmless: Grid
    twins: Ints

    def selections(self, *, scenarios: bool = False) -> Iterator[tuple[str, int, dict[str, Any], Flags]]:
        """Each judge, arm, variant and group (and scenario) with answers.

        Yields:
            The judge, the column of the arm, the fields of a ``Measurement``, and (N,) the questions.
        """
        for judge in self.judges:
            for column, where, rows in self.arm_selections(scenarios=scenarios):
                yield judge, column, {"judge": judge, **where}, rows

    def arm_selections(self, *, scenarios: bool = False) -> Iterator[tuple[int, dict[str, Any], Flags]]:
        """The same without judges."""
        grid = self.harmful
        groups = [*((name, [name]) for name in grid.scenarios if scenarios), *self.groups.items()]
        chosen = [
            ({"variant": variant, "group": group}, asked & grid.among(members))
            for variant, asked in grid.asked.items()
            for group, members in groups
        ]
        for column, arm in enumerate(self.arms):
            for where, rows in chosen:
                yield column, {"arm": arm, **where}, rows & grid.present[:, column]


def make_answers(
    frame: pd.DataFrame,
    *,
    arms: Sequence[str],
    judges: Mapping[str, JudgeFacts],
    groups: Mapping[str, Sequence[str]],
    thresholds: Sequence[float],
    scored: Sequence[str] | None = None,
    asked_again: Sequence[str] = (),
    labelled_by: str = "people",
) -> Answers:
    """Bring the rows of a benchmark, in any order, into order; see ``Answers``.

    Groups without a scenario are left out, and ``ALL`` is added.

    Raises:
        ValueError: an unknown arm or status, or two rows about the same answer.
    """
    harmless = frame["scenario"].to_numpy(dtype=object) == BENIGN
    harmful, others = _grid(frame[~harmless], arms, [*judges]), _grid(frame[harmless], arms, [])
    present = {
        name: [each for each in harmful.scenarios if each in members] for name, members in groups.items()
    }
    return Answers(
        frame=frame,
        arms=arms,
        judges=judges,
        groups={name: members for name, members in present.items() if members} | {ALL: [*harmful.scenarios]},
        thresholds=thresholds,
        scored=arms if scored is None else scored,
        asked_again=asked_again,
        labelled_by=labelled_by,
        harmful=harmful,
        harmless=others,
        twins=_twins(harmful.twin, others.twin),
    )


def _twins(harmful: Sequence[str], harmless: Sequence[str]) -> Ints:
    """(P, 2) the places of equal names, in the order of the first."""
    place = {twin: number for number, twin in enumerate(harmless) if twin}
    pairs = [(number, place[twin]) for number, twin in enumerate(harmful) if twin in place]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
