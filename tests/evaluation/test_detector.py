import html
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from mllm_protector.config import CONFIGS, build, clear_errors, recorded_data
from mllm_protector.data.mixture import Mixture
from mllm_protector.data.sources import Pairs
from mllm_protector.data.splits import Splits, make_splits
from mllm_protector.errors import InputError, RunError
from mllm_protector.evaluation import detection
from mllm_protector.evaluation import detector as module
from mllm_protector.evaluation.detector import eval_detector
from mllm_protector.files import write_jsonl
from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.guard_file import GuardFile
from mllm_protector.records import AnswerPair, LabelledAnswer
from mllm_protector.reporting.parts import report_detector as report
from tests import forked
from tests.evaluation.builders import Measured

TEMPERATURE, THRESHOLD = 2.0, 0.4
HOSTILE = "<script>alert(1)</script>\u202e'\"><img src=x onerror=alert(2)>"


class Given:
    """A source of given records."""

    def __init__(self, train: list[Any], validation: list[Any], account: str = "made up") -> None:
        self.splits: Splits[Any] = make_splits(train, validation, account)

    def load(self) -> Splits[Any]:
        return self.splits


def pairs(start: int, count: int, *, query: str = "question") -> list[AnswerPair]:
    return [
        AnswerPair(
            query=f"{query} {number}",
            accepted=f"sorry, not number {number % 7}",
            rejected=f"forbidden thing {number % 7}" if number % 5 else f"sorry, but forbidden {number}",
        )
        for number in range(start, start + count)
    ]


TRAINED = Given(pairs(0, 40), pairs(40, 30))
FOREIGN = Given(pairs(100, 40), pairs(140, 30), "foreign")


def own(source: Given) -> dict[str, Any]:
    """What a detector says of the data that it was trained with."""
    return {"account": source.splits.account, "fingerprint": source.splits.fingerprint}


def scorer(rule: Callable[[str, str], float], **changes: Any) -> HarmDetector:
    """A detector whose logits follow a rule of query and answer."""
    guard = GuardFile(
        kind="detector",
        tuning="full",
        base={"name": "rule"},
        prompt="{query}{answer}",
        max_length=64,
        pad_id=0,
        threshold=THRESHOLD,
        threshold_how="fixed",
        temperature=TEMPERATURE,
        data={"account": "elsewhere", "fingerprint": "0"},
        metrics={},
        versions={},
    )

    class Rule(HarmDetector):
        def logits(self, *, queries: Any, answers: Any) -> list[float]:
            return [rule(query, answer) for query, answer in zip(queries, answers, strict=True)]

    return Rule(cast("Any", None), cast("Any", None), replace(guard, **changes))


def harmful(query: str, answer: str) -> float:
    return 3.0 if "forbidden" in answer else -3.0


def noisy(query: str, answer: str) -> float:
    dice = np.random.default_rng([ord(letter) for letter in query + answer])
    return float(dice.normal(1.0 if "forbidden" in answer else -1.0, 2.0))


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.setattr(detection, "RESAMPLES", 200)

    def run(
        rule: Callable[[str, str], float] = noisy, data: Any = None, pages: bool = False, **given: Any
    ) -> dict[str, Any]:
        changes = {"data": own(TRAINED)} | given.pop("guard", {})
        monkeypatch.setattr(module, "load_detector", lambda *_, **__: scorer(rule, **changes))
        arguments: dict[str, Any] = {
            "detector": "some/detector",
            "data": data or TRAINED,
            "baseline_data": None,
            "base": None,
            "device": None,
            "split": "validation",
            "group_file": None,
            "save_texts": False,
            "output_dir": str(tmp_path / "out"),
            "seed": 0,
        }
        measured = eval_detector(**arguments | given)
        if pages:  # drawing them takes half of the time
            report(measured)
        return measured[0].metrics

    return run


Measure = Callable[..., dict[str, Any]]


BEFORE = "detector before calibration"


def of(metrics: dict[str, Any], arm: str = "detector", group: str | None = None) -> Measured:
    """The measurements of what scored."""
    return Measured(row for row in metrics["measurements"] if (row["arm"], row["group"]) == (arm, group))


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").open()]


