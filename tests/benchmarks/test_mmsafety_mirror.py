import pytest

from mllm_protector.benchmarks.mmsafety import MMSafetyBench
from mllm_protector.errors import InputError
from tests.benchmarks.test_mmsafety import FIRST, load, write_mirror


def test_the_mirror_gives_numbered_scenarios_and_text_ids(tmp_path):
    for ids in [(10, 2, 0), ("10", "2", "0")]:
        loaded = load(write_mirror(tmp_path, ids=ids), text_field="Changed Question", limit=2)
        assert [(question.id, question.text) for question in loaded.questions] == [
            (f"{FIRST}/TEXT/0", "Text_only 0"),
            (f"{FIRST}/TEXT/2", "Text_only 2"),
            (f"{FIRST}/SD/0", "SD 0"),
            (f"{FIRST}/SD/2", "SD 2"),
            (f"{FIRST}/TYPO/0", "TYPO 0"),
            (f"{FIRST}/TYPO/2", "TYPO 2"),
            (f"{FIRST}/SD_TYPO/0", "SD_TYPO 0"),
            (f"{FIRST}/SD_TYPO/2", "SD_TYPO 2"),
        ], ids
        assert loaded.questions[0].image is None, ids
        assert loaded.questions[2].image.load().size == (8, 6), ids


def test_a_mirrored_question_without_image_is_counted(tmp_path):
    loaded = load(write_mirror(tmp_path, without_image=(2,)), variants=["SD"])
    assert [question.id for question in loaded.questions] == [f"{FIRST}/SD/0", f"{FIRST}/SD/10"]
    assert loaded.missing == [f"{FIRST}/SD/2: no image in Illegal_Activitiy/SD.parquet"]


def test_the_mirror_cannot_ask_the_original_question(tmp_path):
    write_mirror(tmp_path)
    with pytest.raises(InputError, match=r"^text_field=Question: .* set text_field='Changed Question'"):
        load(tmp_path)
    assert len(load(tmp_path, variants=["SD"]).questions) == 3


def test_a_bad_id_in_the_mirror_is_refused_with_its_row(tmp_path):
    cases = [
        (("1", "../../x"), "SD.parquet:2: an id must be a number"),
        ((3, 3), "SD.parquet:2: duplicate"),
        ((3, None), "SD.parquet:2: an id must be a number"),
    ]
    for ids, message in cases:
        with pytest.raises(InputError, match=message):
            load(write_mirror(tmp_path, ids=ids), variants=["SD"])


def test_the_hub_is_asked_for_the_selected_files_only(tmp_path, monkeypatch):
    calls = []

    def snapshot_download(name, **settings):
        calls.append((name, settings))
        return str(tmp_path / "0123abcd")

    write_mirror(tmp_path / "0123abcd")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    benchmark = MMSafetyBench(variants=["SD"], scenarios=[FIRST], revision="main")
    assert len(benchmark.load().questions) == 3
    assert calls == [
        (
            "PKU-Alignment/MM-SafetyBench",
            {
                "repo_type": "dataset",
                "revision": "main",
                "allow_patterns": ["data/Illegal_Activitiy/SD.parquet"],
            },
        )
    ]
    assert benchmark.card.identity["commit"] == "0123abcd"


def test_a_failed_download_tells_what_to_do(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(InputError, match=r"^hub_name=.* cannot be downloaded .* give a local copy as root"):
        MMSafetyBench(variants=["SD"]).load()


def test_the_mirrors_missing_wording_is_told_before_any_download(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(InputError, match="no 'Question' for TEXT"):
        MMSafetyBench().load()
