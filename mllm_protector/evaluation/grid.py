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
from mllm_protector.records import BENIGN, JUDGED, VARIANTS, Confusion, Status
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
"""A status is stored as its place in here."""

CRITERIA: tuple[Criterion, ...] = tuple(Criterion)
"""A criterion is stored as its place in here."""

Flags = NDArray[np.bool_]
Small = NDArray[np.int8]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeFacts:
    """What stands beside a judge's numbers.

    Attributes:
        identity: what its verdicts depend on, as JSON.
        reads_question: whether the question's words are among that.
        note: why its verdicts are circular; ``None`` if they are not.
        circular: whether it is a part of the guard that it judges.
        bias: how it compared with people elsewhere.
    """

    identity: dict[str, Any]
    reads_question: bool = False
    note: str | None = None
    circular: bool = False
    bias: Confusion | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """N questions and A arms; whatever is not known is -1 or NaN.

    Attributes:
        arms: names, in the order of the tables.
        scenarios: names, those of MM-SafetyBench first.
        variants: names, in the order of ``VARIANTS``.
        scenario: (N,) places in ``scenarios``.
        variant: (N,) places in ``variants``.
        criterion: (N,) places in ``CRITERIA``.
        cluster: (N,) what a question shares with those that ask the same thing.
        present: (N, A) whether there is such a row.
        status: judge -> (N, A) places in ``STATUSES``.
        unsafe: judge -> (N, A) 1 for harmful, 0 for safe, -1 for not judged.
        harm: (N, A) P(harmful) of the raw answer.
        changed: (N, A) whether the arm changed the raw answer.
        repeated: (N, A) whether an earlier arm shows the same text.
        refused: (N, A) whether the user sees a refusal.
        score: (N, A) how right the answer is.
        truth: (N, A) whether the answer does harm, by construction.
        human: (N, A) whether it does harm, to people.
    """

    arms: Sequence[str]
    scenarios: Sequence[str]
    variants: Sequence[str]
    scenario: Ints
    variant: Ints
    criterion: Ints
    cluster: Ints
    present: Flags
    status: dict[str, Small]
    unsafe: dict[str, Small]
    harm: Floats
    changed: Flags
    repeated: Flags
    refused: Small
    score: Floats
    truth: Small
    human: Small

    @property
    def asked(self) -> dict[str, Flags]:
        """Variant -> (N,) its questions: those with any image first, if there are any, then each variant."""
        text = np.array([name == "TEXT" for name in self.variants], dtype=bool)[self.variant]
        every = {name: self.variant == place for place, name in enumerate(self.variants)}
        return ({} if text.all() else {IMAGES: ~text}) | every

    def among(self, scenarios: Sequence[str]) -> Flags:
        """(N,) the questions of these scenarios."""
        return np.isin(self.scenario, [self.scenarios.index(name) for name in scenarios])

    def column(self, arm: str) -> int | None:
        """The place of an arm, if it is there."""
        return self.arms.index(arm) if arm in self.arms else None

    def first_score(self) -> Floats:
        """(N,) P(harmful) of each raw answer, from the first arm that has it."""
        known = ~np.isnan(self.harm)
        first = self.harm[np.arange(len(known)), known.argmax(axis=1)] if self.arms else self.harm[:, :0]
        return np.asarray(first, dtype=np.float64).reshape(len(known))


