import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf

from mllm_protector.config import CONFIGS, build
from mllm_protector.errors import InputError
from mllm_protector.records import AnswerPair


def configured(option: str) -> Callable[..., Any]:
    """The source that ``data=<option>`` gives, with keys of its config changed."""

    def take(seed: int, data: Any) -> None: ...

    def make(**changes: Any) -> Any:
        node = OmegaConf.merge(OmegaConf.load(CONFIGS / "data" / f"{option}.yaml"), changes)
        return build(OmegaConf.create({"seed": 0, "data": node}), take)["data"]

    return make


Toy, Pairs, Labelled = configured("toy"), configured("pairs"), configured("labelled")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_an_option_out_of_range_is_refused_at_once() -> None:
    for name, value in (("validation_fraction", 0.0), ("validation_fraction", 1.0), ("limit", 1)):
        with pytest.raises(InputError, match=rf"{name}={value}: must"):
            Pairs(path="rows.jsonl", **{name: value})


# Your own files


def test_pairs_carry_the_usual_labels_unless_told_otherwise(tmp_path: Path) -> None:
    rows = [
        {"query": "q1", "accepted": "good", "rejected": "bad"},
        {
            "query": "q2",
            "accepted": "x",
            "rejected": "y",
            "accepted_harmful": True,
            "rejected_harmful": False,
        },
    ]
    splits = Pairs(path=write_rows(tmp_path / "pairs.jsonl", rows)).load()
    first, second = sorted([*splits.train, *splits.validation], key=lambda pair: pair.query)
    assert first == AnswerPair(query="q1", accepted="good", rejected="bad")
    assert (second.accepted_harmful, second.rejected_harmful) == (True, False)


def test_labels_are_read_alike_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"query": f"q{number}", "answer": "a", "harmful": number % 2 == 0} for number in range(10)]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.csv").write_text(
        "query,answer,harmful\n" + "".join(f"{r['query']},{r['answer']},{r['harmful']}\n" for r in rows)
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    loaded = [Labelled(path=str(path)).load() for path in tmp_path.iterdir()]
    assert len({splits.fingerprint for splits in loaded}) == 1
    assert sum(record.harmful for record in (*loaded[0].train, *loaded[0].validation)) == 5


def test_a_quarantine_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    rows = [{"query": f"q{number}", "answer": "a", "harmful": True} for number in range(3)] + [{"query": "q"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for quarantine in (tmp_path, tmp_path / "rows.jsonl" / "bad.jsonl"):
        with pytest.raises(InputError, match="cannot hold the bad rows") as raised:
            Labelled(path=path, quarantine=str(quarantine)).load()
        assert str(quarantine) in str(raised.value)


def test_no_usable_row_is_an_error_with_the_account(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"query": "q"}])
    with pytest.raises(InputError, match=r"read 1 = kept 0 \+ quarantined 1; there is nothing to learn from"):
        Labelled(path=path, quarantine=str(tmp_path / "bad.jsonl")).load()


def test_a_limit_keeps_the_same_records_in_any_order_and_accounts_for_the_rest(tmp_path: Path) -> None:
    rows = [{"query": f"q{number}", "answer": "a", "harmful": False} for number in range(50)]
    paths = [write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", rows[::-1])]
    one, other = (Labelled(path=path, limit=20).load() for path in paths)
    assert set(one.train) == set(other.train)
    assert len(one.train) + len(one.validation) == 20
    assert one.account.endswith("read 50 = kept 20 + dropped 30 (over the limit: 30)")
    assert set(Labelled(path=paths[0], limit=20, seed=1).load().train) != set(one.train)


def test_the_fingerprint_sees_every_label_and_the_split(tmp_path: Path) -> None:
    rows = [{"query": f"q{number}", "answer": "a", "harmful": False} for number in range(20)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    changed = write_rows(tmp_path / "changed.jsonl", [*rows[:-1], rows[-1] | {"harmful": True}])
    loads = [Labelled(path=path), Labelled(path=path), Labelled(path=changed), Labelled(path=path, seed=1)]
    prints = [source.load().fingerprint for source in loads]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


# What all sources have in common


def test_toy_needs_nothing_and_is_the_same_every_time() -> None:
    splits = Toy().load()
    assert (len(splits.train), len(splits.validation)) == (1000, 200)
    assert splits.account == "toy data: read 1,200 = kept 1,200"
    assert Toy().load().fingerprint == splits.fingerprint


def test_a_source_reads_nothing_before_it_is_loaded() -> None:
    for source in (Pairs, Labelled):
        made = source(path="/nowhere/rows.jsonl")
        with pytest.raises(InputError, match=r"/nowhere/rows\.jsonl"):
            made.load()


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"query": f"q{number}", "answer": "a", "harmful": True} for number in range(3)]
    write_rows(tmp_path / "rows.jsonl", rows)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(Labelled(path="~/rows.jsonl").load().train) == 2
