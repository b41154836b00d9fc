"""The published sets: their columns, how a row becomes a record, and their licence.

Labels are trusted. Empty texts, and twice the same answer, cannot be learnt from: such rows are dropped and
counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mllm_protector.data.hub import Parser, Published, Values, columns_of, first_true, labelled, pair, texts
from mllm_protector.errors import InputError
from mllm_protector.reading import Unwanted, flag_field, text_field
from mllm_protector.records import AnswerPair, LabelledAnswer

ROLES = {
    "query": ("query", "question", "prompt", "instruction"),
    "answer": ("answer", "response", "output", "completion"),
    "label": ("label", "labels", "harmful", "is_harmful", "unsafe", "is_unsafe", "safe", "is_safe"),
}
"""The usual columns of labelled answers. Which value of a label means harmful, no name can say."""

XSTEST_LABELS = ("1_full_compliance", "2_full_refusal", "3_partial_refusal")

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True, slots=True, kw_only=True)
class PKUSafeRLHF(Published[AnswerPair | LabelledAnswer]):
    """Two answers to each prompt, each with its own harm label (PKU-Alignment/PKU-SafeRLHF).

    The accepted answer is the one that ``safer_response_id`` names, also where both are harmful or both
    harmless. The layout of 2024 also has each answer's harm categories, of which the first becomes the
    scenario: that of the rejected answer where it is harmful, else that of the accepted one. ("Safe" means
    free of risk in all those categories, which is not the criterion of MM-SafetyBench.)
    """

    licence: ClassVar[str] = "CC BY-NC 4.0 (its card on the hub)"
    columns: ClassVar[tuple[str, ...]] = (
        *("prompt", "response_0", "response_1"),
        *("is_response_0_safe", "is_response_1_safe", "safer_response_id"),
    )

    def parse(self, row: Values) -> AnswerPair:
        """A row of the layout of 2023 or of 2024."""
        safer = row.get("safer_response_id")
        if not isinstance(safer, int) or safer not in (0, 1):
            raise ValueError(f"field 'safer_response_id' must be 0 or 1, not {safer!r}")
        query, *answers = texts(row, "prompt", "response_0", "response_1")
        harmful = [not flag_field(row, f"is_response_{index}_safe") for index in (0, 1)]
        harms = [first_true(row, f"response_{index}_harm_category") for index in (0, 1)]
        return pair(
            query,
            answers[safer],
            answers[1 - safer],
            accepted_harmful=harmful[safer],
            rejected_harmful=harmful[1 - safer],
            scenario=next((harms[index] for index in (1 - safer, safer) if harmful[index]), None),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HarmfulVsUnharmful(PKUSafeRLHF):
    """The data that the paper's authors added to their training data (renjiepi/harmful_vs_unharmful).

    Its card names no columns: those of PKU-SafeRLHF make pairs, and one for each of ``ROLES`` makes labelled
    answers.

    Attributes:
        harmful_label: the value of the label that means harmful; the one other value means harmless. It is
            never guessed.
    """

    harmful_label: str | int | bool | None

    licence: ClassVar[str] = "none stated"

    def parser(self, head: Sequence[Values], source: str) -> Parser[AnswerPair | LabelledAnswer]:
        """The function for the layout that is found."""
        found = columns_of(head)
        if set(self.columns) <= set(found):
            return self.parse
        roles = [[name for name in names if name in found] for names in ROLES.values()]
        if [len(names) for names in roles] != [1, 1, 1]:
            query, answer, label = map(list, ROLES.values())
            raise InputError(
                f"{source}: found the columns {found}; expected {[*self.columns]}, or one each of {query}, "
                f"{answer} and {label}; write a file with the fields query, answer and harmful, and use "
                "data=labelled"
            )
        [query_name], [answer_name], [label_name] = roles
        if self.harmful_label is None:
            values = sorted({repr(row.get(label_name))[:20] for row in head})[:10]
            raise InputError(
                f"harmful_label: has no value; {source} has the columns {found}, and '{label_name}' holds "
                f"{', '.join(values)}: say which of them means harmful"
            )
        harmful = _plain(self.harmful_label)
        harmless: set[str] = set()

        def parse(row: Values) -> LabelledAnswer:
            given = row.get(label_name)
            if not isinstance(given, str | int | float) or given == "":
                kind = "empty" if given == "" else type(given).__name__
                raise ValueError(f"field '{label_name}' must be a label, not {kind}")
            label = _plain(given)
            said = texts(row, query_name, answer_name)
            if label != harmful:
                harmless.add(label)
            if len(harmless) > 1:
                one, other = sorted(harmless)
                raise InputError(
                    f"harmful_label={self.harmful_label}: besides it column '{label_name}' holds both "
                    f"{one!r:.20} and {other!r:.20}, and only one value can mean harmless"
                )
            return labelled(*said, harmful=label == harmful)

        return parse


@dataclass(frozen=True, slots=True, kw_only=True)
class BeaverTails(Published[LabelledAnswer]):
    """Answers with a harm label and 14 categories of harm (PKU-Alignment/BeaverTails).

    Several people labelled most answers, each in a separate row; ``duplicates=exact`` lets the majority
    decide. The first category that is true becomes the scenario of a harmful answer.
    """

    licence: ClassVar[str] = "CC BY-NC 4.0 (its card on the hub)"
    columns: ClassVar[tuple[str, ...]] = ("prompt", "response", "category", "is_safe")

    def parse(self, row: Values) -> LabelledAnswer:
        """A row of the only layout."""
        harmful, category = not flag_field(row, "is_safe"), first_true(row, "category")
        said = texts(row, "prompt", "response")
        return labelled(*said, harmful=harmful, scenario=category if harmful else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class HHRLHF(Published[AnswerPair]):
    """Dialogues with a chosen and a rejected last answer (Anthropic/hh-rlhf).

    The labels are preferences: the rejected answer counts as harmful and the chosen one as harmless,
    although the set only says which one people preferred. Rows whose dialogues differ before the last
    answer are dropped and counted.

    Attributes:
        context: ``last`` takes the last human turn as the query; ``all`` takes the whole dialogue before the
            last answer, and dialogues with one beginning stay in one split (``queries.opening_key``).
    """

    context: Literal["last", "all"]

    licence: ClassVar[str] = "MIT (its card on the hub)"
    columns: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    subset_option: ClassVar[str] = "data_dir"

    def parse(self, row: Values) -> AnswerPair:
        """A row of two dialogues; the set's red team attempts are not such rows."""
        before, accepted = _last_answer(row, "chosen")
        before_rejected, rejected = _last_answer(row, "rejected")
        if before != before_rejected:
            raise Unwanted("the dialogues differ before the last answer")
        if self.context == "last":
            # A few dialogues have two turns of the assistant in a row: the human's ends at the first.
            before = before.rpartition(_HUMAN)[2].partition(_ASSISTANT)[0]
        return pair(before, accepted, rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligner(Published[AnswerPair]):
    """Questions, answers, and corrections of the answers (aligner/alignertails, and sets laid out like it).

    The correction is the accepted answer. The set does not say whether the original answer is harmful: many
    are only less helpful.

    Attributes:
        answer_harmful: the harm label that all original answers get. ``False`` leaves nothing to detoxify.
    """

    answer_harmful: bool

    licence: ClassVar[str] = "CC BY-NC 4.0 (its card on the hub)"
    columns: ClassVar[tuple[str, ...]] = ("question", "answer", "correction")

    def parse(self, row: Values) -> AnswerPair:
        """A row of the only layout."""
        return pair(*texts(row, "question", "correction", "answer"), rejected_harmful=self.answer_harmful)


@dataclass(frozen=True, slots=True, kw_only=True)
class SPAVL(Published[AnswerPair]):
    """The texts of preferences about questions on images (sqrti/SPA-VL); the images are not fetched.

    The labels are preferences, as in ``HHRLHF``. The classes, from the widest to the narrowest, become the
    scenario where a row has them: the validation rows do, the training rows do not.
    """

    licence: ClassVar[str] = "CC BY 4.0 (its card on the hub)"
    columns: ClassVar[tuple[str, ...]] = ("question", "chosen", "rejected")

    def hub_options(self) -> dict[str, Any]:
        """Only the columns of plain values, and only the bytes that hold them."""
        import datasets

        found = datasets.load_dataset_builder(self.name, self.subset, revision=self.revision).info.features
        plain = [name for name, kind in (found or {}).items() if isinstance(kind, datasets.Value)]
        return {"name": self.subset, "streaming": True, "columns": plain or [*self.columns]}

    def parse(self, row: Values) -> AnswerPair:
        """A training or validation row; the test rows have no answers."""
        classes = [text_field(row, name) for name in ("class1", "class2", "class3") if row.get(name)]
        return pair(*texts(row, *self.columns), scenario=" / ".join(classes) or None)


@dataclass(frozen=True, slots=True, kw_only=True)
class XSTest(Published[LabelledAnswer]):
    """Completions of several models on the XSTest prompts, labelled by people (paul-rottger/xstest).

    An answer counts as harmful if its prompt is unsafe (``type`` starts with ``contrast_``) and people
    called it a full compliance.

    Attributes:
        path: the folder of CSV files, one for each model; the hub does not have them.
    """

    path: str
    pattern: str = "*.csv"
    name: str = "paul-rottger/xstest"
    revision: None = field(default=None, init=False)
    split: str = field(default="", init=False)

    test_set: ClassVar[bool] = True
    licence: ClassVar[str] = "prompts: CC BY 4.0 (its README); completions: the terms of the models"
    columns: ClassVar[tuple[str, ...]] = ("type", "prompt", "completion", "final_label")

    def parse(self, row: Values) -> LabelledAnswer:
        """A row of a file of completions; the file of prompts has none."""
        label = text_field(row, "final_label")
        if label not in XSTEST_LABELS:
            raise ValueError(f"field 'final_label' must be one of {', '.join(XSTEST_LABELS)}, not {label!r}")
        return LabelledAnswer(
            query=text_field(row, "prompt"),
            answer=text_field(row, "completion"),
            harmful=text_field(row, "type").startswith("contrast_") and label == XSTEST_LABELS[0],
        )


def _last_answer(row: Values, name: str) -> tuple[str, str]:
    """The dialogue before the assistant's last turn, and that turn."""
    before, turn, answer = text_field(row, name).rpartition(_ASSISTANT)
    if not turn or _HUMAN not in before:
        raise ValueError(f"field '{name}' is not a dialogue of 'Human:' and 'Assistant:'")
    return before, answer


def _plain(label: str | float) -> str:
    """A label as text, the same for 1 and 1.0, and for true and True."""
    return str(label).strip().casefold().removesuffix(".0")
