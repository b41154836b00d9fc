"""Every option binds, every value is checked, and every mistake is one line that names its key."""

import copy
import functools
import inspect
import math
import pydoc
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

from mllm_protector.calls import check_call, construct
from mllm_protector.commands import COMMANDS
from mllm_protector.config import CONFIGS, build, clear_errors
from mllm_protector.errors import InputError, RunError, Stop
from mllm_protector.helping import flat
from mllm_protector.outputs import WITHOUT_INFLUENCE, claim_output_dir
from mllm_protector.serving.settings import UpstreamSettings
from mllm_protector.training import settings
from mllm_protector.training.settings import FitConfig

TARGETS = {command.config: command.target for command in COMMANDS.values()}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: pydoc.locate(target)  # type: ignore[misc]
    for name, target in {**TARGETS, "benchmark": "speed.run.run_benchmark"}.items()
}
"""A script's name -> the function that it calls."""
WITH_EXPERIMENTS = ("train_detector", "train_detoxifier", "eval_mmsafety")
FILLED_IN = {
    "path": "some/file",
    "images": "some/folder",
    "name": "some/model",
    "model": "some/model",
    "run": "some/run",
}
"""What a user has to give for options that have no value for it."""


def composed(root: str, *overrides: str) -> DictConfig:
    """A config of its own; composing takes a tenth of a second, so the same command line is composed once."""
    return copy.deepcopy(_composed(root, overrides))


@functools.cache
def _composed(root: str, overrides: tuple[str, ...]) -> DictConfig:
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


def test_the_keys_of_a_root_are_the_parameters_of_its_function() -> None:
    for root, function in FUNCTIONS.items():
        assert set(map(str, composed(root))) == set(inspect.signature(function).parameters), root


def test_every_option_binds_to_its_constructor() -> None:
    bound = set()
    for root, group, option in OPTIONS:
        name, _, key = group.partition("@")
        if (root != "eval_mmsafety" or not key) and (group, option) in bound:
            continue  # the same file for the same argument of another script
        bound.add((group, option))
        judge = re.fullmatch(r"chat@judges\.(\w+)\.chat", group)
        inside = [f"judge=[{judge.group(1)}]"] if judge else []
        inside += [f"+data@{key or 'data'}.sources.mine=toy"] if (name, option) == ("data", "mixture") else []
        arguments = build(filled_in(composed(root, *inside, f"{group}={option}")), FUNCTIONS[root])
        for value in (*arguments.values(), *arguments.get("judges", {}).values()):
            if isinstance(value, functools.partial):
                later = {"url": "http://127.0.0.1:1/v1"} if value.func is UpstreamSettings else {}
                inspect.signature(value.func).bind(*value.args, **value.keywords, **later)


def test_every_yaml_is_reached_by_those_tests() -> None:
    reached = {CONFIGS / f"{root}.yaml" for root in FUNCTIONS}
    for root, group, option in OPTIONS:
        folder = group.partition("@")[0]
        reached |= {CONFIGS / folder / f"{option}.yaml", CONFIGS / root / folder / f"{option}.yaml"}
    others = {path for folder in ("accelerate", "scenarios") for path in (CONFIGS / folder).glob("*.yaml")}
    assert set(CONFIGS.rglob("*.yaml")) - others <= reached
    assert not [path for path in reached if path.is_file() and "${now" in path.read_text()]


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
    for backbone, (fit, tuning) in brought.items():
        for part in ("detector", "detoxifier"):
            found = choices(f"train_{part}", f"backbone={backbone}")
            assert (found["fit"], found["tuning"]) == (fit, tuning.format(part=part)), (part, backbone)
        found = choices("train_detector", f"backbone={backbone}", "fit=encoder", "tuning=full")
        assert (found["fit"], found["tuning"]) == ("encoder", "full"), backbone
    assert choices("train_detector", "backbone=hub", "fit=encoder")["tuning"] == "full"


