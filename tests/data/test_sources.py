import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_protector.data import duplicates, sources
from mllm_protector.data.sources import Labelled, Toy
from mllm_protector.data.splits import held_out
from mllm_protector.data.table import cache_folder
from mllm_protector.errors import InputError
from mllm_protector.reading import Account
from mllm_protector.records import AnswerPair, LabelledAnswer
from tests.data.builders import OPTIONS, configured, everything, write_rows


def row(query: str, text: str = "a", harmful: Any = False) -> dict[str, Any]:
    return {"query": query, "answer": text, "harmful": harmful}


def answer(query: str, text: str = "a") -> LabelledAnswer:
    return LabelledAnswer(query=query, answer=text, harmful=False)


def some(count: int) -> list[dict[str, Any]]:
    return [row(f"q{number}") for number in range(count)]


# Your own files


def test_pairs_carry_the_usual_labels_unless_told_otherwise(tmp_path: Path) -> None:
    labels = {"accepted_harmful": True, "rejected_harmful": False}
    rows = [
        {"query": "q1", "accepted": "good", "rejected": "bad"},
        {"query": "q2", "accepted": "x", "rejected": "y", **labels},
    ]
    splits = configured("pairs", path=write_rows(tmp_path / "pairs.jsonl", rows)).load()
    first, second = sorted(everything(splits), key=lambda pair: pair.query)
    assert first == AnswerPair(query="q1", accepted="good", rejected="bad")
    assert (second.accepted_harmful, second.rejected_harmful) == (True, False)


def test_an_option_out_of_range_is_refused_at_once() -> None:
    for name, value in (("validation_fraction", 0.0), ("validation_fraction", 1.0), ("limit", 1)):
        with pytest.raises(InputError, match=rf"{name}={value}: must"):
            configured("pairs", path="rows.jsonl", **{name: value})


def test_a_quarantine_that_would_replace_something_else_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*some(3), {"query": "q"}])
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    empty = tmp_path / "empty"
    empty.touch()
    for quarantine, reason in (
        (tmp_path, "cannot hold the bad rows"),
        (tmp_path / "rows.jsonl" / "bad.jsonl", "cannot hold the bad rows"),
        (path, "is the file that is read"),
        (notes, "holds something else than bad rows"),
        (empty, "holds something else than bad rows"),
    ):
        with pytest.raises(InputError, match=reason) as raised:
            configured("labelled", path=path, quarantine=str(quarantine)).load()
        assert str(quarantine) in str(raised.value)
    assert notes.read_text() == "mine"


def test_the_quarantine_holds_the_bad_rows_of_the_last_run_and_nothing_is_read_again(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*some(6), {"query": "q"}])
    for name in ("bad0.jsonl", "bad1.jsonl", "bad1.jsonl"):
        configured("labelled", path=path, quarantine=str(tmp_path / name)).load()
        [bad] = map(json.loads, (tmp_path / name).read_text().splitlines())
        assert bad["line"] == 7
    write_rows(tmp_path / "rows.jsonl", some(6))
    configured("labelled", path=path, quarantine=str(tmp_path / "bad1.jsonl")).load()
    assert not (tmp_path / "bad1.jsonl").exists()


def test_no_usable_row_is_an_error_with_the_account(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"query": "q"}])
    with pytest.raises(InputError, match=r"read 1 = kept 0 \+ quarantined 1; there is nothing to learn from"):
        configured("labelled", path=path, quarantine=str(tmp_path / "bad.jsonl")).load()


def test_a_source_reads_nothing_before_it_is_loaded_and_expands_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for option in ("pairs", "labelled"):
        made = configured(option, path="/nowhere/rows.jsonl")
        with pytest.raises(InputError, match=r"/nowhere/rows\.jsonl"):
            made.load()
    write_rows(tmp_path / "rows.jsonl", some(3))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(configured("labelled", path="~/rows.jsonl").load().train) == 2


def test_toy_needs_nothing_and_is_the_same_every_time() -> None:
    splits = Toy().load()
    assert (len(splits.train), len(splits.validation)) == (1000, 200)
    assert splits.account == "toy data: read 1,200 = kept 1,200"
    assert Toy().load().fingerprint == splits.fingerprint


# From rows to splits


def test_rows_that_say_the_same_are_kept_or_dropped_as_asked(tmp_path: Path) -> None:
    long = "I would rather not say how that is done because somebody might be hurt by it"
    rows = [row(f"first{n} second{n} third{n} fourth{n}", f"fifth{n} sixth{n}") for n in range(8)]
    rows += [rows[0], row("Why is that so?", long), row("WHY is that so", long.replace("hurt", "cut"))]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for how, left, dropped in (
        ("keep", 11, {}),
        ("exact", 10, {"exact duplicate": 1}),
        ("near", 9, {"exact duplicate": 1, "near duplicate": 1}),
    ):
        splits = configured("labelled", path=path, duplicates=how).load()
        [account] = splits.sources
        assert (len(everything(splits)), account.kept, dict(account.dropped)) == (left, left, dropped)


