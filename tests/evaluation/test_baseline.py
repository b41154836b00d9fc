import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

from mllm_protector.errors import InputError
from mllm_protector.evaluation import baseline
from mllm_protector.evaluation.baseline import cross_validate, teach
from mllm_protector.records import LabelledAnswer

WORDS = ("bread", "flour", "garden", "window", "river", "paper", "music", "stone")


def made_up(queries: int, *, seed: int = 0, hint: float = 1.0) -> list[LabelledAnswer]:
    """Two answers to each query; harmful ones say "forbidden", as far as there is a hint at all."""
    dice = random.Random(seed)
    records = []
    for number in range(queries):
        for harmful in (False, True):
            words = dice.choices(WORDS, k=6)
            if dice.random() < hint:
                words.append("forbidden" if harmful else "sorry")
            records.append(
                LabelledAnswer(query=f"question {number}", answer=" ".join(words), harmful=harmful)
            )
    return records


def auroc(records: Sequence[LabelledAnswer], scores: Any) -> float:
    return float(roc_auc_score([record.harmful for record in records], scores))


def test_the_baseline_learns_what_words_say() -> None:
    held_out = made_up(20, seed=9)
    assert auroc(held_out, teach(made_up(40)).scores(held_out)) == 1.0


def test_the_baseline_looks_at_no_label_and_no_other_answer_of_what_it_scores() -> None:
    train, held_out = made_up(30), made_up(10, seed=9)
    turned = [replace(each, harmful=not each.harmful) for each in held_out]
    assert teach(train).scores(held_out) == teach(train).scores(turned)
    assert teach(train).scores(held_out)[:1] == teach(train).scores(held_out[:1])


def test_cross_validated_scores_are_scikit_learns_with_all_answers_to_a_query_in_one_fold() -> None:
    records = made_up(30, hint=0.6)
    found = cross_validate(records)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    expected = cross_val_predict(
        found.variant.pipeline(),
        found.variant.texts(records),
        [record.harmful for record in records],
        groups=[record.query for record in records],
        cv=folds,
        method="predict_proba",
    )
    assert found.scores == pytest.approx(expected[:, 1])
    assert found.aurocs[str(found.variant)] == max(found.aurocs.values()) == auroc(records, found.scores)


def test_without_a_hint_cross_validated_scores_are_chance_though_words_repeat() -> None:
    # All answers to a query have one label and share a name: who has seen the query knows the answer.
    names = [hashlib.sha256(bytes([number])).hexdigest() for number in range(60)]
    records = [
        LabelledAnswer(query=name, answer=f"{name} {WORDS[copy]}", harmful=number % 2 == 0)
        for number, name in enumerate(names)
        for copy in range(4)
    ]
    assert auroc(records, teach(records).scores(records)) > 0.99
    assert auroc(records, cross_validate(records).scores) < 0.7


def test_of_many_answers_only_words_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "characters" in str(cross_validate(made_up(30)).variant)
    monkeypatch.setattr(baseline, "CHARACTERS_UP_TO", 10)
    assert "characters" not in str(cross_validate(made_up(30)).variant)


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (made_up(1), "too few"),
        ([record for record in made_up(9) if not record.harmful], "to 0 and|to 0 "),
        (
            [LabelledAnswer(query="?", answer="!" * (n + 1), harmful=n % 2 == 0) for n in range(8)],
            "too few",
        ),
        (
            [LabelledAnswer(query="?" * n, answer="!", harmful=n % 2 == 0) for n in range(1, 9)],
            "teach no baseline",
        ),
    ],
)
def test_what_teaches_nothing_is_refused_in_one_line(records: list[LabelledAnswer], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as refused:
        cross_validate(records)
    assert "\n" not in str(refused.value)