def test_an_experiment_is_a_whole_recipe_without_new_keys_and_with_its_models_pinned() -> None:
    models = {
        ("train_detector", "qwen"): ("Qwen/Qwen3-0.6B", "adapter", "lora"),
        ("train_detoxifier", "qwen"): ("Qwen/Qwen3-0.6B", "adapter", "lora"),
        ("train_detector", "paper"): ("openlm-research/open_llama_3b_v2", "paper", "paper_detector"),
        ("train_detoxifier", "paper"): ("lmsys/vicuna-7b-v1.5", "paper", "paper_detoxifier"),
    }
    plain = {root: set(composed(root)) for root in WITH_EXPERIMENTS}
    evaluated = {each: composed("eval_mmsafety", f"experiment={each}") for each in ("paper", "qwen")}
    for (root, experiment), (name, fit, tuning) in models.items():
        cfg = composed(root, f"experiment={experiment}")
        assert set(cfg) == plain[root], (root, experiment)
        assert cfg.output_dir == evaluated[experiment][root.removeprefix("train_")]
        assert cfg.backbone.name == name
        assert re.fullmatch("[0-9a-f]{40}", cfg.backbone.revision), name
        found = choices(root, f"experiment={experiment}")
        assert (found["data"], found["fit"], found["tuning"]) == ("pku_saferlhf", fit, tuning)
    for experiment, cfg in evaluated.items():
        assert set(cfg) == plain["eval_mmsafety"]
        assert cfg.output_dir.startswith(f"outputs/{experiment}_")
    own = choices("train_detector", "experiment=paper", "data=pairs", "fit=tiny")
    assert (own["data"], own["fit"], own["tuning"]) == ("pairs", "tiny", "paper_detector")


def complaint(capsys: pytest.CaptureFixture[str], *overrides: str, root: str = "train_detector") -> str:
    """The one line that a command line is answered with."""
    with pytest.raises(SystemExit) as stopped, clear_errors():
        build(composed(root, *overrides), FUNCTIONS[root])
    assert stopped.value.code == 2, overrides
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert printed.out == ""
    return line.removeprefix("error: ")


NOT_OURS = "not a constructor of mllm_protector, and no installed package declares it"
MISTAKES = {
    "train_detector": {
        "nope=1": "nope: unknown config key",
        "+epochs=1": "epochs: unknown config key; give fit.epochs=...",
        "fit.epoch=3": "fit.epoch: unknown config key (did you mean epochs?)",
        "+fit.epoch=3": "fit.epoch: unknown config key (did you mean epochs?)",
        "fit=nope": "fit=nope: unknown option; choose one of adapter, encoder, paper, tiny",
        "experiment=nope": "experiment=nope: unknown option; choose one of paper, probe, qwen, small",
        "data=pairs": "data.path has no value; give data.path=...",
        "~fit.epochs": "fit.epochs has no value; give fit.epochs=...",
        "fit.epochs=abc": "fit.epochs=abc: must be a whole number",
        "fit.epochs=1.5": "fit.epochs=1.5: must be a whole number",
        "fit.epochs=null": "fit.epochs=null: must be a whole number",
        "fit.learning_rate=true": "fit.learning_rate=true: must be a number",
        "fit.precision=fp8": "fit.precision=fp8: must be 'fp32', 'bf16' or 'auto'",
        "fit.batch_size=0": "fit.batch_size=0: must be at least 1",
        "prompt=3": "prompt=3: must be text or null",
        "seed=-1": "seed=-1: must be at least 0",
        f"seed={10**23}": f"seed={10**23}: must be at most 4,294,967,295",
        "prefixes=2": "prefixes=2: must be at most 1",
        "backbone.hidden_size=0": "backbone.hidden_size=0: must be at least 1",
        "fit": "Error parsing override 'fit': missing EQUAL at '<EOF>'",
        "tuning=lora tuning.rank=0": "tuning.rank=0: must be at least 1",
        "tuning=lora tuning.targets=[1]": "tuning.targets=[1]: must be text",
        "tracker=wandb tracker.mode=on": "tracker.mode=on: must be 'offline' or 'online'",
        "data=hh_rlhf data.path=x data.context=first": "data.context=first: must be 'last' or 'all'",
        "data=pairs data.path=x data.limit=1": "data.limit=1: must be at least 2",
        "data._target_=os.getcwd": f"data._target_=os.getcwd: {NOT_OURS}",
        "data._target_=mllm_protector.nope.Nope": f"data._target_=mllm_protector.nope.Nope: {NOT_OURS}",
        "data._target_=mllm_protector.files.os.getcwd": "data._target_=mllm_protector.files.os.getcwd: not a",
        "backbone._target_=os.getcwd": f"backbone._target_=os.getcwd: {NOT_OURS}",
        "+fit.epochs={_target_:os.getcwd}": 'fit.epochs={"_target_": "os.getcwd"}: must be a whole number',
        "prompt=[{_target_:os.getcwd}]": "prompt=[",
    },
    "eval_mmsafety": {
        "benchmark=[nope]": "benchmark=nope: unknown option; choose one of figstep, gqa, ",
        "judge=[keyword,nope]": "judge=nope: unknown option; choose one of chat, detector, guard_model",
        "judge=[chat]": "judges.chat.chat.model has no value; give judges.chat.chat.model=...",
        "arm=nope": "arm=nope: unknown option; choose one of llama_guard, moderation, protector",
        "judges.keyword._target_=os.getcwd": f"judges.keyword._target_=os.getcwd: {NOT_OURS}",
        "rewrite_tokens=0": "rewrite_tokens=0: must be at least 1",
        "latency_rows=-1": "latency_rows=-1: must be at least 0",
    },
    "generate_pairs": {
        "judge=[keyword]": "generator.model has no value; give generator.model=...",
        "judge=[keyword] generator.model=m unconfirmed=keep": "unconfirmed=keep: must be 'drop' or 'mark'",
    },
    "calibrate_detector": {"batch_tokens=0": "batch_tokens=0: must be at least 1"},
}