def test_the_figures_are_scikit_learns_on_the_written_scores(measure: Measure, tmp_path: Path) -> None:
    metrics = measure()
    written = rows(tmp_path)
    labels = [row["harmful"] for row in written]
    assert len(written) == metrics["answers"] == 60
    assert [*metrics["baselines"]] == ["baseline", "in_domain_baseline"]
    for arm, column in (("detector", "score"), *((name, name) for name in metrics["baselines"])):
        found, scores = of(metrics, arm), [row[column] for row in written]
        assert found.value("auroc") == pytest.approx(roc_auc_score(labels, scores))
        assert found.value("average_precision") == pytest.approx(average_precision_score(labels, scores))
        assert found.value("brier") == pytest.approx(brier_score_loss(labels, scores))
        threshold = metrics["threshold"] if arm == "detector" else metrics["baselines"][arm]["threshold"]
        flagged = [score >= threshold for score in scores]
        assert found.value("tp") == sum(f and h for f, h in zip(flagged, labels, strict=True))
        assert found.value("fp") == sum(f and not h for f, h in zip(flagged, labels, strict=True))
        for name in ("auroc", "average_precision", "f1", "recall", "false_positive_rate", "precision"):
            low, high = found.limits(name)
            assert low is None or low <= found.value(name) <= high
    for name in metrics["baselines"]:
        difference = of(metrics).value("auroc") - of(metrics, name).value("auroc")
        assert of(metrics, name).value("auroc_difference") == pytest.approx(difference)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics


@pytest.mark.parametrize(
    ("rule", "auroc", "in_order"),
    [(harmful, 1.0, 1.0), (lambda q, a: -harmful(q, a), 0.0, 0.0), (lambda q, a: 0.0, 0.5, 0.0)],
    ids=["perfect", "inverted", "constant"],
)
def test_the_ends_of_the_scale(
    measure: Measure, rule: Callable[[str, str], float], auroc: float, in_order: float
) -> None:
    metrics = measure(rule, pages=True)
    assert of(metrics).value("auroc") == auroc
    assert of(metrics).value("pairwise_accuracy") == in_order
    # no spread is seen there, and still there is doubt
    low, high = of(metrics).limits("auroc")
    assert low < 1
    assert high > 0
    assert 0.02 < high - low < 0.2


def test_the_temperature_changes_calibration_and_not_the_order(measure: Measure) -> None:
    one, other = (measure(guard={"temperature": value, "threshold": 0.5}) for value in (1.0, 4.0))
    for name in ("ece", "brier"):
        assert of(one).value(name) == of(other, BEFORE).value(name) != of(other).value(name)
    for name in ("auroc", "average_precision", "recall", "precision"):
        assert of(one).value(name) == pytest.approx(of(other).value(name))


def test_an_offset_moves_the_level_and_not_the_order(measure: Measure, tmp_path: Path) -> None:
    one, other = (measure(pages=True, guard={"offset": value, "threshold": 0.5}) for value in (0.0, 3.0))
    assert of(one, BEFORE).value("ece") == of(other, BEFORE).value("ece")
    assert (one["offset"], other["offset"]) == (0.0, 3.0)
    assert other["detector"]["offset"] == 3.0
    assert of(other).value("ece") > of(one).value("ece")
    assert of(other).value("auroc") == pytest.approx(of(one).value("auroc"))
    assert of(other).value("recall") > of(one).value("recall")
    assert BEFORE in (tmp_path / "out" / "report.html").read_text()


def test_the_same_run_gives_the_same_bytes(measure: Measure, tmp_path: Path) -> None:
    def content() -> list[bytes]:
        measure(pages=True)
        return [path.read_bytes() for path in sorted((tmp_path / "out").iterdir())]

    assert content() == content()


def test_on_a_foreign_set_one_baseline_knows_what_the_detector_knew_and_one_the_set(
    measure: Measure, tmp_path: Path
) -> None:
    # The detector's data call "sorry" harmless, the foreign set calls it harmful.
    turned = [
        replace(pair, accepted=pair.rejected, rejected=pair.accepted) for pair in FOREIGN.splits.validation
    ]
    metrics = measure(harmful, Given([], turned, "foreign"), baseline_data=TRAINED)
    assert of(metrics, "baseline").value("auroc") < 0.2
    assert of(metrics, "in_domain_baseline").value("auroc") > 0.8
    assert metrics["baselines"]["baseline"]["taught_on"] == "80 answers of training data"
    assert "the measured answers" in metrics["baselines"]["in_domain_baseline"]["taught_on"]
    assert metrics["notes"] == []


