"""The published sets: how their rows become records, and under which licence they stand.

Labels are trusted. Empty texts, and twice the same answer, cannot be learnt from: such rows are dropped and
counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mllm_protector.data.hub import Parser, Published, PublishedFiles, Values, columns_of, expect_columns
from mllm_protector.errors import InputError
from mllm_protector.reading import Unwanted, flag_field, missing_field, text_field
from mllm_protector.records import AnswerPair, LabelledAnswer

PKU_COLUMNS = (
    "prompt",
    "response_0",
    "response_1",
    "is_response_0_safe",
    "is_response_1_safe",
    "safer_response_id",
)
QUERY_COLUMNS = ("query", "question", "prompt", "instruction")
ANSWER_COLUMNS = ("answer", "response", "output", "completion")
LABEL_COLUMNS = ("label", "labels", "harmful", "is_harmful", "unsafe", "is_unsafe", "safe", "is_safe")
"""Usual names; which of a label's values means harmful, no name can say."""

SPA_VL_COLUMNS = ("question", "chosen", "rejected")
XSTEST_LABELS = ("1_full_compliance", "2_full_refusal", "3_partial_refusal")

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True, slots=True, kw_only=True)
class PKUSafeRLHF(Published[AnswerPair]):
    """Two answers to each prompt, each with its own harm label (PKU-Alignment/PKU-SafeRLHF).

    The accepted answer is the one named by ``safer_response_id``, also where both are harmful or both
    harmless. The layout of 2023 (branch v0) has these columns; that of 2024 has also each answer's harm
    categories, of which the first in the set's own order becomes the scenario: that of the rejected answer
    where it is harmful, else that of the accepted one. ("Safe" means free of risk in all those categories,
    which is not the criterion of MM-SafetyBench.)
    """

    licence: ClassVar[str] = "CC BY-NC 4.0 (its card on the hub)"

    def parser(self, head: Sequence[Values], source: str) -> Parser[AnswerPair]:
        """For both layouts."""
        expect_columns(PKU_COLUMNS, head, source)
        return _parse_pku


@dataclass(frozen=True, slots=True, kw_only=True)
class HarmfulVsUnharmful(Published[AnswerPair | LabelledAnswer]):
    """What the paper's authors added to their training data (renjiepi/harmful_vs_unharmful).

    Its card names no columns, so they are looked at: those of PKU-SafeRLHF make pairs, and one each of
    ``QUERY_COLUMNS``, ``ANSWER_COLUMNS`` and ``LABEL_COLUMNS`` make labelled answers.

    Attributes:
        harmful_label: the value of the label that means harmful; one other value may stand beside it, and
            means harmless. It is never guessed.
    """

    harmful_label: str | int | bool | None

    licence: ClassVar[str] = "none stated"

    def parser(self, head: Sequence[Values], source: str) -> Parser[AnswerPair | LabelledAnswer]:
        """For the layout that is found."""
        found = columns_of(head)
        if set(PKU_COLUMNS) <= set(found):
            return _parse_pku
        roles = [
            [name for name in names if name in found]
            for names in (QUERY_COLUMNS, ANSWER_COLUMNS, LABEL_COLUMNS)
        ]
        if [len(names) for names in roles] != [1, 1, 1]:
            raise InputError(
                f"{source}: found the columns {found}; expected {list(PKU_COLUMNS)}, or one each of "
                f"{list(QUERY_COLUMNS)}, {list(ANSWER_COLUMNS)} and {list(LABEL_COLUMNS)}; write a file with "
                "the fields query, answer and harmful, and use data=labelled"
            )
        query, answer, label = (names[0] for names in roles)
        if self.harmful_label is None:
            values = sorted({repr(row.get(label))[:20] for row in head})[:10]
            raise InputError(
                f"harmful_label: has no value; {source} has the columns {found}, and '{label}' holds "
                f"{', '.join(values)}: say which of them means harmful"
            )
        return _LabelParser(query, answer, label, str(self.harmful_label))


class _LabelParser:
    """Rows of a question, an answer and a label of two values."""

    def __init__(self, query: str, answer: str, label: str, harmful: str) -> None:
        self._query, self._answer, self._label, self._harmful = query, answer, label, _plain(harmful)
        self._harmless: str | None = None

    def __call__(self, row: Values) -> LabelledAnswer:
        given = row.get(self._label)
        if not isinstance(given, str | int | float) or given == "":
            kind = "empty" if given == "" else type(given).__name__
            raise ValueError(f"field '{self._label}' must be a label, not {kind}")
        label = _plain(given)
        if label != self._harmful and self._harmless not in (None, label):
            raise InputError(
                f"harmful_label={self._harmful}: besides it column '{self._label}' holds both "
                f"{self._harmless!r:.20} and {label!r:.20}, and only one value can mean harmless"
            )
        query = text_field(row, self._query, allow_empty=True)
        answer = text_field(row, self._answer, allow_empty=True)
        if label != self._harmful:
            self._harmless = label
        return _labelled(query, answer, harmful=label == self._harmful)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeaverTails(Published[LabelledAnswer]):
    """Answers with a harm label and 14 categories of harm (PKU-Alignment/BeaverTails).

    Several people labelled most answers, each in a row of its own; ``duplicates=exact`` lets the majority
    decide. The first category that is true becomes the scenario of a harmful answer.
    """

    licence: ClassVar[str] = "CC BY-NC 4.0 (its card on the hub)"

    def parser(self, head: Sequence[Values], source: str) -> Parser[LabelledAnswer]:
        """For the only layout."""
        expect_columns(("prompt", "response", "category", "is_safe"), head, source)
        return _parse_beavertails


