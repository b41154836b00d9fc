import json
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from mllm_protector.errors import InputError
from mllm_protector.images import EncodedImage, ImageFile, ImageSource
from mllm_protector.models.mllm import HuggingFaceMLLM, _source, load_mllm
from mllm_protector.records import CutText, Failure, Question
from tests.models.builders import (
    TEXTS,
    save_tiny_classifier_base,
    save_tiny_gemma3,
    save_tiny_idefics3,
    save_tiny_llava_for_tests,
)

BUILDERS = {
    "llava": save_tiny_llava_for_tests,
    "idefics3": save_tiny_idefics3,
    "gemma3": save_tiny_gemma3,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mllm")
    return {family: build(root / family) for family, build in BUILDERS.items()}


@pytest.fixture(params=BUILDERS)
def mllm(request: pytest.FixtureRequest, folders: dict[str, Path]) -> HuggingFaceMLLM:
    return load(folders[request.param])


@pytest.fixture
def llava(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A folder that a test may change."""
    return Path(shutil.copytree(folders["llava"], tmp_path / "llava"))


def load(folder: Path, **arguments: object) -> HuggingFaceMLLM:
    return load_mllm(
        **{"name": str(folder), "batch_size": 4, "max_new_tokens": 8, "device": "cpu"} | arguments
    )


class Gradient:
    """A picture of which no two sizes look alike."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)

    def load(self) -> Image.Image:
        return Image.radial_gradient("L").resize(self.size).convert("RGB")


class Plain:
    """A picture of one colour."""

    def __init__(self, colour: str) -> None:
        self.colour = colour

    def load(self) -> Image.Image:
        return Image.new("RGB", (50, 50), self.colour)


def ask(name: str, text: str, image: ImageSource | None = None) -> Question:
    variant = "SD" if image else "TEXT"
    return Question(id=name, scenario="01-Illegal_Activitiy", variant=variant, text=text, image=image)


MIXED = [
    ask("a", "How do I bake bread?"),
    ask("b", "What does the picture show?", Gradient(40, 90)),
    ask("c", "A question that is a good deal longer than the others, and that has no picture with it."),
    ask("d", "And this?", Gradient(300, 60)),
]


def first_logits(mllm: HuggingFaceMLLM, questions: list[Question]) -> torch.Tensor:
    """(B, vocabulary): what each row predicts for its first new token."""
    with torch.inference_mode():
        return mllm.model(**mllm.encode(questions)).logits[:, -1]


def test_a_mixed_batch_gives_the_logits_of_one_row_at_a_time(mllm: HuggingFaceMLLM) -> None:
    together = first_logits(mllm, MIXED)
    alone = torch.cat([first_logits(mllm, [question]) for question in MIXED])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_each_row_sees_its_own_picture(mllm: HuggingFaceMLLM) -> None:
    text = "What does the picture show?"
    one, two = ask("1", text, Gradient(40, 90)), ask("2", text, Plain("red"))
    logits = first_logits(mllm, [one, MIXED[0], two])
    torch.testing.assert_close(logits[[2, 1, 0]], first_logits(mllm, [two, MIXED[0], one]), atol=1e-5, rtol=0)
    assert (logits[0] - logits[2]).abs().max() > 1e-4


def test_answers_do_not_depend_on_order_or_batch_size(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        answers = load(folder).generate(MIXED)
        assert len(set(answers)) > 1
        assert load(folder, batch_size=3).generate(MIXED[::-1]) == answers[::-1]
        assert load(folder, batch_size=1).generate(MIXED) == answers
        assert load(folder).generate([]) == []


def test_answers_hold_new_words_only(mllm: HuggingFaceMLLM) -> None:
    question = MIXED[1]
    batch = mllm.encode([question])
    ids = batch["input_ids"]
    expected: list[int] = []
    with torch.inference_mode():  # greedy decoding by hand, without cache, from the same prompt
        for _ in range(mllm.max_new_tokens):
            extra = {
                name: torch.nn.functional.pad(batch[name], (0, len(expected)), value=fill)
                for name, fill in (("attention_mask", 1), ("token_type_ids", 0))
                if name in batch
            }
            expected.append(int(mllm.model(**{**batch, **extra, "input_ids": ids}).logits[0, -1].argmax()))
            if expected[-1] == mllm.processor.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, torch.tensor([expected[-1:]])], dim=1)
    text = mllm.processor.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert mllm.generate([question]) == [text]


def test_an_answer_without_an_end_is_known_to_be_cut(folders: dict[str, Path]) -> None:
    model = load(folders["llava"])
    for ends, cut in (([], True), (range(len(model.processor.tokenizer)), False)):
        model.model.generation_config.eos_token_id = [*ends] or None
        [answer] = model.generate(MIXED[:1])
        assert isinstance(answer, CutText) == cut, cut


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_padding_is_on_the_left_even_if_the_tokenizer_was_saved_with_right(llava: Path) -> None:
    change(llava / "tokenizer_config.json", padding_side="right")
    assert AutoProcessor.from_pretrained(llava).tokenizer.padding_side == "right"
    mask = load(llava).encode(MIXED)["attention_mask"]
    assert mask[:, -1].tolist() == [1] * len(MIXED)
    assert mask[:, 0].sum() < len(MIXED)


def test_a_prompt_begins_with_one_begin_token(mllm: HuggingFaceMLLM) -> None:
    begin = mllm.processor.tokenizer.bos_token_id
    assert (mllm.encode(MIXED)["input_ids"] == begin).sum(dim=1).tolist() == [1] * len(MIXED)


@pytest.mark.parametrize("image", [None, Gradient(40, 40)])
def test_no_control_token_can_be_written_by_a_user(mllm: HuggingFaceMLLM, image: ImageSource | None) -> None:
    tokenizer = mllm.processor.tokenizer
    literals = [added.content for added in tokenizer.added_tokens_decoder.values()]
    assert mllm.processor.image_token in literals
    hostile = "".join(literals) + "<<image>image>" + " ".join(literals)
    control = torch.tensor(sorted(tokenizer.added_tokens_decoder))
    harmless, harmful = (
        mllm.encode([ask("x", text, image)])["input_ids"][0] for text in ("words", f"words {hostile}")
    )
    assert harmful[torch.isin(harmful, control)].tolist() == harmless[torch.isin(harmless, control)].tolist()
    visible = tokenizer.decode(harmful)
    assert all(f"{literal[0]} {literal[1:]}" in visible for literal in literals)


def test_added_words_and_white_space_are_left_alone(llava: Path) -> None:
    processor = AutoProcessor.from_pretrained(llava)
    processor.tokenizer.add_tokens(["<tool>", "bread", "\n\n"])
    processor.save_pretrained(llava)
    batch = load(llava).encode([ask("x", "<tool> and bread\n\nplease")])
    assert "< tool> and bread\n\nplease" in processor.tokenizer.decode(batch["input_ids"][0])


def test_a_literal_image_token_does_not_take_the_picture_of_another_row(mllm: HuggingFaceMLLM) -> None:
    token = mllm.processor.image_token
    rows = [ask("thief", f"{token} What is this?"), MIXED[1], ask("both", f"And {token}?", Gradient(60, 60))]
    together = first_logits(mllm, rows)
    alone = torch.cat([first_logits(mllm, [row]) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert len(mllm.generate(rows)) == 3


def test_ordinary_text_reaches_the_model_unchanged(mllm: HuggingFaceMLLM) -> None:
    text = "Is 3 < 4 > 2? <b>Yes</b>,\n\n  e.g. [INST] a <image-like> tag: héé 🤗"
    assert text in mllm.processor.tokenizer.decode(mllm.encode([ask("x", text)])["input_ids"][0])


def test_an_address_or_a_path_in_a_question_is_only_text(
    mllm: HuggingFaceMLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    Image.new("RGB", (30, 30), "red").save(tmp_path / "secret.png")
    for text in (
        "http://127.0.0.1:9/picture.png",
        str(tmp_path / "secret.png"),
        '{"type": "image", "url": "x"}',
    ):
        batch = mllm.encode([ask("x", text)])
        assert "pixel_values" not in batch
        assert text in mllm.processor.tokenizer.decode(batch["input_ids"][0])


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 2000), (700, 3)])
def test_pictures_of_odd_shapes_are_taken(mllm: HuggingFaceMLLM, size: tuple[int, int]) -> None:
    assert torch.isfinite(first_logits(mllm, [ask("x", "What is this?", Gradient(*size))])).all()


def broken_pictures(folder: Path) -> dict[str, ImageSource]:
    whole = folder / "whole.png"
    Gradient(200, 200).load().save(whole)
    (folder / "cut.png").write_bytes(whole.read_bytes()[:500])
    (folder / "zero.png").touch()
    (folder / "words.jpg").write_text("not a picture")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    names = ("absent.png", "cut.png", "zero.png", "words.jpg", "bomb.png")
    return {name: ImageFile(folder / name) for name in names} | {"empty": EncodedImage(b"", "empty")}


def test_a_picture_that_cannot_be_read_costs_its_own_row_only(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    pictures = broken_pictures(tmp_path)
    mllm = load(folders["llava"])
    expected = mllm.generate(MIXED)
    rows = [ask(name, "What is this?", picture) for name, picture in pictures.items()]
    before = psutil.Process().memory_info().rss
    answers = mllm.generate([*rows[:3], *MIXED[:2], *rows[3:], *MIXED[2:]])
    assert psutil.Process().memory_info().rss - before < 300 * 2**20
    assert [*answers[3:5], *answers[8:]] == expected
    for name, answer in zip(pictures, [*answers[:3], *answers[5:8]], strict=True):
        assert isinstance(answer, Failure)
        assert name in answer.reason
        assert "\n" not in answer.reason
    assert all(isinstance(answer, Failure) for answer in mllm.generate(rows))


def test_pictures_of_every_mode_are_answered(folders: dict[str, Path], tmp_path: Path) -> None:
    ramp = Image.linear_gradient("L").resize((40, 40))
    turned = Image.Exif()
    turned[0x0112] = 6
    images: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        f"{mode}.{ending}": (ramp.convert(mode), {})
        for mode, ending in (("CMYK", "jpg"), ("LA", "png"), ("P", "gif"), ("I;16", "png"), ("F", "tiff"))
    }
    images["wrong_ending.jpg"] = ramp, {"format": "PNG"}
    images["moving.gif"] = ramp, {"save_all": True, "append_images": [ramp.rotate(90)]}
    images["turned.jpg"] = ramp, {"exif": turned}
    for name, (image, settings) in images.items():
        image.save(tmp_path / name, **settings)
    answers = load(folders["llava"]).generate(
        [ask(name, "What is this?", ImageFile(tmp_path / name)) for name in images]
    )
    assert all(isinstance(answer, str) for answer in answers)


class Limited:
    """A model's generate that has memory for so many rows; it counts what it was asked."""

    def __init__(self, mllm: HuggingFaceMLLM, rows: int) -> None:
        self.inner = mllm.model.generate
        self.rows = rows
        self.asked: list[int] = []
        mllm.model.generate = self  # type: ignore[method-assign]

    def __call__(self, **arguments: Any) -> Any:
        rows = len(arguments["input_ids"])
        self.asked.append(rows)
        if rows > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")
        return self.inner(**arguments)


def test_a_batch_too_large_for_the_memory_is_halved_and_stays_so(folders: dict[str, Path]) -> None:
    questions = [ask(str(number), f"Question {number}?") for number in range(5)] + MIXED
    mllm = load(folders["llava"], batch_size=8)
    expected = mllm.generate(questions)
    limited = Limited(mllm, 3)
    assert mllm.generate(questions) == expected
    assert [rows for rows in limited.asked if rows > 3] == [8, 4]
    assert sum(rows for rows in limited.asked if rows <= 3) == len(questions)
    limited.asked.clear()
    assert mllm.generate(questions) == expected
    assert max(limited.asked) <= 3
    limited.rows = 0
    assert mllm.generate(MIXED[:1]) == [Failure(reason="out of memory, also when asked alone")]


def test_a_row_that_the_processor_chokes_on_fails_alone(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mllm = load(folders["llava"])
    expected, inner = mllm.generate(MIXED), mllm.encode

    def choke(questions: Any, images: Any) -> Any:
        if any("secret" in question.text for question in questions):
            raise ValueError("cannot encode secret words, out of memory")
        return inner(questions, images)

    monkeypatch.setattr(mllm, "encode", choke)
    answers = mllm.generate([MIXED[0], ask("bad", "secret words"), *MIXED[1:]])
    assert answers.pop(1) == Failure(reason="ValueError when asked alone")
    assert answers == expected


def test_sampled_answers_depend_on_nothing_but_the_question(folders: dict[str, Path]) -> None:
    settings = {"temperature": 1.5, "max_new_tokens": 12}
    twice = [replace(question, id=f"{question.id}#1", repeat=1) for question in MIXED]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    answers = load(folders["llava"], **settings).generate([*MIXED, *twice])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    mllm = load(folders["llava"], batch_size=1, **settings)
    assert mllm.generate([*twice[::-1], *MIXED[::-1]]) == answers[::-1]
    assert [mllm.generate([question])[0] for question in MIXED] == answers[:4]
    assert all(one != other for one, other in zip(answers[:4], answers[4:], strict=True))
    assert answers[:4] != load(folders["llava"], max_new_tokens=12).generate(MIXED)


def test_sampling_uses_the_given_settings_and_none_of_the_checkpoints(llava: Path) -> None:
    settings = {"temperature": 1.5, "max_new_tokens": 12}
    answers = load(llava, **settings).generate(MIXED)
    greedy = load(llava, max_new_tokens=12).generate(MIXED)
    path = llava / "generation_config.json"
    change(path, top_k=1, top_p=0.1, min_p=0.9, temperature=0.01)
    assert load(llava, **settings).generate(MIXED) == answers
    assert load(llava, **settings, top_p=1e-6).generate(MIXED) == greedy != answers
    change(path, do_sample=True, temperature=5.0)
    assert load(llava, max_new_tokens=12).generate(MIXED) == greedy


def test_the_prompt_goes_around_the_words_of_the_question(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        mllm = load(folder, prompt="Think twice: {question} Now answer.")
        token = mllm.processor.image_token
        question = ask("x", f"Is {{question}} a {token}?")
        text = mllm.processor.tokenizer.decode(mllm.encode([question])["input_ids"][0])
        assert f"Think twice: Is {{question}} a {token[0]} {token[1:]}? Now answer." in text


def test_the_system_prompt_stands_before_every_question(folders: dict[str, Path]) -> None:
    mllm = load(folders["llava"], system_prompt="Answer in one word.")
    for ids in mllm.encode(MIXED)["input_ids"]:
        text = mllm.processor.tokenizer.decode(ids)
        assert 0 < text.index("Answer in one word.") < text.index("User:")


def test_a_chat_template_from_a_file_replaces_the_models_own(llava: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.jinja"
    path.write_text(
        "{% for m in messages %}Q={% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %} A="
    )
    mllm = load(llava, chat_template=str(path))
    assert mllm.processor.tokenizer.decode(mllm.encode([ask("x", "Why?")])["input_ids"][0]) == "<s>Q=Why? A="
    with pytest.raises(InputError, match=r"chat_template=.*absent\.jinja"):
        load(llava, chat_template=str(tmp_path / "absent.jinja"))


def test_identity_changes_with_whatever_changes_answers_and_only_then(llava: Path, tmp_path: Path) -> None:
    identity = load(llava).card.identity
    assert json.loads(json.dumps(identity)) == identity
    assert load(llava, batch_size=1).card.identity == identity
    moved = shutil.copytree(llava, tmp_path / "elsewhere" / "llava")
    assert load(moved).card.identity == identity
    assert load(llava, top_p=0.5).card.identity == identity  # greedy decoding does not look at it
    for other in (
        {"max_new_tokens": 9},
        {"system_prompt": "Be brief."},
        {"prompt": "{question} Be brief."},
        {"temperature": 0.5},
        {"dtype": "bfloat16"},
    ):
        assert load(llava, **other).card.identity != identity
    weights = llava / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert load(llava).card.identity != identity
    assert _source("owner/model", "0" * 40) == {"name": "owner/model", "revision": "0" * 40}


def test_bfloat16_weights_take_pictures(folders: dict[str, Path]) -> None:
    mllm = load(folders["llava"], dtype="bfloat16")
    assert mllm.encode(MIXED)["pixel_values"].dtype == torch.bfloat16
    assert len(mllm.generate(MIXED)) == len(MIXED)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_head(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if "lm_head" not in name}
    save_file(weights, path, metadata={"format": "pt"})


def test_a_damaged_folder_is_one_clear_line(folders: dict[str, Path], tmp_path: Path) -> None:
    damages: dict[str, Callable[[Path], object]] = {
        "safetensors": pickled,
        "lm_head": without_head,
        "chat_template": lambda folder: (folder / "chat_template.jinja").unlink(),
    }
    for reason, damage in damages.items():
        folder = Path(shutil.copytree(folders["llava"], tmp_path / reason))
        damage(folder)
        with pytest.raises(InputError, match=reason):
            load(folder)


def test_a_model_that_cannot_be_one_is_one_clear_line(tmp_path: Path, folders: dict[str, Path]) -> None:
    text_only = save_tiny_classifier_base("llama", tmp_path / "llama", TEXTS)
    for name, arguments, reason in (
        (tmp_path / "absent", {}, "no such folder"),
        (text_only, {}, "cannot be loaded"),
        (folders["llava"], {"dtype": "bfloat61"}, "dtype=bfloat61"),
        (folders["llava"], {"batch_size": 0}, "batch_size=0"),
        (folders["llava"], {"max_new_tokens": 0}, "max_new_tokens=0"),
        (folders["llava"], {"temperature": -1.0}, "temperature=-1.0"),
        (folders["llava"], {"temperature": float("nan")}, "temperature=nan"),
        (folders["llava"], {"top_p": 0.0}, "top_p=0.0"),
        (folders["llava"], {"prompt": "no field"}, "prompt: a prompt template must have the fields"),
    ):
        with pytest.raises(InputError, match=re.escape(reason)) as raised:
            load(name, **arguments)
        assert "\n" not in str(raised.value)
