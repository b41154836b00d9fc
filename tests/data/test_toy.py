import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mllm_protector.data import toy, toy_answers
from mllm_protector.data.toy import ToyImage, benign_questions, mllm_turns, toy_pairs, write_benchmark
from mllm_protector.data.toy_answers import VOICES, WITHHELD, is_harmful
from mllm_protector.errors import InputError
from mllm_protector.files import read_json
from mllm_protector.images import ImageFile
from mllm_protector.records import BENIGN, VARIANTS
from mllm_protector.scenarios import ADVICE, CRITERIA, SCENARIOS

SPLITS = ("train", "validation", "test")
PAIRS = {split: toy_pairs(split) for split in SPLITS}
TURNS = mllm_turns()


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def test_every_scenario_has_a_scene_of_its_own() -> None:
    scenes = toy_answers.SCENES
    assert tuple(scenes) == SCENARIOS
    assert len({scene.topic for scene in scenes.values()}) == len({s.kind for s in scenes.values()}) == 13
    assert {name for name, scene in scenes.items() if scene.expert} == {
        name for name in SCENARIOS if CRITERIA[name] in ADVICE
    }


def test_pairs_are_as_many_as_promised_and_the_same_every_time() -> None:
    assert {split: len(PAIRS[split]) for split in SPLITS} == {"train": 1000, "validation": 200, "test": 200}
    assert all(toy_pairs(split) == PAIRS[split] for split in SPLITS)
    for pairs in PAIRS.values():
        assert 0.2 < sum(not pair.rejected_harmful for pair in pairs) / len(pairs) < 0.3


def test_accepted_answers_are_harmless_and_labels_tell_the_truth() -> None:
    for pair in (pair for pairs in PAIRS.values() for pair in pairs):
        assert not is_harmful(pair.accepted)
        assert not pair.accepted_harmful
        assert is_harmful(pair.rejected) == pair.rejected_harmful
        assert pair.accepted != pair.rejected
        assert max(len(pair.accepted.split()), len(pair.rejected.split())) <= 60


def test_no_query_and_no_invented_word_stands_in_two_splits() -> None:
    invented = {split: {*toy_answers.THINGS[split], *toy_answers.PLACES[split]} for split in SPLITS}
    for split in SPLITS:
        texts = [text for p in PAIRS[split] for text in (p.query, p.accepted, p.rejected)]
        used = set.union(*map(words, texts))
        for other in set(SPLITS) - {split}:
            assert not invented[split] & invented[other]
            assert not used & invented[other]
            assert not {p.query for p in PAIRS[split]} & {p.query for p in PAIRS[other]}


def test_no_measured_answer_stands_in_the_training_data() -> None:
    learnt = {text for p in PAIRS["train"] for text in (p.accepted, p.rejected)}
    for split in ("validation", "test"):
        assert not {text for p in PAIRS[split] for text in (p.accepted, p.rejected)} & learnt
    assert not {turn.answer for turn in TURNS} & learnt


def test_advice_is_accepted_only_from_who_says_that_it_is_not_qualified() -> None:
    for split in SPLITS:
        for pair in PAIRS[split]:
            if CRITERIA.get(pair.scenario or "") in ADVICE:
                assert re.search(r"I am not an? |as I am not one", pair.accepted), pair.accepted


def test_neither_an_opening_nor_a_bracket_gives_a_harmful_answer_away() -> None:
    harmful = [p.rejected for p in PAIRS["train"] if p.rejected_harmful]
    helpful = [text for p in PAIRS["train"] if not p.rejected_harmful for text in (p.accepted, p.rejected)]
    shares = [sum(text.startswith("Sure,") for text in texts) / len(texts) for texts in (harmful, helpful)]
    assert abs(shares[0] - shares[1]) < 0.06
    assert min(shares) > 0.3
    assert sum("[" in text for text in helpful) > len(helpful) / 4


def test_some_of_what_is_measured_is_hard_and_nothing_that_is_learnt() -> None:
    texts = {split: [text for p in PAIRS[split] for text in (p.accepted, p.rejected)] for split in SPLITS} | {
        "turns": [turn.answer for turn in TURNS]
    }
    marks = [mark for voice in VOICES.values() for mark in voice.placeholders]
    for name, some in texts.items():
        without_giveaway = sum(WITHHELD in text for text in some)
        denying = sum(not is_harmful(text) and any(mark in text for mark in marks) for text in some)
        hard = name != "train"
        assert (without_giveaway > 5) == hard, name
        assert (denying > 5) == hard, name


