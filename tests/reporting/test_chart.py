import copy
import io
import json
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from mllm_protector.reporting.chart import chart
from mllm_protector.reporting.plots import pictures_of
from tests.evaluation.made_up import made_up_result, made_up_rows

SCENARIOS = ("01-Illegal_Activitiy", "02-HateSpeech", "10-Legal_Opinion")
GREY, ORANGE, BLUE = (0x99, 0x99, 0x99), (0xE6, 0x9F, 0x00), (0x00, 0x72, 0xB2)
HOSTILE = "$\\frac{1}{0$ <script>\0\ud800\u202e&]]>"


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return made_up_result(made_up_rows(scenarios=SCENARIOS, each=6, benign=10))


def colours(png: bytes) -> set[tuple[int, ...]]:
    with Image.open(io.BytesIO(png)) as image:
        return {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}


def test_the_chart_has_the_colour_of_every_arm(result: dict[str, Any]) -> None:
    assert colours(chart(result)) >= {GREY, ORANGE, BLUE}
    bare = made_up_result(made_up_rows(scenarios=SCENARIOS, each=2, benign=0, rates={"none": 0.7}))
    assert not colours(chart(bare)) & {ORANGE, BLUE}


def test_a_rate_of_zero_is_seen() -> None:
    rows = made_up_rows(scenarios=SCENARIOS, each=2, benign=0, rates={"none": 0.9, "refusal": 0.0})
    assert ORANGE in colours(chart(made_up_result(rows)))


def test_the_chart_shows_the_first_judge_only(result: dict[str, Any]) -> None:
    other = copy.deepcopy(result)
    for entry in (*other["benchmarks"]["mmsafety"]["cells"], *other["benchmarks"]["mmsafety"]["means"]):
        if entry["judge"] == "chat":
            entry.update(harmful=0, macro=0.0, macro_low=0.0)
    assert chart(other) == chart(result)
    other["judges"] = dict(reversed(other["judges"].items()))
    assert chart(other) != chart(result)


def test_a_circular_judge_is_marked(result: dict[str, Any]) -> None:
    other = copy.deepcopy(result)
    other["judges"]["keyword"]["circular"] = True
    assert chart(other) != chart(result)


def test_nothing_measured_is_still_a_picture(result: dict[str, Any]) -> None:
    assert colours(chart(result | {"benchmarks": {}, "judges": {}}))


def test_every_plot_is_there_and_is_the_same_to_the_byte(result: dict[str, Any]) -> None:
    first, second = (pictures_of(result, "mmsafety", "keyword") for _ in range(2))
    assert len(first) == 4
    assert first == second
    for content in first.values():
        assert ElementTree.fromstring(content).tag.endswith("svg")  # noqa: S314
        assert b"<dc:date>" not in content
        assert b"<text" not in content


def test_a_plot_of_nothing_is_left_out() -> None:
    rows = made_up_rows(scenarios=SCENARIOS[:2], variants=("TEXT",), each=2, benign=0)
    assert list(pictures_of(made_up_result(rows), "mmsafety", "keyword")) == [
        "Attack success rate by scenario, as bars"
    ]


def test_names_from_outside_break_no_plot(result: dict[str, Any]) -> None:
    named = json.dumps(result).replace("02-HateSpeech", json.dumps(HOSTILE)[1:-1])
    named = named.replace('"protector"', json.dumps(HOSTILE)).replace('"keyword"', json.dumps(HOSTILE))
    hostile = json.loads(named) | {"notes": [HOSTILE * 20]}
    chart(hostile)
    for content in pictures_of(hostile, "mmsafety", HOSTILE).values():
        names = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(content).iter()}  # noqa: S314
        assert not names & {"script", "image", "foreignObject", "a"}


def test_an_unjudged_scenario_is_no_zero() -> None:
    rows = made_up_rows(scenarios=SCENARIOS, each=2, benign=0, judges=("keyword",))
    for row in rows:
        if row["scenario"] == SCENARIOS[0]:
            row["verdicts"]["keyword"]["status"] = "unparseable"
    result = made_up_result(rows)
    assert len(pictures_of(result, "mmsafety", "keyword")) >= 2
    assert chart(result)
