"""When two texts count as the same: their words, and the keys of a query.

Splits and the digests in ``guard.json`` depend on these keys.
"""

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_protector.normalisation import INVISIBLE
from mllm_protector.reading import read_records, text_field

# Chinese and Japanese are written without spaces: each character is a word.
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[^\W_{_IDEOGRAPHS}]+|[{_IDEOGRAPHS}]")
_INSIDE_WORDS = re.compile(f"['\u2019\u02bc{INVISIBLE}]")
_ASSISTANT = "\n\nAssistant:"


def words(text: str) -> list[str]:
    """The words of a text as they are compared: folded case, one Unicode form, no punctuation.

    An apostrophe or an invisible character joins what stands on both sides of it: "don't" is "dont".
    """
    return _WORD.findall(_folded(text))


def query_key(query: str) -> str:
    """The same for queries that count as the same: those of the same ``words``.

    Of a query without words the signs count, white space and invisible characters apart.
    """
    folded = _folded(query)
    return " ".join(_WORD.findall(folded) or folded.split())


def opening_key(query: str) -> str:
    """The ``query_key`` of a dialogue's first human turn; of any other query its own.

    Dialogues that begin alike share it, however far they went. A dialogue is what ``data=hh_rlhf
    data.context=all`` makes: "Human: ...", then "Assistant: ..." in a new paragraph.
    """
    return query_key(query.partition(_ASSISTANT)[0].lstrip().removeprefix("Human:"))


def digest(seed: int, text: str) -> int:
    """The first 64 bits of a hash of a text, another one for each seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{text}".encode()).digest()[:8], "big")


def _folded(text: str) -> str:
    text = _INSIDE_WORDS.sub("", text)
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _INSIDE_WORDS.sub("", text)


def read_groups(path: Path) -> dict[str, str]:
    """The group, such as a scenario, of each query of a file with the fields ``query`` and ``group``.

    Returns:
        Groups by ``query_key``.

    Raises:
        RecordError: a bad row, or a query that is there twice.
        InputError: the file cannot be read.
    """

    def parse(row: Mapping[str, Any]) -> tuple[str, str]:
        return query_key(text_field(row, "query")), text_field(row, "group")

    return dict(read_records(path, parse, key=lambda row: row[0]).records)