def make_grid(frame: pd.DataFrame, arms: Sequence[str], judges: Sequence[str]) -> Grid:
    """Bring rows into order.

    Args:
        frame: a row for each question and arm, with the columns of ``rows.COLUMNS``.
        arms: their names, in the order of the tables.
        judges: those with a column ``status:<judge>`` that is filled in each row.

    Raises:
        ValueError: an unknown arm or status, or two rows about the same answer.
    """
    names = np.asarray(frame["arm"], dtype=object)
    if unknown := set(names).difference(arms):
        raise ValueError(f"rows of unknown arms: {', '.join(sorted(map(str, unknown)))}")
    places = {arm: place for place, arm in enumerate(arms)}
    column = np.array([places[name] for name in names], dtype=np.int64)
    line, ids = pd.factorize(np.asarray(frame["id"], dtype=object), sort=True)
    taken = np.bincount(line * len(arms) + column, minlength=len(ids) * len(arms))
    if (taken > 1).any():
        row, arm = divmod(int(taken.argmax()), len(arms))
        raise ValueError(f"two rows about the same answer: {arms[arm]} / {ids[row]}")
    first = np.unique(line, return_index=True)[1]
    shape = (len(ids), len(arms))

    def placed(values: Any, unknown: Any, kind: Any) -> NDArray[Any]:
        out = np.full(shape, unknown, dtype=kind)
        out[line, column] = values
        return out

    def flags(name: str) -> Small:
        known = pd.Series(np.asarray(frame[name], dtype=object)).map({True: 1, False: 0})
        return placed(known.fillna(-1).astype(np.int8).to_numpy(), -1, np.int8)

    scenarios, scenario = _codes(frame["scenario"], SCENARIOS)
    variants, variant = _codes(frame["variant"], VARIANTS)
    criteria = [CRITERIA.index(Criterion(name)) for name in np.asarray(frame["criterion"], dtype=object)]
    clusters = pd.factorize(np.asarray(frame["base"], dtype=object), sort=True)[0].astype(np.int64)
    status = {judge: placed(_statuses(frame, judge), -1, np.int8) for judge in judges}
    return Grid(
        arms=list(arms),
        scenarios=scenarios,
        variants=variants,
        scenario=scenario[first],
        variant=variant[first],
        criterion=np.array(criteria, dtype=np.int64)[first],
        cluster=clusters[first],
        present=taken.reshape(shape) > 0,
        status=status,
        unsafe={judge: _unsafe(codes) for judge, codes in status.items()},
        harm=placed(frame["harm"].to_numpy(dtype=np.float64, na_value=np.nan), np.nan, np.float64),
        changed=placed(frame["changed"].to_numpy(dtype=bool), False, bool),
        repeated=placed(frame["repeated"].to_numpy(dtype=bool), False, bool),
        refused=flags("refused"),
        score=placed(frame["score"].to_numpy(dtype=np.float64, na_value=np.nan), np.nan, np.float64),
        truth=flags("truth"),
        human=flags("human"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """All judged answers to one benchmark: what every statistic reads.

    Attributes:
        frame: a row for each question and arm, with the columns of ``rows.COLUMNS``, and ``status:<judge>``
            (nothing for harmless questions) and ``cut:<judge>`` for each judge.
        arms: in the order of the tables.
        judges: name -> its facts, in the order of the tables.
        groups: name -> scenarios; each scenario that occurs is one of ``ALL``.
        thresholds: those of the guards.
        harmful: the questions that are judged.
        harmless: those that are not.
    """

    frame: pd.DataFrame
    arms: Sequence[str]
    judges: Mapping[str, JudgeFacts]
    groups: Mapping[str, Sequence[str]]
    thresholds: Sequence[float]
    harmful: Grid
    harmless: Grid

    def selections(self) -> Iterator[tuple[dict[str, Any], Flags]]:
        """``variant`` and ``group`` of each group in each variant, and (N,) its questions."""
        for variant, asked in self.harmful.asked.items():
            for group, members in self.groups.items():
                yield {"variant": variant, "group": group}, asked & self.harmful.among(members)


def make_answers(
    frame: pd.DataFrame,
    *,
    arms: Sequence[str],
    judges: Mapping[str, JudgeFacts],
    groups: Mapping[str, Sequence[str]],
    thresholds: Sequence[float],
) -> Answers:
    """Bring the rows of a benchmark into order; see ``Answers``.

    Args:
        frame: rows in any order.
        arms: in the order of the tables.
        judges: in the order of the tables.
        groups: the benchmark's own groups; those without a scenario are left out, and ``ALL`` is added.
        thresholds: those of the guards.

    Raises:
        ValueError: a row with an unknown arm or status, or two rows about the same answer.
    """
    harmless = np.asarray(frame["scenario"], dtype=object) == BENIGN
    harmful = make_grid(frame[~harmless], arms, [*judges])
    present = {
        name: [each for each in harmful.scenarios if each in members] for name, members in groups.items()
    }
    return Answers(
        frame=frame,
        arms=arms,
        judges=judges,
        groups={name: members for name, members in present.items() if members} | {ALL: [*harmful.scenarios]},
        thresholds=thresholds,
        harmful=harmful,
        harmless=make_grid(frame[harmless], arms, []),
    )


def _statuses(frame: pd.DataFrame, judge: str) -> Small:
    values = pd.Series(np.asarray(frame[f"status:{judge}"], dtype=object))
    codes = values.map({str(status): place for place, status in enumerate(STATUSES)})
    if codes.isna().any():
        raise ValueError(f"{judge}: a row has the unknown status {values[codes.isna()].iloc[0]!r}")
    return np.asarray(codes, dtype=np.int8)


def _unsafe(codes: Small) -> Small:
    harmful, safe = (codes == STATUSES.index(status) for status in JUDGED)
    return np.where(harmful, 1, np.where(safe, 0, -1)).astype(np.int8)


def _codes(values: "pd.Series[Any]", known: Sequence[str]) -> tuple[list[str], Ints]:
    """The names that occur, known ones first, and the place of each value among them."""
    found, names = pd.factorize(np.asarray(values, dtype=object), sort=True)
    order = [name for name in known if name in set(names)] + [name for name in names if name not in known]
    place = np.array([order.index(name) for name in names], dtype=np.int64)
    return [str(name) for name in order], place[found] if len(place) else found.astype(np.int64)
