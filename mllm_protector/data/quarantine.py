"""The file of bad rows that a user names: it replaces an earlier one of its kind, and no other file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_protector.errors import InputError
from mllm_protector.files import expand, write_jsonl
from mllm_protector.outputs import probe
from mllm_protector.reading import parse_json_line

FIELDS = {"file", "line", "reason", "raw"}
"""Of a bad row (see ``reading.Account``)."""


def require_place(quarantine: str, source: str | None) -> None:
    """Check, before anything is read, that bad rows can be written and replace nothing else.

    Args:
        quarantine: the file for them.
        source: the file or folder that is read, if any.

    Raises:
        InputError: it is a folder, cannot be written, is what is read, or holds something else than bad rows.
    """
    path = expand(quarantine)
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        probe(path.parent)
    except OSError as error:
        raise _unwritable(quarantine, error) from error
    if not path.exists():
        return
    if not path.is_file():
        raise InputError(f"quarantine={quarantine}: is no file; name one for bad rows")
    if source is not None and expand(source).exists() and path.samefile(expand(source)):
        raise InputError(f"quarantine={quarantine}: is the file that is read; name another one for bad rows")
    if not _holds_bad_rows(path):
        raise InputError(
            f"quarantine={quarantine}: holds something else than bad rows of an earlier run, and would be "
            "replaced; name another file"
        )


def write_bad_rows(quarantine: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the bad rows and nothing else: where there are none, those of an earlier run go.

    Raises:
        InputError: they cannot be written.
    """
    try:
        if rows:
            write_jsonl(expand(quarantine), rows)
        else:
            expand(quarantine).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(quarantine, error) from error


def _unwritable(quarantine: str, error: OSError) -> InputError:
    return InputError(f"quarantine={quarantine}: cannot hold the bad rows ({error.strerror})")


def _holds_bad_rows(path: Path) -> bool:
    try:
        with path.open("rb") as lines:
            written = path.stat().st_size > 0
            return written and all(parse_json_line(line).keys() == FIELDS for line in lines)
    except (OSError, ValueError):
        return False
