"""From a command line and YAML to one call, and from exceptions to one clear line.

No other module knows hydra. The signatures of the functions and constructors that a config names are its only
schema, and they are checked before anything is built.
"""

import logging
import os
import pydoc
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mllm_protector.calls import check, check_call, construct
from mllm_protector.errors import InputError, RunError, Stop, stoppable, system_error
from mllm_protector.files import expand
from mllm_protector.helping import CONFIGS, ConfigFile, flat, help_text, suggestion
from mllm_protector.outputs import claim_output_dir, is_first

__all__ = ["CONFIGS", "build", "clear_errors", "launch", "quiet_libraries", "recorded_data", "reread", "run"]

OmegaConf.register_new_resolver("configs_folder", lambda: str(CONFIGS), replace=True)


def launch(usage: str, target: str, then: str | None = None) -> None:
    """Run a script: answer ``--help`` and ``--version``, or call its function with the config's values.

    Args:
        usage: the first line of ``--help``.
        target: the full name of the script's function. Its module is imported only when it is called,
            because torch takes seconds.
        then: the full name of the function that gets what ``target`` returns.
    """
    script = Path(sys.argv[0]).stem
    with clear_errors():
        given = as_hydra_reads(sys.argv[1:])
    sys.argv[1:] = given
    overrides = [argument for argument in given if not argument.startswith("-")]

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=script)  # type: ignore[untyped-decorator]
    def main(cfg: DictConfig) -> None:
        with clear_errors():
            quiet_libraries()
            run(cfg, pydoc.locate(target), pydoc.locate(then) if then else None)  # type: ignore[arg-type]
            if "torch" in sys.modules:
                from mllm_protector.processes import leave_processes

                leave_processes()

    with clear_errors():
        if "--version" in given:
            sys.stdout.write(f"mllm-protector {version('mllm-protector')}\n")
        elif {"--help", "-h"} & set(given):
            values, files = _composed(script, overrides)
            sys.stdout.write(help_text(usage, values, files, (CONFIGS, CONFIGS / script)))
        else:
            _require_options(script, overrides)
            try:
                main()
            except HydraException as error:
                raise InputError(_config_error(error, script, overrides)) from error


def build(cfg: DictConfig, function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword arguments of a script's function: every ``_target_`` constructed, other values unchanged.

    People share YAML files, so a file may name constructors of this package and nothing else.

    Raises:
        InputError: a key is missing or unknown, a value does not fit the signature, a ``_target_`` is not a
            constructor of this package, or a constructor refuses its values. The message begins with the key.
    """
    if missing := sorted(OmegaConf.missing_keys(cfg), key=len):
        raise InputError(f"{missing[0]} has no value; give {missing[0]}=...")
    content = _plain(cfg)
    check_call("", function, content)
    return {name: construct(name, value) for name, value in content.items()}


def reread(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of the running script's function, from its command line and its YAML files as they are.

    Raises:
        InputError: as ``build``, or the files cannot be read.
    """
    command = HydraConfig.get()
    try:
        return build(hydra.compose(command.job.config_name, [*command.overrides.task]), function)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_config_error(error)) from None
    except (OSError, YAMLError) as error:
        raise InputError(" ".join(str(error).split())) from None


def run(cfg: DictConfig, function: Callable[..., Any], then: Callable[[Any], object] | None = None) -> None:
    """Check a config, claim its ``output_dir``, and call the script's function.

    Args:
        cfg: the composed config.
        function: gets its keys.
        then: gets what the function returns.

    Raises:
        InputError: as ``build`` and ``claim_output_dir``.
    """
    arguments = build(cfg, function)
    with claim_output_dir(_plain(cfg), function.__name__):
        result = function(**arguments)
        if then is not None:
            then(result)


