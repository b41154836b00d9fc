"""From a command line and YAML to one call, and from exceptions to one clear line.

Besides this module only ``command_line`` knows hydra. The signatures of the functions and constructors that a
config names are its only schema, and they are checked before anything is built.
"""

import logging
import os
import pydoc
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mllm_protector.calls import check, check_call, construct
from mllm_protector.command_line import CONFIGS, CommandLine, config_error
from mllm_protector.errors import InputError, RunError, Stop, stoppable, system_error
from mllm_protector.files import expand
from mllm_protector.helping import help_text, missing_extra, version_line
from mllm_protector.outputs import claim_output_dir, is_first
from mllm_protector.plugins import DATA, declared

__all__ = ["CONFIGS", "build", "clear_errors", "launch", "quiet_libraries", "recorded_data", "reread", "run"]


def launch(usage: str, target: str, then: str | None = None, *, config: str) -> None:
    """Run a command: answer ``--help`` and ``--version``, or call its function with the config's values.

    Args:
        usage: the first line of ``--help``.
        target: the full name of the command's function. Its module is imported only when it is called,
            because torch takes seconds.
        then: the full name of the function that gets what ``target`` returns.
        config: the name of the command's root YAML.
    """
    if "--version" in sys.argv[1:]:
        sys.stdout.write(version_line())
        return
    with clear_errors():
        line = CommandLine.parsed(config, sys.argv[1:])
    sys.argv[1:] = [*line.flags, *line.overrides]

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config)  # type: ignore[untyped-decorator]
    def main(cfg: DictConfig) -> None:
        with clear_errors():
            quiet_libraries()
            run(cfg, pydoc.locate(target), pydoc.locate(then) if then else None)  # type: ignore[arg-type]
            if "torch" in sys.modules:
                from mllm_protector.processes import leave_processes

                leave_processes()

    with clear_errors():
        if {"--help", "-h"} & set(line.flags):
            values, files = line.composed()
            sys.stdout.write(help_text(usage, values, files, line.folders))
        else:
            line.require_options()
            try:
                main()
            except HydraException as error:
                raise InputError(config_error(error, line)) from error


def build(cfg: DictConfig, function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword arguments of a script's function: every ``_target_`` constructed, other values unchanged.

    People share YAML files, so a file may name constructors of this package, and what other packages that
    the user has installed declare for it (``plugins``). Nothing else.

    Raises:
        InputError: a key is missing or unknown, a value does not fit the signature, a ``_target_`` may not be
            named, or a constructor refuses its values. The message begins with the key.
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
        raise InputError(config_error(error)) from None
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
        InputError: the file is missing, names no source of data, or the data cannot be read or
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
    if not source.startswith("mllm_protector.data.") and declared(source, DATA) is None:
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
        _stop(config_error(error), InputError.exit_code)
    except Exception as error:
        absent = missing_extra(error.name) if isinstance(error, ModuleNotFoundError) else None
        if (message := absent or system_error(error)) is None:
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


def _plain(cfg: Any) -> Any:
    """All values, resolved, with ``~/`` replaced by the user's home."""

    def at_home(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: at_home(item) for name, item in value.items()}
        if isinstance(value, list):
            return list(map(at_home, value))
        return str(expand(value)) if isinstance(value, str) and value.startswith("~/") else value

    return at_home(OmegaConf.to_container(cfg, resolve=True))
