import inspect
import re
from dataclasses import fields, replace

import pytest
import torch

from mllm_protector.errors import RunError
from mllm_protector.models.backbone import Backbone
from mllm_protector.training.detector import train_detector
from mllm_protector.training.settings import FitConfig, out_of_memory_help, remedies
from tests.training.tagger import CONFIG

LONGEST = 300
GREEDY = replace(
    CONFIG, batch_size=64, micro_batch_tokens=4096, precision="fp32", gradient_checkpointing=False
)


def model(trained: bool = True, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return torch.nn.Linear(4, 4, dtype=dtype).requires_grad_(trained)


def message_of(error: Exception) -> str:
    with pytest.raises(RunError) as caught, out_of_memory_help(model(), GREEDY, longest=LONGEST, processes=1):
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


def test_a_lack_of_memory_is_one_line_that_says_what_to_lower() -> None:
    allocator = "DefaultCPUAllocator:"
    for error, asked in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."), "2.50 GiB"),
        (RuntimeError(f"{allocator} can't allocate memory: you tried to allocate 8 bytes."), "8 bytes"),
        (RuntimeError(f"{allocator} not enough memory: you tried to allocate 64 bytes."), "64 bytes"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), None),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), None),
        (MemoryError(), None),
    ):
        message = message_of(error)
        assert "\n" not in message, error
        beginning = f"out of memory (asked for {asked} more); " if asked else "out of memory; "
        assert message.startswith(f"{beginning}try in this order: fit.micro_batch_tokens=2048, "), error


def test_any_other_error_stays_what_it_is() -> None:
    for error in (RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError("x")):
        with (
            pytest.raises(type(error)) as caught,
            out_of_memory_help(model(), GREEDY, longest=LONGEST, processes=1),
        ):
            raise error
        assert caught.value is error


def test_settings_to_lower_are_named_in_order() -> None:
    assert remedies(model(), GREEDY, longest=LONGEST, processes=1) == [
        "fit.micro_batch_tokens=2048",
        "fit.gradient_checkpointing=true",
        "fit.precision=bf16",
        "tuning=lora",
        "max_length=150",
    ]


def test_only_settings_that_would_help_are_named() -> None:
    thrifty = replace(GREEDY, micro_batch_tokens=LONGEST, precision="bf16", gradient_checkpointing=True)
    frozen = model(trained=False, dtype=torch.bfloat16)
    assert remedies(frozen, thrifty, longest=LONGEST, processes=1) == [
        "backbone.quantization=4bit",
        "max_length=150",
    ]
    wide = model(trained=False)
    assert remedies(wide, thrifty, longest=LONGEST, processes=1)[:2] == [
        "backbone.dtype=bfloat16",
        "backbone.quantization=4bit",
    ]


def test_half_of_the_largest_pass_is_named_but_never_less_than_the_longest_example() -> None:
    for changes, processes, expected in (
        ({"micro_batch_tokens": 400}, 1, LONGEST),
        ({"micro_batch_tokens": 10**6}, 1, 32 * LONGEST),
        ({"micro_batch_tokens": None}, 1, 32 * LONGEST),
        ({"micro_batch_tokens": None}, 4, 8 * LONGEST),
        ({"micro_batch_tokens": None, "micro_batch_size": 6}, 1, 3 * LONGEST),
        ({"micro_batch_tokens": LONGEST}, 1, None),
        ({"micro_batch_tokens": None, "micro_batch_size": 1}, 1, None),
        ({"micro_batch_tokens": None}, 64, None),
    ):
        first = remedies(model(), replace(GREEDY, **changes), longest=LONGEST, processes=processes)[0]
        wanted = f"fit.micro_batch_tokens={expected}" if expected else "fit.gradient_checkpointing=true"
        assert first == wanted, changes


def test_every_named_key_exists() -> None:
    named = {
        match[1]
        for each in (model(), model(trained=False))
        for match in re.finditer(r"([\w.]+)=", " ".join(remedies(each, GREEDY, longest=LONGEST, processes=1)))
    }
    known = {f"fit.{each.name}" for each in fields(FitConfig)}
    known |= {f"backbone.{each.name}" for each in fields(Backbone)}
    assert len(named) == 7
    assert named <= known | set(inspect.signature(train_detector).parameters)