def recorded_data(folder: Path, fingerprint: str | None) -> Any:
    """The ``Splits`` that a part was trained with, as the ``config.yaml`` in its folder says; writes no file.

    Raises:
        InputError: the file is missing, names no data source of this package, or the data cannot be read or
            have another fingerprint now.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        data = _plain(OmegaConf.load(path))["data"]
        source = str(data["_target_"])
    except (OSError, ValueError, TypeError, KeyError, YAMLError, OmegaConfBaseException):
        raise InputError(f"{path}: names no data") from None
    if not source.startswith("mllm_protector.data."):
        raise InputError(f"{path}: data._target_={source}: not a source of data")
    with TemporaryDirectory() as scratch:  # instead of the file that the training wrote
        data = _with_quarantine(data, str(Path(scratch) / "quarantine.jsonl"))
        check("data", data, Any)
        splits = construct("data", data).load()
    if splits.fingerprint != fingerprint:
        raise InputError("it has changed since, or is split by another rule")
    return splits


def _with_quarantine(value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        name: place if name == "quarantine" and item is not None else _with_quarantine(item, place)
        for name, item in value.items()
    }


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn errors that a user can cause into one line on stderr and an exit code. Others keep their trace.

    ``launch`` needs it twice: around hydra for the command line, and inside for the work, because hydra adds
    lines to an error that passes through it.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # hydra then raises instead of printing its own lines
    try:
        with stoppable():
            yield
    except InputError as error:
        _stop(str(error), error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        _stop(_config_error(error), InputError.exit_code)
    except Exception as error:
        if (message := system_error(error)) is None:
            raise
        _stop(message, RunError.exit_code)
    except Stop as error:
        _stop(str(error), error.exit_code)


def quiet_libraries() -> None:
    """Let only the first process log, and silence the libraries.

    The package makes the checks behind transformers' warnings on its own. Downloads keep their bars.
    """
    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging as transformers_logging

    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # also of processes that are started from here
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    enable_progress_bars()  # the line above had switched off the hub's as well
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    for chatty in ("httpx", "httpx2", "openai"):  # a line for each request, and for each retry
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns when peft imports it
    if not is_first():
        logging.disable(logging.INFO)


def _stop(message: str, exit_code: int) -> None:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(exit_code)


def _composed(script: str, overrides: Sequence[str]) -> tuple[dict[str, Any], list[ConfigFile]]:
    """A script's values by full key, and the YAML files that they come from, the script's own first."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        content = OmegaConf.to_container(hydra.compose(script, list(overrides)), resolve=False)
        loader = GlobalHydra.instance().config_loader()
        defaults = loader.compute_defaults_list(script, list(overrides), RunMode.RUN).defaults
    files = []
    for each in defaults:
        folder, _, name = str(each.config_path).rpartition("/")
        places = (CONFIGS / folder / f"{name}.yaml", CONFIGS / script / folder / f"{name}.yaml")
        files += [ConfigFile(path, folder, each.package or "") for path in places if path.is_file()]
    files.sort(key=lambda file: file.path.parent != CONFIGS)
    return flat(content), files  # type: ignore[arg-type]


def as_hydra_reads(arguments: Iterable[str]) -> list[str]:
    """The arguments of a command line for hydra: ``data=[a,b]`` is a mixture, odd values are quoted."""
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
    if not equals or override.startswith("-") or value[:1] in ("[", "{", "'", '"'):
        return override
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return '{}="{}"'.format(key, value.replace('"', '\\"'))
    return override


def _require_options(script: str, overrides: Sequence[str]) -> None:
    """Refuse a group whose option is null, a boolean or a number: hydra would end in a traceback."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        group = key.partition("@")[0]
        options = [
            path.stem for root in (CONFIGS, CONFIGS / script) for path in (root / group).glob("*.yaml")
        ]
        if options and (value in ("null", "true", "false") or value.removeprefix("-").isdecimal()):
            raise InputError(f"{key}={value}: unknown option; choose one of {', '.join(sorted(options))}")


def _config_error(error: Exception, script: str = "", overrides: Sequence[str] = ()) -> str:
    """An error of hydra or omegaconf in one line."""
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text):
        key = found.group(1) or found.group(2)
        others = [each for each in overrides if each.lstrip("+~").partition("=")[0] != key]
        known: Iterable[str] = ()
        with suppress(HydraException, OmegaConfBaseException):  # of another mistake
            known = _composed(script, others)[0] if script else ()
        return f"{key}: unknown config key{suggestion(key, known)}"
    if found := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        group, option = found.groups()
        options = re.findall(r"^\t([\w.]+)$", text.partition("Config search path")[0], flags=re.MULTILINE)
        options = options or sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
        return f"{group}={option}: unknown option; choose one of {', '.join(options)}"
    if found := re.search(r"Ambiguous value for argument '(.*)'", text):
        key, _, value = found.group(1).partition("=")
        return f"{key}={value}: a comma needs quotes within those of the shell: '{key}=\"{value}\"'"
    return ": ".join(text.splitlines()[:2]) or type(error).__name__


def _plain(cfg: Any) -> Any:
    """All values, resolved, with ``~/`` replaced by the user's home."""

    def at_home(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: at_home(item) for name, item in value.items()}
        if isinstance(value, list):
            return list(map(at_home, value))
        return str(expand(value)) if isinstance(value, str) and value.startswith("~/") else value

    return at_home(OmegaConf.to_container(cfg, resolve=True))
