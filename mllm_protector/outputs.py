"""Folders of results: no command overwrites a file that it did not write, or one that it reads.

A command claims its folder before it works. A marker in the folder says which files the command left there.
If a file of one of the command's names is there and differs from that, it belongs to somebody else and the
command refuses to run. Meanwhile a lock keeps other runs out.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import yaml

from mllm_protector.errors import InputError
from mllm_protector.files import expand, file_digest, read_json, write_json, write_text
from mllm_protector.locks import locked

MARKER = ".mllm_protector.json"
CONFIG = "config.yaml"

_MODEL = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.py", "merges.txt", "vocab.txt")
"""What ``save_pretrained`` writes for a model, its tokenizer and its processor."""
_TRAINING = (*_MODEL, "metrics.jsonl", "last", "checkpoints")
_PART = (*_TRAINING, "training.png", "README.md", CONFIG, "data_report.*", "wandb", "wandb_run_id.txt")

WRITES: Mapping[str, tuple[str, ...]] = {
    "train_detector": _PART,
    "train_detoxifier": _PART,
    "toy_mllm": (*_TRAINING, "untrained"),
    "export_detector": (*_MODEL, "README.md", CONFIG),
    "import_official_detector": (*_MODEL, CONFIG),
    "evaluate": ("asr.*", "measurements.csv", "report.html", "run.json", "cache", "*/results.jsonl"),
    "eval_detector": (
        *("metrics.json", "scores.jsonl", "report.*", "sets.*", "measurements.csv"),
        *("*/metrics.json", "*/scores.jsonl", "*/report.*"),
    ),
    "eval_robustness": ("robustness.*", "measurements.csv", "cache"),
    "eval_detoxifier": ("metrics.json", "rewrites.jsonl", "rewrites.md"),
    "measure_latency": ("latency.json", "latency.md"),
    "measure_streaming": ("streaming.json", "streaming.csv", "streaming.md"),
    "export_answers": ("*_*.tsv", "*_samples_*.jsonl"),
    "list_questions": ("questions.jsonl",),
    "compare": ("compare.*",),
    "prepare_data": ("data_report.*", "train.jsonl", "validation.jsonl"),
    "generate_pairs": ("generation.json", "pairs.jsonl", "cache"),
    "run_benchmark": ("benchmark.json", CONFIG),
}
"""Function of a command -> patterns of the names that it writes in its folder."""

SMALL = 1 << 24
"""Bytes up to which a file is recognised by its hash; a larger one by its size."""

WITHOUT_INFLUENCE = (
    "checkpoint.",
    "fit.compile",
    "fit.gradient_checkpointing",
    "fit.log_every",
    "fit.micro_batch",
    "fit.packing",
    "resume",
    "tracker.",
)
"""Prefixes of keys that change results by rounding at most."""


@contextmanager
def claim_output_dir(settings: Mapping[str, Any], command: str) -> Iterator[None]:
    """Claim ``output_dir`` while a command works, and write ``config.yaml`` there for commands that keep one.

    Args:
        settings: all keys of the command, as plain values.
        command: the name of its function. One that is not in ``WRITES`` claims nothing.

    Raises:
        InputError: as ``claimed``, or the folder holds weights or checkpoints of other settings.
    """
    texts = {key: value for key, value in _leaves("", settings) if isinstance(value, str)}
    for key, value in texts.items():
        if key.endswith(("output_dir", "folder", "quarantine")) and not value.strip():
            raise InputError(f"{key}={value}: is empty; give a path")
    _require_own_quarantines(texts)
    if command not in WRITES:
        yield
        return
    folder = Path(settings["output_dir"])
    # Constructors write to keys such as backbone.folder and check them on their own.
    uses = {key: value for key, value in texts.items() if not key.endswith(("output_dir", "folder"))}
    with claimed(folder, command, uses=uses):
        if CONFIG in WRITES[command] and is_first():
            _require_same_training(settings, folder)
            write_text(folder / CONFIG, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
        yield


@contextmanager
def claimed(
    folder: Path, command: str, *, key: str = "output_dir", uses: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Claim a folder while a command works. Only the first of several processes does this.

    Args:
        folder: created if it is missing, and removed again if nothing was written.
        command: one of ``WRITES``.
        key: the folder's key, as the user typed it.
        uses: other keys and their texts. Those that are paths must not be overwritten.

    Raises:
        InputError: the folder cannot be written to, another run uses it, or the command would overwrite
            somebody else's file.
    """
    if not is_first():
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{key}={folder}: is a file; name a folder")
    _require_unused(folder, command, key, uses or {})
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.callback(_tidy, folder, new)
            held.enter_context(locked(folder, key))
            _mark(folder, command, key)
        except OSError as error:
            raise InputError(f"{key}={folder}: cannot be written to ({error.strerror or error})") from error
        held.callback(_remember, folder, command)
        yield


def probe(folder: Path) -> None:
    """Test that files can be written to a folder, or to its nearest existing parent. Leaves nothing behind.

    Raises:
        OSError: it cannot be written to.
    """
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    with TemporaryFile(dir=folder, buffering=0) as file:
        file.write(b"0")


