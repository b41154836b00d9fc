import csv
import gzip
import io
import json
import lzma
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mllm_protector.data.mixture import Mixture
from mllm_protector.data.queries import opening_key
from mllm_protector.data.table import VARIABLE
from mllm_protector.errors import InputError, RecordError
from mllm_protector.reading import Account
from mllm_protector.records import AnswerPair
from tests.data.builders import configured, everything, write_rows

Fields = dict[str, Any]

PUBLIC_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path_factory.mktemp("cache")))


def public(name: str) -> str:
    path = PUBLIC_DATA / name
    if not path.exists():
        pytest.skip(f"the public data set {name} is not here")
    return str(path)


# A good row of each published layout


def dialogue(*turns: str) -> str:
    return "".join(f"\n\n{'Assistant' if n % 2 else 'Human'}: {turn}" for n, turn in enumerate(turns))


def pku_2023(number: int, *, safer: int = 0, safe: tuple[bool, bool] = (True, False)) -> Fields:
    return {
        "prompt": f"prompt {number}",
        "response_0": f"zero {number}",
        "response_1": f"one {number}",
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        "better_response_id": 1,
        "safer_response_id": safer,
    }


def pku_2024(number: int, *, first: tuple[str, ...] = (), second: tuple[str, ...] = ("Fraud",)) -> Fields:
    harms = ("Violence", "Fraud", "Privacy")
    more = {
        "prompt_source": "a source",
        "response_0_source": "a model",
        "response_1_source": "a model",
        "response_0_harm_category": {harm: harm in first for harm in harms},
        "response_1_harm_category": {harm: harm in second for harm in harms},
        "response_0_severity_level": min(len(first), 1),
        "response_1_severity_level": min(len(second), 1),
    }
    return pku_2023(number, safe=(not first, not second)) | more


def labelled(number: int) -> Fields:
    return {"question": f"prompt {number}", "answer": f"answer {number}", "label": number % 2}


def beavertails(number: int, *harms: str) -> Fields:
    return {
        "prompt": f"prompt {number}",
        "response": f"answer {number}",
        "category": {harm: harm in harms for harm in ("animal_abuse", "self_harm", "violence")},
        "is_safe": not harms,
    }


def hh_rlhf(number: int) -> Fields:
    question = f"prompt {number}"
    return {"chosen": dialogue(question, "kind"), "rejected": dialogue(question, "unkind")}


def aligner(number: int) -> Fields:
    return {"question": f"prompt {number}", "answer": "unkind", "correction": "kind"}


def spa_vl(number: int) -> Fields:
    return {"question": f"prompt {number}", "chosen": "kind", "rejected": "unkind", "image_name": "a.jpg"}


def xstest(number: int, kind: str = "contrast_homonyms", label: str = "1_full_compliance") -> Fields:
    return {
        "id": f"v2-{number}",
        "type": kind,
        "prompt": f"prompt {number}",
        "completion": "done",
        "annotation_1": label,
        "annotation_2": label,
        "agreement": "TRUE",
        "final_label": label,
    }


def own_pair(number: int) -> Fields:
    return {"query": f"prompt {number}", "accepted": "kind", "rejected": "unkind", "accepted_harmful": False}


def own_answer(number: int) -> Fields:
    return {"query": f"prompt {number}", "answer": "kind", "harmful": False, "scenario": "Privacy"}


LAYOUTS: dict[str, tuple[str, Callable[[int], Fields], tuple[str, ...]]] = {
    "pku 2023": ("pku_saferlhf", pku_2023, ("prompt", "response_0", "response_1")),
    "pku 2024": ("pku_saferlhf", pku_2024, ("prompt", "response_0", "response_1")),
    "augmented as pku": ("harmful_vs_unharmful", pku_2023, ("prompt", "response_0", "response_1")),
    "augmented": ("harmful_vs_unharmful", labelled, ("question", "answer")),
    "beavertails": ("beavertails", beavertails, ("prompt", "response")),
    "hh_rlhf": ("hh_rlhf", hh_rlhf, ("chosen", "rejected")),
    "aligner": ("aligner", aligner, ("question", "answer", "correction")),
    "spa_vl": ("spa_vl", spa_vl, ("question", "chosen", "rejected")),
    "xstest": ("xstest", xstest, ("prompt", "completion", "type", "final_label")),
    "your pairs": ("pairs", own_pair, ("query", "accepted", "rejected")),
    "your answers": ("labelled", own_answer, ("query", "answer")),
}
"""Config option, a good row, and the columns that hold texts."""