def test_an_image_opens_the_toy_mllm_more_than_words_do() -> None:
    harmful: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for turn in TURNS:
        if turn.question.scenario != BENIGN:
            asked[turn.question.variant] += 1
            harmful[turn.question.variant] += is_harmful(turn.answer)
        else:
            assert not is_harmful(turn.answer)
    shares = {variant: harmful[variant] / asked[variant] for variant in VARIANTS}
    assert 0.1 < shares["TEXT"] < 0.4
    assert all(0.6 < shares[variant] < 0.95 for variant in ("SD", "TYPO", "SD_TYPO")), shares
    assert len(TURNS) == 1200


def test_the_toy_mllm_sees_training_things_only_and_loads_no_image_early() -> None:
    unseen = {
        w for split in ("validation", "test") for w in toy_answers.THINGS[split] + toy_answers.PLACES[split]
    }
    for turn in TURNS:
        assert not words(turn.question.text) & unseen
        assert (turn.question.image is None) == (turn.question.variant == "TEXT")
        assert not isinstance(turn.question.image, Image.Image)


def test_an_image_is_made_from_its_name_alone() -> None:
    one, again, other = (ToyImage(name).load() for name in ("one", "one", "other"))
    assert (one.size, one.mode) == ((224, 224), "RGB")
    assert one.tobytes() == again.tobytes() != other.tobytes()


def test_benign_questions_go_through_all_variants() -> None:
    questions = benign_questions(10)
    assert [question.id for question in questions[:5]] == [
        "Benign/TEXT/1",
        "Benign/SD/1",
        "Benign/TYPO/1",
        "Benign/SD_TYPO/1",
        "Benign/TEXT/2",
    ]
    assert len({question.id for question in benign_questions(100)}) == 100
    assert all(question.scenario == BENIGN for question in questions)
    assert not {q.text for q in benign_questions(100)} & {p.query for p in PAIRS["train"]}


def test_the_benchmark_has_the_published_layout(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "benchmark"
    write_benchmark(folder, per_scenario=2)
    assert sorted(path.stem for path in (folder / "processed_questions").iterdir()) == sorted(SCENARIOS)
    for name in SCENARIOS:
        table = read_json(folder / "processed_questions" / f"{name}.json")
        assert len({row["Key Phrase"] for row in table.values()}) == 2
        for identity, row in table.items():
            assert len(row) == 7
            assert row["Key Phrase"] in row["Question"]
            assert row["Rephrased Question"].startswith("The bottom of the image shows ")
            assert row["Key Phrase"] not in row["Rephrased Question"]
            assert words(row["Key Phrase"]) & set(toy_answers.THINGS["test"])
            for variant in ("SD", "TYPO", "SD_TYPO"):
                assert ImageFile(folder / "imgs" / name / variant / f"{identity}.jpg").load().width >= 224
    assert len(list(folder.rglob("*.jpg"))) == 13 * 3 * 2


def test_a_benchmark_is_written_once_and_again_only_for_other_settings(tmp_path: Path) -> None:
    folder = tmp_path / "benchmark"
    write_benchmark(folder, per_scenario=1)
    picture = folder / "imgs" / SCENARIOS[0] / "SD" / "1.jpg"
    before = picture.stat().st_mtime_ns
    write_benchmark(folder, per_scenario=1)
    assert picture.stat().st_mtime_ns == before
    write_benchmark(folder, per_scenario=2)
    assert len(list(folder.rglob("*.jpg"))) == 13 * 3 * 2
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark"]


def test_a_benchmark_never_replaces_what_it_did_not_write(tmp_path: Path) -> None:
    real = tmp_path / "processed_questions"
    real.mkdir()
    with pytest.raises(InputError, match="not a toy benchmark"):
        write_benchmark(tmp_path, per_scenario=1)
    assert real.is_dir()
    write_benchmark(tmp_path / "toy", per_scenario=1)
    (tmp_path / "toy" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not a toy benchmark"):
        write_benchmark(tmp_path / "toy", per_scenario=2)
    assert (tmp_path / "toy" / "notes.txt").exists()
    with pytest.raises(InputError, match="at least one question"):
        write_benchmark(tmp_path / "none", per_scenario=0)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(toy, "_write_images", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_benchmark(tmp_path / "benchmark", per_scenario=1)
    assert list(tmp_path.iterdir()) == []
