"""``guard.json``: what a trained part says of itself, beside its weights.

The weights are in the standard Hugging Face or PEFT format. This file adds what that does not keep: prompt,
lengths, base, threshold and data, and a sha256 of every file that is loaded. It is written last, so a half-
written folder never loads. It is not signed: it tells a damaged part, not one that was forged with care.
"""

import json
import logging
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Required

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, with_config
from pydantic.dataclasses import dataclass as checked_dataclass
from typing_extensions import TypedDict

from mllm_protector import prompts
from mllm_protector.errors import InputError
from mllm_protector.files import file_digest, read_json, write_json
from mllm_protector.models.backbone import Backbone
from mllm_protector.models.known import KnownAnswer
from mllm_protector.models.tuning import Quantization, TuningKind

log = logging.getLogger(__name__)

SCHEMA = 2
UNHASHED = 1
"""The schema of earlier releases, which hashed the weights alone; a key that it lacks has its default."""
FILE_NAME = "guard.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
PROBE_FILE = "probe.safetensors"

HARM_CONVENTION = "positive logit = harmful; score = sigmoid((logit + offset) / temperature) = P(harmful)"

WEIGHTS = "*.safetensors"
LOADED = (
    *("config.json", "adapter_config.json", "*.safetensors.index.json"),
    *("*token*.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("*.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    "*.py",
)
"""What decides an answer of a part beside its weights. (How it decodes is set by the detoxifier.)"""

MEASURED = (
    *("threshold", "threshold_how", "group_thresholds", "temperature", "offset", "calibration"),
    *("metrics", "versions", "weights", "files", "prompt_sha256", "base_fingerprint", "pretrained", "known"),
)
"""What is only known when a part is saved, or is not a setting of a training."""

TOY = "toy data"
"""The name of the embedded toy set among a part's sources."""

Kind = Literal["detector", "detoxifier"]
Share = Annotated[float, Field(ge=0, le=1)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Prompt = Annotated[str, AfterValidator(lambda text: prompts.require_fields(text, {"query", "answer"}))]

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How a logit becomes a score, in float64 so that strong scores stay apart.

    No scale changes the order of two answers.

    Attributes:
        temperature: positive; above 1 it makes every score less sure.
        offset: in logits; positive makes every answer more harmful.
    """

    temperature: float = 1.0
    offset: float = 0.0

    def logits(self, logits: Sequence[float] | Floats) -> Floats:
        """The calibrated logits, shape (n,)."""
        return (np.asarray(logits, dtype=np.float64) + self.offset) / self.temperature

    def scores(self, logits: Sequence[float] | Floats) -> list[float]:
        """P(harmful) in [0, 1] of each answer; NaN where its logit is."""
        from scipy.special import expit

        scores: list[float] = expit(self.logits(logits)).tolist()
        return scores


@with_config(STRICT)
class Base(TypedDict, total=False):
    """The fields of a ``Backbone``, as JSON."""

    name: Required[Annotated[str, Field(min_length=1)]]
    revision: str | None
    dtype: Literal["float32", "bfloat16"]
    attention: str | None
    trust_remote_code: bool
    quantization: Quantization | None


@checked_dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class GuardFile:
    """The content of ``guard.json``.

    Attributes:
        tuning: ``full`` (the folder holds a whole model), ``lora`` (an adapter on ``base``) or ``probe`` (a
            linear layer that reads ``base``).
        base_fingerprint: identifies the base (``parts.fingerprint``); ``None`` if not taken.
        pretrained: false where the backbone started from random weights.
        prompt: the template that renders its input; ``prompt_sha256`` guards it against edits.
        max_length: the longest input in tokens.
        pad_id: the id that fills batches.
        chat: the prompt goes through the tokenizer's chat template.
        joined: the prompt and the texts are tokenised in one piece, as the part was trained; special tokens
            inside a text stay words.
        threshold: scores at or above it are harmful; ``None`` for a detoxifier, as is ``temperature``.
        group_thresholds: of an earlier release, by group; they are no longer used.
        calibration: for what, on what data and with what metrics threshold and scale were chosen, and why
            they are these; ``None`` where they were not chosen on data.
        window: the most tokens of an answer that a detector reads at once; ``None`` for as many as fit.
        metrics: of exactly these weights on the validation split.
        weights: file name to sha256.
        files: the same for configuration and tokenizer; empty in a file of an earlier release.
        known: of an exported detector; the file of any other part has no such key.
    """

    kind: Kind
    tuning: TuningKind
    base: Base
    base_fingerprint: Hash | None = None
    pretrained: bool = True
    prompt: Prompt
    max_length: Annotated[int, Field(ge=1)]
    pad_id: Annotated[int, Field(ge=0)]
    chat: bool = False
    joined: bool = False
    threshold: Share | None = None
    threshold_how: str | None = None
    group_thresholds: dict[str, Share] = field(default_factory=dict)
    temperature: Annotated[float, Field(gt=0)] | None = None
    offset: float = 0.0
    calibration: dict[str, Any] | None = None
    window: Annotated[int, Field(ge=1)] | None = None
    data: dict[str, Any]
    metrics: dict[str, Any]
    versions: dict[str, str]
    weights: dict[str, Hash] = field(default_factory=dict)
    files: dict[str, Hash] = field(default_factory=dict)
    known: list[KnownAnswer] = field(default_factory=list)
    prompt_sha256: str = ""
    schema: Annotated[int, Field(ge=UNHASHED, le=SCHEMA)] = SCHEMA
    harm_convention: Annotated[str, Field(pattern="^positive logit = harmful;")] = HARM_CONVENTION

    def backbone(self) -> Backbone:
        """The base as it was loaded for training."""
        return Backbone(**self.base)

    @property
    def harmful_from(self) -> float:
        """A detector's threshold: scores at or above it are harmful."""
        return 0.5 if self.threshold is None else self.threshold

    @property
    def scale(self) -> Scale:
        """How a logit becomes a score."""
        return Scale(temperature=self.temperature or 1.0, offset=self.offset)

    @property
    def caveat(self) -> str | None:
        """Why this part guards nothing, in one sentence; ``None`` for all that anybody means to use."""
        sets = [] if self.pretrained else [str(source.get("set")) for source in self.data.get("sources", [])]
        if {*sets} <= {TOY}:
            return None
        return (
            f"the {self.kind} is a tiny model that began with random weights and has read {', '.join(sets)} "
            "and nothing else: it tries the commands and guards nothing; train it with backbone=hub "
            "backbone.name=<a folder or a name on the hub>"
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What the results of any part depend on."""
        names = ("kind", "base_fingerprint", "weights", "files", "prompt_sha256", "max_length")
        return {"base": self.base["name"]} | {name: getattr(self, name) for name in names}

    def origin(self) -> dict[str, Any]:
        """All that is decided before the training: base, prompt, lengths, data."""
        known = {name: value for name, value in asdict(self).items() if name not in MEASURED}
        return known | {"schema": UNHASHED}  # so that trainings which an earlier release began resume

    def write(self, folder: Path) -> None:
        """Write ``guard.json``, hashing the files that are in the folder now."""
        content = asdict(self) | {
            "weights": weight_hashes(folder),
            "files": _hashes(folder, LOADED),
            "prompt_sha256": prompts.template_hash(self.prompt),
            "schema": SCHEMA,
            "harm_convention": HARM_CONVENTION,
        }
        write_json(
            folder / FILE_NAME, {name: content[name] for name in content if name != "known" or self.known}
        )


def read_guard_file(folder: Path, kind: Kind, *, served: bool = False) -> GuardFile:
    """Read and check ``guard.json``; what a user must know of an intact part is logged, once per folder.

    The weights of a part that is ``served`` elsewhere are not looked for.

    Raises:
        InputError: no such folder or file, another kind or schema, an impossible value, an edited prompt, or
            files that are not the ones it was written for.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; train the {kind} first or give {kind}=<folder>")
    path = folder / FILE_NAME
    if not path.is_file():
        raise InputError(f"{folder}: no {FILE_NAME}, so this is not a trained {kind}")
    content = read_json(path, strict=True)
    if not isinstance(content, dict) or content.get("schema") not in (UNHASHED, SCHEMA):
        raise InputError(f"{path}: not of schema {SCHEMA}; it was written by another release")
    if content.get("kind") != kind:
        raise InputError(f"{folder}: holds a {content.get('kind')}, but a {kind} is wanted")
    missing = [each.name for each in fields(GuardFile) if each.name not in (*content, "known")]
    if content["schema"] == SCHEMA and missing:
        raise InputError(f"{path}: {missing[0]} is missing; copy the file again or retrain")
    prompt = content.get("prompt")
    if not isinstance(prompt, str) or prompts.template_hash(prompt) != content.get("prompt_sha256"):
        raise InputError(f"{path}: the prompt was edited; a trained part only knows its own prompt")
    try:
        guard = GuardFile(**content)
    except ValidationError as error:
        first = error.errors()[0]
        value = textwrap.shorten(json.dumps(first["input"]), width=60, placeholder=" ...")
        key = ".".join(map(str, first["loc"]))
        problem = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
        problem = f"{key} is missing" if first["type"] == "missing" else f"{key}={value}: {problem}"
        raise InputError(f"{path}: {problem}; copy the file again or retrain") from None
    _require_whole(guard, folder, served)
    if guard.group_thresholds:
        instead = f"threshold={guard.threshold} holds for all answers"
        _warn_once(f"{folder}: its group_thresholds are no longer used; {instead}")
    if guard.caveat:
        _warn_once(f"{folder}: {guard.caveat}")
    return guard


def _require_whole(guard: GuardFile, folder: Path, served: bool) -> None:
    """Refuse a folder whose files are not those that its ``guard.json`` was written for."""
    path = folder / FILE_NAME
    if guard.kind == "detector" and guard.threshold is None:
        raise InputError(f"{path}: threshold is missing; copy the file again or retrain")
    if not guard.weights:
        raise InputError(f"{path}: names no weights; the part was saved without any in safetensors format")
    held = {"lora": ADAPTER_FILES[1], "probe": PROBE_FILE}
    if any((name in guard.weights) != (guard.tuning == tuning) for tuning, name in held.items()):
        raise InputError(f"{path}: tuning={guard.tuning} does not fit {', '.join(guard.weights)}")
    found, wanted = ({}, {}) if served else (weight_hashes(folder), guard.weights)
    if guard.schema == SCHEMA or guard.files:
        found, wanted = found | _hashes(folder, LOADED), wanted | guard.files
    else:
        unchecked = "its configuration and tokenizer files are not checked"
        _warn_once(f"{folder}: saved by an earlier release, so {unchecked}")
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            state = "missing" if name not in found else "not a file that the part was saved with"
            raise InputError(f"{folder / name}: {state}; copy the checkpoint again or retrain")


def warn_of(guard: GuardFile) -> None:
    """Log why a part guards nothing, where it does not."""
    if guard.caveat:
        log.warning("%s", guard.caveat)


@cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


def weight_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every safetensors file directly in a folder."""
    return _hashes(folder, [WEIGHTS])


def loaded_files(folder: Path, patterns: Iterable[str] = (WEIGHTS, *LOADED)) -> list[str]:
    """The files of a part's folder that are loaded, by their names within it."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _hashes(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in loaded_files(folder, patterns)}