PUBLISHED = [name for name in LAYOUTS if not name.startswith("your")]
ON_THE_HUB = [name for name in PUBLISHED if name != "xstest"]


def of_layout(layout: str, **changes: Any) -> Any:
    option = LAYOUTS[layout][0]
    if option == "harmful_vs_unharmful":
        changes = {"harmful_label": 1, "revision": "3" * 40} | changes
    return configured(option, **changes)


def pretend_hub(monkeypatch: pytest.MonkeyPatch, rows: list[Fields]) -> Fields:
    """A hub with these rows in every set; what it is asked comes back."""
    asked: Fields = {}

    def load_dataset(path: str, **options: Any) -> list[Fields]:
        asked.update(options, path=path)
        return rows

    builder = SimpleNamespace(info=SimpleNamespace(features=None))
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *args, **options: builder)
    return asked


# What all sets have in common


def test_every_kind_of_local_file_gives_the_same_records(tmp_path: Path) -> None:
    for name, (_, good, _) in LAYOUTS.items():
        folder = tmp_path / name
        folder.mkdir()
        rows = [good(number) for number in range(20)]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / "train.jsonl").write_bytes(lines)
        (folder / "train.jsonl.gz").write_bytes(gzip.compress(lines))
        (folder / "train.jsonl.xz").write_bytes(lzma.compress(lines))
        (folder / "train.json").write_text(json.dumps(rows, indent=1))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
        loaded = [of_layout(name, path=str(path)).load() for path in folder.iterdir()]
        assert len({splits.fingerprint for splits in loaded}) == 1, name
        assert [len(everything(splits)) for splits in loaded] == [20] * 5, name
        assert len({record.scenario for splits in loaded for record in splits.train}) == 1, name


def test_the_same_config_asks_the_hub_for_a_pinned_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ON_THE_HUB:
        monkeypatch.setenv(VARIABLE, str(tmp_path / name))
        rows = [LAYOUTS[name][1](number) for number in range(20)]
        asked = pretend_hub(monkeypatch, rows)
        hub = of_layout(name).load()
        local = of_layout(name, path=write_rows(tmp_path / "train.jsonl", rows)).load()
        assert hub.fingerprint == local.fingerprint, name
        assert re.fullmatch("[0-9a-f]{40}", asked["revision"]), name
        assert "trust_remote_code" not in asked
        [of_hub], [of_file] = hub.sources, local.sources
        assert (of_hub.origin.revision, of_hub.origin.files) == (asked["revision"], {}), name
        assert (of_hub.origin.name, of_file.origin.revision) == (asked["path"], None), name
        assert [*of_file.origin.files] == ["train.jsonl"]
        assert hub.account == f"{asked['path']}@{asked['revision'][:7]}: read 20 = kept 20", name


def test_a_revision_that_can_move_is_refused_where_the_hub_is_asked(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [pku_2023(number) for number in range(3)])
    for revision in ("v0", "main", "8b87c33", None):
        with pytest.raises(InputError, match=rf"^revision={revision}: give the full hash"):
            configured("pku_saferlhf", revision=revision).load()
        assert len(configured("pku_saferlhf", revision=revision, path=path).load().train) == 2


def test_another_layout_is_one_error_with_the_columns_found_and_expected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in PUBLISHED:
        _, good, texts = LAYOUTS[name]
        rows = [{f"new_{key}" if key == texts[-1] else key: value for key, value in good(0).items()}] * 3
        path = write_rows(tmp_path / "rows.jsonl", rows)
        pretend_hub(monkeypatch, rows)
        sources = [of_layout(name, path=path), of_layout(name, path=path, quarantine=f"{tmp_path}/bad.jsonl")]
        if name in ON_THE_HUB:
            sources.append(of_layout(name))
        for source in sources:
            with pytest.raises(InputError, match=r"^[^\n]*found [^\n]*$") as raised:
                source.load()
            for words in (texts[-1], f"'new_{texts[-1]}'"):
                assert words in str(raised.value), name