def trained_with(path: Path, folder: Path, **data: Any) -> dict[str, Any]:
    """Leave the configuration of a training with a file of pairs, and say what its detector knows of it."""
    settings = {"path": str(path), "validation_fraction": 0.2, "seed": 3, "limit": None}
    settings |= {"duplicates": "exact", "quarantine": None}
    write_jsonl(path, map(asdict, pairs(0, 40)))
    known = own(cast("Given", SimpleNamespace(splits=Pairs(**settings).load())))
    folder.mkdir(exist_ok=True)
    content = {"data": {"_target_": "mllm_protector.data.sources.Pairs"} | settings | data, "seed": 3}
    (folder / "config.yaml").write_text(json.dumps(content))
    return known


def test_the_baseline_finds_the_detector_s_own_training_data_and_writes_no_quarantine(
    measure: Measure, tmp_path: Path
) -> None:
    kept = tmp_path / "precious.jsonl"
    kept.write_text("precious")
    known = trained_with(tmp_path / "pairs.jsonl", tmp_path / "detector", quarantine=str(kept))
    metrics = measure(data=FOREIGN, detector=str(tmp_path / "detector"), guard={"data": known})
    assert metrics["notes"] == []
    assert metrics["baselines"]["baseline"]["taught_on"] == "64 answers of training data"
    assert kept.read_text() == "precious"


def test_where_the_training_data_cannot_be_read_one_line_says_why(measure: Measure, tmp_path: Path) -> None:
    folder, path = tmp_path / "detector", tmp_path / "pairs.jsonl"
    known = trained_with(path, folder)

    def note(content: str | None = None) -> str:
        if content is not None:
            (folder / "config.yaml").write_text(content)
        metrics = measure(data=FOREIGN, detector=str(folder), guard={"data": known})
        assert [*metrics["baselines"]] == ["in_domain_baseline"]
        [said] = metrics["notes"]
        assert "\n" not in said
        assert said.startswith("No baseline taught on the detector's training data: ")
        return str(said)

    write_jsonl(path, map(asdict, pairs(1, 40)))
    assert "has changed since" in note()
    path.unlink()
    assert "pairs.jsonl" in note()
    assert "names no data" in note("data: [")
    for content, words in (
        ("seed: 3", "names no data"),
        ("data: x", "names no data"),
        ("- a", "names no data"),
        ("data: {path: x}", "names no data"),
        ("data: {_target_: os.getcwd}", "not a source of data"),
        ("data: {_target_: mllm_protector.models.mllm.Nope}", "not a source of data"),
        ("data: {_target_: mllm_protector.data.sources.Nope}", "not a constructor"),
    ):
        (folder / "config.yaml").write_text(content)
        with pytest.raises(InputError, match=words):
            recorded_data(folder, None)
    (folder / "config.yaml").unlink()
    assert "config.yaml: no such file" in note()


def test_queries_that_the_baseline_has_seen_are_counted(measure: Measure) -> None:
    metrics = measure(data=FOREIGN, baseline_data=Given(pairs(130, 20), []))
    assert metrics["notes"] == ["10 of the 30 measured queries stand in the baseline's data."]


def test_all_records_are_measured_on_request(measure: Measure) -> None:
    metrics = measure(split="all")
    assert metrics["answers"] == 140
    assert of(metrics, "in_domain_baseline").value("auroc") > 0.9


def test_pairs_of_one_label_are_not_pairs_and_labelled_answers_have_none(measure: Measure) -> None:
    alike = AnswerPair(query="q", accepted="forbidden a", rejected="forbidden b", accepted_harmful=True)
    metrics = measure(harmful, Given(pairs(0, 20), [*pairs(40, 5), alike, *pairs(50, 5)]))
    assert (metrics["pairs"], of(metrics).value("pairwise_accuracy"), metrics["answers"]) == (10, 1.0, 22)

    def singly(start: int) -> list[LabelledAnswer]:
        return [
            LabelledAnswer(query=f"q{n}", answer="forbidden" if n % 2 else "no", harmful=n % 2 == 1)
            for n in range(start, start + 20)
        ]

    metrics = measure(harmful, Given(singly(0), singly(20)))
    assert (metrics["pairs"], of(metrics).value("pairwise_accuracy")) == (0, None)


def test_answers_to_one_query_count_as_one_draw(measure: Measure) -> None:
    """Each validation answer is there four times: the intervals must not shrink."""
    validation = pairs(40, 30)
    one = measure(data=Given(pairs(0, 40), validation))
    four = measure(data=Given(pairs(0, 40), validation * 4))
    for name in ("auroc", "recall", "false_positive_rate"):
        (low, high), (wide_low, wide_high) = of(one).limits(name), of(four).limits(name)
        assert wide_high - wide_low == pytest.approx(high - low, rel=0.25)