def is_first() -> bool:
    """Whether this is the process, among those of a launch, that writes the shared files.

    Raises:
        InputError: RANK or WORLD_SIZE in the environment is not a number.
    """
    numbers = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    for name, text in numbers.items():
        if not text.strip().removeprefix("-").isdecimal():
            raise InputError(f"{name}={text}: this environment variable must be a number")
    return int(numbers["WORLD_SIZE"]) <= 1 or int(numbers["RANK"]) == 0


def keep_mark(path: Path) -> None:
    """Let a file that another command of this package changed still count as its first command's."""
    marker = path.parent / MARKER
    if not marker.is_file():
        return
    marked = _read_marker(marker)
    for left in marked.values():
        if left is not None and path.name in left:
            left[path.name] = _state(path)
    write_json(marker, marked)


def _require_own_quarantines(texts: Mapping[str, str]) -> None:
    """Refuse one quarantine file for two sets: the second would overwrite the first."""
    taken: dict[Path, str] = {}
    for key, value in texts.items():
        if key.endswith("quarantine"):
            other = taken.setdefault(expand(value).resolve(), key)
            if other != key:
                raise InputError(f"{key}={value}: is also that of {other}; give each its own file")


def _require_unused(folder: Path, command: str, key: str, uses: Mapping[str, str]) -> None:
    """Refuse a folder in which the command would overwrite its input or the output of another key."""
    root = folder.resolve()
    for name, value in uses.items():
        if not value or "\n" in value or "\0" in value:
            continue  # no path
        path = Path(os.path.expanduser(value)).resolve()  # noqa: PTH111 (an unknown ~name is not an error)
        if path.is_relative_to(root):
            inside = path.relative_to(root).parts
            covered = ("/".join(inside[: pattern.count("/") + 1]) for pattern in WRITES[command])
            if not inside or any(map(fnmatchcase, covered, WRITES[command])):
                raise InputError(f"{name}={value}: this command would overwrite it; choose another {key}")


def _mark(folder: Path, command: str, key: str) -> None:
    """Record that a command is at work, unless another's files have the names that it writes."""
    marker = folder / MARKER
    marked = _read_marker(marker) if marker.is_file() else {}
    # Nobody knows what a killed run wrote, so everything of the command's names counts as its own.
    left = marked.get(command, {})
    if left is not None:
        for name, path in _matches(folder, command):
            changed = path.is_file() and left.get(name) != _state(path)
            if changed or (path.is_dir() and command not in marked):
                raise InputError(
                    f"{path}: differs from what this command left, and would be overwritten; choose another "
                    f"{key}, or move the file away"
                )
    write_json(marker, marked | {command: None})


def _remember(folder: Path, command: str) -> None:
    """Record what a command leaves."""
    marker = folder / MARKER
    with suppress(OSError, InputError):
        left = {name: _state(path) for name, path in _matches(folder, command) if path.is_file()}
        write_json(marker, _read_marker(marker) | {command: left})


def _matches(folder: Path, command: str) -> Iterator[tuple[str, Path]]:
    found = {path for pattern in WRITES[command] for path in folder.glob(pattern)}
    for path in sorted(found):
        if not path.name.startswith("."):
            yield path.relative_to(folder).as_posix(), path


def _state(path: Path) -> str:
    """What a file is recognised by, also when it was copied."""
    size = path.stat().st_size
    return file_digest(path) if size <= SMALL else f"{size} bytes"


def _read_marker(marker: Path) -> dict[str, dict[str, str] | None]:
    """A command -> what it left, by name; ``None`` if it is at work or was killed."""
    marked = read_json(marker)
    if not isinstance(marked, dict) or not all(isinstance(left, dict | None) for left in marked.values()):
        raise InputError(f"{marker}: was edited; remove it, and the files that the command may overwrite")
    return marked


def _tidy(folder: Path, new: Sequence[Path]) -> None:
    """Remove new folders that are still empty; ``new`` is ordered from the innermost."""
    with suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {MARKER}:
            (folder / MARKER).unlink(missing_ok=True)
            for each in new:
                each.rmdir()


def _require_same_training(settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse to overwrite weights or checkpoints that were trained with other settings.

    A run that failed before it saved either may be repeated in its folder with any settings.
    """
    kept = [folder / "guard.json"] * (folder / "guard.json").exists()
    kept += [folder / "checkpoints"] * any(folder.glob("checkpoints/step-*"))
    if not kept or not all((folder / name).exists() for name in (CONFIG, "metrics.jsonl")):
        return
    try:
        saved = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        words = f"not readable as YAML; remove its folder ({type(error).__name__})"
        raise InputError(f"{folder / CONFIG}: {words}") from None
    now, earlier = (
        {key: value for key, value in _leaves("", each) if not key.startswith(WITHOUT_INFLUENCE)}
        for each in (settings, saved)
    )
    if changed := sorted(key for key in {*now, *earlier} if now.get(key) != earlier.get(key)):
        raise InputError(
            f"{folder}: holds results of another configuration (changed: {', '.join(changed[:5])}); choose "
            f"another output_dir, or remove {' and '.join(map(str, kept))} to train again"
        )


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Single values and their full keys."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}" if key else str(name), item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(f"{key}[{index}]", item)
    else:
        yield key, value
