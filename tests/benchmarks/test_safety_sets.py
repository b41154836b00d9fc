"""The newer safety benchmarks, each one YAML file: made files in their layouts, and the published ones."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from omegaconf import OmegaConf
from PIL import Image

from mllm_protector.benchmarks.questions import QuestionFile
from mllm_protector.config import CONFIGS, build
from mllm_protector.errors import InputError
from mllm_protector.records import BENIGN, LoadedBenchmark
from tests.benchmarks.test_questions import evaluated, image

DATA = Path(__file__).parents[3] / "shared" / "data"


def option(name: str, **given: Any) -> QuestionFile:
    """What ``benchmark=<name>`` makes of the settings that a user gives."""
    chosen = OmegaConf.merge(OmegaConf.load(CONFIGS / "benchmark" / f"{name}.yaml"), given)
    made = build(OmegaConf.create({"benchmarks": {name: chosen}}), evaluated)["benchmarks"][name]
    assert isinstance(made, QuestionFile)
    return made


def written(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def table(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def told(loaded: LoadedBenchmark) -> list[tuple[str, str, str, str, str | None]]:
    return [(each.id, each.scenario, each.variant, each.text, each.twin) for each in loaded.questions]


def test_mossbench_pairs_its_questions_with_the_contrast_set(tmp_path: Path) -> None:
    row = {"image": "images/1.png", "pid": "1", "metadata": {"over": "type 1", "harm": ["7"]}}
    only = {"question": "alone?", "image": "images/2.png", "pid": "2", "metadata": {"over": "type 2"}}
    for folder, rows in (("data", {"1": row | {"question": "safe?"}, "2": only}),
                         ("data_contrast", {"1": row | {"question": "unsafe?"}})):  # fmt: skip
        written(tmp_path / folder / "images_information" / "information.json", rows)
        image(tmp_path / folder / "images" / "1.png")
    loaded = option("mossbench", path=str(tmp_path)).load()
    assert told(loaded) == [
        ("safe/1", BENIGN, "SD", "safe?", "1"),
        ("contrast/1", "type 1", "SD", "unsafe?", "1"),
    ]
    assert loaded.missing == ["safe/2: no file data/images/2.png"]
    folders = [str(each.image.path.parent.parent.name) for each in loaded.questions]  # type: ignore[union-attr]
    assert folders == ["data", "data_contrast"]


def test_vlguard_asks_each_safe_image_twice(tmp_path: Path) -> None:
    safe = [{"safe_instruction": "safe?", "response": "r"}, {"unsafe_instruction": "bad?", "response": "r"}]
    kinds = {"harmful_category": "deception", "harmful_subcategory": "disinformation"}
    rows = [
        kinds
        | {"image": "a/1.jpg", "safe": False, "instr-resp": [{"instruction": "seen?", "response": "r"}]},
        {"image": "a/2.jpg", "safe": True, "instr-resp": safe},
        kinds | {"image": "a/3.jpg", "safe": True, "instr-resp": safe[::-1]},
    ]
    for number in (1, 2, 3):
        image(tmp_path / "test" / "a" / f"{number}.jpg")
    path = written(tmp_path / "test.json", rows)
    assert told(option("vlguard", path=str(path), images=str(tmp_path / "test")).load()) == [
        ("unsafes/a/1.jpg", "disinformation", "SD", "seen?", None),
        ("safe_unsafes/a/2.jpg", "all", "SD", "bad?", "a/2.jpg"),
        ("safe_unsafes/a/3.jpg", "disinformation", "SD", "bad?", "a/3.jpg"),
        ("safe_safes/a/2.jpg", BENIGN, "SD", "safe?", "a/2.jpg"),
        ("safe_safes/a/3.jpg", BENIGN, "SD", "safe?", "a/3.jpg"),
    ]


def test_holisafe_is_harmless_only_where_everything_is_safe(tmp_path: Path) -> None:
    types = ("SSS", "SSU", "SUU", "USU", "UUU")
    row = {"category": "hate", "subcategory": "s", "image": "hate/x.png", "image_safe": True}
    rows = [row | {"id": number, "type": kind, "query": kind} for number, kind in enumerate(types)]
    image(tmp_path / "images" / "hate" / "x.png")
    written(tmp_path / "holisafe_bench.json", rows)
    loaded = option("holisafe", path=str(tmp_path)).load()
    assert [(each.id, each.scenario, each.text) for each in loaded.questions] == [
        ("safe/0", BENIGN, "SSS"),
        *((f"unsafe/{number}", "hate", types[number]) for number in (1, 2, 3, 4)),
    ]


def test_jailbreakv_names_images_from_its_own_folder(tmp_path: Path) -> None:
    image(tmp_path / "figstep" / "1.png")
    row = {"id": "7", "jailbreak_query": "j?", "redteam_query": "r?", "format": "figstep", "policy": "Fraud"}
    rows = [row | {"image_path": "figstep/1.png"}, row | {"id": "8", "image_path": "SD/2.png"}]
    loaded = option("jailbreakv28k", path=str(table(tmp_path / "mini.csv", rows))).load()
    assert told(loaded) == [("7", "Fraud", "SD", "j?", None)]
    assert loaded.missing == ["8: no file SD/2.png"]


def test_orbench_is_harmless_text(tmp_path: Path) -> None:
    rows = [{"prompt": "p?", "category": "deception"}, {"prompt": "q?", "category": "harmful"}]
    loaded = option("orbench", path=str(table(tmp_path / "hard.csv", rows))).load()
    assert told(loaded) == [("1", BENIGN, "TEXT", "p?", None), ("2", BENIGN, "TEXT", "q?", None)]


def test_sets_on_the_hub_are_asked_for_at_one_commit_and_keep_their_images_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    png = io.BytesIO()
    Image.new("RGB", (3, 2)).save(png, "PNG")
    picture = {"bytes": png.getvalue(), "path": None}
    made: dict[str, list[dict[str, Any]]] = {
        "felfri/MSTS": [
            {"prompt_id": "p1", "prompt_text": "q?", "hazard_category": "Other", "case_id": "c"}
            | {"unsafe_image": picture, "unsafe_image_id": "u"}
        ],
        "sqrti/SPA-VL": [{"question": "q?", "image": picture, "class1": "Fraud"}],
        "bench-llm/or-bench": [{"prompt": "q?", "category": "hate"}],
    }
    asked: dict[str, Any] = {}

    def load_dataset(path: str, **options: Any) -> datasets.Dataset:
        asked[path] = options
        rows = datasets.Dataset.from_list(made[path])
        for column in ("image", "unsafe_image"):
            rows = rows.cast_column(column, datasets.Image()) if column in rows.column_names else rows
        return rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = {name: option(name).load().questions for name in ("msts", "spa_vl_eval", "orbench")}
    assert {name: [(each.id, each.scenario) for each in questions] for name, questions in found.items()} == {
        "msts": [("p1", "Other")],
        "spa_vl_eval": [("1", "Fraud")],
        "orbench": [("1", BENIGN)],
    }
    for name in ("msts", "spa_vl_eval"):
        assert found[name][0].image is not None
        assert found[name][0].image.load().size == (3, 2)
    assert found["msts"][0].base == "c"
    assert all(len(options["revision"]) == 40 for options in asked.values())
    assert asked["sqrti/SPA-VL"] | {"revision": ""} == {"name": "test", "split": "harm", "revision": ""}
    assert option("msts").card.identity["questions"].startswith("felfri/MSTS@9630ca3")
    with pytest.raises(InputError, match=r"^revision=main: give the full hash of a commit of felfri/MSTS"):
        option("msts", revision="main").load()


def all_images(folder: Path, names: Iterable[str]) -> str:
    """A folder where each of these images is there, if empty."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