def bad_rows(good: Fields, texts: tuple[str, ...]) -> Iterator[tuple[Fields, str]]:
    """What a row can suffer, with the reason that has to be given."""
    for name in texts:
        yield {key: value for key, value in good.items() if key != name}, f"missing field '{name}'"
        yield good | {name: 5}, f"field '{name}' must be a text, not int"
        yield good | {name: None}, f"field '{name}' must be a text, not NoneType"
        yield good | {name: "a\0"}, f"field '{name}' contains a NUL character"


BAD_LABELS: dict[str, list[tuple[Fields, str]]] = {
    "pku 2023": [
        ({"safer_response_id": 2}, "must be 0 or 1, not 2"),
        ({"safer_response_id": 1.0}, "must be 0 or 1, not 1.0"),
        ({"safer_response_id": None}, "must be 0 or 1, not None"),
        ({"is_response_0_safe": None}, "must be true or false"),
    ],
    "pku 2024": [
        ({"response_1_harm_category": "Fraud"}, "must be an object of true and false, not str"),
        ({"response_1_harm_category": {"Fraud": "perhaps"}}, "field 'Fraud' must be true or false"),
    ],
    "augmented as pku": [({"is_response_1_safe": "no idea"}, "must be true or false")],
    "augmented": [
        ({"label": None}, "field 'label' must be a label, not NoneType"),
        ({"label": [1]}, "field 'label' must be a label, not list"),
        ({"label": ""}, "field 'label' must be a label, not empty"),
    ],
    "beavertails": [
        ({"is_safe": "perhaps"}, "field 'is_safe' must be true or false"),
        ({"category": ["violence"]}, "field 'category' must be an object of true and false, not list"),
    ],
    "hh_rlhf": [({"chosen": "just words"}, "field 'chosen' is not a dialogue")],
    "aligner": [],
    "spa_vl": [({"class1": 5}, "field 'class1' must be a text, not int")],
    "xstest": [
        ({"final_label": "4_unknown"}, "field 'final_label' must be one of"),
        ({"completion": " "}, "field 'completion' is empty"),
    ],
    "your pairs": [
        ({"query": " "}, "field 'query' is empty"),
        ({"rejected": "kind"}, "are the same text"),
        ({"accepted_harmful": "perhaps"}, "field 'accepted_harmful' must be true or false"),
        ({"rejectd_harmful": True}, "unknown field 'rejectd_harmful': is 'rejected_harmful' meant?"),
    ],
    "your answers": [
        ({"harmful": None}, "must be true or false"),
        ({"scenario": 7}, "must be a text, not int"),
    ],
}


