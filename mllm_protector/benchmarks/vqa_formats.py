"""Published sets of harmless questions about pictures, each read to questions with known answers.

Every reader takes the question file (of MME the folder) and the folder of the pictures.
"""

import re
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mllm_protector.benchmarks.fields import checked_name, id_field
from mllm_protector.benchmarks.pictures import Found, find_picture, picture_of
from mllm_protector.benchmarks.vqa_scoring import (
    PEOPLE,
    Choice,
    Elements,
    KnownAnswer,
    Presence,
    YesNo,
    known_answer,
)
from mllm_protector.errors import InputError
from mllm_protector.files import read_json
from mllm_protector.reading import collect, read_records, text_field
from mllm_protector.rows import Row, parse_json_line

Format = Literal["generic", "pope", "scienceqa", "mmvet", "mme", "gqa"]

_BOM = b"\xef\xbb\xbf"
_PICTURE_ENDINGS = (".jpg", ".png", ".jpeg")


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualItem:
    """A question before it is asked.

    Attributes:
        id: unique within its set.
        text: the words.
        found: the picture, or why there is none; neither for a question without one.
        known: what an answer is compared with.
    """

    id: str
    text: str
    found: Found
    known: KnownAnswer


def read_generic(path: Path, images: Path, split: str) -> list[VisualItem]:
    """JSONL, CSV or parquet: ``question``, ``answers`` (a text or a list) and maybe ``image`` and ``id``.

    Each answer of a list is right, but ten of them are those of ten people, as in VQAv2; they may be its
    objects with ``answer``. Without an ``id`` the row's number counts, from 1.
    """
    rows = 0

    def parse(row: Mapping[str, Any]) -> VisualItem:
        nonlocal rows
        rows += 1
        identifier = str(rows) if row.get("id") in (None, "") else id_field(row, "id")
        return VisualItem(
            id=identifier,
            text=text_field(row, "question"),
            found=picture_of(row, images, f"{path}: id {identifier}"),
            known=known_answer(_answers(row)),
        )

    return read_records(path, parse, key=lambda item: item.id).records


def read_pope(path: Path, images: Path, split: str) -> list[VisualItem]:
    """POPE (Li et al., arXiv 2305.10355; AoiDragon/POPE): JSON lines in files that end in ``.json``."""

    def parse(row: Mapping[str, Any]) -> VisualItem:
        return VisualItem(
            id=id_field(row, "question_id"),
            text=text_field(row, "text"),
            found=find_picture(images, text_field(row, "image")),
            known=Presence(_is_yes(text_field(row, "label"), "label")),
        )

    items = collect(_json_lines(path), str(path), parse, key=lambda item: item.id).records
    if not items:
        raise InputError(f"{path}: the file is empty")
    return items


def read_scienceqa(path: Path, images: Path, split: str) -> list[VisualItem]:
    """ScienceQA (Lu et al., arXiv 2209.09513; lupantech/ScienceQA): ``problems.json``, ``pid_splits.json``.

    Pictures are ``<split>/<id>/image.png``; a question without one is asked as text. The hint stands before
    the question, the choices behind it.
    """
    splits_file = path.with_name("pid_splits.json")
    splits = read_json(splits_file)
    if not isinstance(splits, dict) or not isinstance(splits.get(split), list):
        known = ", ".join(map(str, splits)) if isinstance(splits, dict) else "none"
        raise InputError(f"split={split}: not a list in {splits_file} (found: {known})")
    problems = _json_object(path)
    wanted = [str(key) for key in splits[split]]
    if absent := [key for key in wanted if key not in problems]:
        raise InputError(f"{splits_file}: {path.name} has no problem {absent[0][:40]!r}")

    def parse(key: str, row: Mapping[str, Any]) -> VisualItem:
        if not re.fullmatch("[0-9]{1,9}", key):
            raise ValueError("an id must be a number")
        choices = _texts(row, "choices")
        right = row.get("answer")
        if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(choices):
            raise ValueError(f"field 'answer' must be the index of one of {len(choices)} choices")
        if not 2 <= len(choices) <= len(string.ascii_uppercase):
            raise ValueError(f"field 'choices' must have from 2 to 26 texts, not {len(choices)}")
        hint = text_field(row, "hint", allow_empty=True) if row.get("hint") is not None else ""
        lettered = [
            f"({letter}) {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False)
        ]
        found = Found()
        if row.get("image") not in (None, ""):
            found = find_picture(images, f"{text_field(row, 'split')}/{key}/{text_field(row, 'image')}")
        lines = [*([hint.strip()] if hint.strip() else []), text_field(row, "question"), *lettered]
        return VisualItem(id=key, text="\n".join(lines), found=found, known=Choice(tuple(choices), right))

    return list(_parsed(path, {key: problems[key] for key in wanted}, parse))


