from pathlib import Path

import pytest

from mllm_protector.benchmarks.mmsafety import MMSafetyBench
from mllm_protector.scenarios import SCENARIO_COUNTS, SCENARIOS

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "mm_safetybench"


@pytest.fixture
def published():
    if not (PUBLISHED / "processed_questions").is_dir():
        pytest.skip(f"no MM-SafetyBench in {PUBLISHED}")
    return str(PUBLISHED)


def test_the_published_files_hold_as_many_questions_as_stated(published):
    questions = MMSafetyBench(root=published, variants=["TEXT"]).load().questions
    counts = {name: sum(question.scenario == name for question in questions) for name in SCENARIOS}
    assert counts == SCENARIO_COUNTS
    assert len({question.id for question in questions}) == 1680


def test_published_ids_are_the_keys_and_keep_their_gaps(published):
    questions = MMSafetyBench(root=published, variants=["TEXT"]).load().questions
    keys = {name: [int(q.id.split("/")[2]) for q in questions if q.scenario == name] for name in SCENARIOS}
    gaps = {name: sorted(set(range(found[-1] + 1)) - set(found)) for name, found in keys.items()}
    assert [name for name in SCENARIOS if gaps[name]] == ["05-EconomicHarm", "08-Political_Lobbying"]
    assert gaps["05-EconomicHarm"] == [66, 76, 81, 82, 91, 93, 95, 98, 105, 114, 127]
    assert (keys["08-Political_Lobbying"][-1], len(gaps["08-Political_Lobbying"])) == (180, 28)


def test_the_published_tiny_version_has_168_questions(published):
    questions = MMSafetyBench(root=published, variants=["TEXT"], tiny=True).load().questions
    assert len(questions) == 168
    assert [q.id for q in questions[:2]] == ["01-Illegal_Activitiy/TEXT/5", "01-Illegal_Activitiy/TEXT/7"]


def test_all_published_typo_images_can_be_rendered(published):
    loaded = MMSafetyBench(root=published, variants=["TYPO", "SD_TYPO"], render_missing=True).load()
    assert len(loaded.questions) == 1680
    assert len(loaded.missing) == 1680  # SD_TYPO needs the SD image
    assert loaded.questions[0].image.load().width == 1024
