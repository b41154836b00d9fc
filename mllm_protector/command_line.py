"""What is typed behind a command, as hydra reads it: overrides, and options of ours and of the user."""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mllm_protector.errors import InputError
from mllm_protector.files import expand
from mllm_protector.helping import CONFIGS, ConfigFile, flat, suggestion

__all__ = ["CONFIGS", "CommandLine", "config_error", "quoted"]

OmegaConf.register_new_resolver("configs_folder", lambda: str(CONFIGS), replace=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """The arguments of a command.

    Attributes:
        config: the name of the command's root YAML.
        overrides: such as ``data=pairs`` and ``seed=1``, as hydra reads them.
        flags: all other arguments, such as ``--multirun``.
        own: the folder of ``--config-dir``, with options of the user's.
    """

    config: str
    overrides: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    own: Path | None = None

    @classmethod
    def parsed(cls, config: str, arguments: Sequence[str]) -> "CommandLine":
        """Read arguments; flags and overrides may come in any order.

        Raises:
            InputError: a flag is unknown, or ``--config-dir`` is no folder or has an option of ours.
        """
        parser = get_args_parser()
        parser.error = _refuse
        found = parser.parse_intermixed_args(arguments)
        flags = list(arguments)
        for override in found.overrides:
            flags.remove(override)
        own = None if found.config_dir is None else expand(found.config_dir).absolute()
        line = cls(config=config, overrides=tuple(quoted(found.overrides)), flags=tuple(flags), own=own)
        line._require_own_options()
        return line

    @property
    def folders(self) -> list[Path]:
        """The folders that hold groups, in the order in which hydra searches them."""
        places = (CONFIGS, self.own, CONFIGS / self.config)
        return [place for place in places if place is not None and place.is_dir()]

    def composed(self) -> tuple[dict[str, Any], list[ConfigFile]]:
        """The values by full key, and the YAML files that they come from, the command's own first."""
        places = ",".join(f'"file://{each}"' for each in self.folders[1:])
        overrides = [*self.overrides, *([f"hydra.searchpath=[{places}]"] if places else [])]
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            content = OmegaConf.to_container(hydra.compose(self.config, overrides), resolve=False)
            loader = GlobalHydra.instance().config_loader()
            defaults = loader.compute_defaults_list(self.config, overrides, RunMode.RUN).defaults
        files = []
        for each in defaults:
            group = str(each.config_path).rpartition("/")[0]
            paths = [folder / f"{each.config_path}.yaml" for folder in self.folders]
            files += [ConfigFile(path, group, each.package or "") for path in paths if path.is_file()]
        files.sort(key=lambda file: file.path.parent != CONFIGS)
        return flat(content), files  # type: ignore[arg-type]

    def require_options(self) -> None:
        """Refuse a group whose option is null, a boolean or a number: hydra would end in a traceback."""
        for override in self.overrides:
            key, _, value = override.lstrip("+").partition("=")
            group = key.partition("@")[0]
            options = [path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")]
            if options and (value in ("null", "true", "false") or value.removeprefix("-").isdecimal()):
                raise InputError(f"{key}={value}: unknown option; choose one of {', '.join(sorted(options))}")

    def without(self, key: str) -> "CommandLine":
        """The same without what is said about a key."""
        others = (each for each in self.overrides if each.lstrip("+~").partition("=")[0] != key)
        return CommandLine(config=self.config, overrides=tuple(others), own=self.own)

    def _require_own_options(self) -> None:
        """Refuse a folder with files that hydra would not read, or would read instead of ours."""
        if self.own is None:
            return
        if not self.own.is_dir():
            raise InputError(f"--config-dir={self.own}: no such folder")
        for path in sorted(self.own.rglob("*.yaml")):
            name = path.relative_to(self.own)
            if any((folder / name).exists() for folder in (CONFIGS, CONFIGS / self.config)):
                raise InputError(f"{path}: the package has an option {name} of its own; rename the file")


def quoted(arguments: Iterable[str]) -> list[str]:
    """Overrides for hydra: ``data=[a,b]`` is a mixture, odd values are quoted.

    Raises:
        InputError: what is in ``data=[...]`` are not different options.
    """
    return [_quoted(each) for argument in arguments for each in _unfolded(argument)]


def _unfolded(override: str) -> list[str]:
    """``data=[a,b]`` as a mixture of the sources a and b; any other override as it is."""
    key, _, value = override.partition("=")
    if key != "data" or not (value.startswith("[") and value.endswith("]")):
        return [override]
    names = [name.strip(" '\"") for name in value[1:-1].split(",")]
    if len({*names}) < len(names) or not all(re.fullmatch(r"[\w.]+", name) for name in names):
        raise InputError(f"{override}: give different options of data, such as data=[pairs,labelled]")
    return ["data=mixture", *(f"+data@data.sources.{name}={name}" for name in names)]


def _quoted(override: str) -> str:
    """Quote a value that hydra cannot parse, such as a path with ``=``, ``(`` or ``~``."""
    key, equals, value = override.partition("=")
    is_template = re.match(r"\{\w+\}", value)  # such as {picture}.png; a mapping has a colon
    if not equals or (value[:1] in ("[", "{", "'", '"') and not is_template):
        return override
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return '{}="{}"'.format(key, value.replace('"', '\\"'))
    return override


def config_error(error: Exception, line: CommandLine | None = None) -> str:
    """An error of hydra or omegaconf in one line."""
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text):
        key = found.group(1) or found.group(2)
        known: Iterable[str] = ()
        with suppress(HydraException, OmegaConfBaseException):  # of another mistake
            known = line.without(key).composed()[0] if line else ()
        return f"{key}: unknown config key{suggestion(key, known)}"
    if found := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        group, option = found.groups()
        options = re.findall(r"^\t([\w.]+)$", text.partition("Config search path")[0], flags=re.MULTILINE)
        folders = line.folders if line else [CONFIGS]
        options = options or sorted(path.stem for each in folders for path in (each / group).glob("*.yaml"))
        return f"{group}={option}: unknown option; choose one of {', '.join(options)}"
    if found := re.search(r"Ambiguous value for argument '(.*)'", text):
        key, _, value = found.group(1).partition("=")
        return f"{key}={value}: a comma needs quotes within those of the shell: '{key}=\"{value}\"'"
    return ": ".join(text.splitlines()[:2]) or type(error).__name__


def _refuse(message: str) -> NoReturn:
    raise InputError(f"{message}; --help explains the keys")
