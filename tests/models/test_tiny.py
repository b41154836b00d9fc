import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
)

from mllm_protector.errors import InputError
from mllm_protector.models.tiny import SETTINGS, save_tiny_llava, save_tiny_lm, tiny_tokenizer
from tests.models.builders import TEXTS

LM = {"vocab_size": 400, "hidden_size": 16, "layers": 1, "heads": 2, "max_positions": 64, "seed": 0}
LLAVA = {**LM, "image_size": 16, "patch_size": 8}

TOKENIZER = tiny_tokenizer(TEXTS, vocab_size=300, special_tokens=["<image>"])


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@given(st.text())
def test_any_text_comes_back_from_the_tokenizer(text: str) -> None:
    for split in (False, True):
        ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]
        assert TOKENIZER.decode(ids) == text


def test_the_chat_template_takes_texts_and_lists_and_begins_once() -> None:
    def render(content: object) -> str:
        return TOKENIZER.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    text = {"type": "text", "text": "What is this?"}
    assert render("What is this?") == render([text]) == "<s>User: What is this?\nAssistant: "
    assert render([{"type": "image"}, text]) == "<s>User: <image>\nWhat is this?\nAssistant: "


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(InputError, match=r"vocab_size=258.*259"):
        tiny_tokenizer(TEXTS, vocab_size=258)


def test_a_saved_lm_loads_whole_by_the_auto_classes(tmp_path: Path) -> None:
    folder = save_tiny_lm(tmp_path / "lm", TEXTS, **LM)
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS[0], return_tensors="pt")["input_ids"]
    assert classifier(input_ids=ids).logits.shape == (1, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lm"]


def test_a_saved_llava_loads_whole_by_the_auto_classes(tmp_path: Path) -> None:
    folder = save_tiny_llava(tmp_path / "llava", TEXTS, **LLAVA)
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert AutoProcessor.from_pretrained(folder).image_token_id == model.config.image_token_id
    assert model.generation_config.eos_token_id == TOKENIZER.eos_token_id


def test_the_seed_alone_decides_and_the_callers_random_numbers_are_not_disturbed(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    one = save_tiny_llava(tmp_path / "one", TEXTS, **LLAVA)
    assert torch.equal(torch.rand(4), expected)
    other = save_tiny_llava(tmp_path / "other", TEXTS, **LLAVA)
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_a_folder_with_the_same_settings_is_left_alone(tmp_path: Path) -> None:
    folder = save_tiny_lm(tmp_path / "lm", TEXTS, **LM)
    (folder / "model.safetensors").write_bytes(b"a mark that a second build would remove")
    save_tiny_lm(folder, iter(TEXTS), **LM)
    assert weights(folder).startswith(b"a mark")


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"seed": 1}, {"texts": ("Other words.",)}])
def test_other_settings_rebuild_the_folder(tmp_path: Path, change: dict[str, object]) -> None:
    folder = save_tiny_lm(tmp_path / "lm", TEXTS, **LM)
    before = json.loads((folder / SETTINGS).read_text())
    save_tiny_lm(folder, **{"texts": TEXTS, **LM, **change})
    assert json.loads((folder / SETTINGS).read_text()) != before
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        save_tiny_lm(tmp_path, TEXTS, **LM)
    folder = save_tiny_lm(tmp_path / "lm", TEXTS, **LM)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.txt: not a file of a tiny model"):
        save_tiny_lm(folder, TEXTS, **LM | {"seed": 1})
    for kept in (tmp_path, folder):
        assert (kept / "thesis.txt").read_text() == "mine"


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vocab_size"):
        save_tiny_lm(tmp_path / "lm", TEXTS, **{**LM, "vocab_size": 10})
    assert list(tmp_path.iterdir()) == []
