from pathlib import Path

import pytest

from mllm_protector.errors import InputError
from mllm_protector.files import read_json, write_json, write_jsonl, write_text


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"kept": 1})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half a surrogate pair: \ud800")
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"score": float("nan")})
    assert read_json(path) == {"kept": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_unreadable_json_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "guard.json"
    with pytest.raises(InputError, match="no such file"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        read_json(path)


def test_rows_are_written_as_they_come_and_only_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    write_jsonl(path, ({"row": number, "text": "\ud800"} for number in range(3)))
    assert path.read_text() == "".join(f'{{"row": {number}, "text": "\\ud800"}}\n' for number in range(3))

    def broken() -> object:
        yield {"row": 0}
        raise KeyError("row 1")

    with pytest.raises(KeyError):
        write_jsonl(path, broken())  # type: ignore[arg-type]
    assert len(path.read_text().splitlines()) == 3
    assert list(path.parent.iterdir()) == [path]


def test_a_key_that_stands_twice_is_refused_where_it_matters(tmp_path: Path) -> None:
    path = tmp_path / "guard.json"
    path.write_text('{"threshold": 0.5, "deeper": {"threshold": 1.0, "threshold": 0.5}}')
    assert read_json(path)["deeper"] == {"threshold": 0.5}
    with pytest.raises(InputError, match="the key 'threshold' occurs twice"):
        read_json(path, strict=True)