def test_a_bad_row_stops_with_file_line_and_reason_or_is_quarantined(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for name, (_, good, texts) in LAYOUTS.items():
        of_labels = [(good(0) | change, reason) for change, reason in BAD_LABELS[name]]
        for row, reason in [*bad_rows(good(0), texts), *of_labels]:
            write_rows(path, [good(1), good(2), row, good(3)])
            with pytest.raises(RecordError) as raised:
                [*of_layout(name, path=str(path)).records(Account())]
            assert str(raised.value).startswith(f"{path}:3: "), name
            assert reason in str(raised.value), name
            account = Account()
            records = [*of_layout(name, path=str(path), quarantine="bad.jsonl").records(account)]
            assert (account.read, account.kept, len(records), account.dropped.total()) == (4, 3, 3, 0), name
            [bad] = account.bad_rows
            assert (bad["file"], bad["line"], json.loads(bad["raw"])) == (str(path), 3, row), name


UNWANTED: dict[str, list[Fields]] = {
    "pku 2023": [{"prompt": " "}, {"response_1": ""}, {"response_0": "same", "response_1": " same"}],
    "pku 2024": [{"prompt": ""}],
    "augmented as pku": [{"response_0": "same", "response_1": "same"}],
    "augmented": [{"question": " "}, {"answer": ""}],
    "beavertails": [{"prompt": ""}, {"response": "\n"}],
    "hh_rlhf": [
        {"chosen": dialogue("another prompt", "kind")},
        {"rejected": dialogue("prompt 0", "kind")},
        {"chosen": dialogue("prompt 0", "")},
    ],
    "aligner": [{"question": ""}, {"answer": "kind"}, {"correction": " "}],
    "spa_vl": [{"question": ""}, {"rejected": "kind"}],
    "xstest": [],
    "your pairs": [],
    "your answers": [],
}


def test_read_is_kept_and_quarantined_and_dropped_on_any_mix(tmp_path: Path) -> None:
    rng = random.Random(0)
    for name, (_, good, texts) in LAYOUTS.items():
        bad = [row for row, _ in bad_rows(good(0), texts)]
        unwanted = [good(0) | change for change in UNWANTED[name]]
        rows = [*(good(number) for number in range(100, 106)), *bad, *unwanted]
        rng.shuffle(rows)
        path, quarantine = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / f"{name}.jsonl"
        splits = of_layout(name, path=path, quarantine=str(quarantine)).load()
        [counted] = splits.sources
        assert counted.read == len(rows), name
        assert counted.kept == len(everything(splits)) == 6, name
        assert counted.quarantined == len(quarantine.read_bytes().splitlines()) == len(bad), name
        assert sum(counted.dropped.values()) == len(unwanted), name


def test_a_file_without_a_readable_row_names_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"[]\n{\n")
    for options in ({}, {"quarantine": str(tmp_path / "bad.jsonl")}):
        with pytest.raises(RecordError, match=r"rows\.jsonl:1: must be a JSON object, not list"):
            configured("beavertails", path=str(path), **options).load()
    path.write_bytes(b"")
    with pytest.raises(InputError, match="the file is empty"):
        configured("beavertails", path=str(path)).load()


def test_a_hub_out_of_reach_is_one_line_that_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **options: Any) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"no route.*give its `path`") as raised:
        configured("pku_saferlhf").load()
    assert "\n" not in str(raised.value)


def test_the_training_files_of_a_folder_are_read_in_order(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "b" / "train.jsonl", [pku_2023(2), pku_2023(3)])
    write_rows(tmp_path / "data" / "a" / "train.jsonl", [pku_2023(0), pku_2023(1), {"prompt": "p"}])
    write_rows(tmp_path / "data" / "c" / "train.jsonl", [pku_2023(0), {"prompt": "q"}])
    write_rows(tmp_path / "data" / "a" / "test.jsonl", [pku_2023(9)])
    quarantine = tmp_path / "bad.jsonl"
    source = configured("pku_saferlhf", path=str(tmp_path / "data"), quarantine=str(quarantine))
    splits = source.load()
    assert sorted(pair.query[-1] for pair in everything(splits)) == ["0", "1", "2", "3"]
    assert "read 7 = kept 4 + quarantined 2 + dropped 1 (exact duplicate: 1)" in splits.account
    bad = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(Path(row["file"]).parent.name, row["line"]) for row in bad] == [("a", 3), ("c", 2)]
    assert sorted(splits.sources[0].origin.files) == ["a/train.jsonl", "b/train.jsonl", "c/train.jsonl"]
    with pytest.raises(InputError, match=r"no .* file there that fits"):
        configured("pku_saferlhf", path=str(tmp_path / "data"), pattern="*.csv").load()


def test_the_files_of_a_cloned_set_are_found(tmp_path: Path) -> None:
    for option, file in (
        ("pku_saferlhf", "data/Alpaca-7B/train.jsonl"),
        ("harmful_vs_unharmful", "augmented_dataset.json"),
        ("beavertails", "round0/330k/train.jsonl.xz"),
        ("hh_rlhf", "harmless-base/train.jsonl.gz"),
        ("aligner", "safety/train.jsonl"),
        ("spa_vl", "data/train-00000-of-00008.parquet"),
        ("xstest", "xstest_v2_completions_gpt4.csv"),
    ):
        clone = tmp_path / option
        (clone / file).parent.mkdir(parents=True, exist_ok=True)
        (clone / file).write_bytes(b"")
        (clone / "README.md").write_text("a card")
        assert [*configured(option, path=str(clone)).origin().files] == [file]


