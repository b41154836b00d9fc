"""From composed YAML to keyword arguments, and from exceptions to one clear line.

This module and ``scripts/`` are the only places that know hydra. The signatures of the functions and
constructors that a config names are its only schema: they are checked before anything is made.
"""

import difflib
import inspect
import json
import logging
import os
import pydoc
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args, get_origin

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mllm_protector.errors import InputError, RunError
from mllm_protector.files import expand, system_error
from mllm_protector.helping import ConfigFile, flat, help_text
from mllm_protector.outputs import claim_output_dir, is_first
from mllm_protector.ranges import fits, in_words
from mllm_protector.stopping import Stop, stoppable

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

OmegaConf.register_new_resolver("configs_folder", lambda: str(CONFIGS), replace=True)


def launch(main: Callable[[], Any], usage: str) -> None:
    """Start a script: ``--help`` and ``--version`` are answered, errors are one line.

    Args:
        main: the function that hydra calls; its config has the script's own name.
        usage: what ``--help`` begins with.
    """
    script, given = Path(sys.argv[0]).stem, [_quoted(argument) for argument in sys.argv[1:]]
    sys.argv[1:] = given
    overrides = [argument for argument in given if not argument.startswith("-")]
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
    """The keyword arguments of a script's function: every ``_target_`` constructed, the rest as it is.

    A YAML file is data that people pass around, so it may name our own constructors and nothing else.

    Raises:
        InputError: a value is missing, unknown or of another type than the signature says, a ``_target_`` is
            not ours, or a constructor refuses its values. The message begins with the key.
    """
    if missing := sorted(OmegaConf.missing_keys(cfg), key=len):
        raise InputError(f"{missing[0]} has no value; give {missing[0]}=...")
    content = _plain(cfg)
    _check_call("", function, content)
    return {name: _construct(name, value) for name, value in content.items()}


def run(cfg: DictConfig, function: Callable[..., Any], then: Callable[[Any], object] | None = None) -> None:
    """All that a script does: check the config, claim the folder that results go to, and call.

    Args:
        cfg: the composed config.
        function: gets the config's keys.
        then: gets what the function returns.

    Raises:
        InputError: as ``build`` and ``claim_output_dir``.
    """
    arguments = build(cfg, function)
    with claim_output_dir(_plain(cfg), function.__name__):
        result = function(**arguments)
        if then is not None:
            then(result)


def recorded_data(folder: Path) -> Any:
    """What a part was trained with, loaded anew by the ``config.yaml`` in its folder; no file is written.

    Returns:
        The ``Splits`` of that configuration's ``data``.

    Raises:
        InputError: there is no such file, it names no data of ours, or the data cannot be read.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        data = _plain(OmegaConf.load(path))["data"]
        known = str(data["_target_"]).startswith("mllm_protector.data.")
    except (OSError, ValueError, TypeError, KeyError, YAMLError, OmegaConfBaseException):
        raise InputError(f"{path}: names no data") from None
    if not known:
        raise InputError(f"{path}: data._target_={data['_target_']}: not a source of data")
    with TemporaryDirectory() as scratch:  # whatever that training set aside is set aside there
        data = _with_quarantine(data, str(Path(scratch) / "quarantine.jsonl"))
        _check("data", data, Any)
        return _construct("data", data).load()


def _with_quarantine(value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        name: place if name == "quarantine" and item is not None else _with_quarantine(item, place)
        for name, item in value.items()
    }


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn what a user can cause into one line on stderr and an exit code; show the rest in full.

    The scripts need it twice: around hydra for the command line, and within it for the work, because hydra
    adds lines of its own to an error that passes through it.
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
    """Only the first process speaks, and of the libraries only what a user must know.

    Of transformers' warnings, what matters is checked by ourselves; downloads keep their bars.
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


