import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mllm_protector.errors import InputError
from mllm_protector.training.parallel import prepare
from tests.training.sharded import TUNINGS, VALIDATION, collate, make_base, summed_loss, train

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs" / "accelerate"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    for tuning in TUNINGS:
        train(folder / tuning / "fp32", tuning, "fp32")
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings by one launch of the config that is shipped, on two CPU processes."""
    folder = tmp_path_factory.mktemp("two")
    launcher = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / "fsdp2.yaml"),
    )
    subprocess.run(
        [*launcher, "--main_process_port", "0", "--module", "tests.training.sharded", str(folder)],
        check=True,
        cwd=REPOSITORY,
        timeout=120,
    )
    return folder


def measured(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "measured.json").read_text())
    return content


def saved(folder: Path) -> dict[str, torch.Tensor]:
    [path] = folder.glob("*.safetensors")
    return load_file(path)


def test_each_process_holds_half_of_every_weight(two: Path) -> None:
    for tuning in TUNINGS:
        local = measured(two / tuning / "fp32")["local"]
        model = TUNINGS[tuning].prepare(make_base(), "CAUSAL_LM", [])
        assert set(local.values()) == {0.5}, tuning
        assert len(local) == len(list(model.named_parameters())), tuning


def test_two_sharding_processes_give_the_weights_and_losses_of_one(one: Path, two: Path) -> None:
    for tuning in TUNINGS:
        folders = one / tuning / "fp32", two / tuning / "fp32"
        (weights, others), (alone, together) = map(saved, folders), map(measured, folders)
        assert weights.keys() == others.keys(), tuning
        assert max(float((weights[name] - others[name]).abs().max()) for name in weights) < 1e-6, tuning
        for first, second in zip(alone["losses"], together["losses"], strict=True):
            assert second == pytest.approx(first, abs=1e-5), tuning
        assert together["norms"] == pytest.approx(alone["norms"], rel=1e-5), tuning


def test_bfloat16_training_of_shards_stays_near_and_keeps_float32_weights(one: Path, two: Path) -> None:
    for tuning in TUNINGS:
        weights = saved(two / tuning / "bf16")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}, tuning
        alone, together = measured(one / tuning / "fp32"), measured(two / tuning / "bf16")
        assert together["losses"][-1] == pytest.approx(alone["losses"][-1], rel=0.02), tuning
        assert together["norms"] == pytest.approx(alone["norms"], rel=0.05), tuning


def test_sharded_weights_are_saved_for_stock_libraries(two: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(two / "full" / "fp32")
    adapted = PeftModel.from_pretrained(make_base(), two / "lora" / "fp32")
    for tuning, model in (("full", whole), ("lora", adapted)):
        losses = measured(two / tuning / "fp32")["losses"][-1]
        again = [summed_loss(model.eval(), collate([row])).item() for row in VALIDATION]
        assert again == pytest.approx(losses, abs=1e-5)
        assert again != pytest.approx([summed_loss(make_base(), collate([row])).item() for row in VALIDATION])


def test_the_accelerate_configs_are_known_to_the_launcher_and_ask_for_what_their_names_say() -> None:
    options = {action.dest: action.help or "" for action in launch_command_parser()._actions}
    configs = {path.stem: load_config_from_file(str(path)) for path in CONFIGS.glob("*.yaml")}
    for name, config in configs.items():
        for key in config.fsdp_config:
            assert key in options, (name, key)
            assert "deprecated" not in options[key].lower(), (name, key)
        assert config.mixed_precision is None, name  # fit.precision decides
    assert {name: config.distributed_type for name, config in configs.items()} == {
        "ddp": DistributedType.MULTI_GPU,
        "fsdp2": DistributedType.FSDP,
    }
    assert configs["fsdp2"].fsdp_config["fsdp_version"] == 2


def alone(objective: torch.nn.Module) -> Any:
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.NO, prepare=lambda module: module)
    return prepare(accelerator, objective, lambda module: torch.optim.SGD(module.parameters(), lr=1.0))


def test_the_first_version_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(InputError, match="fsdp_version=1: use 2"):
        alone(torch.nn.Linear(1, 1))


def test_a_gradient_is_clipped_to_the_longest_and_its_own_norm_returned() -> None:
    for longest, scale in ((None, 1.0), (10.0, 1.0), (2.5, 0.5)):
        layer = torch.nn.Linear(2, 1, bias=False)
        before = layer.weight.detach().clone()
        parallel = alone(layer)
        parallel.objective(torch.tensor([3.0, 4.0])).sum().backward()
        assert math.isclose(parallel.clip_gradient(longest), 5.0, rel_tol=1e-6), longest
        parallel.optimizer.step()
        torch.testing.assert_close(
            before - layer.weight, scale * torch.tensor([[3.0, 4.0]]), rtol=1e-5, atol=1e-6
        )