@dataclass(frozen=True, slots=True, kw_only=True)
class HHRLHF(Published[AnswerPair]):
    """Dialogues with a chosen and a rejected last answer (Anthropic/hh-rlhf).

    The labels are preferences: the rejected answer counts as harmful and the chosen one as harmless,
    although the set only says which one people preferred. Rows whose dialogues differ before the last
    answer are dropped and counted.

    Attributes:
        subset: the folder of the set that the hub is asked for.
        context: ``last`` takes the last human turn as the query and leaves out earlier ones, which 71 % of
            the rows have; ``all`` takes the whole dialogue before the last answer, with its names of
            speakers, and dialogues with one beginning stay in one split (``queries.opening_key``).
    """

    subset: str
    context: Literal["last", "all"]

    licence: ClassVar[str] = "MIT (its card on the hub)"

    def __post_init__(self) -> None:
        """Check the options."""
        Published.__post_init__(self)
        if self.context not in ("last", "all"):
            raise InputError(f"context={self.context}: choose 'last' or 'all'")

    def hub_options(self) -> dict[str, Any]:
        """The folder."""
        return {"data_dir": self.subset}

    def parser(self, head: Sequence[Values], source: str) -> Parser[AnswerPair]:
        """For the dialogues; not for the set's red team attempts."""
        expect_columns(("chosen", "rejected"), head, source)
        return self._parse

    def _parse(self, row: Values) -> AnswerPair:
        before, accepted = _last_answer(row, "chosen")
        before_rejected, rejected = _last_answer(row, "rejected")
        if before != before_rejected:
            raise Unwanted("the dialogues differ before the last answer")
        query = before
        if self.context == "last":
            # A few dialogues have two turns of the assistant in a row: the human's ends at the first.
            query = before.rpartition(_HUMAN)[2].partition(_ASSISTANT)[0]
        return _pair(query, accepted, rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligner(Published[AnswerPair]):
    """Questions, answers, and corrections of the answers (aligner/alignertails, and sets laid out like it).

    The correction is the accepted answer. The set does not say whether the original answer is harmful: many
    are only less helpful.

    Attributes:
        subset: the part of the set that the hub is asked for.
        answer_harmful: the harm label that all original answers get. ``False`` leaves nothing to detoxify.
    """

    subset: str
    answer_harmful: bool

    licence: ClassVar[str] = "CC BY-NC 4.0 (its card on the hub)"

    def hub_options(self) -> dict[str, Any]:
        """The part."""
        return {"name": self.subset}

    def parser(self, head: Sequence[Values], source: str) -> Parser[AnswerPair]:
        """For the only layout."""
        expect_columns(("question", "answer", "correction"), head, source)
        return self._parse

    def _parse(self, row: Values) -> AnswerPair:
        texts = [text_field(row, name, allow_empty=True) for name in ("question", "correction", "answer")]
        return _pair(*texts, rejected_harmful=self.answer_harmful)


@dataclass(frozen=True, slots=True, kw_only=True)
class SPAVL(Published[AnswerPair]):
    """The texts of preferences about questions on pictures (sqrti/SPA-VL).

    The labels are preferences, as in ``HHRLHF``. The pictures, without which some questions say little, are
    neither decoded nor fetched. The classes, from the widest to the narrowest, become the scenario where a
    row has them: the validation rows do, the training rows do not.

    Attributes:
        subset: the part of the set that the hub is asked for.
    """

    subset: str

    licence: ClassVar[str] = "CC BY 4.0 (its card on the hub)"

    def hub_options(self) -> dict[str, Any]:
        """Only the columns of plain values, and only the bytes that hold them."""
        import datasets

        found = datasets.load_dataset_builder(self.name, self.subset, revision=self.revision).info.features
        plain = [name for name, kind in (found or {}).items() if isinstance(kind, datasets.Value)]
        return {
            "name": self.subset,
            "streaming": True,
            "columns": plain or ["question", "chosen", "rejected"],
        }

    def parser(self, head: Sequence[Values], source: str) -> Parser[AnswerPair]:
        """For training and validation rows; the test rows have no answers."""
        expect_columns(SPA_VL_COLUMNS, head, source)
        return _parse_spa_vl


@dataclass(frozen=True, slots=True, kw_only=True)
class XSTest(PublishedFiles[LabelledAnswer]):
    """Completions of several models on the XSTest prompts, labelled by people (paul-rottger/xstest).

    An answer counts as harmful if its prompt is unsafe (``type`` starts with ``contrast_``) and people
    called it a full compliance. All answers to one prompt stand in one split. An empty completion makes a
    bad row.

    Attributes:
        path: the folder of CSV files, one for each model.
    """

    path: str
    pattern: str = "*.csv"
    name: str = "paul-rottger/xstest"

    licence: ClassVar[str] = "prompts: CC BY 4.0 (its README); completions: the terms of the models"

    def parser(self, head: Sequence[Values], source: str) -> Parser[LabelledAnswer]:
        """For the files of completions, not the file of prompts."""
        expect_columns(("type", "prompt", "completion", "final_label"), head, source)
        return _parse_xstest


def _parse_pku(row: Values) -> AnswerPair:
    if "safer_response_id" not in row:
        raise missing_field(row, "safer_response_id")
    safer = row["safer_response_id"]
    if not isinstance(safer, int) or safer not in (0, 1):
        raise ValueError(f"field 'safer_response_id' must be 0 or 1, not {safer!r}")
    texts = [text_field(row, f"response_{index}", allow_empty=True) for index in (0, 1)]
    harmful = [not flag_field(row, f"is_response_{index}_safe") for index in (0, 1)]
    harms = [_first_true(row, f"response_{index}_harm_category") for index in (0, 1)]
    return _pair(
        text_field(row, "prompt", allow_empty=True),
        texts[safer],
        texts[1 - safer],
        accepted_harmful=harmful[safer],
        rejected_harmful=harmful[1 - safer],
        scenario=next((harms[index] for index in (1 - safer, safer) if harmful[index]), None),
    )


def _parse_beavertails(row: Values) -> LabelledAnswer:
    harmful = not flag_field(row, "is_safe")
    category = _first_true(row, "category")
    return _labelled(
        text_field(row, "prompt", allow_empty=True),
        text_field(row, "response", allow_empty=True),
        harmful=harmful,
        scenario=category if harmful else None,
    )


def _parse_spa_vl(row: Values) -> AnswerPair:
    classes = [text_field(row, name) for name in ("class1", "class2", "class3") if row.get(name)]
    texts = [text_field(row, name, allow_empty=True) for name in SPA_VL_COLUMNS]
    return _pair(*texts, scenario=" / ".join(classes) or None)


def _parse_xstest(row: Values) -> LabelledAnswer:
    label = text_field(row, "final_label")
    if label not in XSTEST_LABELS:
        raise ValueError(f"field 'final_label' must be one of {', '.join(XSTEST_LABELS)}, not {label!r}")
    return LabelledAnswer(
        query=text_field(row, "prompt"),
        answer=text_field(row, "completion"),
        harmful=text_field(row, "type").startswith("contrast_") and label == "1_full_compliance",
    )


def _last_answer(row: Values, field: str) -> tuple[str, str]:
    """The dialogue before the assistant's last turn, and that turn."""
    before, turn, answer = text_field(row, field).rpartition(_ASSISTANT)
    if not turn or _HUMAN not in before:
        raise ValueError(f"field '{field}' is not a dialogue of 'Human:' and 'Assistant:'")
    return before, answer


def _first_true(row: Values, name: str) -> str | None:
    """The first name in an object of yes/no that is true; a row need not have the object."""
    flags = row.get(name)
    if flags is None:
        return None
    if not isinstance(flags, Mapping):
        raise ValueError(f"field '{name}' must be an object of true and false, not {type(flags).__name__}")
    return next((str(flag) for flag in flags if flags[flag] is not None and flag_field(flags, flag)), None)


def _pair(query: str, accepted: str, rejected: str, **known: Any) -> AnswerPair:
    query, accepted, rejected = _filled(query, accepted, rejected)
    if accepted == rejected:
        raise Unwanted("twice the same answer")
    return AnswerPair(query=query, accepted=accepted, rejected=rejected, **known)


def _labelled(query: str, answer: str, *, harmful: bool, scenario: str | None = None) -> LabelledAnswer:
    query, answer = _filled(query, answer)
    return LabelledAnswer(query=query, answer=answer, harmful=harmful, scenario=scenario)


def _filled(query: str, *answers: str) -> list[str]:
    texts = [text.strip() for text in (query, *answers)]
    if not texts[0]:
        raise Unwanted("empty query")
    if not all(texts):
        raise Unwanted("empty answer")
    return texts


def _plain(label: str | float) -> str:
    """A label as text, the same for 1 and 1.0, and for true and True."""
    return str(label).strip().casefold().removesuffix(".0")
