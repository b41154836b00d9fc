"""Which group, such as a scenario, each query of a data set belongs to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_protector.data.queries import query_key
from mllm_protector.reading import read_records, text_field


def read_groups(path: Path) -> dict[str, str]:
    """The group of each query, by ``query_key``.

    Args:
        path: a file with the fields ``query`` and ``group``.

    Raises:
        RecordError: a bad row, or a query that stands there twice.
        InputError: the file cannot be read.
    """

    def parse(row: Mapping[str, Any]) -> tuple[str, str]:
        return query_key(text_field(row, "query")), text_field(row, "group")

    return dict(read_records(path, parse, key=lambda row: row[0]).records)