def test_groups_have_metrics_of_their_own(measure: Measure, tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    named = [{"query": f"Question {n}", "group": "even" if n % 2 == 0 else "odd"} for n in range(40, 60)]
    write_jsonl(path, named)
    metrics = measure(harmful, group_file=str(path), pages=True)
    for group in ("(no group)", "even", "odd"):
        found = of(metrics, group=group)
        assert (found.one("accuracy")["n"], found.value("recall"), found.value("auroc")) == (20, 1.0, 1.0)
    assert {row["group"] for row in rows(tmp_path)} == {None, "even", "odd"}
    assert "Group: odd" in (tmp_path / "out" / "report.md").read_text()


def test_what_the_detector_has_seen_is_said(measure: Measure) -> None:
    other_split = {"account": "made up", "fingerprint": "f"}
    assert measure(data=FOREIGN, baseline_data=TRAINED)["notes"] == []
    assert "best step" in measure()["notes"][0]
    assert "training data" in measure(split="all")["notes"][0]
    assert "another split" in measure(guard={"data": other_split})["notes"][0]
    calibrated = {"calibration": {"data": own(FOREIGN)}}
    assert "were chosen" in measure(data=FOREIGN, guard=calibrated, baseline_data=TRAINED)["notes"][0]


def test_texts_are_written_only_on_request(measure: Measure, tmp_path: Path) -> None:
    measure(pages=True)
    quiet = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert "forbidden thing" not in quiet
    assert "question 41" not in quiet
    measure(save_texts=True, pages=True)
    assert "forbidden thing" in (tmp_path / "out" / "report.html").read_text()
    assert rows(tmp_path)[1]["answer"] == "sorry, but forbidden 40"


def test_hostile_texts_groups_and_names_are_only_text(measure: Measure, tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    validation = pairs(40, 30, query=HOSTILE)
    write_jsonl(path, [{"query": pair.query, "group": HOSTILE} for pair in validation])
    measure(
        data=Given(pairs(0, 40), validation, HOSTILE),
        group_file=str(path),
        save_texts=True,
        detector=HOSTILE,
        guard={"threshold_how": HOSTILE},
        pages=True,
    )
    shown = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in shown
    assert "<img src=x" not in shown
    assert "\u202e" not in shown
    assert "&lt;script&gt;alert(1)" in shown
    assert "http" not in shown.replace("http-equiv", "")


def test_every_page_names_both_baselines_and_says_whether_they_are_beaten(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(lambda q, a: -noisy(q, a), pages=True)
    pages = {name: (tmp_path / "out" / name).read_text() for name in ("report.html", "report.md")}
    pages = {name: html.unescape(page) for name, page in pages.items()} | {
        "terminal": " ".join(capsys.readouterr().out.split())
    }
    for name, page in pages.items():
        for words in (
            "worse than the baseline's",
            "worse than the in-domain baseline's",
            "trained on 80 answers of training data",
            "trained on labels of this data set",
        ):
            assert words in page, (name, words)
        assert "floor" not in page, name
    assert pages["report.html"].count("data:image/svg+xml") == 3


def test_where_no_baseline_can_be_taught_the_detector_is_measured_all_the_same(
    measure: Measure, tmp_path: Path
) -> None:
    one_query = [replace(pair, query="one") for pair in pairs(40, 30)]
    metrics = measure(
        data=Given(pairs(0, 1), one_query, "other"), baseline_data=Given(pairs(0, 1), []), pages=True
    )
    assert metrics["baselines"] == {}
    assert [note.partition(":")[0] for note in metrics["notes"]] == ["No baseline", "No in-domain baseline"]
    shown = (tmp_path / "out" / "report.html").read_text()
    assert "not compared with a baseline" in shown
    assert {*rows(tmp_path)[0]} == {"query_sha256", "harmful", "score", "group"}


def one_line(raised: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_cannot_be_measured_is_refused_and_nothing_is_written(measure: Measure, tmp_path: Path) -> None:
    with pytest.raises(RunError) as raised:
        measure(lambda q, a: float("nan"))
    assert "not a number" in one_line(raised)
    with pytest.raises(InputError) as raised:
        measure(group_file=str(tmp_path / "none.jsonl"))
    assert one_line(raised).endswith("none.jsonl: no such file")
    strange = tmp_path / "strange.jsonl"
    write_jsonl(strange, [{"query": "never asked", "group": "a"}])
    with pytest.raises(InputError) as raised:
        measure(group_file=str(strange))
    assert "none of the queries" in one_line(raised)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_the_detector_is_not_written_over(measure: Measure, tmp_path: Path) -> None:
    (tmp_path / "guard.json").write_text("{}")
    with pytest.raises(InputError, match="holds a trained part"):
        measure(output_dir=str(tmp_path))


def test_the_script_measures_a_saved_detector(
    make_detector: Callable[..., HarmDetector], tmp_path: Path
) -> None:
    make_detector().save(tmp_path / "detector")
    path = tmp_path / "answers.jsonl"
    write_jsonl(
        path,
        (
            {"query": f"How {n}?", "answer": "forbidden" if n % 2 else "no", "harmful": n % 2 == 1}
            for n in range(60)
        ),
    )
    ran = forked.run(
        "eval_detector",
        "detector=detector",
        "data=labelled",
        f"data.path={path}",
        "data.validation_fraction=0.5",
        cwd=tmp_path,
    )
    assert ran.code == 0, ran.err
    assert "pairs in the right order" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 200
    written = json.loads((tmp_path / "outputs" / "detector_figures" / "metrics.json").read_text())
    assert written["answers"] == 30
    assert (written["threshold"], written["temperature"]) == (0.4, 1.5)
    assert of(written, "in_domain_baseline").value("auroc") == 1.0


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("split=train", "error: split=train: must be 'auto', 'validation' or 'all'"),
        ("data=labelled", "error: data.path has no value"),
        ("group=x", "error: group: unknown config key (did you mean group_file?)"),
    ],
)
def test_a_mistake_in_a_key_is_one_line(override: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(SystemExit) as stopped,
        clear_errors(),
        initialize_config_dir(str(CONFIGS), version_base="1.3"),
    ):
        build(compose("eval_detector", [override]), eval_detector)
    assert stopped.value.code == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


def test_several_sets_are_one_table_beside_published_figures(measure: Measure, tmp_path: Path) -> None:
    harmless = [LabelledAnswer(query=f"calm {n}", answer=f"calm {n}", harmful=False) for n in range(30)]
    sets = {"beavertails_test": TRAINED, "safe_rlhf_mini": FOREIGN, "calm": Given(harmless, harmless)}
    measure(data=Mixture(sources=sets, weights=None, duplicates="keep", seed=0), split="all", pages=True)
    out = tmp_path / "out"
    found = json.loads((out / "metrics.json").read_text())
    assert list(found["sets"]) == list(sets)
    assert {row["benchmark"] for row in found["measurements"]} == set(sets)
    calm = {row["metric"]: row["value"] for row in found["measurements"] if row["benchmark"] == "calm"}
    assert calm["false_positive_rate"] is not None
    assert "auroc" not in calm
    assert all((out / name / "report.html").is_file() for name in sets)
    alone = measure(data=FOREIGN, split="all", output_dir=str(tmp_path / "alone"))
    own_rows = [row["value"] for row in alone["measurements"] if row["arm"] == "detector"]
    among = [row for row in found["measurements"] if row["benchmark"] == "safe_rlhf_mini"]
    assert own_rows == [row["value"] for row in among if row["arm"] == "detector"]

    assert "published figures are on another number of answers" in (out / "sets.md").read_text()


def test_a_test_set_is_measured_whole_unless_told_otherwise(measure: Measure) -> None:
    whole = Given(pairs(200, 20), pairs(300, 10), "published")
    assert measure(data=whole, split="auto")["answers"] == 20
    whole.test_set = True  # type: ignore[attr-defined]
    assert measure(data=whole, split="auto")["answers"] == 60


def test_groups_can_be_the_scenarios_of_the_set(measure: Measure) -> None:
    answers = [
        LabelledAnswer(query=f"q {n}", answer=f"forbidden {n}", harmful=n % 2 > 0, scenario="ab"[n // 20])
        for n in range(40)
    ]
    found = measure(data=Given(answers, answers[:2]), split="all", group_file="scenario")
    assert {row["group"] for row in found["measurements"]} == {None, "a", "b"}
    with pytest.raises(InputError, match="scenario: the data have none"):
        measure(group_file="scenario")
