import gzip
import json
import lzma
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_protector.errors import InputError, RecordError
from mllm_protector.files import write_jsonl
from mllm_protector.reading import Unwanted, flag_field, read_records, text_field
from mllm_protector.rows import parse_json_line, read_rows

GOOD = b'{"query": "q", "answer": "a"}'
UNWANTED = b'{"query": "not wanted", "answer": "a"}'
DEEP = b'{"query": "q", "answer": ' + b"[" * 5000 + b"]" * 5000 + b"}"

HOSTILE = {
    "broken": (b'{"query": "q", "answer": ', "not valid JSON"),
    "not an object": (b'["q", "a"]', "must be a JSON object, not list"),
    "wrong type": (b'{"query": "q", "answer": 5}', "field 'answer' must be a text, not int"),
    "null": (b'{"query": "q", "answer": null}', "field 'answer' must be a text, not NoneType"),
    "missing field": (b'{"query": "q"}', "missing field 'answer' (found: 'query')"),
    "empty answer": (b'{"query": "q", "answer": " \\n"}', "field 'answer' is empty"),
    "latin-1": (b'{"query": "q", "answer": "caf\xe9"}', "not UTF-8 (byte 30)"),
    "byte order mark inside the file": (b"\xef\xbb\xbf" + GOOD, "not valid JSON"),
    "raw NUL": (b'{"query": "q", "answer": "a\0"}', "not valid JSON"),
    "escaped NUL": (b'{"query": "q", "answer": "a\\u0000"}', "field 'answer' contains a NUL character"),
    "NaN": (b'{"query": "q", "answer": NaN}', "NaN is not JSON"),
    "duplicate key": (b'{"query": "q", "answer": "a", "answer": "b"}', "field 'answer' stands there twice"),
    "nested 5000 deep": (DEEP, "nested too deeply"),
    "duplicate row": (b'{"query": "q1", "answer": "a"}', "duplicate of line 1"),
}

Row = tuple[str, str]


def parse(row: Mapping[str, Any]) -> Row:
    record = text_field(row, "query"), text_field(row, "answer")
    if record[0] == "not wanted":
        raise Unwanted("asked not to be read")
    return record


def itself(record: Row) -> Row:
    return record


def first_lines(hostile: bytes) -> bytes:
    """Two good lines, one hostile, one good."""
    return (
        b'{"query": "q1", "answer": "a"}\n{"query": "q2", "answer": "a"}\n' + hostile + b"\n" + GOOD + b"\n"
    )


def test_a_hostile_line_stops_strict_reading_and_is_set_aside_by_lenient_reading(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for name, (line, reason) in HOSTILE.items():
        path.write_bytes(first_lines(line))
        with pytest.raises(RecordError) as raised:
            read_records(path, parse, key=itself)
        assert str(raised.value).startswith(f"{path}:3: "), name
        assert reason in str(raised.value), name
        assert "\n" not in str(raised.value), name
        reading = read_records(path, parse, key=itself, strict=False)
        assert (reading.read, len(reading.records)) == (4, 3), name
        write_jsonl(tmp_path / "bad.jsonl", reading.bad_rows)
        [bad] = map(json.loads, (tmp_path / "bad.jsonl").read_bytes().splitlines())
        assert (bad["file"], bad["line"]) == (str(path), 3), name
        assert reason in bad["reason"], name
        assert bad["raw"] == line.decode(errors="replace"), name


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["good", "unwanted", "blank", *HOSTILE])))
def test_every_row_is_kept_quarantined_or_dropped(kinds: list[str]) -> None:
    lines = {"good": GOOD, "unwanted": UNWANTED, "blank": b"  "} | {
        k: line for k, (line, _) in HOSTILE.items()
    }
    kept = kinds.count("good") + kinds.count("duplicate row")  # a good row, as duplicates are allowed here
    filled = len(kinds) - kinds.count("blank")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.write_bytes(b"\n".join([GOOD, *(lines[kind] for kind in kinds)]))
        reading = read_records(path, parse, strict=False)
    assert reading.read == 1 + filled
    assert set(reading.dropped) <= {"asked not to be read"}
    assert len(reading.records) == 1 + kept
    assert reading.dropped.total() == kinds.count("unwanted")
    assert len(reading.bad_rows) == filled - kept - kinds.count("unwanted")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_or_a_bad_row(line: bytes) -> None:
    with suppress(ValueError):  # the only error that becomes a bad row
        assert isinstance(parse_json_line(line), dict)


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for character in ("\u2028", "\u2029", "\x85", "\x0b", "\r", "😀"):
        row = json.dumps({"query": "q", "answer": f"a{character}b"}, ensure_ascii=False)
        path.write_bytes((row + "\n" + row).encode())
        assert read_records(path, parse).records == [("q", f"a{character}b")] * 2, ascii(character)


