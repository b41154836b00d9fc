from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.data.mixture import Mixture
from mllm_protector.data.sources import Labelled, Pairs, Toy
from mllm_protector.data.splits import Splits
from mllm_protector.errors import InputError
from tests.data.builders import OPTIONS, texts, write_rows


def pairs(path: Path, queries: list[str], text: str = "a", **options: Any) -> Pairs:
    rows = [{"query": query, "accepted": f"{text} {query}", "rejected": f"no {query}"} for query in queries]
    return Pairs(path=write_rows(path, rows), **OPTIONS | {"validation_fraction": 0.2} | options)


def mixture(sources: dict[str, Any], duplicates: Any = "near", seed: int = 0, **weights: Any) -> Splits[Any]:
    return Mixture(sources=sources, weights=weights, duplicates=duplicates, seed=seed).load()


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Pairs]:
    return {
        "first": pairs(tmp_path / "first.jsonl", texts("alpha", 20)),
        "second": pairs(tmp_path / "second.jsonl", texts("beta", 10)),
    }


def adds_up(splits: Splits[Any]) -> None:
    for account in splits.sources:
        assert account.read == account.kept + account.quarantined + sum(account.dropped.values())
        if account.weight == 1:
            assert account.kept == account.train + account.validation
    assert sum(account.train for account in splits.sources) == len(splits.train)
    assert sum(account.validation for account in splits.sources) == len(splits.validation)


def test_a_mixture_is_its_sources_one_after_the_other(two: dict[str, Pairs]) -> None:
    splits = mixture(two)
    apart = [source.load() for source in two.values()]
    assert list(splits.train) == [record for each in apart for record in each.train]
    assert list(splits.validation) == [record for each in apart for record in each.validation]
    assert [account.name for account in splits.sources] == ["first", "second"]
    assert splits.account == "first: read 20 = kept 20; second: read 10 = kept 10"
    adds_up(splits)


def test_a_weight_is_how_often_a_training_record_is_used(two: dict[str, Pairs]) -> None:
    apart = {name: source.load() for name, source in two.items()}
    splits = mixture(two, first=0.5, second=2.5)
    times = Counter(splits.train)
    first, second = (Counter(times[record] for record in each.train) for each in apart.values())
    assert first == {0: 8, 1: 8}
    assert second == {2: 4, 3: 4}
    assert len(splits.validation) == 6
    assert [(account.weight, account.train) for account in splits.sources] == [(0.5, 8), (2.5, 20)]
    adds_up(splits)


@pytest.mark.parametrize(
    ("how", "dropped"),
    [
        ("keep", {}),
        ("exact", {"stands in an earlier source": 2}),
        ("near", {"stands in an earlier source": 2, "nearly stands in an earlier source": 3}),
    ],
)
def test_a_later_source_repeats_nothing_of_an_earlier_one(
    how: Any, dropped: dict[str, int], tmp_path: Path
) -> None:
    first = texts("alpha", 20)
    nearly = [query.replace("word3", "other") for query in first[5:8]]
    sources = {
        "first": pairs(tmp_path / "a.jsonl", first, validation_fraction=0.05),
        "second": pairs(
            tmp_path / "b.jsonl", [*first[:2], *nearly, *texts("beta", 9)], validation_fraction=0.05
        ),
    }
    held = {record.query for source in sources.values() for record in source.load().validation}
    splits = mixture(sources, how)
    found = {k: n for k, n in splits.sources[1].dropped.items() if "validates" not in k}
    assert splits.sources[0].dropped.keys() <= {"its query validates in another source"}
    assert found == dropped
    assert not {record.query for record in splits.train} & held
    adds_up(splits)


def test_no_query_is_learnt_that_another_source_validates_with(tmp_path: Path) -> None:
    queries = texts("alpha", 30)
    sources = {
        "first": pairs(tmp_path / "a.jsonl", queries, "one", seed=0),
        "second": pairs(tmp_path / "b.jsonl", queries, "another way to say", seed=1),
    }
    apart = [source.load() for source in sources.values()]
    held = {record.query for each in apart for record in each.validation}
    assert {record.query for each in apart for record in each.train} & held
    splits = mixture(sources, "exact")
    assert not {record.query for record in splits.train} & held
    assert sum(a.dropped.get("its query validates in another source", 0) for a in splits.sources)
    adds_up(splits)


def test_pairs_and_labelled_answers_mix_with_the_toy_data(tmp_path: Path, two: dict[str, Pairs]) -> None:
    rows = [{"query": f"{query}!", "answer": "yes", "harmful": True} for query in texts("gamma", 9)]
    answers = Labelled(path=write_rows(tmp_path / "answers.jsonl", rows), **OPTIONS)
    splits = mixture({"toy": Toy(), "answers": answers} | two, "exact", toy=0.1)
    assert [len({type(record) for record in part}) for part in (splits.train, splits.validation)] == [2, 2]
    adds_up(splits)


def test_a_mixture_of_nothing_sensible_is_refused(two: dict[str, Pairs]) -> None:
    options: dict[str, Any] = {"sources": two, "weights": {}, "duplicates": "exact", "seed": 0}
    for change, reason in (
        ({"sources": {}}, "sources: there are none"),
        ({"sources": {"inner": Mixture(**options)}}, r"sources\.inner: a mixture cannot be a source"),
        ({"weights": {"frist": 1}}, "weights.frist: there is no such source; there are first, second"),
        ({"weights": {"first": 0}}, "weights.first=0: must be a number above 0"),
        ({"weights": {"first": float("nan")}}, "weights.first=nan: must be a number above 0"),
    ):
        with pytest.raises(InputError, match=reason):
            Mixture(**options | change)
