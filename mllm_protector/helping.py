"""The text of ``--help``: a script's groups with their options, and its keys, in the words of the YAML."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

WIDTH = 48
"""Columns in front of an explanation; longer keys push theirs to the right."""

_GROUP = re.compile(r"^ *- /?(\w+)(?:@([\w.]+))?: *(\[.*?\]|[\w.-]*) *(?:# *(.*))?$", re.MULTILINE)
_KEY = re.compile(r"^( *)(\w+):(?: .*?)??(?: +# +(.*))?$")


class ConfigFile(NamedTuple):
    """A YAML file, its folder's path within the configs, and where its keys go: ``judges.chat``."""

    path: Path
    group: str
    package: str


def help_text(
    usage: str, values: Mapping[str, Any], files: Sequence[ConfigFile], folders: Sequence[Path]
) -> str:
    """Groups first, then every key with its value and its explanation.

    Args:
        usage: what stands above.
        values: of all keys by their full names, in order.
        files: that the values come from, the script's own first.
        folders: in which groups are looked for.
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
    more = "--cfg job prints the config, --multirun runs several (docs/training.md), --version the version."
    return "\n".join([*lines, "", more, ""])


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config by their full names, without what names constructors."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            found |= flat(value, f"{key}.")
        elif name not in ("_target_", "_partial_"):
            found[key] = value
    return found


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
            options = sorted(path for folder in folders for path in (folder / group).glob("*.yaml"))
            yield from (_line(f"    {path.stem}", _first_sentence(path)) for path in options)


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
    """What stands behind the keys of a file."""
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
    """Of the comment at a file's top."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").strip())
    return re.split(r"(?<=\.) ", " ".join(lines), maxsplit=1)[0]


def _line(left: str, comment: str) -> str:
    return f"{left:{WIDTH}}  # {comment}" if comment else left
