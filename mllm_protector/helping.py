"""The text of ``--help``, and suggestions for unknown keys, both from the YAML files and their comments."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any, NamedTuple

_HERE = Path(__file__).resolve().parent
CONFIGS = next(each for each in (_HERE / "configs", _HERE.parent / "configs") if each.is_dir())
"""Within the package where it is installed from a wheel, beside it in a checkout."""

_WIDTH = 48
"""Columns before an explanation; a longer key pushes it to the right."""

_GROUP = re.compile(r"^ *- /?(\w+)(?:@([\w.]+))?: *(\[.*?\]|[\w.-]*) *(?:# *(.*))?$", re.MULTILINE)
_KEY = re.compile(r"^( *)(\w+):(?: .*?)??(?: +# +(.*))?$")


_FLAGS = (
    "--cfg job prints the config, --multirun runs several (docs/training.md), --version the version.",
    "--config-dir FOLDER adds options of your own: FOLDER/GROUP/NAME.yaml is the option GROUP=NAME.",
)


class ConfigFile(NamedTuple):
    """A YAML file, its folder below ``configs``, and the prefix of its keys, such as ``judges.chat``."""

    path: Path
    group: str
    package: str


def help_text(
    usage: str, values: Mapping[str, Any], files: Sequence[ConfigFile], folders: Sequence[Path]
) -> str:
    """List the groups with their options, then every key with its value and explanation.

    Args:
        usage: the first line.
        values: by full key, in order.
        files: the YAML files that the values come from, the script's own first.
        folders: the folders that hold the groups.
    """
    lines = [
        usage.replace("``", ""),
        "",
        "Groups: choose an option with group=option, several with group=[one,other]",
        "",
    ]
    lines += _groups(files, folders)
    lines += ["", "Keys of these options: change one with key=value", ""]
    lines += _keys(values, files)
    return "\n".join([*lines, "", *_FLAGS, ""])


def version_line() -> str:
    """The answer to ``--version``."""
    return f"mllm-protector {version('mllm-protector')}\n"


def missing_extra(module: str | None) -> str | None:
    """Advice for a module that is not installed, if an optional part of this package brings it."""
    for requirement in requires("mllm-protector") or ():
        found = re.match(r"([\w-]+).*; extra == .(\w+).$", requirement)
        if found and found[1].replace("-", "_") == module:
            return f"{module} is not installed; it comes with: pip install 'mllm-protector[{found[2]}]'"
    return None


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config by full key, without the names of constructors."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            found |= flat(value, f"{key}.")
        elif name not in ("_target_", "_partial_"):
            found[key] = value
    return found


RENAMED = {"kinds": "variants"}
"""The last part of keys that were renamed, and what it is now."""


def suggestion(key: str, known: Iterable[str] = ()) -> str:
    """Advice for an unknown key: the ``known`` full keys that end in its name, or the name most like it."""
    place, _, name = key.rpartition(".")
    name = RENAMED.get(name, name)
    renamed = f"{place}.{name}" if place else name
    if renamed != key and renamed in known:
        return f"; give {renamed}=..."
    if longer := [f"{each}=..." for each in known if each.endswith(f".{name}") and each != key]:
        return f"; give {' or '.join(longer)}"
    words = {
        word
        for path in CONFIGS.rglob("*.yaml")
        if path.parent.name != "accelerate"
        for word in re.findall(r"^\s*(\w+):", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    words.update(part for each in known for part in each.split("."))
    close = difflib.get_close_matches(name, sorted(words - {name}), n=1)
    return f" (did you mean {close[0]}?)" if close else "; --help lists the keys"


def _groups(files: Sequence[ConfigFile], folders: Sequence[Path]) -> Iterator[str]:
    for file in files:
        for group, package, default, comment in _GROUP.findall(file.path.read_text(encoding="utf-8")):
            place = ".".join(filter(None, (file.package, package)))
            chosen = [
                each.path.stem
                for each in files
                if each.group == group and (not package or each.package == place)
            ]
            name = f"{group}@{place}" if package else group
            yield _line(f"{name}={','.join(chosen) or default}", comment)
            options = (path for folder in folders for path in (folder / group).glob("*.yaml"))
            for path in sorted(options, key=lambda each: each.stem):
                yield _line(f"    {path.stem}", _first_sentence(path))


def _keys(values: Mapping[str, Any], files: Sequence[ConfigFile]) -> Iterator[str]:
    comments: dict[str, str] = {}
    for file in files:
        comments |= _comments(file)
    said = set()
    for key, value in values.items():
        parts = key.split(".")
        for parent in (".".join(parts[:count]) for count in range(1, len(parts))):
            if parent in comments and parent not in said:
                said.add(parent)
                yield _line(f"{parent}:", comments[parent])
        shown = value if isinstance(value, str) else json.dumps(value)
        yield _line(f"{key}: {json.dumps(shown) if chr(10) in shown else shown}", comments.get(key, ""))


def _comments(file: ConfigFile) -> dict[str, str]:
    """The comments behind the keys of a file."""
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in file.path.read_text(encoding="utf-8").splitlines():
        if match := _KEY.match(line):
            indent, name, comment = len(match[1]), match[2], match[3]
            parents = [*(parent for parent in parents if parent[0] < indent), (indent, name)]
            if comment:
                names = (each for _, each in parents)
                found[".".join(filter(None, (file.package, *names)))] = comment
    return found


def _first_sentence(path: Path) -> str:
    """The first sentence of the comment at the top of a file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").strip())
    return re.split(r"(?<=\.) ", " ".join(lines), maxsplit=1)[0]


def _line(left: str, comment: str) -> str:
    return f"{left:{_WIDTH}}  # {comment}" if comment else left
