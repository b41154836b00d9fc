"""The fields of rows that become ids and names in results."""

from collections.abc import Mapping
from typing import Any

from mllm_protector.reading import text_field

_LONGEST = 200


def id_field(row: Mapping[str, Any], name: str) -> str:
    """A required id: a whole number or a short text in one line.

    Raises:
        ValueError: missing or anything else.
    """
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return checked_name(text_field(row, name), f"field '{name}'")


def checked_name(value: str, what: str) -> str:
    """The text itself, if it can stand in a table and in a file's line.

    Raises:
        ValueError: empty, long, or with characters that cannot be printed.
    """
    if not value.strip() or len(value) > _LONGEST or not value.isprintable():
        raise ValueError(f"{what} must be one printable line of at most {_LONGEST} characters")
    return value
