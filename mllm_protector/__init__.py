"""MLLM-Protector: train, measure and run a plug-and-play guard for any multimodal LLM."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_protector.guard.mllm import ProtectedMLLM
    from mllm_protector.guard.protector import Protector
    from mllm_protector.models.mllm import load_mllm
    from mllm_protector.records import Question

__all__ = ["ProtectedMLLM", "Protector", "Question", "load_mllm"]

_HOMES = {
    "ProtectedMLLM": "mllm_protector.guard.mllm",
    "Protector": "mllm_protector.guard.protector",
    "Question": "mllm_protector.records",
    "load_mllm": "mllm_protector.models.mllm",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: torch and transformers take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