def test_all_kinds_of_file_give_the_same_records(tmp_path: Path) -> None:
    rows = [{"query": "one, two", "answer": "a\nb"}, {"query": "001", "answer": "N/A"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "rows.jsonl").write_bytes(lines)
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "rows.csv").write_bytes(b'\xef\xbb\xbfquery,answer\r\n"one, two","a\nb"\r\n001,N/A\r\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for path in tmp_path.iterdir():
        assert read_records(path, parse).records == [("one, two", "a\nb"), ("001", "N/A")], path.name


def test_a_hostile_csv_row_is_named_by_its_line_and_reading_continues_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    reasons = {"q": "another number of columns", "q,a,b": "another number of columns"}
    for row in ("q", "q,a,b", '"q","a"x', "q,\0", "q,"):
        path.write_text(f"query,answer\nq,a\n{row}\nq,a\n")
        with pytest.raises(RecordError, match=rf"rows\.csv:3: {reasons.get(row, '')}"):
            read_records(path, parse)
        reading = read_records(path, parse, strict=False)
        assert reading.summary() == "read 3 = kept 2 + quarantined 1", row


def test_an_unusable_file_is_one_clear_error(tmp_path: Path) -> None:
    many = b"\n".join([GOOD] * 1000)
    for number, (name, content, reason) in enumerate(
        [
            ("rows.jsonl", b"", "the file is empty"),
            ("rows.jsonl", b"\n \n", "the file is empty"),
            ("rows.csv", b"query,answer\n", "the file is empty"),
            ("rows.csv", b"query,answer,answer\nq,a,b\n", "column 'answer' stands there twice"),
            ("rows.txt", GOOD, "unknown kind of file"),
            ("rows.jsonl.gz", GOOD, "cannot be read to the end"),
            ("rows.jsonl.gz", gzip.compress(many)[:-9], "cannot be read to the end"),
            ("rows.jsonl.xz", lzma.compress(many)[:-20], "cannot be read to the end"),
            ("rows.parquet", GOOD * 9, "not a readable parquet file"),
            ("rows.jsonl", None, "no such file"),
        ]
    ):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=reason) as raised:
            read_records(path, parse, strict=False)
        assert str(path) in str(raised.value)
    with pytest.raises(InputError, match="is a folder"):
        read_records(tmp_path, parse)


def test_a_csv_row_that_is_not_utf8_is_named_by_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"query,answer\n" + b"q,a\n" * 3000 + b"q,\xe9\n" + b"q,a\n")
    with pytest.raises(RecordError, match=r"rows\.csv:3002: not UTF-8"):
        read_records(path, parse)
    assert len(read_records(path, parse, strict=False).records) == 3001


def test_a_flag_is_read_from_every_usual_form_and_from_nothing_else() -> None:
    for value, flag in ((True, True), (0, False), ("TRUE", True), (" false ", False)):
        assert flag_field({"harmful": value}, "harmful") is flag
    for other in (None, "yes", 2, 0.5, float("nan"), [True]):
        with pytest.raises(ValueError, match="field 'harmful' must be true or false"):
            flag_field({"harmful": other}, "harmful")


def test_an_array_of_json_is_read_and_names_the_item_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('\n[{"query": "q", "answer": "a"},\n ["q"], {"query": "r", "answer": "a"}]')
    reading = read_records(path, parse, strict=False)
    assert reading.records == [("q", "a"), ("r", "a")]
    assert [(row["line"], row["reason"]) for row in reading.bad_rows] == [
        (2, "must be a JSON object, not list")
    ]


def test_a_damaged_array_of_json_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text, reason in (
        (b'[{"query": "q"},\n{"query": ]', "not valid JSON (Expecting value, line 2, column 11)"),
        (b'[{"query": "caf\xe9"}]', "not UTF-8 (byte 16)"),
        (b'[{"query": NaN}]', "NaN is not JSON"),
        (b'[{"query": "q", "query": "q"}]', "field 'query' stands there twice"),
        (b"[" * 100_000, "nested too deeply"),
    ):
        path.write_bytes(text)
        with pytest.raises(InputError) as raised:
            read_records(path, parse, strict=False)
        assert str(raised.value) == f"{path}: {reason}"


def test_pictures_in_a_parquet_file_are_not_read(tmp_path: Path) -> None:
    picture = {"bytes": b"of a picture", "path": "a.jpg"}
    row = {"query": "q", "answer": "a", "image": picture, "images": [picture], "raw": b"bytes"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    [found] = read_rows(tmp_path / "rows.parquet", texts_only=True)
    assert found.value == {"query": "q", "answer": "a"}


def test_halves_of_surrogate_pairs_are_replaced_and_whole_pairs_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"query": "q", "answer": "half \\ud800, whole \\ud83d\\ude00"}\n')
    assert read_records(path, parse).records == [("q", "half \ufffd, whole \U0001f600")]


def test_a_file_in_utf_16_is_refused_by_that_name(tmp_path: Path) -> None:
    for ending, text in (("csv", "query,answer\nq,a\n"), ("jsonl", '{"query": "q"}\n'), ("json", "[]")):
        for encoding in ("utf-16", "utf-16-be"):
            path = tmp_path / f"rows.{ending}"
            mark = "\ufeff" if encoding.endswith("be") else ""
            path.write_bytes((mark + text).encode(encoding))
            with pytest.raises(InputError, match="is UTF-16, and UTF-8 is wanted"):
                read_records(path, parse)


def test_a_space_in_a_column_name_can_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("query, answer\nq,a\n")
    with pytest.raises(RecordError, match=re.escape("missing field 'answer' (found: 'query', ' answer')")):
        read_records(path, parse)
