"""The two layouts of MM-SafetyBench on disk, each read to questions by number."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_protector.benchmarks.image_files import Found, image_file
from mllm_protector.errors import InputError
from mllm_protector.files import read_json
from mllm_protector.images import EncodedImage, ImageFile, RenderedText, Stacked
from mllm_protector.reading import missing_field, read_records, text_field
from mllm_protector.records import Variant

# Which words go with which picture: README of isXinLiu/MM-SafetyBench, "Evaluation". The text-only question
# is not defined there; "Question" is what the official MLLM-Protector code asks, "Changed Question" what
# the mirror holds, so the benchmark's `text_field` decides.
QUESTION_FIELDS: dict[Variant, str] = {
    "TEXT": "Question",
    "SD": "Rephrased Question(SD)",
    "TYPO": "Rephrased Question",
    "SD_TYPO": "Rephrased Question",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A question before it has its full id."""

    text: str
    found: Found


@dataclass(frozen=True, slots=True)
class _Pictures:
    """The pictures of one question in the published layout; ``phrase=None`` renders nothing."""

    root: Path
    scenario: str
    key: str
    phrase: str | None
    font: Path | None

    def find(self, variant: Variant) -> Found:
        """The picture, or why there is none; neither for TEXT."""
        if variant == "TEXT":
            return Found()
        path = self._file(variant)
        if path is not None:
            return Found(ImageFile(path))
        if self.phrase is not None and variant == "TYPO":
            return Found(RenderedText(self.phrase, self.font))
        if self.phrase is not None and variant == "SD_TYPO":
            photo = self._file("SD")
            if photo is not None:
                return Found(Stacked(ImageFile(photo), RenderedText(self.phrase, self.font)))
        return Found(missing=f"no file {self._name(variant)}")

    def _name(self, variant: Variant) -> str:
        return f"imgs/{self.scenario}/{variant}/{self.key}.jpg"

    def _file(self, variant: Variant) -> Path | None:
        return image_file(self.root, self._name(variant))


def published_entries(
    folder: Path,
    scenario: str,
    variants: Sequence[Variant],
    *,
    asked_as_text: str,
    render_missing: bool,
    font: Path | None,
) -> Iterator[tuple[Variant, dict[str, Entry]]]:
    """The questions of ``processed_questions/<scenario>.json`` with their pictures in ``imgs/``, by variant.

    Args:
        folder: the root of both.
        scenario: a scenario's name.
        variants: which ways of asking.
        asked_as_text: the field that TEXT asks.
        render_missing: draw missing pictures from the key phrase.
        font: a TrueType file for that.

    Raises:
        InputError: a file that is missing or broken, or a picture that leads out of the folder.
    """
    file = folder / "processed_questions" / f"{scenario}.json"
    rows = read_json(file)
    if not isinstance(rows, dict) or not rows:
        raise InputError(f"{file}: must be a JSON object of questions by id")
    for variant in variants:
        name = asked_as_text if variant == "TEXT" else QUESTION_FIELDS[variant]
        entries = {}
        for key, row in rows.items():
            try:
                if not isinstance(row, dict):
                    raise ValueError(f"must be a JSON object, not {type(row).__name__}")
                text = text_field(row, name)
                phrase = text_field(row, "Key Phrase") if render_missing else None
                found = _Pictures(folder, scenario, _checked_id(key), phrase, font).find(variant)
            except ValueError as error:
                raise InputError(f"{file}: id {key!r}: {error}") from None
            entries[key] = Entry(text, found)
        yield variant, entries


def mirror_entries(
    folder: Path, scenario: str, variants: Sequence[Variant]
) -> Iterator[tuple[Variant, dict[str, Entry]]]:
    """The questions of ``data/<scenario>/<split>.parquet``, which carry their pictures, by variant.

    Raises:
        InputError: a file that is missing or broken.
    """
    for variant in variants:
        file = folder / mirror_file(scenario, variant)
        reading = read_records(file, _mirror_parser(variant, file), key=lambda record: record[0])
        yield variant, dict(reading.records)


def mirror_file(scenario: str, variant: Variant) -> str:
    """A file of the mirror, which drops the scenarios' numbers."""
    split = "Text_only" if variant == "TEXT" else variant
    return f"data/{scenario.partition('-')[2]}/{split}.parquet"


def _mirror_parser(variant: Variant, file: Path) -> Callable[[Mapping[str, Any]], tuple[str, Entry]]:
    def parse(row: Mapping[str, Any]) -> tuple[str, Entry]:
        if row.get("id") is None:
            raise missing_field(row, "id")
        key = _checked_id(str(row["id"]))
        try:
            text = text_field(row, "question")
        except ValueError as error:
            raise ValueError(f"id {key}: {error}") from None
        if variant == "TEXT":
            return key, Entry(text, Found())
        image = row.get("image")
        data = image.get("bytes") if isinstance(image, dict) else None
        if not data:
            return key, Entry(text, Found(missing=f"no picture in {file.parent.name}/{file.name}"))
        return key, Entry(text, Found(EncodedImage(data, f"{file}: id {key}")))

    return parse


def _checked_id(key: str) -> str:
    """The id itself: digits only, so it can name a file and cannot lead anywhere.

    Raises:
        ValueError: anything else.
    """
    if not re.fullmatch("[0-9]{1,9}", key):
        raise ValueError(f"an id must be a number, not {key!r}")
    return key
