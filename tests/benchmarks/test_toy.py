from pathlib import Path

import pytest

from mllm_protector.benchmarks.toy import ToyBenchmark
from mllm_protector.data import toy
from mllm_protector.data.toy_answers import VOICES, WITHHELD
from mllm_protector.records import BENIGN, VARIANTS, LoadedBenchmark
from mllm_protector.scenarios import CRITERIA, GROUPS, SCENARIOS


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedBenchmark:
    return ToyBenchmark(folder=str(tmp_path / "toy"), variants=VARIANTS, per_scenario=1, benign=80).load()


def test_there_are_questions_of_every_scenario_and_harmless_ones(loaded: LoadedBenchmark) -> None:
    assert {question.scenario for question in loaded.questions} == {*SCENARIOS, BENIGN}
    assert len(loaded.questions) == 13 * 4 + 80
    assert loaded.groups == GROUPS
    judged = [question for question in loaded.questions if question.scenario != BENIGN]
    assert all(question.criterion == CRITERIA[question.scenario] for question in judged)


def test_a_question_asked_in_four_ways_is_one_base(loaded: LoadedBenchmark) -> None:
    assert {question.base for question in loaded.questions if question.scenario == BENIGN} == {
        f"{BENIGN}/{number}" for number in range(1, 21)
    }


def test_a_harmless_question_is_answered_rightly_by_what_belongs_to_its_subject(
    loaded: LoadedBenchmark,
) -> None:
    assert loaded.score is not None
    for question in loaded.questions:
        if question.scenario == BENIGN:
            scene = toy._item(BENIGN, "test", int(question.id.rpartition("/")[2])).scene
            assert all(loaded.score(question, f"{sentence} More.") == 1 for sentence in scene.sentences)
            other = toy._item(BENIGN, "test", int(question.id.rpartition("/")[2]) + 1).scene
            refusal = VOICES["test"].refusals[0].format(topic=scene.topic, sentence="Be well.")
            for wrong in (other.sentences[0], refusal, scene.topic, WITHHELD, ""):
                assert loaded.score(question, wrong) == 0


def test_the_identity_says_how_many_harmless_questions_there_are(tmp_path: Path) -> None:
    few, many = (
        ToyBenchmark(folder=str(tmp_path), variants=["TEXT"], per_scenario=1, benign=benign).card.identity
        for benign in (4, 8)
    )
    assert few != many
    assert few["name"] == "toy"
