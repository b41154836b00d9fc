import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_protector.calls import check_call
from mllm_protector.errors import InputError
from mllm_protector.models import backbone as module
from mllm_protector.models.backbone import Backbone, device_of, inference, pick_device, require_length
from mllm_protector.models.tuning import FullTuning, LoraTuning
from tests.cases import case
from tests.models.builders import FAMILIES, POSITIONS, Family

HEADS: dict[Family, list[str]] = {
    "llama": ["score"],
    "qwen2": ["score"],
    "gemma": ["score"],
    "gpt2": ["score"],
    "bert": ["bert.pooler.dense", "classifier"],
}


@pytest.fixture
def llama(bases: dict[Family, Path], tmp_path: Path) -> Path:
    """A folder that a test may change."""
    return Path(shutil.copytree(bases["llama"], tmp_path / "llama"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def to_pickle(folder: Path) -> None:
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()


BROKEN: dict[str, Callable[[Path], object]] = {
    "truncated weights": lambda folder: truncate(folder / "model.safetensors"),
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "pickled weights only": to_pickle,
    "truncated config": lambda folder: truncate(folder / "config.json"),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "weights of another size": lambda folder: change_config(folder, hidden_size=64),
    "config of another type": lambda folder: change_config(folder, hidden_size="x"),
    "unknown activation": lambda folder: change_config(folder, hidden_act="nonsense"),
    "unknown model": lambda folder: change_config(folder, model_type="nonsense"),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_folder_is_one_line_that_names_it(llama: Path, damage: Callable[[Path], object]):
    damage(llama)
    for load in (Backbone(name=str(llama)).load_causal_lm, classifier_of(llama)):
        with pytest.raises(InputError, match=r"llama: the folder cannot be loaded \(\S") as caught:
            load()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_one_line_that_names_the_folder(llama: Path, name: str):
    truncate(llama / name)
    with pytest.raises(InputError, match="llama: the folder cannot be loaded"):
        Backbone(name=str(llama)).load_tokenizer()


def classifier_of(folder: Path) -> Callable[[], object]:
    return lambda: Backbone(name=str(folder)).load_classifier(pad_id=2)


def test_a_wrong_name_costs_one_look_up(monkeypatch: pytest.MonkeyPatch):
    looked_up = []

    def away(name: str, **_: object) -> None:
        looked_up.append(name)
        raise OSError("We couldn't connect\nto the hub")

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("looked for more files")

    monkeypatch.setattr(module.AutoConfig, "from_pretrained", away)
    for loader in (
        module.AutoTokenizer,
        module.AutoModelForCausalLM,
        module.AutoModelForSequenceClassification,
    ):
        monkeypatch.setattr(loader, "from_pretrained", forbidden)
    wrong = Backbone(name="nobody/nothing", revision="abc")
    for load in (wrong.load_tokenizer, wrong.load_causal_lm, lambda: wrong.load_classifier(pad_id=0)):
        looked_up.clear()
        with pytest.raises(InputError, match=r"nobody/nothing: .* name a local folder .*connect to the hub"):
            load()
        assert looked_up == ["nobody/nothing"]


def test_a_dtype_that_is_none_of_ours_is_refused():
    for dtype in ["float23", "nn", "int8", "float16", ""]:
        with case(dtype), pytest.raises(InputError, match="must be 'float32', 'bfloat16' or 'auto'"):
            check_call("", Backbone, {"name": "anything", "dtype": dtype})


def test_code_that_comes_with_a_model_neither_runs_nor_asks(llama: Path, monkeypatch: pytest.MonkeyPatch):
    marker = llama / "marker"
    (llama / "theirs.py").write_text(f"open({str(marker)!r}, 'w')")
    classes = {
        "AutoConfig": "theirs.C",
        "AutoModelForCausalLM": "theirs.M",
        "AutoModelForSequenceClassification": "theirs.M",
    }
    change_config(llama, auto_map=classes, model_type="theirs")
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["theirs.T", None]}, "tokenizer_class": "T"}
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the user"))
    backbone = Backbone(name=str(llama))
    for load in (backbone.load_causal_lm, classifier_of(llama), backbone.load_tokenizer):
        with pytest.raises(InputError, match="custom code"):
            load()
    assert not marker.exists()


def test_a_classifier_has_one_output_and_names_what_is_new(bases: dict[Family, Path]):
    for family in FAMILIES:
        with case(family):
            model, fresh = Backbone(name=str(bases[family])).load_classifier(pad_id=2)
            assert fresh == HEADS[family]
            assert model.config.num_labels == 1
            assert model.config.pad_token_id == 2
            assert model.config.problem_type == "multi_label_classification"
            ids = torch.tensor([[5, 6, 7]])
            assert model(input_ids=ids).logits.shape == (1, 1)


def test_a_causal_lm_without_its_head_is_refused(llama: Path):
    weights = load_file(llama / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.weight is missing"):
        Backbone(name=str(llama)).load_causal_lm()


def test_full_tuning_trains_every_weight_in_float32(bases: dict[Family, Path]):
    model, fresh = Backbone(name=str(bases["llama"]), dtype="bfloat16").load_classifier(pad_id=2)
    tuned = FullTuning().prepare(model, "SEQ_CLS", fresh)
    assert all(parameter.requires_grad for parameter in tuned.parameters())
    assert {parameter.dtype for parameter in tuned.parameters()} == {torch.float32}


def test_lora_trains_exactly_adapters_and_head_in_float32_and_so_are_the_logits(
    bases: dict[Family, Path],
):
    for family in FAMILIES:
        with case(family):
            model, fresh = Backbone(name=str(bases[family]), dtype="bfloat16").load_classifier(pad_id=2)
            tuned = LoraTuning(rank=2, alpha=4, dropout=0.1, targets="all-linear").prepare(
                model, "SEQ_CLS", fresh
            )
            trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
            heads = {name for name in trained if "modules_to_save" in name}
            assert {name.partition("modules_to_save")[0] for name in heads} == {
                f"base_model.model.{head}." for head in HEADS[family]
            }
            adapters = trained.keys() - heads
            assert adapters
            assert all("lora_A" in name or "lora_B" in name for name in adapters)
            assert {p.dtype for p in trained.values()} == {torch.float32}
            frozen = {
                p.dtype
                for name, p in tuned.named_parameters()
                if name not in trained and "original" not in name
            }
            assert frozen == {torch.bfloat16}
            for autocast in (True, False):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    logits = tuned.eval()(input_ids=torch.tensor([[5, 6, 7]])).logits
                assert logits.dtype == torch.float32
                assert not torch.equal(logits, logits.bfloat16().float())


def test_lora_on_layers_that_do_not_exist_is_refused(bases: dict[Family, Path]):
    model = Backbone(name=str(bases["llama"])).load_causal_lm()
    with pytest.raises(InputError, match=r"tuning\.targets"):
        LoraTuning(rank=2, alpha=4, dropout=0.0, targets=["nonsense"]).prepare(model, "CAUSAL_LM", [])


def test_a_device_that_is_not_here_is_refused():
    for device in ["cuad", "cuda:99", "gpu 0"]:
        with case(device):
            with pytest.raises(InputError, match=f"device={device}: cannot be used here") as caught:
                pick_device(device)
            assert "\n" not in str(caught.value)


def test_inference_is_without_gradients_and_leaves_the_mode_as_it_was():
    for training in [True, False]:
        with case(training):
            model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()).train(training)
            with inference(model):
                assert not model.training
                assert not model(torch.ones(1, 2)).requires_grad
            assert model.training is training
            with pytest.raises(RuntimeError, match="inside"), inference(model):
                raise RuntimeError("inside")
            assert model.training is training
            assert device_of(model) == torch.device("cpu")


def test_a_length_beyond_the_positions_is_refused(bases: dict[Family, Path]):
    model = Backbone(name=str(bases["gpt2"])).load_causal_lm()
    require_length(model, POSITIONS)
    with pytest.raises(InputError, match=f"gpt2 has only {POSITIONS} positions"):
        require_length(model, POSITIONS + 1)