def test_the_same_answer_with_other_labels_of_a_pair_is_a_contradiction(tmp_path: Path) -> None:
    texts = {"query": "q", "accepted": "a", "rejected": "r"}
    labels = [{"accepted_harmful": a, "rejected_harmful": r} for a in (True, False) for r in (True, False)]
    others = [{"query": f"q{n}", "accepted": "a", "rejected": "r"} for n in range(4)]
    path = write_rows(tmp_path / "rows.jsonl", [*others, *(texts | each for each in labels)])
    [account] = configured("pairs", path=path).load().sources
    assert dict(account.dropped) == {"contradictory labels": 4}


@given(st.data())
def test_read_is_kept_and_quarantined_and_dropped_and_kept_is_both_parts(data: st.DataObject) -> None:
    good = st.builds(row, st.sampled_from("abcdefgh"), st.sampled_from("xyz"), st.booleans())
    rows = data.draw(st.lists(good | st.just({"query": "only"}), min_size=1, max_size=30))
    changes = {
        "duplicates": data.draw(st.sampled_from(["keep", "exact"])),
        "limit": data.draw(st.none() | st.integers(2, 10)),
        "quarantine": str(cache_folder() / "bad.jsonl"),
    }
    path = write_rows(cache_folder() / "rows.jsonl", rows)
    try:
        splits = Labelled(path=path, **OPTIONS | changes).load()
    except InputError:  # nothing is left, or one query only
        return
    [account] = splits.sources
    assert account.read == len(rows) == account.kept + account.quarantined + sum(account.dropped.values())
    assert account.kept == account.train + account.validation
    assert (account.train, account.validation) == (len(splits.train), len(splits.validation))
    assert account.quarantined == rows.count({"query": "only"})
    assert not {r.query for r in splits.train} & {r.query for r in splits.validation}


def test_a_file_is_read_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def counting(self: Labelled, account: Account) -> Iterator[LabelledAnswer]:
        read.append(self.path)
        return records(self, account)

    records = Labelled.records
    monkeypatch.setattr(Labelled, "records", counting)
    path = write_rows(tmp_path / "rows.jsonl", some(6))
    first = Labelled(path=path, **OPTIONS).load()
    for options in (OPTIONS, OPTIONS | {"seed": 3}, OPTIONS | {"limit": 4}):
        Labelled(path=path, **options).load()
    assert len(read) == 1
    write_rows(tmp_path / "rows.jsonl", [*some(5), row("q5", harmful=True)])
    changed = Labelled(path=path, **OPTIONS).load()
    assert len(read) == 2
    assert first.fingerprint != changed.fingerprint
    assert sum(record.harmful for record in everything(changed)) == 1


def test_near_copies_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", some(6))
    looked = []
    near = duplicates.near_duplicates

    def counting(*given: Any, **options: Any) -> Any:
        looked.append(given)
        return near(*given, **options)

    monkeypatch.setattr(sources.duplicates, "near_duplicates", counting)
    for seed in range(3):
        Labelled(path=path, **OPTIONS | {"duplicates": "near", "seed": seed}).load()
    assert len(looked) == 1


def test_a_limit_keeps_the_same_records_in_any_order_and_accounts_for_the_rest(tmp_path: Path) -> None:
    paths = [write_rows(tmp_path / f"{step}.jsonl", some(50)[::step]) for step in (1, -1)]
    one, other = (configured("labelled", path=path, limit=20).load() for path in paths)
    assert set(one.train) == set(other.train)
    assert len(everything(one)) == 20
    assert one.account.endswith("read 50 = kept 20 + dropped 30 (over the limit: 30)")
    assert set(configured("labelled", path=paths[0], limit=20, seed=1).load().train) != set(one.train)


def test_the_fingerprint_sees_every_label_and_the_split_but_no_scenario(tmp_path: Path) -> None:
    rows = some(20)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    changed = write_rows(tmp_path / "changed.jsonl", [*rows[:-1], rows[-1] | {"harmful": True}])
    named = write_rows(tmp_path / "named.jsonl", [each | {"scenario": "s"} for each in rows])
    nameless = write_rows(tmp_path / "nameless.jsonl", [each | {"scenario": ""} for each in rows])
    same = [configured("labelled", path=each).load() for each in (path, path, named, nameless)]
    others = [configured("labelled", path=changed), configured("labelled", path=path, seed=1)]
    assert len({splits.fingerprint for splits in same}) == 1
    assert len({same[0].fingerprint, *(source.load().fingerprint for source in others)}) == 3
    assert [{record.scenario for record in everything(splits)} for splits in same[2:]] == [{"s"}, {None}]


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
    with pytest.raises(InputError, match="at least two"):
        held_out([answer("How  do I\ncook?"), answer("how do i cook? ")], 0.5, seed=0)