def _check_call(key: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check names and types of a call's arguments, and of all calls within them."""
    signature = inspect.signature(function, eval_str=True)
    for name in arguments:
        if name not in signature.parameters:
            known = () if key else flat(arguments)
            raise InputError(f"{_join(key, name)}: unknown config key{_suggestion(name, known)}")
    for name, parameter in signature.parameters.items():
        if name not in arguments and parameter.default is parameter.empty:
            group = name.removesuffix("s")  # options of the group judge fill judges
            given = f"{group}=[...]" if (CONFIGS / group).is_dir() else f"{_join(key, name)}=..."
            raise InputError(f"{given.partition('=')[0]} has no value; give {given}")
    # Plain values first: others may repeat them, and a message should name the one that the user gave.
    for name, value in sorted(arguments.items(), key=lambda item: isinstance(item[1], dict)):
        _check(_join(key, name), value, signature.parameters[name].annotation)


def _check(key: str, value: Any, wanted: Any) -> None:
    if isinstance(value, dict) and "_target_" in value:
        arguments = {name: item for name, item in value.items() if name not in ("_target_", "_partial_")}
        _check_call(key, _constructor(key, str(value["_target_"])), arguments)
    elif not fits(value, wanted):
        raise InputError(f"{key}={_shown(value)}: must be {in_words(wanted)}")
    elif isinstance(value, dict):
        inside = [get_args(each)[1] for each in (wanted, *get_args(wanted)) if get_origin(each) is Mapping]
        for name, item in value.items():
            _check(_join(key, name), item, inside[0] if inside else Any)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check(f"{key}[{index}]", item, Any)


def _constructor(key: str, target: str) -> Callable[..., Any]:
    """What a ``_target_`` names, if it is defined in this package (and not only imported there)."""
    found: Any = pydoc.locate(target) if target.startswith("mllm_protector.") else None
    if not callable(found) or not str(getattr(found, "__module__", "")).startswith("mllm_protector."):
        raise InputError(
            f"{key}._target_={target}: not a constructor of mllm_protector, and no other may be named"
        )
    return found  # type: ignore[no-any-return]


def _construct(key: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "_target_" not in value:
        return {name: _construct(_join(key, name), item) for name, item in value.items()}
    try:
        return hydra.utils.instantiate(value, _convert_="all")
    except InstantiationException as error:
        if not isinstance(error.__cause__, InputError):
            raise
        message = str(error.__cause__)
        first = re.split("[=:. ]", message, maxsplit=1)[0]
        if first in value:
            message = f"{key}.{message}"
        elif first != key:
            message = f"{key}: {message}"
        raise InputError(message) from error


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _stop(message: str, exit_code: int) -> None:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(exit_code)


def _composed(script: str, overrides: Sequence[str]) -> tuple[dict[str, Any], list[ConfigFile]]:
    """A script's values by their full names, and the files that they come from, its own first."""
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


def _quoted(override: str) -> str:
    """An override whose value hydra cannot read, such as a path with ``=``, ``(`` or ``~``, in quotes."""
    key, equals, value = override.partition("=")
    if not equals or override.startswith("-") or value[:1] in ("[", "{", "'", '"'):
        return override
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return '{}="{}"'.format(key, value.replace('"', '\\"'))
    return override


def _require_options(script: str, overrides: Sequence[str]) -> None:
    """Refuse a group that is set to no option's name, on which hydra ends in a traceback."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        group = key.partition("@")[0]
        options = [
            path.stem for root in (CONFIGS, CONFIGS / script) for path in (root / group).glob("*.yaml")
        ]
        if options and (value in ("null", "true", "false") or value.removeprefix("-").isdecimal()):
            raise InputError(f"{key}={value}: unknown option; choose one of {', '.join(sorted(options))}")


def _config_error(error: Exception, script: str = "", overrides: Sequence[str] = ()) -> str:
    """What hydra or omegaconf say of a command line, in one line."""
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text):
        key = found.group(1) or found.group(2)
        others = [each for each in overrides if each.lstrip("+~").partition("=")[0] != key]
        known: Iterable[str] = ()
        with suppress(HydraException, OmegaConfBaseException):  # of another mistake
            known = _composed(script, others)[0] if script else ()
        return f"{key}: unknown config key{_suggestion(key, known)}"
    if found := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        group, option = found.groups()
        options = re.findall(r"^\t([\w.]+)$", text.partition("Config search path")[0], flags=re.MULTILINE)
        options = options or sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
        return f"{group}={option}: unknown option; choose one of {', '.join(options)}"
    if found := re.search(r"Ambiguous value for argument '(.*)'", text):
        key, _, value = found.group(1).partition("=")
        return f"{key}={value}: a comma needs quotes within those of the shell: '{key}=\"{value}\"'"
    return ": ".join(text.splitlines()[:2]) or type(error).__name__


RENAMED = {"kinds": "variants"}
"""The last part of keys that were renamed, and what it is now."""


def _suggestion(key: str, known: Iterable[str] = ()) -> str:
    place, _, name = key.rpartition(".")
    name = RENAMED.get(name, name)
    if (renamed := _join(place, name)) != key and renamed in known:
        return f"; give {renamed}=..."
    if longer := [f"{each}=..." for each in known if each.endswith(f".{name}") and each != key]:
        return f"; give {' or '.join(longer)}"
    words = {
        word
        for path in CONFIGS.rglob("*.yaml")
        if path.parent.name != "accelerate"
        for word in re.findall(r"^\s*(\w+):", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    close = difflib.get_close_matches(name, sorted(words - {name}), n=1)
    return f" (did you mean {close[0]}?)" if close else "; --help lists the keys"


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _plain(cfg: Any) -> dict[str, Any]:
    """All values, resolved; ``~/`` in front of a path is the user's home."""
    content: dict[str, Any] = _at_home(OmegaConf.to_container(cfg, resolve=True))
    return content


def _at_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _at_home(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return str(expand(value)) if isinstance(value, str) and value.startswith("~/") else value