def test_the_library_of_the_hub_reads_a_repository_as_the_local_files_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub_cache")
    for layout, file, part in (
        ("pku 2024", "data/Alpaca-7B/train.jsonl", None),
        ("beavertails", "round0/330k/train.jsonl.xz", ("default", "330k_train")),
        ("hh_rlhf", "harmless-base/train.jsonl.gz", None),
        ("aligner", "safety/train.jsonl", ("safety", "train")),
    ):
        folder = tmp_path / layout
        rows = [LAYOUTS[layout][1](number) for number in range(10)]
        write_rows(folder / file, rows)
        pack = {".xz": lzma.compress, ".gz": gzip.compress}.get((folder / file).suffix, bytes)
        (folder / file).write_bytes(pack((folder / file).read_bytes()))
        if part:
            (folder / "README.md").write_text(
                f"---\nconfigs:\n- config_name: {part[0]}\n  data_files:\n  - split: {part[1]}\n"
                f"    path: {file}\n---\n"
            )
        local = of_layout(layout, path=str(folder)).load()
        hub = of_layout(layout, name=str(folder)).load()
        assert hub.fingerprint == local.fingerprint, layout
        assert [record.scenario for record in everything(hub)] == [r.scenario for r in everything(local)]


# Each set


def test_pku_accepts_the_safer_answer_and_keeps_labels_and_the_first_harm_category(
    tmp_path: Path,
) -> None:
    rows = [
        pku_2023(0, safer=0, safe=(True, False)),
        pku_2023(1, safer=1, safe=(False, False)),
        pku_2023(2, safer=1, safe=(True, True)),
        pku_2024(3, second=("Privacy", "Fraud")),
        pku_2024(4, first=("Violence",), second=("Privacy",)),
        pku_2024(5, first=("Violence",), second=()),
        pku_2024(6) | {"is_response_1_safe": True},
        pku_2024(7) | {"response_1_harm_category": {"Violence": None, "Fraud": True}},
    ]
    splits = configured("pku_saferlhf", path=write_rows(tmp_path / "rows.jsonl", rows)).load()
    pairs = {int(pair.query[-1]): pair for pair in everything(splits)}
    assert pairs[0] == AnswerPair(query="prompt 0", accepted="zero 0", rejected="one 0")
    assert (pairs[1].accepted, pairs[1].accepted_harmful) == ("one 1", True)
    assert (pairs[2].rejected, pairs[2].rejected_harmful) == ("zero 2", False)
    scenarios = [pairs[number].scenario for number in range(8)]
    assert scenarios == [None, None, None, "Fraud", "Privacy", "Violence", None, "Fraud"]


def test_which_label_of_the_augmented_set_means_harmful_is_asked_and_not_guessed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "augmented_dataset.json", [labelled(number) for number in range(10)])
    with pytest.raises(InputError) as raised:
        configured("harmful_vs_unharmful", path=path).load()
    message = str(raised.value)
    assert message.startswith("harmful_label: has no value")
    assert "['question', 'answer', 'label']" in message
    assert "'label' holds 0, 1" in message
    for values, harmful in (
        ((1, 0), 1),
        ((0, 1), 0),
        ((True, False), True),
        (("bad", "good"), "bad"),
        ((1.0, 0.0), 1),
        (("1", "0"), 1),
    ):
        write_rows(
            tmp_path / "rows.jsonl", [labelled(n) | {"label": value} for n, value in enumerate(values)]
        )
        splits = configured(
            "harmful_vs_unharmful", path=str(tmp_path / "rows.jsonl"), harmful_label=harmful
        ).load()
        found = {record.query: record.harmful for record in everything(splits)}
        assert found == {"prompt 0": True, "prompt 1": False}, values
    path = write_rows(tmp_path / "twice.jsonl", [labelled(0) | {"is_safe": True}] * 2)
    with pytest.raises(InputError, match=r"found the columns .*'is_safe'.*data=labelled"):
        configured("harmful_vs_unharmful", path=path, harmful_label=1).load()


