import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf
from PIL import Image

from mllm_protector.benchmarks.questions import QuestionFile
from mllm_protector.config import CONFIGS
from mllm_protector.errors import InputError
from mllm_protector.records import BENIGN
from tests.benchmarks.test_questions import image, scores, write


def option(name: str, path: Path, images: Path, **changes: Any) -> QuestionFile:
    """What ``benchmark=<name>`` makes of a file."""
    settings: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "benchmark" / f"{name}.yaml"))
    assert settings.pop("_target_").endswith(".QuestionFile")
    if "images" in settings:
        settings["images"] = str(images)
    return QuestionFile(**(settings | {"path": str(path)} | changes))


def write_published(name: str, root: Path) -> Path:
    """Made-up rows in the published form of a set."""
    png = io.BytesIO()
    Image.new("RGB", (3, 2)).save(png, "PNG")
    choices = {
        "question": "Red?",
        "choices": ["a rose", "the sea"],
        "hint": "",
        "image": None,
        "split": "test",
    }
    where = {"question": "Where?", "imageId": "n16"}
    what = {"imagename": "v1_0.png", "question": "What is x?"}
    dog = {"image": "COCO_1.jpg", "text": "Is there a dog?"}
    ocr = {"question_id": "OCR/1.png", "category": "OCR", "image": {"bytes": png.getvalue(), "path": None}}
    pictures = {"vqa": "a.png", "pope": "COCO_1.jpg", "scienceqa": "test/4/image.png", "mmvet": "v1_0.png"}
    pictures["gqa"] = "n16.jpg"
    content: dict[str, Any] = {
        "vqa": [
            {"id": "v", "question": "what?", "image": "a.png", "answers": ["cat", "kitten"]},
            {"id": "x", "question": "two and two?", "answers": "four"},
        ],
        "pope": [dog | {"question_id": 1, "label": "yes"}, dog | {"question_id": 2, "label": "no"}],
        "scienceqa": {
            "4": choices | {"image": "image.png", "hint": "Look. ", "answer": 0},
            "11": choices | {"hint": "", "answer": 1},
            "12": choices | {"answer": 1, "split": "train"},
        },
        "mmvet": {"v1_0": what | {"answer": "-1<AND>-5"}, "v1_1": what | {"answer": "dog<OR>hound"}},
        "gqa": {"201": where | {"answer": "yes"}, "202": where | {"answer": "left"}},
        "mme": [ocr | {"question": "q", "answer": "Yes"}, ocr | {"question": "r", "answer": "No"}],
    }
    root.mkdir(parents=True, exist_ok=True)
    if name in pictures:
        image(root / "images" / pictures[name])
    if name == "vqa":
        return write(root, *content[name])
    path = root / ("set.parquet" if name == "mme" else "set.json")
    if name == "mme":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content[name]), path)
    elif name == "pope":
        path.write_text("\n".join(map(json.dumps, content[name])))
    else:
        path.write_text(json.dumps(content[name], indent=1))
    return path


EXPECTED: dict[str, tuple[dict[str, str], str, dict[str, float]]] = {
    "vqa": ({"v": "what?", "x": "two and two?"}, "A kitten.", {"v": 1, "x": 0}),
    "pope": (
        dict.fromkeys("12", "Is there a dog?\nAnswer with yes or no."),
        "Yes, there is.",
        {"1": 1, "2": 0},
    ),
    "scienceqa": (
        {
            "4": "Look.\nRed?\n(A) a rose\n(B) the sea\nAnswer with the letter of the right choice.",
            "11": "Red?\n(A) a rose\n(B) the sea\nAnswer with the letter of the right choice.",
        },
        "It is the sea.",
        {"4": 0, "11": 1},
    ),
    "mmvet": (
        dict.fromkeys(["v1_0", "v1_1"], "What is x?"),
        "x is -1, and it is a hound",
        {"v1_0": 0.5, "v1_1": 1},
    ),
    "gqa": (
        dict.fromkeys(["201", "202"], "Where?\nAnswer with one word or a short phrase."),
        "No, on the left.",
        {"201": 0, "202": 1},
    ),
    "mme": ({"1": "q", "2": "r"}, "no", {"1": 0, "2": 1}),
}
"""Option -> the questions, an answer to all of them, and its scores."""


def test_the_published_sets_are_options_of_the_one_reader(tmp_path: Path) -> None:
    for name, (asked, text, right) in EXPECTED.items():
        path = write_published(name, tmp_path / name)
        loaded = option(name, path, tmp_path / name / "images").load()
        assert {question.id: question.text for question in loaded.questions} == asked, name
        assert scores(loaded, text) == right, name
        assert loaded.missing == [], name
        assert (loaded.metrics is not None) == (name in ("pope", "mme")), name
        for question in loaded.questions:
            assert question.scenario == BENIGN, name
            assert (question.image is None) == (question.variant == "TEXT"), name
            assert question.image is None or question.image.load().size == (3, 2), name
            again = replace(question, id=f"{question.id}#1", base=question.cluster, repeat=1)
            assert loaded.score is not None
            assert loaded.score(again, text) == right[question.id], name


def test_a_missing_image_is_counted_and_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    image(tmp_path / "outside.png")
    for name in EXPECTED:
        path = write_published(name, tmp_path / name)
        files = [file for file in (tmp_path / name).rglob("*") if file.suffix in (".png", ".jpg")]
        for file in files:
            file.unlink()
        loaded = option(name, path, tmp_path / name / "images").load()
        assert bool(loaded.missing) == bool(files), name
        assert all(": no file " in reason for reason in loaded.missing), name
        for file in files:
            file.symlink_to(tmp_path / "outside.png")
            with pytest.raises(InputError, match="leads out of"):
                option(name, path, tmp_path / name / "images").load()


def test_questions_without_an_image_or_with_one_can_be_chosen(tmp_path: Path) -> None:
    path = write_published("scienceqa", tmp_path)
    for variant, number in (("TEXT", "11"), ("SD", "4")):
        loaded = option("scienceqa", path, tmp_path / "images", variants=[variant]).load()
        assert [question.id for question in loaded.questions] == [number]
    train = option("scienceqa", path, tmp_path / "images", where={"split": "train"}).load()
    assert [question.id for question in train.questions] == ["12"]