def read_mmvet(path: Path, images: Path, split: str) -> list[VisualItem]:
    """MM-Vet (Yu et al., arXiv 2308.02490; yuweihao/MM-Vet): ``mm-vet.json``.

    In an answer ``<OR>`` parts alternatives and ``<AND>`` what each must say.
    """

    def parse(key: str, row: Mapping[str, Any]) -> VisualItem:
        alternatives = tuple(
            tuple(element.strip() for element in alternative.split("<AND>") if element.strip())
            for alternative in text_field(row, "answer").split("<OR>")
        )
        if not all(alternatives):
            raise ValueError("field 'answer' has an alternative without words")
        return VisualItem(
            id=checked_name(key, "an id"),
            text=text_field(row, "question"),
            found=find_picture(images, text_field(row, "imagename")),
            known=Elements(alternatives),
        )

    return list(_parsed(path, _json_object(path), parse))


def read_gqa(path: Path, images: Path, split: str) -> list[VisualItem]:
    """GQA (Hudson and Manning, arXiv 1902.09506): such as ``testdev_balanced_questions.json``.

    The official score wants the exact answer; here it may stand in a sentence.
    """

    def parse(key: str, row: Mapping[str, Any]) -> VisualItem:
        return VisualItem(
            id=checked_name(key, "an id"),
            text=text_field(row, "question"),
            found=find_picture(images, f"{text_field(row, 'imageId')}.jpg"),
            known=known_answer([text_field(row, "answer")]),
        )

    return list(_parsed(path, _json_object(path), parse))


def read_mme(path: Path, images: Path, split: str) -> list[VisualItem]:
    """MME (Fu et al., arXiv 2306.13394): a folder of categories.

    ``<category>/<picture>.txt`` holds lines ``question<TAB>Yes|No`` beside the picture of that name; some
    categories keep the texts in ``questions_answers_YN`` and the pictures in ``images``.
    """
    items = []
    for file in mme_files(path):
        category = file.relative_to(path).parts[0]
        pictures = path / category / ("images" if file.parent.name == "questions_answers_YN" else "")

        def parse(row: Mapping[str, Any], file: Path = file, pictures: Path = pictures) -> VisualItem:
            named = f"{file.relative_to(path).parts[0]}/{file.stem}/{row['line']}"
            return VisualItem(
                id=checked_name(named, "a file's name"),
                text=text_field(row, "question"),
                found=_first_picture(pictures, file.stem),
                known=YesNo(_is_yes(text_field(row, "answer"), "answer")),
            )

        items += collect(_tab_lines(file), str(file), parse).records
    if not items:
        raise InputError(f"path={path}: holds no MME categories with <picture>.txt files")
    return items


def mme_files(path: Path) -> list[Path]:
    """The question files of an MME folder.

    Raises:
        InputError: there is no such folder.
    """
    if not path.is_dir():
        raise InputError(f"path={path}: no such folder")
    return sorted([*path.glob("*/*.txt"), *path.glob("*/questions_answers_YN/*.txt")])


READERS: dict[Format, Callable[[Path, Path, str], list[VisualItem]]] = {
    "generic": read_generic,
    "pope": read_pope,
    "scienceqa": read_scienceqa,
    "mmvet": read_mmvet,
    "mme": read_mme,
    "gqa": read_gqa,
}


def _first_picture(folder: Path, stem: str) -> Found:
    tried = [find_picture(folder, stem + ending) for ending in _PICTURE_ENDINGS]
    return next((found for found in tried if found.missing is None), tried[0])


def _is_yes(value: str, name: str) -> bool:
    known = {"yes": True, "no": False}.get(value.strip().lower())
    if known is None:
        raise ValueError(f"field '{name}' must be yes or no")
    return known


def _answers(row: Mapping[str, Any]) -> list[str]:
    answers = row.get("answers")
    if isinstance(answers, str):
        return [text_field(row, "answers")]
    if not isinstance(answers, list) or len(answers) != PEOPLE:
        return _texts(row, "answers")
    told = [each if isinstance(each, dict) else {"answer": each} for each in answers]
    return [text_field(each, "answer", allow_empty=True) for each in told]


def _texts(row: Mapping[str, Any], name: str) -> list[str]:
    values = row.get(name)
    if not isinstance(values, list) or not values:
        raise ValueError(f"field '{name}' must be a list of texts")
    return [text_field({name: value}, name) for value in values]


def _json_object(path: Path) -> dict[str, Any]:
    try:
        rows = parse_json_line(path.read_bytes().removeprefix(_BOM))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if not rows:
        raise InputError(f"{path}: the file is empty")
    return rows


def _parsed(
    path: Path, rows: Mapping[str, Any], parse: Callable[[str, Mapping[str, Any]], VisualItem]
) -> Iterator[VisualItem]:
    for key, row in rows.items():
        try:
            if not isinstance(row, dict):
                raise ValueError(f"must be a JSON object, not {type(row).__name__}")
            yield parse(key, row)
        except ValueError as error:
            raise InputError(f"{path}: id {key[:40]!r}: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        content = path.read_bytes().removeprefix(_BOM)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        try:
            yield Row(number, "", value=parse_json_line(line))
        except ValueError as error:
            yield Row(number, "", problem=str(error))


def _tab_lines(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        try:
            question, tab, answer = line.decode("utf-8").strip().rpartition("\t")
        except UnicodeDecodeError as error:
            yield Row(number, "", problem=f"not UTF-8 (byte {error.start + 1})")
            continue
        if tab:
            yield Row(number, "", value={"question": question, "answer": answer, "line": number})
        else:
            yield Row(number, "", problem="must be a question, a tab and Yes or No")