def test_a_mistake_is_one_line_that_names_the_key_as_typed_and_what_is_allowed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for root, cases in MISTAKES.items():
        for overrides, expected in cases.items():
            said = complaint(capsys, *overrides.split(" "), root=root)
            assert said.startswith(expected), said


def test_the_detector_judge_reads_the_evaluations_detector_or_the_default_one() -> None:
    evaluated = composed("eval_mmsafety", "judge=[detector]", "detector=elsewhere")
    generated = composed("generate_pairs", "judge=[detector]")
    assert evaluated.judges.detector.folder == "elsewhere"
    assert generated.judges.detector.folder == composed("train_detector").output_dir


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
    fit: FitConfig | None = None,
    anything: Any = None,
) -> None:
    """A function with every kind of annotation that our own functions have."""


def test_a_value_fits_its_annotation_or_is_refused() -> None:
    cases: dict[str, tuple[list[Any], list[Any]]] = {
        "whole": ([0, -3], [1.0, "1", True, None, [1], 10**23]),
        "number": ([1, 1.5], ["1", True, None, math.nan, math.inf]),
        "text": (["", "1"], [1, None, ["a"]]),
        "flag": ([True, False], [0, 1, "true", None]),
        "maybe": ([1, None], ["1", 1.5]),
        "choice": (["a", "b"], ["c", None, 1]),
        "texts": ([[], ["a"]], ["a", [1], None, [None]]),
        "numbers": ([[1, 2.5], "all"], [["a"], 1]),
        "table": ([{}, None], [3, "a", {"a": {}}]),
        "fit": ([None], [3, "a", {}, {"epochs": 1}]),
        "anything": ([1, "a", None, [1], {"a": 1}], []),
    }
    for name, (good, bad) in cases.items():
        for value in good:
            assert build(OmegaConf.create({name: value}), sample) == {name: value}
        for value in bad:
            with pytest.raises(InputError, match=rf"^{name}(\.a)?=.*: must be \S") as refused:
                build(OmegaConf.create({name: value}), sample)
            assert "\n" not in str(refused.value)


def test_what_a_user_can_cause_is_one_line_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    for error, code, line in (
        (InputError("a.jsonl:3: bad\n row"), 2, "error: a.jsonl:3: bad row\n"),
        (RunError("the loss is nan"), 1, "error: the loss is nan\n"),
        (Stop(signal.SIGTERM), 143, "error: stopped by SIGTERM; finished work is kept, "),
    ):
        with pytest.raises(SystemExit) as stopped, clear_errors():
            raise error
        assert stopped.value.code == code
        assert capsys.readouterr().err.startswith(line)
    with pytest.raises(ZeroDivisionError), clear_errors():  # a fault of ours keeps its traceback
        _ = 1 / 0


def test_a_module_of_an_extra_is_named_with_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = ["tqdm>=4", 'starlette>=0.45; extra == "serve"', 'prometheus-client>=0.20; extra == "serve"']
    monkeypatch.setattr("mllm_protector.helping.requires", lambda name: needed)
    with pytest.raises(SystemExit) as stopped, clear_errors():
        raise ModuleNotFoundError(name="prometheus_client")
    assert stopped.value.code == 1
    line = "error: prometheus_client is not installed; it comes with: pip install 'mllm-protector[serve]'\n"
    assert capsys.readouterr().err == line
    for other in ("tqdm", "mllm_protector.nope"):  # a broken installation, or a fault of ours
        with pytest.raises(ModuleNotFoundError), clear_errors():
            raise ModuleNotFoundError(name=other)


