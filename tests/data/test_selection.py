import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_protector.data import duplicates, selection
from mllm_protector.data.duplicates import distinct, label_of, text_of
from mllm_protector.data.queries import digest
from mllm_protector.data.sources import Labelled, Pairs
from mllm_protector.data.splits import Splits, held_out
from mllm_protector.data.table import cache_folder
from mllm_protector.errors import InputError
from mllm_protector.reading import Account
from mllm_protector.records import AnswerPair, LabelledAnswer

OPTIONS: dict[str, Any] = {
    "validation_fraction": 0.25,
    "seed": 0,
    "limit": None,
    "duplicates": "exact",
    "quarantine": None,
}


def answer(query: str, text: str = "a", harmful: bool = False) -> LabelledAnswer:
    return LabelledAnswer(query=query, answer=text, harmful=harmful)


def write(path: Path, records: list[LabelledAnswer]) -> str:
    rows = [{"query": r.query, "answer": r.answer, "harmful": r.harmful} for r in records]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def everything(splits: Splits[Any]) -> list[Any]:
    return [*splits.train, *splits.validation]


# Which of equal texts is kept


def kept_by_hand(records: list[LabelledAnswer]) -> tuple[list[int], Counter[str]]:
    places = defaultdict(list)
    for place, record in enumerate(records):
        places[text_of(record)].append(place)
    kept, dropped = [], Counter[str]()
    for same in places.values():
        votes = Counter(records[place].harmful for place in same).most_common()
        if len(votes) > 1 and votes[0][1] == votes[1][1]:
            dropped["contradictory labels"] += len(same)
            continue
        label, count = votes[0]
        kept.append(next(place for place in same if records[place].harmful == label))
        dropped["exact duplicate"] += count - 1
        dropped["outvoted label"] += len(same) - count
    return sorted(kept), +dropped


@given(st.lists(st.builds(answer, st.sampled_from("abc"), st.sampled_from("xy"), st.booleans()), max_size=40))
def test_the_first_of_equal_rows_stays_and_the_majority_names_the_label(
    records: list[LabelledAnswer],
) -> None:
    dropped = Counter[str]()
    texts = np.array([digest(0, text_of(record)) for record in records], np.uint64)
    labels = np.array([label_of(record) for record in records], np.uint8)
    places = distinct(texts, labels, dropped)
    assert (places.tolist(), dropped) == kept_by_hand(records)
    assert len(places) + dropped.total() == len(records)


def test_the_four_labels_of_a_pair_are_told_apart() -> None:
    pairs = [
        AnswerPair(query="q", accepted="a", rejected="r", accepted_harmful=one, rejected_harmful=other)
        for one in (False, True)
        for other in (False, True)
    ]
    assert sorted(map(label_of, pairs)) == [0, 1, 2, 3]


# From rows to splits


def test_rows_that_say_the_same_are_kept_or_dropped_as_asked(tmp_path: Path) -> None:
    long = "I would rather not say how that is done because somebody might be hurt by it"
    records = [answer(f"first{n} second{n} third{n} fourth{n}", f"fifth{n} sixth{n}") for n in range(8)]
    records += [
        records[0],
        answer("Why is that so?", long),
        answer("WHY is that so", long.replace("hurt", "cut")),
    ]
    path = write(tmp_path / "rows.jsonl", records)
    for how, left, dropped in (
        ("keep", 11, {}),
        ("exact", 10, {"exact duplicate": 1}),
        ("near", 9, {"exact duplicate": 1, "near duplicate": 1}),
    ):
        splits = Labelled(path=path, **OPTIONS | {"duplicates": how}).load()
        [account] = splits.sources
        assert (len(everything(splits)), account.kept, dict(account.dropped)) == (left, left, dropped)


@given(st.data())
def test_read_is_kept_and_quarantined_and_dropped_and_kept_is_both_parts(data: st.DataObject) -> None:
    good = st.builds(answer, st.sampled_from("abcdefgh"), st.sampled_from("xyz"), st.booleans())
    records = data.draw(st.lists(good | st.none(), min_size=1, max_size=30))
    options = OPTIONS | {
        "duplicates": data.draw(st.sampled_from(["keep", "exact"])),
        "limit": data.draw(st.none() | st.integers(2, 10)),
    }
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    rows = [{"query": "only"} if r is None else vars_of(r) for r in records]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        splits = Labelled(path=str(path), **options | {"quarantine": str(folder / "bad.jsonl")}).load()
    except InputError:  # nothing is left, or one query only
        return
    [account] = splits.sources
    assert account.read == len(records) == account.kept + account.quarantined + sum(account.dropped.values())
    assert account.kept == account.train + account.validation
    assert (account.train, account.validation) == (len(splits.train), len(splits.validation))
    assert account.quarantined == records.count(None)
    assert not {r.query for r in splits.train} & {r.query for r in splits.validation}