def test_a_label_beside_two_others_is_refused_whatever_the_reading(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [labelled(0), labelled(1), labelled(2)])
    for options in ({}, {"quarantine": str(tmp_path / "bad.jsonl")}):
        with pytest.raises(InputError, match=r"harmful_label=yes: besides it .* both '0' and '1'"):
            configured("harmful_vs_unharmful", path=path, harmful_label="yes", **options).load()


def test_beavertails_lets_the_majority_decide_and_names_the_first_category_of_harm(tmp_path: Path) -> None:
    rows = [
        beavertails(0, "violence"),
        beavertails(0, "violence", "self_harm"),
        beavertails(0),
        beavertails(1),
        beavertails(2, "violence"),
        beavertails(2),
        beavertails(3, "violence", "self_harm"),
        beavertails(4, "violence") | {"is_safe": True},
        beavertails(5) | {"is_safe": False},
    ]
    splits = configured("beavertails", path=write_rows(tmp_path / "rows.jsonl", rows)).load()
    found = {record.query: (record.harmful, record.scenario) for record in everything(splits)}
    assert found == {
        "prompt 0": (True, "violence"),
        "prompt 1": (False, None),
        "prompt 3": (True, "self_harm"),
        "prompt 4": (False, None),
        "prompt 5": (True, None),
    }
    assert "read 9 = kept 5 + dropped 4" in splits.account


