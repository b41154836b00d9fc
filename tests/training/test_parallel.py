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
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mllm_protector.data.encoding import Batch
from mllm_protector.errors import InputError
from mllm_protector.models.backbone import inference
from mllm_protector.models.tuning import FullTuning, LoraTuning, Tuning
from mllm_protector.processes import Processes, leave_processes
from mllm_protector.training.parallel import prepare
from tests.forked import together
from tests.training import tagger
from tests.training.tagger import collate, logged

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs" / "accelerate"
LLAMA = LlamaConfig(
    vocab_size=tagger.VOCABULARY + 1,  # an even number
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=False,
)
TUNINGS: dict[str, Tuning] = {
    "full": FullTuning(),
    "lora": LoraTuning(rank=2, alpha=4, dropout=0.1, targets=["q_proj", "v_proj"]),
}


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA)


def make_rows(count: int, seed: int) -> list[tagger.Row]:
    """Every token is a target; processes have unequal work."""
    return [[(token, token) for token, _ in row] for row in tagger.make_rows(count, seed)]


def summed_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Goes around the head's own forward, as a fused loss does."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    logits = torch.nn.functional.linear(hidden[:, :-1], inner.lm_head.weight).float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


def evaluate(model: Any, processes: Processes[Any]) -> dict[str, float]:
    rows = make_rows(5, seed=2)
    with inference(model):
        mine = [summed_loss(model, collate([row])).item() for row in processes.mine(rows)]
    return {"loss": sum(processes.gather(mine, len(rows)))}


def save(model: Any, target: Path, metrics: dict[str, float], state: dict[str, torch.Tensor]) -> None:
    model.save_pretrained(target, state_dict=state)


def train(folder: Path, precision: str) -> None:
    """Two steps of each tuning, of 7 and 4 rows, each with a validation."""
    for name, tuning in TUNINGS.items():
        target = folder / name / precision
        model: Any = tuning.prepare(make_base(), "CAUSAL_LM", [])
        tagger.run(
            target,
            train=make_rows(11, seed=1),
            model=model,
            loss_fn=summed_loss,
            evaluate=evaluate,
            save=save,
            epochs=1,
            batch_size=7,
            micro_batch_size=2,
            learning_rate=1e-3,
            schedule="constant_with_warmup",
            clip_norm=0.5,
            precision=precision,
            validate_every=1,
        )
        shares = [
            parameter.to_local().numel() / parameter.numel() if isinstance(parameter, DTensor) else 1.0
            for parameter in model.parameters()
        ]
        (target / "shares.json").write_text(json.dumps(shares))


def train_in_both_precisions(folder: Path) -> None:
    for precision in ("fp32", "bf16"):
        train(folder, precision)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train(folder, "fp32")
    return folder


@pytest.fixture(scope="module", params=["forked", pytest.param("launched", marks=pytest.mark.slow)])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings on two CPU processes, as the config that is shipped asks for."""
    folder = tmp_path_factory.mktemp("two")
    config = ["--config_file", str(CONFIGS / "fsdp2.yaml")]
    if request.param == "forked":
        arguments, *_ = _validate_launch_command(launch_command_parser().parse_args([*config, "it.py"]))
        made = prepare_multi_gpu_env(arguments)
        asked = {name: made[name] for name in made if name.startswith(("ACCELERATE_", "FSDP_"))}
        together(train_in_both_precisions, folder, **asked)
    else:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *config, "--main_process_port", "0"]
        subprocess.run([*launcher, "--module", __name__, str(folder)], check=True, cwd=REPOSITORY)
    return folder


def saved(folder: Path) -> dict[str, torch.Tensor]:
    [path] = folder.glob("*.safetensors")
    return load_file(path)


def figures(folder: Path) -> tuple[list[float], list[float]]:
    """The losses of the validations, and the norms of the gradients."""
    losses, steps = logged(folder, "validation"), logged(folder, "train")
    return [row["loss"] for row in losses], [row["gradient_norm"] for row in steps]


def test_each_process_holds_half_of_every_weight(two: Path) -> None:
    for tuning in TUNINGS:
        model = TUNINGS[tuning].prepare(make_base(), "CAUSAL_LM", [])
        shares = json.loads((two / tuning / "fp32" / "shares.json").read_text())
        assert shares == [0.5] * len(list(model.parameters())), tuning


def test_two_sharding_processes_give_the_weights_and_losses_of_one(one: Path, two: Path) -> None:
    for tuning in TUNINGS:
        folders = one / tuning / "fp32", two / tuning / "fp32"
        (weights, others), (alone, sharded) = map(saved, folders), map(figures, folders)
        assert weights.keys() == others.keys(), tuning
        assert max(float((weights[name] - others[name]).abs().max()) for name in weights) < 1e-6, tuning
        assert sharded[0] == pytest.approx(alone[0], abs=2e-5), tuning
        assert sharded[1] == pytest.approx(alone[1], rel=1e-5), tuning


def test_bfloat16_training_of_shards_stays_near_and_keeps_float32_weights(one: Path, two: Path) -> None:
    for tuning in TUNINGS:
        weights = saved(two / tuning / "bf16")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}, tuning
        alone, sharded = figures(one / tuning / "fp32"), figures(two / tuning / "bf16")
        assert sharded[0] == pytest.approx(alone[0], rel=0.02), tuning
        assert sharded[1] == pytest.approx(alone[1], rel=0.05), tuning


def test_sharded_weights_are_saved_for_stock_libraries(two: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(two / "full" / "fp32")
    adapted = PeftModel.from_pretrained(make_base(), two / "lora" / "fp32")
    for tuning, model in (("full", whole), ("lora", adapted)):
        losses, _ = figures(two / tuning / "fp32")
        again = evaluate(model, Processes(0, 1))["loss"]
        assert again == pytest.approx(losses[-1], abs=2e-5)
        assert again != pytest.approx(evaluate(make_base(), Processes(0, 1))["loss"])


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


if __name__ == "__main__":
    train_in_both_precisions(Path(sys.argv[1]))
    leave_processes()
