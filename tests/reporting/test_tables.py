from mllm_protector.reporting.tables import policy_groups, shown_groups, views
from mllm_protector.scenarios import GROUPS, HARM, POLICY
from tests.evaluation.builders import report, rows


def test_groups_are_shown_once_with_scenarios_of_their_own() -> None:
    groups = {"a": ["1", "2"], "b": ["3"], "all": ["1", "2", "3", "4"]}
    assert shown_groups(groups) == {"a": ["1", "2"], "b": ["3"], "all": ["4"]}


def test_single_group_is_not_repeated_as_all() -> None:
    assert list(shown_groups({"a": ["1"], "all": ["1"]})) == ["a"]
    assert list(shown_groups({"a": ["1"], "b": ["2"], "all": ["1", "2"]})) == ["a", "b", "all"]


def test_policy_stands_apart_only_where_a_benchmark_has_it() -> None:
    assert policy_groups(GROUPS | {"all": [*HARM, *POLICY]}) == ["08+10-13"]
    assert policy_groups({"08+10-13": POLICY[:1], "all": HARM}) == ["08+10-13"]
    assert policy_groups({"all": ["Fraud"]}) == []


def test_each_judge_has_its_own_view() -> None:
    result = report(rows("Fraud", "SD", "none", 1, 1, judges=["one", "two"]))
    first, second = views(result, "mmsafety")
    assert (first.title, second.title) == ("one", "two")
    assert first.kinds == ["IMAGES", "SD"]
    assert first.cells["SD", "Fraud", "none"]["judge"] == "one"
    assert second.means["IMAGES", "all", "none"]["judge"] == "two"
