import functools
import inspect
import math
import re
import runpy
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from mllm_protector.config import CONFIGS, build, clear_errors
from mllm_protector.data.preparation import prepare_data
from mllm_protector.errors import InputError, RunError
from mllm_protector.evaluation.detector import eval_detector
from mllm_protector.evaluation.detoxifier import eval_detoxifier
from mllm_protector.evaluation.listing import list_questions
from mllm_protector.evaluation.run import evaluate
from mllm_protector.generation.run import generate_pairs
from mllm_protector.helping import flat
from mllm_protector.models.export import export_detector
from mllm_protector.models.official import import_official_detector
from mllm_protector.outputs import WITHOUT_INFLUENCE, claim_output_dir
from mllm_protector.reporting.compare import compare
from mllm_protector.stopping import Stop
from mllm_protector.training import settings
from mllm_protector.training.calibration import calibrate_detector
from mllm_protector.training.detector import train_detector
from mllm_protector.training.detoxifier import train_detoxifier
from mllm_protector.training.settings import FitConfig
from speed.run import run_benchmark

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "train_detector": train_detector,
    "train_detoxifier": train_detoxifier,
    "prepare_data": prepare_data,
    "list_questions": list_questions,
    "eval_mmsafety": evaluate,
    "benchmark": run_benchmark,
    "compare_runs": compare,
    "generate_pairs": generate_pairs,
    "calibrate_detector": calibrate_detector,
    "eval_detector": eval_detector,
    "eval_detoxifier": eval_detoxifier,
    "import_official": import_official_detector,
    "export_detector": export_detector,
}
WITH_EXPERIMENTS = ("train_detector", "train_detoxifier", "eval_mmsafety")
FILLED_IN = {"path": "some/file", "images": "some/folder", "name": "some/model", "model": "some/model"}
"""What a user has to give for options that have no value for it."""


def composed(root: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(root, list(overrides))


def filled_in(cfg: DictConfig) -> DictConfig:
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, FILLED_IN[key.rpartition(".")[2]])
    return cfg


def groups(root: str) -> dict[str, list[str]]:
    """The argument of each group of a root YAML (as it is overridden), with all its options."""
    found = {}
    for default in yaml.safe_load((CONFIGS / f"{root}.yaml").read_text())["defaults"]:
        key = next(iter(default)) if isinstance(default, dict) else default
        if key != "_self_" and not key.startswith("override "):
            group = key.partition("@")[0]
            paths = [*(CONFIGS / group).glob("*.yaml"), *(CONFIGS / root / group).glob("*.yaml")]
            found[key] = sorted(path.stem for path in paths)
    return found


CHATS = [
    (root, f"chat@judges.{judge}.chat")
    for root in ("eval_mmsafety", "generate_pairs")
    for judge in ("chat", "guard_model")
]
"""Groups within the options of a group."""
OPTIONS = [
    (root, group, option) for root in FUNCTIONS for group, found in groups(root).items() for option in found
] + [(root, group, option) for root, group in CHATS for option in ("local", "served")]


@pytest.mark.parametrize("root", FUNCTIONS)
def test_the_keys_of_a_root_are_the_parameters_of_its_function(root: str) -> None:
    assert set(map(str, composed(root))) == set(inspect.signature(FUNCTIONS[root]).parameters)


@pytest.mark.parametrize(("root", "group", "option"), OPTIONS)
def test_every_option_binds_to_its_constructor(root: str, group: str, option: str) -> None:
    judge = re.fullmatch(r"chat@judges\.(\w+)\.chat", group)
    inside = [f"judge=[{judge.group(1)}]"] if judge else []
    name, _, key = group.partition("@")
    inside += [f"+data@{key or 'data'}.sources.mine=toy"] if (name, option) == ("data", "mixture") else []
    arguments = build(filled_in(composed(root, *inside, f"{group}={option}")), FUNCTIONS[root])
    for value in (*arguments.values(), *arguments.get("judges", {}).values()):
        if isinstance(value, functools.partial):
            inspect.signature(value.func).bind(*value.args, **value.keywords)


def test_every_yaml_is_reached_by_those_tests() -> None:
    reached = {CONFIGS / f"{root}.yaml" for root in FUNCTIONS}
    for root, group, option in OPTIONS:
        folder = group.partition("@")[0]
        reached |= {CONFIGS / folder / f"{option}.yaml", CONFIGS / root / folder / f"{option}.yaml"}
    others = {path for folder in ("accelerate", "scenarios") for path in (CONFIGS / folder).glob("*.yaml")}
    assert set(CONFIGS.rglob("*.yaml")) - others <= reached