def vars_of(record: LabelledAnswer) -> dict[str, Any]:
    return {"query": record.query, "answer": record.answer, "harmful": record.harmful}


def test_a_file_is_read_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def counting(self: Labelled, account: Account) -> Iterator[LabelledAnswer]:
        read.append(self.path)
        return records(self, account)

    records = Labelled.records
    monkeypatch.setattr(Labelled, "records", counting)
    rows = [answer(f"q{number}") for number in range(6)]
    path = write(tmp_path / "rows.jsonl", rows)
    first = Labelled(path=path, **OPTIONS).load()
    for options in (OPTIONS, OPTIONS | {"seed": 3}, OPTIONS | {"limit": 4}):
        Labelled(path=path, **options).load()
    assert len(read) == 1
    write(tmp_path / "rows.jsonl", [*rows[:5], answer("q5", harmful=True)])
    changed = Labelled(path=path, **OPTIONS).load()
    assert len(read) == 2
    assert first.fingerprint != changed.fingerprint
    assert sum(record.harmful for record in everything(changed)) == 1


def test_the_quarantine_is_written_again_without_reading_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, [answer(f"q{number}") for number in range(6)])
    path.write_text(path.read_text() + '{"query": "q"}\n')
    for number in range(2):
        bad = tmp_path / f"bad{number}.jsonl"
        Labelled(path=str(path), **OPTIONS | {"quarantine": str(bad)}).load()
        [row] = map(json.loads, bad.read_text().splitlines())
        assert row["line"] == 7


def test_near_copies_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", [answer(f"q{number}") for number in range(6)])
    looked = []
    near = duplicates.near_duplicates

    def counting(*given: Any, **options: Any) -> Any:
        looked.append(given)
        return near(*given, **options)

    monkeypatch.setattr(selection.duplicates, "near_duplicates", counting)
    for seed in range(3):
        Labelled(path=path, **OPTIONS | {"duplicates": "near", "seed": seed}).load()
    assert len(looked) == 1


def test_a_scenario_is_kept_and_makes_no_other_record(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"query": f"q{n}", "accepted": "a", "rejected": "r", "scenario": f"s{n}"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = Pairs(path=str(path), **OPTIONS).load()
    assert sorted(str(pair.scenario) for pair in everything(named)) == ["s0", "s1", "s2", "s3"]
    path.write_text("".join(json.dumps(row | {"scenario": ""}) + "\n" for row in rows))
    nameless = Pairs(path=str(path), **OPTIONS).load()
    assert {pair.scenario for pair in everything(nameless)} == {None}
    assert named.fingerprint == nameless.fingerprint


# The split by query


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 3)), min_size=2).filter(
        lambda rows: len({query for query, _ in rows}) > 1
    ),
    st.floats(0.01, 0.99),
    st.randoms(use_true_random=False),
)
def test_a_split_shares_no_query_and_does_not_depend_on_the_order(
    rows: Any, fraction: float, rng: Any
) -> None:
    records = [answer(query, str(text)) for query, text in rows]
    held = [r for r, out in zip(records, held_out(records, fraction, 0), strict=True) if out]
    assert 0 < len(held) < len(records)
    assert not {r.query for r in held} & {r.query for r in records if r not in held}
    rng.shuffle(records)
    again = [r for r, out in zip(records, held_out(records, fraction, 0), strict=True) if out]
    assert sorted(map(repr, again)) == sorted(map(repr, held))


def test_a_split_is_of_the_wanted_size_and_moves_with_the_seed() -> None:
    records = [answer(f"question {number}") for number in range(1000)]
    parts = [held_out(records, 0.1, seed) for seed in (0, 0, 1)]
    assert [part.sum() for part in parts] == [100, 100, 100]
    assert (parts[0] == parts[1]).all()
    assert (parts[0] != parts[2]).any()


def test_case_and_spacing_do_not_make_another_query() -> None:
    with pytest.raises(InputError, match="at least two"):
        held_out([answer("How  do I\ncook?"), answer("how do i cook? ")], 0.5, seed=0)