def claimed(folder: Path, *overrides: str, trained: bool = True) -> DictConfig:
    """A training in this folder, up to its weights or only to its first step."""
    cfg = composed("train_detector", f"output_dir={folder}", *overrides)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    with claim_output_dir(plain, "train_detector"):
        (folder / "metrics.jsonl").touch()
        if trained:
            (folder / "guard.json").touch()
    return cfg


def test_a_folder_keeps_its_resolved_config_and_belongs_to_that_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    claimed(folder, "data=pairs", "data.path=mispelt", trained=False)
    cfg = claimed(folder)  # a training that saved nothing may be corrected
    written = OmegaConf.load(folder / "config.yaml")
    assert written == OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert "${" not in (folder / "config.yaml").read_text()
    claimed(folder)
    claimed(folder, "tracker=wandb", "fit.log_every=1")
    claimed(folder)
    with pytest.raises(InputError, match=r"\(changed: fit.epochs, max_length\)") as refused:
        claimed(folder, "fit.epochs=9", "max_length=100", "backbone.max_positions=512")
    assert str(refused.value).endswith(f"or remove {folder}/guard.json to train again")
    assert OmegaConf.load(folder / "config.yaml").fit.epochs == 2
    (folder / "guard.json").unlink()
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    with pytest.raises(InputError, match=r"or remove .*/checkpoints to train again"):
        claimed(folder, "fit.epochs=9")


def test_a_folder_and_a_checkpoint_agree_on_which_settings_change_no_result() -> None:
    names = [field.name for field in fields(FitConfig)]
    of_folders = {name for name in names if f"fit.{name}".startswith(WITHOUT_INFLUENCE)}
    assert of_folders == set(settings.WITHOUT_INFLUENCE)


ANYTHING = (None, -1, 0, 10**23, math.nan, "", "x", [], {})
"""Tried in the place of every value."""
CHECKED_LATER = {
    "eval_mmsafety": {"threshold", "max_unjudged", "repeats"},
    "generate_pairs": {"concurrency", "max_retries", "timeout", "temperature"},
}
"""By the function, first of all, or by the constructor of a served model, with tests beside them."""


def with_value(content: Any, key: str, value: Any) -> Any:
    """A copy of a config with another value; what lies beside the way to it is shared."""
    name, _, rest = key.partition(".")
    changed = copy.copy(content)
    place: Any = int(name) if isinstance(content, list) else name
    changed[place] = with_value(content[place], rest, value) if rest else value
    return changed


def test_any_value_of_any_key_is_taken_or_refused_in_a_line_that_names_the_key() -> None:
    for root, function in FUNCTIONS.items():
        plain: Any = OmegaConf.to_container(filled_in(composed(root)), resolve=True)
        for key, usual in flat(plain).items():
            name = key.rpartition(".")[2]
            is_number = isinstance(usual, int | float) and not isinstance(usual, bool)
            is_number &= not key.startswith("model.")  # the benchmark checks the size of its model itself
            for value in ANYTHING:
                said = None
                content = with_value(plain, key, value)
                try:
                    check_call("", function, content)
                    construct("", content)
                except InputError as refused:
                    said = str(refused)
                    assert name in said, f"{root}: {key}={value}: {said}"
                    assert "\n" not in said, f"{root}: {key}={value}: {said}"
                small = value == -1 and name not in CHECKED_LATER.get(root, ())
                if is_number and (small or value in ("", "x", [], {}, 10**23) or value is math.nan):
                    assert said is not None, f"{root}: {key}={value} was taken"


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
    for path in ("/no=such.csv", "/no (such) one.csv", "~/no.csv", "/no:such%.csv", "{no}/{such}.csv"):
        said = launched(monkeypatch, capsys, "data=labelled", f"data.path={path}", folder)
        assert said == f"{path.replace('~', str(tmp_path))}: no such file", path
    said = launched(monkeypatch, capsys, "data=labelled", "data.path=/no,such.csv", folder)
    assert said.endswith("""'data.path="/no,such.csv"'"""), said
