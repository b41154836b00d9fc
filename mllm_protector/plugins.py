"""What other installed packages offer to configs: what they declare as entry points, and nothing else."""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mllm_protector.errors import InputError

DATA = "mllm_protector.data"
GROUPS = ("mllm_protector.benchmarks", "mllm_protector.judges", DATA)
"""The groups of entry points; their values are ``module:Name``, and a ``_target_`` says ``module.Name``."""


def declared(target: str, *groups: str) -> EntryPoint | None:
    """The entry point of these groups that a ``_target_`` names. Nothing is imported."""
    found = (each for group in groups for each in entry_points(group=group))
    return next((each for each in found if each.value.replace(":", ".") == target), None)


def loaded(key: str, target: str) -> Any:
    """The declared object that the ``_target_`` of a key names; ``None`` where no package declares it.

    Raises:
        InputError: its package cannot be imported or has no such object.
    """
    if (found := declared(target, *GROUPS)) is None:
        return None
    try:
        return found.load()
    except (ImportError, AttributeError) as error:
        package = found.dist.name if found.dist else "a package"
        raise InputError(f"{key}._target_={target}: {package} declares it, but: {error}") from error
