"""What to do when the memory is not enough: which keys to lower, and the one line that says so."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mllm_protector.errors import RunError
from mllm_protector.models.generating import is_out_of_memory
from mllm_protector.models.tuning import is_quantized
from mllm_protector.training.settings import FitConfig


@contextmanager
def out_of_memory_help(
    model: torch.nn.Module, config: FitConfig, *, longest: int, processes: int
) -> Iterator[None]:
    """Turn a lack of memory, of the GPU or the CPU, into one line that says which keys to lower.

    Args:
        model: what is trained.
        config: how.
        longest: tokens of the longest example.
        processes: how many work together.

    Raises:
        RunError: the memory was not enough.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        advice = remedies(model, config, longest=longest, processes=processes)
        raise RunError(
            f"out of memory{f' (asked for {asked[1]} more)' if asked else ''}; "
            f"try, the first first: {', '.join(advice)}"
        ) from error


def remedies(model: torch.nn.Module, config: FitConfig, *, longest: int, processes: int) -> list[str]:
    """The settings that would take less memory than the present ones, the cheapest first.

    Args:
        model: what is trained.
        config: how.
        longest: tokens of the longest example, which always has to fit.
        processes: how many work together.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    frozen = [parameter for parameter in matrices if not parameter.requires_grad]
    found = []
    share = -(-config.batch_size // processes)
    most = longest * min(share, config.micro_batch_size or share)
    tokens = min(most, config.micro_batch_tokens or most)
    if tokens > longest:
        found.append(f"fit.micro_batch_tokens={max(longest, tokens // 2)}")
    if not config.gradient_checkpointing:
        found.append("fit.gradient_checkpointing=true")
    if config.precision == "fp32":
        found.append("fit.precision=bf16")
    if not frozen:
        found.append("tuning=lora")
    elif not is_quantized(model):
        if any(parameter.dtype == torch.float32 for parameter in frozen):
            found.append("backbone.dtype=bfloat16")
        found.append("backbone.quantization=4bit")
    return [*found, f"max_length={longest // 2}"]
