"""An exercise: a new set of questions with columns of its own is one YAML file."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf
from PIL import Image

from mllm_protector.config import CONFIGS, build
from mllm_protector.protocols import Benchmark
from mllm_protector.records import BENIGN

MINE = """\
# @package benchmarks.mine
_target_: mllm_protector.benchmarks.questions.QuestionFile
path: ???
images: ???
columns: {question: prompt, image: '{set}/{number}.jpg', options: choices, answers: gold}
where: {split: test}
scorer: option
instruction: Answer with the letter of the right option.
"""


def measured(benchmarks: Mapping[str, Benchmark]) -> None:
    """Stands for a script that takes benchmarks."""


def test_a_new_benchmark_with_its_own_columns_is_one_yaml_file(
    tmp_path: Path,
) -> None:
    own = tmp_path / "my_configs" / "benchmark" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(MINE)
    rows = [
        {"prompt": "Which colour?", "set": "a", "number": 7, "choices": ["red", "teal"], "gold": 1},
        {"prompt": "Which shape?", "set": "b", "number": 9, "choices": ["oval", "square"], "gold": "B"},
    ]
    for row in rows:
        place = tmp_path / "pictures" / str(row["set"]) / f"{row['number']}.jpg"
        place.parent.mkdir(parents=True)
        Image.new("RGB", (6, 4), "teal").save(place)
    path = tmp_path / "odd.jsonl"
    lines = [row | {"split": "test"} for row in rows] + [rows[0] | {"split": "train"}]
    path.write_text("\n".join(map(json.dumps, lines)))

    given = [f"benchmarks.mine.path={path}", f"benchmarks.mine.images={tmp_path / 'pictures'}"]
    place = f"hydra.searchpath=[file://{own.parents[1]}]"  # as --config-dir
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = hydra.compose("eval_mmsafety", ["benchmark=[mine]", *given, place])
    chosen = OmegaConf.create({"benchmarks": {"mine": composed.benchmarks.mine}})
    loaded = build(chosen, measured)["benchmarks"]["mine"].load()

    assert [question.scenario for question in loaded.questions] == [BENIGN, BENIGN]
    for question, right, wrong in zip(loaded.questions, ("B", "square"), ("A", "oval"), strict=True):
        assert question.image is not None
        assert question.image.load().size == (6, 4)
        assert question.text.endswith("Answer with the letter of the right option.")
        assert loaded.score is not None
        assert loaded.score(question, right) == 1.0
        assert loaded.score(question, wrong) == 0.0


def test_the_set_of_the_readme_is_measured_with_its_yaml_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    [yaml] = re.findall(r"```yaml\n(# @package benchmarks\.mine\n.*?)```", readme, flags=re.DOTALL)
    configs = shutil.copytree(CONFIGS, tmp_path / "configs")
    (configs / "benchmark" / "mine.yaml").write_text(yaml)
    monkeypatch.setattr("mllm_protector.config.CONFIGS", configs)
    Image.new("RGB", (6, 4), "teal").save(tmp_path / "a.png")
    path = tmp_path / "questions.csv"
    path.write_text("prompt,picture,is_safe,pair\nsafe?,a.png,1,p\nunsafe?,a.png,0,p\nalone?,,,\n")
    with hydra.initialize_config_dir(str(configs), version_base="1.3"):
        composed = hydra.compose("eval_mmsafety", ["benchmark=[mine]", f"benchmarks.mine.path={path}"])
    chosen = OmegaConf.create({"benchmarks": {"mine": composed.benchmarks.mine}})
    questions = build(chosen, measured)["benchmarks"]["mine"].load().questions
    assert [(each.scenario, each.variant, each.twin) for each in questions] == [
        (BENIGN, "SD", "p"),
        ("all", "SD", "p"),
        ("all", "TEXT", None),
    ]
