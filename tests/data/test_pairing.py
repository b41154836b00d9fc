from pathlib import Path

import pytest

from mllm_protector.data.mixture import Mixture
from mllm_protector.data.pairing import Paired
from mllm_protector.data.preparation import prepare
from mllm_protector.data.table import VARIABLE
from mllm_protector.errors import InputError
from tests.data.builders import configured, everything, write_rows


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path_factory.mktemp("cache")))


def test_each_harmful_answer_meets_a_harmless_one_to_its_question(tmp_path: Path) -> None:
    rows = [
        {"question": f"What of {number}{mark}", "answer": f"{label} {answer} to {number}", "label": label}
        for number in range(12)
        for label, answer, mark in (
            (1, "a", "?"),
            (0, "b", " ?!"),
            (1, "c", "?"),
            (1, "d", ""),
            (0, "e", "?"),
        )
    ]
    alone = [
        {"question": f"Only {number}?", "answer": f"one {number}", "label": number % 2} for number in range(9)
    ]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, *alone])
    source = Paired(source=configured("jailbreakeval", path=path, validation_fraction=0.25))
    splits = source.load()
    pairs = everything(splits)
    assert len(pairs) == 36
    assert all(pair.rejected_harmful and not pair.accepted_harmful for pair in pairs)
    of_three = {(pair.rejected, pair.accepted) for pair in pairs if pair.query.startswith("What of 3")}
    assert of_three == {("1 a to 3", "0 b to 3"), ("1 c to 3", "0 e to 3"), ("1 d to 3", "0 b to 3")}
    assert not {pair.query for pair in splits.train} & {pair.query for pair in splits.validation}
    [account] = prepare(source, {}, contaminated="drop", folder=tmp_path).splits.sources
    assert (account.read, account.kept) == (69, 36)
    assert account.dropped["not the harmful answer of a pair"] == 33


def test_a_source_without_both_labels_for_a_question_is_refused(tmp_path: Path) -> None:
    rows = [{"question": f"What of {n}?", "answer": f"one {n}", "label": n % 2} for n in range(9)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match="no question of the train part has answers of both labels"):
        Paired(source=configured("jailbreakeval", path=path)).load()
    both = {name: configured("jailbreakeval", path=path) for name in "ab"}
    mixture = Mixture(sources=both, weights=None, duplicates="keep", seed=0)
    with pytest.raises(InputError, match="is a mixture; pair each source"):
        Paired(source=mixture).load()
    with pytest.raises(InputError, match="has pairs already"):
        Paired(source=configured("toy")).load()
