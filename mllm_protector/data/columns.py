"""Sets of labelled answers or pairs that differ only in their columns: a YAML option each, and no code.

``configs/data/`` has the options; docs/data.md shows how to add one.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_protector.data.hub import Parser, Published, Values, labelled, pair, require_columns, texts
from mllm_protector.errors import InputError
from mllm_protector.reading import Unwanted, plain_value, text_field
from mllm_protector.records import AnswerPair, LabelledAnswer
from mllm_protector.rows import Row

Label = str | int | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns(Published[Any]):
    """What both kinds of such sets have in common.

    Attributes:
        licence: as the set states it.
        test_set: made for measuring; a training with it is refused unless ``contaminated=keep``.
    """

    licence: str  # type: ignore[misc]  # of the class in other sets
    test_set: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledColumns(Columns):
    """Answers with a label each.

    Attributes:
        query: the column of the question.
        answer: that of the answer; a row without one is left out.
        label: that of the label; a row without one is left out.
        label_within: a regular expression whose one group is the label; ``None`` if the whole value is.
        harmful: the values of the label that mean harmful, compared without regard to case.
        harmless: those that mean harmless; a row with any other value is a bad row.
        unclear: those that mean neither; such rows are left out.
        withheld: questions that stand for ones which the set does not show; such rows are left out.
        scenario: the column of the kind of harm, or of what is asked; ``None`` for none.
        dialogue: how one column (``query`` and ``answer`` name the same one) holds both: a regular expression
            with the groups ``query`` and ``answer``; ``None`` if each has a column.
    """

    query: str
    answer: str
    label: str
    harmful: Sequence[Label]
    harmless: Sequence[Label]
    unclear: Sequence[Label] = ()
    withheld: Sequence[str] = ()
    label_within: str | None = None
    scenario: str | None = None
    dialogue: str | None = None

    def __post_init__(self) -> None:
        """Check the labels and the regular expressions."""
        kinds = [plain_value(value) for value in (*self.harmful, *self.harmless, *self.unclear)]
        if twice := sorted({value for value in kinds if kinds.count(value) > 1}):
            raise InputError(f"harmful, harmless, unclear: the label {twice[0]!r} stands there twice")
        _require_groups("dialogue", self.dialogue, ["answer", "query"])
        _require_groups("label_within", self.label_within, [])

    def parser(self, head: Sequence[Values], source: str) -> Parser[LabelledAnswer]:
        """``parse``, if the first rows have the columns."""
        require_columns(head, source, (self.query, self.answer, self.label))
        return self.parse

    def parse(self, row: Values) -> LabelledAnswer:
        """A row as a labelled answer."""
        given = row.get(self.label)
        if given is None or given == "":
            raise Unwanted("no label")
        if row.get(self.answer) is None:
            raise Unwanted("no answer")
        if not isinstance(given, str | int | float):
            raise ValueError(f"field '{self.label}' must be a label, not {type(given).__name__}")
        if self.label_within is not None:
            found = re.search(self.label_within, str(given))
            if found is None:
                raise ValueError(f"field '{self.label}' has no label as `label_within` describes it")
            given = found[1]
        label, kinds = plain_value(given), self._kinds()
        if label not in kinds:
            known = ", ".join(map(repr, sorted(kinds)))
            raise ValueError(f"field '{self.label}' must be one of {known}, not {label!r:.40}")
        harmful = kinds[label]
        if harmful is None:
            raise Unwanted("unclear label")
        query, answer = texts(row, self.query, self.answer) if self.dialogue is None else self._turns(row)
        if query in self.withheld:
            raise Unwanted("withheld question")
        kind = row.get(self.scenario) if self.scenario else None
        return labelled(query, answer, harmful=harmful, scenario=str(kind) if kind else None)

    def _turns(self, row: Values) -> list[str]:
        found = re.match(self.dialogue or "", text_field(row, self.query))
        if found is None:
            raise ValueError(f"field '{self.query}' is not a dialogue as `dialogue` describes it")
        return [found["query"], found["answer"]]

    def _kinds(self) -> dict[str, bool | None]:
        of = {True: self.harmful, False: self.harmless, None: self.unclear}
        return {plain_value(value): kind for kind, values in of.items() for value in values}


@dataclass(frozen=True, slots=True, kw_only=True)
class PairColumns(Columns):
    """A question with a better and a worse answer in each row, or with lists of both, paired in their order.

    Attributes:
        query: the column of the question.
        accepted: that of the better answer, or of the better answers.
        rejected: that of the worse answer, or of the worse answers.
        accepted_harmful: the harm label of all accepted answers.
        rejected_harmful: that of all rejected answers.
    """

    query: str
    accepted: str
    rejected: str
    accepted_harmful: bool
    rejected_harmful: bool

    def parser(self, head: Sequence[Values], source: str) -> Parser[AnswerPair]:
        """``parse``, if the first rows have the columns."""
        require_columns(head, source, (self.query, self.accepted, self.rejected))
        return self.parse

    def unfolded(self, row: Row) -> Iterator[Row]:
        """A row for each pair of a row with lists of answers; lists of two lengths make a bad row."""
        value = row.value or {}
        better, worse = value.get(self.accepted), value.get(self.rejected)
        if not (isinstance(better, list) and isinstance(worse, list)):
            yield row
        elif len(better) != len(worse):
            yield Row(
                row.line, row.raw, problem=f"has {len(better)} accepted and {len(worse)} rejected answers"
            )
        else:
            for one, other in zip(better, worse, strict=True):
                yield Row(row.line, row.raw, value={**value, self.accepted: one, self.rejected: other})

    def parse(self, row: Values) -> AnswerPair:
        """A row as a pair."""
        return pair(
            *texts(row, self.query, self.accepted, self.rejected),
            accepted_harmful=self.accepted_harmful,
            rejected_harmful=self.rejected_harmful,
        )


def _require_groups(key: str, expression: str | None, names: list[str]) -> None:
    if expression is None:
        return
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise InputError(f"{key}={expression}: not a regular expression ({error})") from None
    if sorted(compiled.groupindex) != names or compiled.groups != (len(names) or 1):
        wanted = f"the groups {' and '.join(names)}" if names else "one group"
        raise InputError(f"{key}={expression}: must have {wanted}")
