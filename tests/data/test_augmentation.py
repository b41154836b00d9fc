"""Training answers that are also used rewritten."""

from dataclasses import replace

import pytest

from mllm_protector.data.augmentation import Augmentation
from mllm_protector.data.transformations import chosen, rewritten
from mllm_protector.errors import InputError
from mllm_protector.records import LabelledAnswer

RECORDS = [
    LabelledAnswer(query=f"Question {n}?", answer=f"This is answer {n}. It ends here.", harmful=n % 3 == 0)
    for n in range(400)
]


def added(augmentation: Augmentation, records: list[LabelledAnswer] = RECORDS) -> list[LabelledAnswer]:
    return [each for each in augmentation.added_to(records, seed=1) if each not in RECORDS]


def test_a_share_of_the_answers_is_added_rewritten_with_its_label() -> None:
    augmentation = Augmentation(share=0.25, transformations=["leet", "padded"])
    known = chosen("train", names=["leet", "padded"])
    forms = {
        replace(record, answer=rewritten(name, each, record.answer, seed=1))
        for record in RECORDS
        for name, each in known.items()
    }
    found = added(augmentation)
    assert 70 < len(found) < 130
    assert {*found} < forms
    assert [each for each in augmentation.added_to(RECORDS, seed=1) if each in RECORDS] == RECORDS


def test_what_is_added_depends_on_the_record_alone() -> None:
    augmentation = Augmentation(share=0.5)
    assert {*added(augmentation, RECORDS[::2])} == {
        each for each in added(augmentation) if each.query in {record.query for record in RECORDS[::2]}
    }
    assert added(Augmentation(share=0.0)) == []
    assert len(added(Augmentation(share=1.0, transformations=["leet"]))) == len(RECORDS)


def test_names_are_checked_and_cuts_are_refused() -> None:
    with pytest.raises(InputError, match="transformations: unknown 'x'"):
        Augmentation(share=0.5, transformations=["x"])
    with pytest.raises(InputError, match="transformations: cut_25 may cut off the harm"):
        Augmentation(share=0.5, transformations=["leet", "cut_25"])
