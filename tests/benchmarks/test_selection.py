from pathlib import Path

import pytest

from mllm_protector.benchmarks.selection import (
    check_limit,
    check_names,
    files_digest,
    question_digest,
    sample,
)
from mllm_protector.errors import InputError

ITEMS = [f"item {number}" for number in range(100)]


def key(item: str) -> str:
    return item


def test_a_sample_keeps_the_order_and_does_not_take_the_first() -> None:
    chosen = sample(ITEMS, 10, 0, key)
    assert len(chosen) == 10
    assert chosen == [item for item in ITEMS if item in chosen]
    assert chosen != ITEMS[:10]


def test_a_larger_sample_holds_the_smaller_one() -> None:
    small, large = (set(sample(ITEMS, limit, 0, key)) for limit in (10, 40))
    assert small < large


def test_a_sample_depends_on_keys_and_seed_only() -> None:
    assert set(sample(ITEMS, 10, 0, key)) == set(sample(ITEMS[::-1], 10, 0, key))
    assert set(sample(ITEMS, 10, 0, key)) != set(sample(ITEMS, 10, 1, key))


def test_no_limit_takes_all() -> None:
    for limit in [None, 100, 101]:
        assert sample(ITEMS, limit, 0, key) == ITEMS, limit


def test_a_limit_that_leaves_nothing_is_refused() -> None:
    for limit in [0, -1]:
        with pytest.raises(InputError, match=f"^limit must be at least 1, not {limit}"):
            check_limit(limit)


def test_a_wrong_name_is_refused_with_the_key_in_front() -> None:
    check_names("variants", ["TEXT"], ("TEXT", "TYPO"))
    with pytest.raises(InputError, match=r"^variants: no 'TYP'\. Did you mean 'TYPO'\? Known: TEXT, TYPO"):
        check_names("variants", ["TYP"], ("TEXT", "TYPO"))


def test_a_digest_knows_names_and_bytes_but_not_the_place(tmp_path: Path) -> None:
    digests = []
    for folder, name, content in [("a", "x", "1"), ("b", "x", "1"), ("c", "y", "1"), ("d", "x", "2")]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(content)
        digests.append(files_digest((tmp_path / folder).iterdir(), tmp_path / folder))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    with pytest.raises(InputError, match="gone: cannot be read"):
        question_digest(tmp_path / "gone")