def test_hh_rlhf_is_cut_at_the_last_answer(tmp_path: Path) -> None:
    before = dialogue("first", "reply", "second\n\nwith a paragraph")
    twice = "\n\nHuman: once\n\nAssistant: so\n\nAssistant: "
    rows = [
        {"chosen": f"{before}\n\nAssistant: kind", "rejected": f"{before}\n\nAssistant: unkind"},
        {"chosen": dialogue("alone", "a"), "rejected": dialogue("alone", "b")},
        {"chosen": dialogue("one", "a"), "rejected": dialogue("another", "b")},
        {"chosen": dialogue("q", ""), "rejected": dialogue("q", "b")},
        {"chosen": dialogue("q", "b"), "rejected": dialogue("q", "b")},
        {"chosen": f"{twice}a", "rejected": f"{twice}b"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    splits = configured("hh_rlhf", path=path).load()
    pairs = {pair.query: pair for pair in everything(splits)}
    assert set(pairs) == {"second\n\nwith a paragraph", "alone", "once"}
    assert pairs["second\n\nwith a paragraph"].accepted == "kind"
    assert pairs["alone"] == AnswerPair(query="alone", accepted="a", rejected="b")
    assert "read 6 = kept 3 + dropped 3" in splits.account
    whole = configured("hh_rlhf", path=path, context="all").load()
    assert before.strip() in {pair.query for pair in everything(whole)}


def test_dialogues_of_hh_rlhf_with_one_beginning_share_a_split_in_whole_and_in_mixtures(
    tmp_path: Path,
) -> None:
    turns = [(f"question {n}", *more) for n in range(30) for more in ((), ("so", "why?"), ("no", "and?"))]
    rows = [
        {"chosen": dialogue(*each, f"kind {n}"), "rejected": dialogue(*each, f"unkind {n}")}
        for n, each in enumerate(turns)
    ]
    source = configured("hh_rlhf", path=write_rows(tmp_path / "rows.jsonl", rows), context="all")
    splits = source.load()
    assert len(splits.validation) == 9
    held = {opening_key(pair.query) for pair in splits.validation}
    assert not held & {opening_key(pair.query) for pair in splits.train}
    [first] = [pair for pair in everything(splits) if pair.accepted == "kind 1"]
    assert first.query == "Human: question 0\n\nAssistant: so\n\nHuman: why?"

    other = write_rows(tmp_path / "other.jsonl", [row for row in rows if "Assistant: no" in row["chosen"]])
    again = replace(source, path=str(other), seed=source.seed + 1)
    mixed = Mixture(sources={"a": source, "b": again}, weights=None, duplicates="keep", seed=0).load()
    held = {opening_key(pair.query) for pair in mixed.validation}
    assert not held & {opening_key(pair.query) for pair in mixed.train}


def test_the_public_hh_rlhf_rows_are_all_accounted_for() -> None:
    splits = configured("hh_rlhf", path=public("hh_rlhf/harmless_base.jsonl.gz")).load()
    assert "read 1,800 = kept 1,791 + dropped 9" in splits.account
    assert "(the dialogues differ before the last answer: 5, empty answer: 4)" in splits.account
    assert (len(splits.train), len(splits.validation)) == (1612, 179)


def test_aligner_takes_the_correction_and_gives_the_answer_the_configured_label(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [aligner(number) for number in range(3)])
    for harmful in (True, False):
        wanted = AnswerPair(query="prompt 1", accepted="kind", rejected="unkind", rejected_harmful=harmful)
        assert wanted in everything(configured("aligner", path=path, answer_harmful=harmful).load())


def test_spa_vl_has_a_scenario_where_a_row_has_classes(tmp_path: Path) -> None:
    classes = {"class1": "Toxicity", "class2": "Harassment", "class3": None}
    path = write_rows(tmp_path / "rows.jsonl", [spa_vl(0) | classes, spa_vl(1), spa_vl(2)])
    splits = configured("spa_vl", path=path).load()
    scenarios = {pair.query: pair.scenario for pair in everything(splits)}
    assert scenarios == {"prompt 0": "Toxicity / Harassment", "prompt 1": None, "prompt 2": None}


def write_images(folder: Path) -> None:
    """SPA-VL's repository, with an image that cannot be decoded."""
    image = {"bytes": b"this is no image", "path": "a.jpg"}
    rows = [spa_vl(number) | {"image": image} for number in range(20)]
    path = folder / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    columns = "\n".join(f"  - name: {name}\n    dtype: string" for name in spa_vl(0))
    (folder / "README.md").write_text(
        "---\ndataset_info:\n- config_name: default\n  features:\n  - name: image\n    dtype: image\n"
        f"{columns}\n  splits:\n  - name: train\n    num_examples: 20\n    num_bytes: 0\n"
        "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
    )


def test_spa_vl_never_looks_at_an_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub_cache")
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *args: pytest.fail("an image was decoded"))
    write_images(tmp_path / "set")
    local = configured("spa_vl", path=str(tmp_path / "set")).load()
    hub = configured("spa_vl", name=str(tmp_path / "set")).load()
    assert hub.fingerprint == local.fingerprint
    assert len(everything(hub)) == 20
    assert not [*tmp_path.rglob("*.arrow")]
    options = configured("spa_vl", name=str(tmp_path / "set")).hub_options()
    assert "image" not in options["columns"]
    assert options["streaming"]


def write_xstest(path: Path, rows: list[Fields]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, xstest(0).keys())
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue())


def test_xstest_calls_only_full_compliance_with_an_unsafe_prompt_harmful(tmp_path: Path) -> None:
    rows = [
        xstest(0) | {"completion": "done"},
        xstest(0, label="3_partial_refusal") | {"completion": "in part"},
        xstest(1, kind="homonyms") | {"completion": "done so"},
    ]
    write_xstest(tmp_path / "b.csv", rows[:2])
    write_xstest(tmp_path / "a.csv", rows[2:])
    splits = configured("xstest", path=str(tmp_path), validation_fraction=0.5).load()
    assert {record.answer: record.harmful for record in everything(splits)} == {
        "done": True,
        "in part": False,
        "done so": False,
    }
    assert [len({r.query for r in part}) for part in (splits.train, splits.validation)] == [1, 1]


def test_the_public_xstest_rows_are_all_kept() -> None:
    splits = configured("xstest", path=public("xstest")).load()
    assert splits.account.endswith("read 1,620 = kept 1,620")
    assert sum(record.harmful for record in everything(splits)) == 100
    assert len({record.query for record in splits.validation}) * 5 == len(splits.validation)
