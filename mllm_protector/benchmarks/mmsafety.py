"""MM-SafetyBench (Liu et al., arXiv 2311.17600): its files to questions.

Two layouts are read: the published one (``processed_questions/*.json`` beside ``imgs/``) and that of the
Hugging Face mirror (``data/<scenario>/<split>.parquet``). The data is for research only (CC BY-NC 4.0) and
is never bundled. Ids are the files' own keys, which have gaps in 05 and 08, never positions.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from mllm_protector.benchmarks.shared import (
    Found,
    check_limit,
    check_names,
    files_digest,
    find_image,
    font_file,
    image_field,
    lines_digest,
    with_images,
)
from mllm_protector.errors import InputError
from mllm_protector.files import read_json
from mllm_protector.protocols import Card
from mllm_protector.reading import read_records, required, text_field
from mllm_protector.records import VARIANTS, LoadedBenchmark, Question, Variant
from mllm_protector.rendering import RenderedText, Stacked, rendering_identity
from mllm_protector.scenarios import CRITERIA, GROUPS, SCENARIOS

# README of isXinLiu/MM-SafetyBench, "Evaluation". The text-only question is not defined there; "Question" is
# what the official MLLM-Protector code asks, "Changed Question" what the mirror holds.
_WORDINGS: dict[Variant, str] = {
    "SD": "Rephrased Question(SD)",
    "TYPO": "Rephrased Question",
    "SD_TYPO": "Rephrased Question",
}
_TINY = "TinyVersion_ID_List.json"
_Layout = Literal["published", "mirror"]
_Entry = tuple[str, Found]
"""The words of a question, and its image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MMSafetyBench:
    """The benchmark, or a selection of it; cheap until it is loaded.

    Attributes:
        root: a local folder in either layout; ``None`` takes the mirror on the Hugging Face hub.
        hub_name: the mirror's name there.
        revision: the mirror's commit; give one for results that are to be compared.
        variants: how questions are asked.
        scenarios: names such as ``01-Illegal_Activitiy``; ``None`` takes all 13.
        text_field: which wording TEXT asks. The mirror has ``Changed Question`` only.
        tiny: only the ids of ``<root>/TinyVersion_ID_List.json`` (168 of 1680).
        limit: at most this many questions of each scenario and variant, lowest ids first.
        render_missing: draw missing TYPO images from the key phrase, and missing SD_TYPO images from it and
            the SD image (published layout only: the mirror has no key phrases).
        font: a TrueType file for that; see ``rendering.RenderedText``.

    Raises:
        InputError: an unknown variant or scenario, or a limit below 1.
    """

    root: str | None = None
    hub_name: str = "PKU-Alignment/MM-SafetyBench"
    revision: str | None = None
    variants: Sequence[Variant] = VARIANTS
    scenarios: Sequence[str] | None = None
    text_field: Literal["Question", "Changed Question"] = "Question"
    tiny: bool = False
    limit: int | None = None
    render_missing: bool = False
    font: str | None = None

    def __post_init__(self) -> None:
        check_names("variants", self.variants, VARIANTS)
        if self.scenarios is not None:
            check_names("scenarios", self.scenarios, SCENARIOS)
        check_names("text_field", [self.text_field], ("Question", "Changed Question"))
        check_limit(self.limit)

    def load(self) -> LoadedBenchmark:
        """The questions by scenario, variant (in the order of ``VARIANTS``) and number.

        A question without its image is left out and named in ``missing``.

        Raises:
            InputError: a file or folder that is missing, broken or incomplete, or an id or a link that leads
                out of ``root``.
        """
        folder, layout = self._locate()
        if self.render_missing:
            font_file(self.font)
        return with_images(folder, self._questions(folder, layout), GROUPS)

    @property
    def card(self) -> Card:
        """What texts and images depend on; not the selection, so that a small run can be extended.

        A mirror on the hub is known by its commit, a local folder by the bytes of its question files; where
        missing images are rendered, also by which images there are and how the others are drawn.
        """
        folder, layout = self._locate()
        identity: dict[str, Any] = {"name": "mmsafety", "layout": layout, "text_field": self.text_field}
        if self.root is None:
            identity |= {"hub_name": self.hub_name, "commit": folder.name}
        else:
            pattern = "processed_questions/*.json" if layout == "published" else "data/*/*.parquet"
            identity["questions"] = files_digest(folder.glob(pattern), folder)
        if self.render_missing:
            images = sorted(folder.glob("imgs/*/*/*.jpg"))
            identity["rendering"] = rendering_identity(font_file(self.font))
            identity["pictures"] = lines_digest(file.relative_to(folder).as_posix() for file in images)
        return Card(identity=identity)

    def _questions(self, folder: Path, layout: _Layout) -> Iterator[tuple[Question, Found]]:
        read = self._published if layout == "published" else self._mirrored
        tiny = _tiny_ids(folder / _TINY) if self.tiny else None
        for scenario, variant in self._asked():
            entries = read(folder, scenario, variant)
            for key in self._selected(scenario, entries, tiny):
                text, found = entries[key]
                question = Question(
                    id=f"{scenario}/{variant}/{key}",
                    scenario=scenario,
                    variant=variant,
                    text=text,
                    criterion=CRITERIA[scenario],
                    base=f"{scenario}/{key}",
                )
                yield question, found

    def _asked(self) -> list[tuple[str, Variant]]:
        """Scenarios and variants in the benchmark's order."""
        scenarios = [name for name in SCENARIOS if self.scenarios is None or name in self.scenarios]
        return list(product(scenarios, (each for each in VARIANTS if each in self.variants)))

    def _locate(self) -> tuple[Path, _Layout]:
        if self.root is None:
            self._require_mirrored_wording()
            return self._download(), "mirror"
        folder = Path(self.root)
        if not folder.is_dir():
            raise InputError(f"root={folder}: no such folder")
        if (folder / "processed_questions").is_dir():
            return folder, "published"
        if any(folder.glob("data/*/*.parquet")):
            self._require_mirrored_wording()
            return folder, "mirror"
        raise InputError(
            f"root={folder}: holds neither processed_questions/*.json nor data/<scenario>/<split>.parquet, "
            "the two layouts of MM-SafetyBench"
        )

    def _require_mirrored_wording(self) -> None:
        if "TEXT" in self.variants and self.text_field == "Question":
            raise InputError(
                "text_field=Question: the MM-SafetyBench mirror has no 'Question' for TEXT; set "
                "text_field='Changed Question', leave TEXT out of variants, or give the published files as "
                "root"
            )

    def _download(self) -> Path:
        from huggingface_hub import snapshot_download

        wanted = [_mirror_file(*each) for each in self._asked()]
        try:
            return Path(
                snapshot_download(
                    self.hub_name, repo_type="dataset", revision=self.revision, allow_patterns=wanted
                )
            )
        except Exception as error:  # the client raises many kinds, and the way out is always the same
            raise InputError(
                f"hub_name={self.hub_name}: cannot be downloaded ({type(error).__name__}); "
                "give a local copy as root"
            ) from error

    def _published(self, folder: Path, scenario: str, variant: Variant) -> dict[str, _Entry]:
        """The questions of ``processed_questions/<scenario>.json`` with their images in ``imgs/``."""
        file = folder / "processed_questions" / f"{scenario}.json"
        rows = read_json(file)
        if not isinstance(rows, dict) or not rows:
            raise InputError(f"{file}: must be a JSON object of questions by id")
        entries: dict[str, _Entry] = {}
        for key, row in rows.items():
            try:
                if not isinstance(row, dict):
                    raise ValueError(f"must be a JSON object, not {type(row).__name__}")
                text = text_field(row, _WORDINGS.get(variant, self.text_field))
                phrase = text_field(row, "Key Phrase") if self.render_missing else None
                entries[key] = text, self._image(folder, scenario, variant, _checked_id(key), phrase)
            except ValueError as error:
                raise InputError(f"{file}: id {key!r}: {error}") from None
        return entries

    def _image(self, folder: Path, scenario: str, variant: Variant, key: str, phrase: str | None) -> Found:
        """The published image, or else one drawn from the phrase, if there is any."""

        def published(name: Variant) -> Found:
            return find_image(folder, f"imgs/{scenario}/{name}/{key}.jpg")

        if variant == "TEXT":
            return Found()
        found = published(variant)
        if found.missing is not None and phrase is not None:
            drawn = RenderedText(phrase, font_file(self.font))
            if variant == "TYPO":
                return Found(drawn)
            if variant == "SD_TYPO" and (photo := published("SD").image):
                return Found(Stacked(photo, drawn))
        return found

    def _mirrored(self, folder: Path, scenario: str, variant: Variant) -> dict[str, _Entry]:
        """The questions of ``data/<scenario>/<split>.parquet``, which carry their images."""
        file = folder / _mirror_file(scenario, variant)

        def parse(row: Mapping[str, Any]) -> tuple[str, _Entry]:
            key = _checked_id(str(required(row, "id")))
            try:
                text = text_field(row, "question")
            except ValueError as error:
                raise ValueError(f"id {key}: {error}") from None
            if variant == "TEXT":
                return key, (text, Found())
            found = image_field(row, "image", folder, f"{file}: id {key}")
            if found.image is None:
                found = Found(missing=f"no image in {file.parent.name}/{file.name}")
            return key, (text, found)

        return dict(read_records(file, parse, key=lambda record: record[0]).records)

    def _selected(
        self, scenario: str, entries: Iterable[str], tiny: Mapping[str, set[str]] | None
    ) -> list[str]:
        keys = sorted(entries, key=lambda key: (int(key), key))
        if tiny is not None:
            wanted = tiny.get(scenario, set())
            if not wanted:
                raise InputError(f"{_TINY}: has no ids for {scenario}")
            if absent := wanted.difference(keys):
                raise InputError(f"{_TINY}: {scenario} has no question with id {min(absent)}")
            keys = [key for key in keys if key in wanted]
        return keys[: self.limit]


def _mirror_file(scenario: str, variant: Variant) -> str:
    """A file of the mirror, which drops the scenarios' numbers."""
    split = "Text_only" if variant == "TEXT" else variant
    return f"data/{scenario.partition('-')[2]}/{split}.parquet"


def _checked_id(key: str) -> str:
    """The id itself: digits only, so it can name a file and cannot lead anywhere."""
    if not re.fullmatch("[0-9]{1,9}", key):
        raise ValueError(f"an id must be a number, not {key!r}")
    return key


def _tiny_ids(file: Path) -> dict[str, set[str]]:
    try:
        return {item["Scenario"]: {*map(str, item["Sampled_ID_List"])} for item in read_json(file)}
    except (TypeError, KeyError):
        raise InputError(
            f"{file}: must be a list of objects with the fields Scenario and Sampled_ID_List"
        ) from None
