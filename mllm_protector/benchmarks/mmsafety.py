"""MM-SafetyBench (Liu et al., arXiv 2311.17600): its files to questions.

Two layouts are read: the published one (``processed_questions/*.json`` beside ``imgs/``) and that of the
Hugging Face mirror (``data/<scenario>/<split>.parquet``). The data is for research only (CC BY-NC 4.0) and
is never bundled. Ids are the files' own keys, which have gaps in 05 and 08, never positions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mllm_protector.benchmarks.mmsafety_files import (
    Entry,
    mirror_entries,
    mirror_file,
    published_entries,
)
from mllm_protector.benchmarks.selection import (
    check_limit,
    check_names,
    files_digest,
    lines_digest,
    relative,
    warn_of_missing,
)
from mllm_protector.errors import InputError
from mllm_protector.files import read_json
from mllm_protector.images import rendering_identity
from mllm_protector.records import VARIANTS, LoadedBenchmark, Question, Variant
from mllm_protector.scenarios import CRITERIA, GROUPS, SCENARIOS

_TINY = "TinyVersion_ID_List.json"
_Layout = Literal["published", "mirror"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MMSafetyBench:
    """The benchmark, or a selection of it; cheap until it is loaded.

    Attributes:
        root: a local folder in either layout; ``None`` takes the mirror on the Hugging Face hub.
        hub_name: the mirror's name there.
        revision: the mirror's commit; give one for results that are to be compared.
        kinds: how questions are asked.
        scenarios: names such as ``01-Illegal_Activitiy``; ``None`` takes all 13.
        text_field: which wording TEXT asks. The mirror has ``Changed Question`` only.
        tiny: only the ids of ``<root>/TinyVersion_ID_List.json`` (168 of 1680).
        limit: at most this many questions of each scenario and kind, lowest ids first.
        render_missing: draw missing TYPO images from the key phrase, and missing SD_TYPO images from it and
            the SD image (published layout only: the mirror has no key phrases).
        font: a TrueType file for that; see ``images.RenderedText``.

    Raises:
        InputError: an unknown kind or scenario, or a limit below 1.
    """

    root: str | None = None
    hub_name: str = "PKU-Alignment/MM-SafetyBench"
    revision: str | None = None
    kinds: Sequence[Variant] = VARIANTS
    scenarios: Sequence[str] | None = None
    text_field: Literal["Question", "Changed Question"] = "Question"
    tiny: bool = False
    limit: int | None = None
    render_missing: bool = False
    font: str | None = None

    def __post_init__(self) -> None:
        check_names("kinds", self.kinds, VARIANTS)
        if self.scenarios is not None:
            check_names("scenarios", self.scenarios, SCENARIOS)
        check_names("text_field", [self.text_field], ("Question", "Changed Question"))
        check_limit(self.limit)

    def load(self) -> LoadedBenchmark:
        """The questions by scenario, kind (in the order of ``VARIANTS``) and number.

        A question without its picture is left out and named in ``missing``.

        Raises:
            InputError: a file or folder that is missing, broken or incomplete, or an id or a link that leads
                out of ``root``.
        """
        folder, layout = self._locate()
        if self.render_missing and self.font is not None and not Path(self.font).is_file():
            raise InputError(f"font={self.font}: no such file")
        tiny = _tiny_ids(folder / _TINY) if self.tiny else None

        questions: list[Question] = []
        missing: list[str] = []
        for scenario in self._scenarios():
            for variant, entries in self._entries(folder, layout, scenario):
                for key in self._selected(scenario, entries, tiny):
                    identifier, entry = f"{scenario}/{variant}/{key}", entries[key]
                    if entry.found.missing is not None:
                        missing.append(f"{identifier}: {entry.found.missing}")
                        continue
                    questions.append(
                        Question(
                            id=identifier,
                            scenario=scenario,
                            variant=variant,
                            text=entry.text,
                            image=entry.found.image,
                            criterion=CRITERIA[scenario],
                            base=f"{scenario}/{key}",
                        )
                    )
        return warn_of_missing(folder, LoadedBenchmark(questions=questions, missing=missing, groups=GROUPS))

    def identity(self) -> dict[str, Any]:
        """What texts and pictures depend on; not the selection, so that a small run can be extended.

        A mirror on the hub is known by its commit, a local folder by the bytes of its question files; where
        missing pictures are rendered, also by which pictures there are and how the others are drawn.
        """
        folder, layout = self._locate()
        identity: dict[str, Any] = {"name": "mmsafety", "layout": layout, "text_field": self.text_field}
        if self.root is None:
            identity |= {"hub_name": self.hub_name, "commit": folder.name}
        else:
            pattern = "processed_questions/*.json" if layout == "published" else "data/*/*.parquet"
            identity["questions"] = files_digest(folder.glob(pattern), folder)
        if self.render_missing:
            pictures = sorted(folder.glob("imgs/*/*/*.jpg"))
            identity["rendering"] = rendering_identity(self._font())
            identity["pictures"] = lines_digest(relative(file, folder) for file in pictures)
        return identity

    def _scenarios(self) -> list[str]:
        return [name for name in SCENARIOS if self.scenarios is None or name in self.scenarios]

    def _variants(self) -> list[Variant]:
        return [variant for variant in VARIANTS if variant in self.kinds]

    def _font(self) -> Path | None:
        return None if self.font is None else Path(self.font)

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
        if "TEXT" in self.kinds and self.text_field == "Question":
            raise InputError(
                "text_field=Question: the MM-SafetyBench mirror has no 'Question' for TEXT; set "
                "text_field='Changed Question', leave TEXT out of kinds, or give the published files as root"
            )

    def _download(self) -> Path:
        from huggingface_hub import snapshot_download

        wanted = [mirror_file(scenario, kind) for scenario in self._scenarios() for kind in self._variants()]
        try:
            folder = snapshot_download(
                self.hub_name, repo_type="dataset", revision=self.revision, allow_patterns=wanted
            )
        except Exception as error:  # the client raises many kinds, and the way out is always the same
            raise InputError(
                f"hub_name={self.hub_name}: cannot be downloaded ({type(error).__name__}); "
                "give a local copy as root"
            ) from error
        return Path(folder)

    def _entries(
        self, folder: Path, layout: _Layout, scenario: str
    ) -> Iterator[tuple[Variant, dict[str, Entry]]]:
        if layout == "mirror":
            return mirror_entries(folder, scenario, self._variants())
        return published_entries(
            folder,
            scenario,
            self._variants(),
            asked_as_text=self.text_field,
            render_missing=self.render_missing,
            font=self._font(),
        )

    def _selected(
        self, scenario: str, entries: Mapping[str, Entry], tiny: Mapping[str, set[str]] | None
    ) -> list[str]:
        keys = sorted(entries, key=lambda key: (int(key), key))
        if tiny is not None:
            wanted = tiny.get(scenario, set())
            if not wanted:
                raise InputError(f"{_TINY}: has no ids for {scenario}")
            if absent := wanted - entries.keys():
                raise InputError(f"{_TINY}: {scenario} has no question with id {min(absent)}")
            keys = [key for key in keys if key in wanted]
        return keys[: self.limit]


def _tiny_ids(file: Path) -> dict[str, set[str]]:
    try:
        return {item["Scenario"]: {*map(str, item["Sampled_ID_List"])} for item in read_json(file)}
    except (TypeError, KeyError):
        raise InputError(
            f"{file}: must be a list of objects with the fields Scenario and Sampled_ID_List"
        ) from None
