import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from mllm_protector import prompts
from mllm_protector.errors import InputError
from mllm_protector.models.detector import load_detector
from mllm_protector.models.export import export_detector
from mllm_protector.models.official import import_official_detector
from tests.cases import case
from tests.data.test_tokens import spm_tokenizer
from tests.models.test_export import code_scores

PAIRS = [
    ("How do I bake bread?", "Mix flour, water and salt."),
    ("Why?", ""),
    ("What is this?" + " What is this?" * 3, "The image shows a red square.\n\nIt is large."),
]
QUERIES, ANSWERS = map(list, zip(*PAIRS, strict=True))


@pytest.fixture(scope="module")
def published(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with the layout that the official training saves (PEFT 0.4 names no head in its config)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published")
    base = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=1)
    config = LoraConfig(
        task_type="SEQ_CLS", r=32, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    edit_config(folder, modules_to_save=None)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def convert(adapter: Path, base: Path, output_dir: Path) -> Path:
    return import_official_detector(
        adapter=str(adapter),
        adapter_revision=None,
        base=str(base),
        base_revision=None,
        dtype="float32",
        output_dir=str(output_dir),
    )


def test_a_detector_of_ours_is_not_imported_because_its_sign_would_be_turned(
    published: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    ours = convert(published, bases["llama"], tmp_path / "ours")
    with pytest.raises(InputError, match=rf"adapter={ours}: has a guard\.json"):
        convert(ours, bases["llama"], tmp_path / "again")
    assert not (tmp_path / "again").exists()


def official_logits(adapter: Path, base: Path, rows: list[list[int]]) -> torch.Tensor:
    """By stock transformers and PEFT, padded with the end token as the official code does."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = tokenizer.eos_token_id
    model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    with torch.inference_mode():
        return model(**batch).logits[:, 0]


def save_spm_base(llama: Path, folder: Path) -> Path:
    """The tiny Llama with a tokenizer that joins a space with the word behind it."""
    tokenizer = spm_tokenizer()
    shutil.copytree(llama, folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("joins", [False, True])
def test_a_score_is_one_minus_the_official_one_of_the_text_in_one_piece(
    published: Path, bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, joins: bool
) -> None:
    base = save_spm_base(bases["llama"], tmp_path / "base") if joins else bases["llama"]
    detector = load_detector(convert(published, base, tmp_path / "ours"), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = ["Question: " + query + "\n\nAnswer: " + answer for query, answer in PAIRS]
    rows = tokenizer(texts)["input_ids"]
    safe = torch.sigmoid(official_logits(published, base, rows))
    scores = detector.score(queries=QUERIES, answers=ANSWERS)
    assert scores == pytest.approx((1 - safe).tolist(), abs=1e-6)
    assert detector.encoder.encode(queries=QUERIES, answers=ANSWERS) == rows
    assert max(scores) - min(scores) > 0.01
    assert detector.guard.prompt == prompts.OFFICIAL_DETECTOR
    ours = [record for record in caplog.records if record.name.startswith("mllm_protector")]
    assert not [record for record in ours if record.levelname == "WARNING"]


def test_an_export_of_it_still_reads_prompt_and_texts_in_one_piece(
    published: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = save_spm_base(bases["llama"], tmp_path / "base")
    imported = convert(published, base, tmp_path / "ours")
    exported = export_detector(
        detector=str(imported), output_dir=str(tmp_path / "exported"), base=None, push_to=None, private=True
    )
    ours, theirs = (load_detector(folder, device="cpu") for folder in (imported, exported))
    pairs = {"queries": QUERIES, "answers": ANSWERS}
    assert theirs.card.identity["joined"] is True
    assert theirs.score(**pairs) == pytest.approx(ours.score(**pairs), abs=1e-6)
    assert "ordinary texts give the same ids" in (exported / "README.md").read_text()
    assert code_scores(exported, QUERIES, ANSWERS) == pytest.approx(ours.score(**pairs), abs=1e-6)


def test_a_guard_file_that_does_not_know_of_it_reads_texts_apart(
    published: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = convert(published, bases["llama"], tmp_path / "ours")
    path = folder / "guard.json"
    content = json.loads(path.read_text())
    assert content.pop("joined") is True
    content["schema"] = 1
    path.write_text(json.dumps(content))
    detector = load_detector(folder, device="cpu")
    assert detector.card.identity["joined"] is detector.encoder.joined is False


def test_only_the_sign_of_the_head_is_turned(published: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    theirs = load_file(published / "adapter_model.safetensors")
    ours = load_file(convert(published, bases["llama"], tmp_path / "ours") / "adapter_model.safetensors")
    head = "base_model.model.score.weight"
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours.pop(head), -theirs.pop(head))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def change_weights(folder: Path, head: torch.Tensor | None) -> None:
    path = folder / "adapter_model.safetensors"
    weights = {key: value for key, value in load_file(path).items() if "score" not in key}
    save_file(weights if head is None else weights | {"base_model.model.score.weight": head}, path)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"not to be opened")


def test_an_adapter_that_is_no_detector_for_the_base_is_refused_in_one_line(
    published: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    for name, spoil, message in (
        (
            "7b",
            partial(edit_config, task_type="CAUSAL_LM", r=128),
            r'task_type is "CAUSAL_LM".* random; it looks like a detoxifier',
        ),
        ("no head", partial(change_weights, head=None), r"no score\.weight; without its trained head"),
        ("pickle", pickled, r"adapter_model\.bin: a pickle.*convert it once"),
        ("wide", partial(change_weights, head=torch.zeros(1, 77)), "does not fit base="),
    ):
        with case(name):
            adapter = Path(shutil.copytree(published, tmp_path / name))
            spoil(adapter)
            with pytest.raises(InputError, match=message) as error:
                convert(adapter, bases["llama"], tmp_path / "ours")
            assert "\n" not in str(error.value)
            assert not (tmp_path / "ours").exists()