@pytest.mark.parametrize("root", WITH_EXPERIMENTS)
@pytest.mark.parametrize("experiment", ["paper", "qwen"])
def test_an_experiment_changes_values_and_adds_no_key(root: str, experiment: str) -> None:
    plain, overlaid = composed(root), composed(root, f"experiment={experiment}")
    assert set(overlaid) == set(plain)
    assert overlaid.output_dir.startswith(f"outputs/{experiment}_")


def choices(root: str, *overrides: str) -> dict[str, str | None]:
    """The options that a command line comes to."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(root, list(overrides), return_hydra_config=True)
    return {group: cfg.hydra.runtime.choices[group] for group in ("data", "backbone", "tuning", "fit")}


def test_an_option_of_backbone_brings_its_fit_and_tuning_and_what_is_given_wins() -> None:
    brought = {
        "tiny": ("tiny", "full"),
        "hub": ("adapter", "lora"),
        "qwen3_0.6b": ("adapter", "lora"),
        "open_llama_3b": ("paper", "paper_{part}"),
        "vicuna_7b": ("paper", "paper_{part}"),
    }
    assert brought.keys() == set(groups("train_detector")["backbone"])
    for root in ("train_detector", "train_detoxifier"):
        assert choices(root)["fit"] == "tiny"
        for backbone, (fit, tuning) in brought.items():
            found = choices(root, f"backbone={backbone}")
            part = root.removeprefix("train_")
            assert (found["fit"], found["tuning"]) == (fit, tuning.format(part=part)), (root, backbone)
            for given in ("fit=adapter", "fit=paper", "fit=tiny"):
                found = choices(root, f"backbone={backbone}", given, "tuning=full")
                assert (found["fit"], found["tuning"]) == (given[4:], "full"), (root, backbone, given)
    assert choices("train_detector", "backbone=hub", "fit=encoder")["tuning"] == "full"


def test_an_experiment_is_a_whole_recipe_with_the_models_of_the_hub_pinned() -> None:
    models = {
        ("train_detector", "qwen"): ("Qwen/Qwen3-0.6B", "adapter", "lora"),
        ("train_detoxifier", "qwen"): ("Qwen/Qwen3-0.6B", "adapter", "lora"),
        ("train_detector", "paper"): ("openlm-research/open_llama_3b_v2", "paper", "paper_detector"),
        ("train_detoxifier", "paper"): ("lmsys/vicuna-7b-v1.5", "paper", "paper_detoxifier"),
    }
    for (root, experiment), (name, fit, tuning) in models.items():
        cfg = composed(root, f"experiment={experiment}")
        assert cfg.backbone.name == name
        assert re.fullmatch("[0-9a-f]{40}", cfg.backbone.revision), name
        found = choices(root, f"experiment={experiment}")
        assert (found["data"], found["fit"], found["tuning"]) == ("pku_saferlhf", fit, tuning)
        own = choices(root, f"experiment={experiment}", "data=pairs", "fit=tiny")
        assert (own["data"], own["fit"], own["tuning"]) == ("pairs", "tiny", tuning)


@pytest.mark.parametrize("experiment", ["paper", "qwen"])
def test_an_experiment_evaluates_the_parts_that_it_trains(experiment: str) -> None:
    evaluated = composed("eval_mmsafety", f"experiment={experiment}")
    for part in ("detector", "detoxifier"):
        assert evaluated[part] == composed(f"train_{part}", f"experiment={experiment}").output_dir


def complaint(capsys: pytest.CaptureFixture[str], *overrides: str, root: str = "train_detector") -> str:
    """The one line that a command line is answered with."""
    with pytest.raises(SystemExit) as stopped, clear_errors():
        build(composed(root, *overrides), FUNCTIONS[root])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert printed.out == ""
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("nope=1", "nope: unknown config key"),
        ("+epochs=1", "epochs: unknown config key; give fit.epochs=..."),
        ("fit.epoch=3", "fit.epoch: unknown config key (did you mean epochs?)"),
        ("+fit.epoch=3", "fit.epoch: unknown config key (did you mean epochs?)"),
        ("+nope=1", "nope: unknown config key"),
        ("fit=nope", "fit=nope: unknown option; choose one of adapter, encoder, paper, tiny"),
        ("experiment=nope", "experiment=nope: unknown option; choose one of paper, qwen"),
        ("data=pairs", "data.path has no value; give data.path=..."),
        ("~fit.epochs", "fit.epochs has no value; give fit.epochs=..."),
        ("fit.epochs=abc", "fit.epochs=abc: must be a whole number"),
        ("fit.epochs=1.5", "fit.epochs=1.5: must be a whole number"),
        ("fit.epochs=null", "fit.epochs=null: must be a whole number"),
        ("fit.learning_rate=true", "fit.learning_rate=true: must be a number"),
        ("fit.precision=fp8", "fit.precision=fp8: must be one of fp32, bf16"),
        ("fit.batch_size=0", "fit.batch_size=0: must be at least 1"),
        ("max_length=abc", "max_length=abc: must be a whole number"),
        ("seed=abc", "seed=abc: must be a whole number"),
        ("prompt=3", "prompt=3: must be a text or null"),
        ("backbone.hidden_size=abc", "backbone.hidden_size=abc: must be a whole number"),
        ("fit", "Error parsing override 'fit': missing EQUAL at '<EOF>'"),
        ("data._target_=os.getcwd", "data._target_=os.getcwd: not a constructor of mllm_protector"),
        (
            "data._target_=mllm_protector.nope.Nope",
            "data._target_=mllm_protector.nope.Nope: not a constructor",
        ),
        ("data._target_=mllm_protector.files.os.getcwd", "data._target_=mllm_protector.files.os.getcwd: not"),
        ("backbone._target_=os.getcwd", "backbone._target_=os.getcwd: not a constructor"),
        ("+fit.epochs={_target_:os.getcwd}", "fit.epochs._target_=os.getcwd: not a constructor"),
        ("fit.clip_norm={_target_:os.getcwd}", "fit.clip_norm._target_=os.getcwd: not a constructor"),
        ("prompt=[{_target_:os.getcwd}]", "prompt=["),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key_as_it_was_typed(
    override: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint(capsys, override).startswith(expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data=pairs", "data.path=x", "data.limit=1"], "data.limit=1: must be at least 2"),
        (["tuning=lora", "tuning.rank=x"], "tuning.rank=x: must be a whole number"),
        (["tuning=lora", "tuning.targets=[1]"], "tuning.targets=[1]: must be a text or a list, each a text"),
        (["tracker=wandb", "tracker.mode=on"], "tracker.mode=on: must be one of offline, online"),
        (
            ["data=hh_rlhf", "data.path=x", "data.context=first"],
            "data.context=first: must be one of last, all",
        ),
    ],
)
def test_a_mistake_in_an_option_is_found_before_anything_is_read(
    overrides: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint(capsys, *overrides).startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("benchmarks.toy.variants=[SD,NO]", "benchmarks.toy.variants"),
        ("benchmark=[nope]", "benchmark=nope: unknown option; choose one of figstep, gqa, "),
        ("judge=[keyword,nope]", "judge=nope: unknown option; choose one of chat, detector, guard_model"),
        ("judge=[chat]", "judges.chat.chat.model has no value; give judges.chat.chat.model=..."),
        ("arms=protector", "arms=protector: must be a list, each a text"),
        ("judges.keyword._target_=os.getcwd", "judges.keyword._target_=os.getcwd: not a constructor"),
    ],
)
def test_mistakes_of_an_evaluation_are_found_as_well(
    override: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint(capsys, override, root="eval_mmsafety").startswith(expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "generator.model has no value; give generator.model=..."),
        (["max_calls=0"], "max_calls=0: must be a whole number from 1 to 1,000,000,000 or null"),
        (["pairs=0"], "pairs=0: must be a whole number from 1 to"),
        (["near_duplicate=0.2"], "near_duplicate=0.2: must be a number from 0.51 to 1"),
        (["min_share=0"], "min_share=0: must be a number from"),
        (["unconfirmed=keep"], "unconfirmed=keep: must be one of drop, mark"),
        (["question_format=xml"], "question_format=xml: must be one of json, lines"),
        (["max_call=1"], "max_call: unknown config key (did you mean max_calls?)"),
    ],
)
def test_mistakes_of_a_generation_are_found_as_well(
    overrides: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["generator.model=m", "judge=[keyword]"] if overrides else ["judge=[keyword]"]
    assert complaint(capsys, *given, *overrides, root="generate_pairs").startswith(expected)


def test_the_detector_judge_reads_the_evaluations_detector_or_the_default_one() -> None:
    evaluated = composed("eval_mmsafety", "judge=[detector]", "detector=elsewhere")
    generated = composed("generate_pairs", "judge=[detector]")
    assert evaluated.judges.detector.folder == "elsewhere"
    assert generated.judges.detector.folder == composed("train_detector").output_dir


def test_plain_values_arrive_as_they_are_and_constructors_as_objects() -> None:
    arguments = build(composed("train_detector", "fit.learning_rate=1e-4", "seed=7"), train_detector)
    assert arguments["seed"] == 7
    assert isinstance(arguments["fit"], FitConfig)
    assert arguments["fit"].learning_rate == 1e-4
    assert isinstance(arguments["backbone"], functools.partial)


def sample(
    *,
    whole: int = 0,
    number: float = 0.0,
    text: str = "",
    flag: bool = False,
    maybe: int | None = None,
    choice: Literal["a", "b"] = "a",
    texts: Sequence[str] = (),
    numbers: list[float] | str = "",
    table: Mapping[str, Callable[[], Any]] | None = None,
    anything: Any = None,
) -> None:
    """A function with every kind of annotation that our own functions have."""


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("whole", [0, -3], [1.0, "1", True, None, [1]]),
        ("number", [1, 1.5], ["1", True, None]),
        ("text", ["", "1"], [1, None, ["a"]]),
        ("flag", [True, False], [0, 1, "true", None]),
        ("maybe", [1, None], ["1", 1.5]),
        ("choice", ["a", "b"], ["c", None, 1]),
        ("texts", [[], ["a"]], ["a", [1], None, [None]]),
        ("numbers", [[1, 2.5], "all"], [["a"], 1]),
        ("table", [{}, None], [3, "a"]),
        ("anything", [1, "a", None, [1], {"a": 1}], []),
    ],
)
def test_a_value_is_what_its_annotation_says_or_refused(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert build(OmegaConf.create({name: value}), sample) == {name: value}
    for value in bad:
        with pytest.raises(InputError, match=re.escape(f"{name}=") + ".*: must be "):
            build(OmegaConf.create({name: value}), sample)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a.jsonl:3: bad\n row"), 2, "error: a.jsonl:3: bad row"),
        (RunError("the loss is nan"), 1, "error: the loss is nan"),
        (
            Stop(signal.SIGTERM),
            143,
            "error: stopped by SIGTERM; what was finished is kept, and the same command goes on from there",
        ),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped, clear_errors():
        raise error
    assert stopped.value.code == code
    assert capsys.readouterr().err == line + "\n"


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), clear_errors():
        _ = 1 / 0


def claimed(folder: Path, *overrides: str, trained: bool = True) -> DictConfig:
    """A training that ran so far in this folder, to kept weights or only to its first step."""
    cfg = composed("train_detector", f"output_dir={folder}", *overrides)
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    with claim_output_dir(settings, "train_detector"):
        (folder / "metrics.jsonl").touch()
        if trained:
            (folder / "guard.json").touch()
    return cfg


def test_the_resolved_config_is_written_beside_the_results(tmp_path: Path) -> None:
    cfg = claimed(tmp_path / "new" / "folder", "seed=3")
    written = OmegaConf.load(tmp_path / "new" / "folder" / "config.yaml")
    assert written == OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert written.backbone.seed == 3
    assert "${" not in (tmp_path / "new" / "folder" / "config.yaml").read_text()


def test_the_same_configuration_may_use_its_folder_again(tmp_path: Path) -> None:
    claimed(tmp_path, "seed=3")
    claimed(tmp_path, "seed=3")


def test_the_folder_of_another_configuration_is_refused_with_the_changed_keys(tmp_path: Path) -> None:
    claimed(tmp_path)
    with pytest.raises(InputError, match=r"\(changed: fit.epochs, max_length\)") as refused:
        claimed(tmp_path, "fit.epochs=9", "max_length=100", "backbone.max_positions=512")
    assert str(refused.value).endswith(f"or remove {tmp_path}/guard.json to train anew")
    assert OmegaConf.load(tmp_path / "config.yaml").fit.epochs == 2
    (tmp_path / "guard.json").unlink()
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    with pytest.raises(InputError, match=r"or remove .*/checkpoints to train anew"):
        claimed(tmp_path, "fit.epochs=9")


def test_keys_that_change_no_result_may_differ(tmp_path: Path) -> None:
    claimed(tmp_path)
    claimed(tmp_path, "tracker=wandb", "fit.log_every=1")


def test_a_training_that_came_to_nothing_may_be_corrected(tmp_path: Path) -> None:
    claimed(tmp_path, "data=pairs", "data.path=mispelt", trained=False)
    claimed(tmp_path, "data=pairs", "data.path=misspelt")
    assert OmegaConf.load(tmp_path / "config.yaml").data.path == "misspelt"


def test_a_config_holds_no_clock() -> None:
    assert not [path for path in CONFIGS.rglob("*.yaml") if "${now" in path.read_text()]


def test_a_folder_and_a_checkpoint_agree_on_which_settings_change_no_result() -> None:
    names = [field.name for field in fields(FitConfig)]
    of_folders = {name for name in names if f"fit.{name}".startswith(WITHOUT_INFLUENCE)}
    assert of_folders == set(settings.WITHOUT_INFLUENCE)


ANYTHING = (None, -1, 0, 10**23, math.nan, "", "x", [], {})
"""What is tried in the place of every value."""
CHECKED_LATER = {
    "eval_mmsafety": {"threshold", "max_unjudged", "repeats"},
    "generate_pairs": {"concurrency", "max_retries", "timeout", "temperature"},
}
"""By the function, first of all, or by the constructor of a served model, with tests beside them."""


@pytest.mark.parametrize("root", FUNCTIONS)
def test_any_value_of_any_key_is_taken_or_refused_in_a_line_that_names_the_key(root: str) -> None:
    plain: Any = OmegaConf.to_container(filled_in(composed(root)), resolve=True)
    for key, usual in flat(plain).items():
        name = key.rpartition(".")[2]
        is_number = isinstance(usual, int | float) and not isinstance(usual, bool)
        is_number &= not key.startswith("model.")  # the benchmark checks the size of its model itself
        for value in ANYTHING:
            changed = OmegaConf.create(plain)
            OmegaConf.update(changed, key, value, merge=False)
            said = None
            try:
                build(changed, FUNCTIONS[root])
            except InputError as refused:
                said = str(refused)
                assert name in said, f"{key}={value}: {said}"
                assert "\n" not in said, f"{key}={value}: {said}"
            small = value == -1 and name not in CHECKED_LATER.get(root, ())
            if is_number and (small or value in ("", "x", [], {}, 10**23) or value is math.nan):
                assert said is not None, f"{key}={value} was taken"


def test_ranges_are_said_in_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    for root, override, expected in (
        ("eval_mmsafety", "rewrite_tokens=0", "must be a whole number from 1 to"),
        ("eval_mmsafety", "latency_rows=-1", "must be a whole number from 0 to"),
        ("eval_mmsafety", "batch_size=0", "must be a whole number from 1 to"),
        ("eval_detoxifier", "batch_size=0", "must be a whole number from 1 to"),
        ("benchmark", "rounds=0", "must be a whole number from 1 to"),
        ("calibrate_detector", "batch_tokens=0", "must be a whole number from 1 to"),
        ("train_detector", "seed=-1", "must be a whole number from 0 to 4,294,967,295"),
        ("train_detector", f"seed={10**23}", "must be a whole number from 0 to 4,294,967,295"),
        ("train_detector", "backbone.hidden_size=0", "must be a whole number from 1 to"),
        ("train_detector", "prefixes=2", "must be a number from 0 to 1"),
    ):
        assert complaint(capsys, override, root=root).startswith(f"{override}: {expected}")
    rank = complaint(capsys, "tuning=lora", "tuning.rank=0")
    assert rank.startswith("tuning.rank=0: must be a whole number from 1 to")


def launched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *given: str) -> str:
    """What ``prepare_data.py`` says to a command line that it cannot follow."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *given])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(CONFIGS.parent / "scripts" / "prepare_data.py"), run_name="__main__")
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")


def test_a_group_without_an_option_is_one_line_with_the_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in ("data=null", "benchmark=null", "data=3"):
        said = launched(monkeypatch, capsys, given)
        assert said.startswith(f"{given}: unknown option; choose one of "), given


def test_any_path_can_be_typed_or_the_quotes_it_needs_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = f"output_dir={tmp_path / 'out'}"
    for path in ("/no=such.csv", "/no (such) one.csv", "~/no.csv", "/no:such%.csv"):
        said = launched(monkeypatch, capsys, "data=labelled", f"data.path={path}", folder)
        assert said == f"{path.replace('~', str(tmp_path))}: no such file", path
    said = launched(monkeypatch, capsys, "data=labelled", "data.path=/no,such.csv", folder)
    assert said.endswith("""'data.path="/no,such.csv"'"""), said
