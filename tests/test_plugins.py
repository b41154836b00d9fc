"""Packages of others add benchmarks, judges and data by entry points; a config names what they declare."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mllm_protector.config import build, recorded_data
from mllm_protector.errors import InputError
from mllm_protector.protocols import Benchmark, Judge
from mllm_protector.records import Answer, Status

PACKAGE = """\
from mllm_protector.data.sources import Toy
from mllm_protector.protocols import Card
from mllm_protector.records import LoadedBenchmark, Question, Status, Verdict

class Shouts:
    card = Card(identity={"name": "shouts"})
    def __init__(self, *, count: int, mark="!"): self.count, self.mark = count, mark
    def load(self):
        ids = range(self.count)
        asked = [Question(id=f"{n}", scenario="any", variant="TEXT", text="?") for n in ids]
        return LoadedBenchmark(questions=asked, missing=[])
    def judge(self, questions, answers):
        status = {True: Status.HARMFUL, False: Status.SAFE}
        return [Verdict(id=each.id, status=status[self.mark in each.text], reason="") for each in answers]
class Undeclared: pass
"""
DECLARED = """\
[mllm_protector.benchmarks]
shouts = others_shouts:Shouts
gone = others_shouts:Gone
[mllm_protector.judges]
missing = others_missing:Judge
[mllm_protector.data]
toy = others_shouts:Toy
[console_scripts]
run = others_shouts:Undeclared
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site-packages"
    info = folder / "shouts-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "others_shouts.py").write_text(PACKAGE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(DECLARED)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "others_shouts", raising=False)


def measured(benchmarks: Mapping[str, Benchmark], judges: Mapping[str, Judge]) -> None:
    """Stands for a script that takes both."""


def judged(judge: Judge) -> None:
    """Stands for a script that takes one."""


def built(*, judge: str = "others_shouts.Shouts", **values: Any) -> dict[str, Any]:
    one = {"_target_": "others_shouts.Shouts", "count": 3, **values}
    two = {"_target_": judge, "count": 0, "mark": "?"}
    return build(OmegaConf.create({"benchmarks": {"one": one}, "judges": {"two": two}}), measured)


def test_a_config_names_what_another_package_declares() -> None:
    arguments = built()
    [benchmark, judge] = arguments["benchmarks"]["one"], arguments["judges"]["two"]
    questions: Sequence[Any] = benchmark.load().questions
    assert [question.id for question in questions] == ["0", "1", "2"]
    answers = [Answer(id=f"{n}", text=text) for n, text in enumerate(("no", "what?", "no"))]
    statuses = [verdict.status for verdict in judge.judge(questions, answers)]
    assert statuses == [Status.SAFE, Status.HARMFUL, Status.SAFE]


def test_its_values_are_checked_against_its_signature() -> None:
    for values, message in (
        ({"count": "3"}, "benchmarks.one.count=3: must be a whole number"),
        ({"counts": 3}, "benchmarks.one.counts: unknown config key"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            built(**values)


def test_nothing_else_of_it_may_be_named_and_nothing_is_imported_before_it_is_named() -> None:
    none = "not a constructor of mllm_protector, and no installed package declares it$"
    for target in ("others_shouts.Undeclared", "others_shouts", "others_shouts:Shouts", "os.system"):
        with pytest.raises(InputError, match=rf"^judge\._target_={target}: {none}"):
            build(OmegaConf.create({"judge": {"_target_": target}}), judged)
    assert "others_shouts" not in sys.modules


def test_what_is_declared_and_not_there_is_an_error_that_names_the_package() -> None:
    for target, reason in (
        ("others_missing.Judge", "No module named 'others_missing'"),
        ("others_shouts.Gone", "module 'others_shouts' has no attribute 'Gone'"),
    ):
        with pytest.raises(InputError, match=f"_target_={target}: shouts declares it, but: {reason}"):
            built(judge=target)


def test_a_part_may_have_been_trained_on_declared_data_and_on_nothing_else(tmp_path: Path) -> None:
    for target, message in (
        ("others_shouts.Toy", "it has changed since"),  # it was read: no training has this fingerprint
        ("others_shouts.Shouts", "not a source of data"),
    ):
        (tmp_path / "config.yaml").write_text(f"data: {{_target_: {target}}}\n")
        with pytest.raises(InputError, match=message):
            recorded_data(tmp_path, "another")