@pytest.fixture
def published() -> Path:
    if not (DATA / "siuo").is_dir():
        pytest.skip(f"no published sets in {DATA}")
    return DATA


def missing_images(loaded: QuestionFile) -> list[str]:
    """The images that a set without any misses; none of its questions may be left."""
    found = loaded.load()
    assert found.questions == []
    return [reason.partition(": no file ")[2] for reason in found.missing]


def test_the_published_siuo_has_167_questions(published: Path, tmp_path: Path) -> None:
    path = str(published / "siuo")
    names = missing_images(option("siuo", path=path))
    assert len(names) == 167
    questions = option("siuo", path=path, images=all_images(tmp_path, names)).load().questions
    counts = Counter(each.scenario for each in questions)
    assert (len(counts), counts["privacy violation"], sum(counts.values())) == (9, 21, 167)
    assert {each.variant for each in questions} == {"SD"}


def test_the_published_vlsbench_has_2241_questions(published: Path, tmp_path: Path) -> None:
    path = str(published / "vlsbench")
    names = missing_images(option("vlsbench", path=path))
    assert (len(names), names[0]) == (2241, "imgs/0.png")
    questions = option("vlsbench", path=path, images=all_images(tmp_path, names)).load().questions
    assert Counter(each.scenario for each in questions) == {
        "Violent": 590,
        "Illegal Activity": 539,
        "Self-Harm": 370,
        "Erotic": 343,
        "Hate": 269,
        "Privacy": 130,
    }


def test_the_published_msts_has_two_questions_about_each_of_200_cases(
    published: Path, tmp_path: Path
) -> None:
    path = str(published / "msts" / "english_multimodal.csv")
    names = missing_images(option("msts", path=path))
    assert (len(names), len(set(names))) == (400, 200)
    questions = option("msts", path=path, images=all_images(tmp_path, names)).load().questions
    assert Counter(Counter(each.cluster for each in questions).values()) == {2: 200}
    assert Counter(each.scenario for each in questions) == {
        "Non-Violent Crimes": 140,
        "Suicide & Self-Harm": 80,
        "Violent Crimes": 70,
        "Sex-Related Crimes": 60,
        "Other": 50,
    }


def test_the_published_mossbench_has_300_questions_and_244_pairs(published: Path, tmp_path: Path) -> None:
    files = {"safe": {"files": "information.json"}, "contrast": {"files": "information_contrast.json"}}
    given: dict[str, Any] = {"path": str(published / "mossbench"), "parts": files}
    names = missing_images(option("mossbench", **given))
    assert len(names) == 544
    images = all_images(tmp_path, names)
    questions = option("mossbench", **given, images=images).load().questions
    assert Counter(each.scenario for each in questions) == {
        BENIGN: 300,
        "type 1": 100,
        "type 2": 44,
        "type 3": 100,
    }
    assert Counter(Counter(each.twin for each in questions).values()) == {2: 244, 1: 56}
    few = option("mossbench", **given, images=images, limit=20).load().questions
    assert sum(count == 1 for count in Counter(each.twin for each in few).values()) < 12
