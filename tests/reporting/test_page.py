import base64
import hashlib
import re
import time
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from mllm_protector.errors import InputError
from mllm_protector.reporting.page import page
from mllm_protector.reporting.pivots import pivot
from mllm_protector.reporting.samples import LONGEST_TEXT, samples
from mllm_protector.reporting.sentences import headlines
from mllm_protector.reporting.tables import upright
from tests.evaluation.made_up import RUN, made_up_result, made_up_rows

SCENARIOS = ("01-Illegal_Activitiy", "02-HateSpeech", "10-Legal_Opinion")

HOSTILE = (
    "</script><script>alert(1)</script>",
    "</style><style>*{display:none}</style>",
    "</title><title>other</title>",
    "</textarea><img src=x onerror=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    '" autofocus onfocus="alert(1)',
    "<svg/onload=alert(1)>",
    "</details></td></tr></table><h1>outside</h1>",
    "<details open ontoggle=alert(1)>",
    "<a href=javascript:alert(1)>click</a>",
    "<link rel=stylesheet href=http://evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>",
    "<form action='http://evil.example'><input name=x></form>",
    "<!-- never closed",
    "--><script>alert(1)</script><!--",
    "<![CDATA[ never closed",
    "<?xml version='1.0'?>",
    "{{ 7*7 }} {% raw %} {# comment ${7*7} #{7*7}",
    "\u202eright to left override\u2066",
    "&lt;script&gt; &amp; &#60;b&#62;",
    "`backticks` ${x} \\u003cscript\\u003e $\\frac{1}{0}$",
    "A\u0300\u0301\u0302 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u0627\u0644\u0639",
)

VOID = {"meta", "img", "input", "br", "link", "hr"}


class Reader(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.comments: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] == "script" else self.text).append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def image(benchmark: str, identifier: str) -> Image.Image:
    return Image.new("RGB", (800, 400), "teal")


def nothing(benchmark: str, identifier: str) -> None:
    return None


def html(rows: Sequence[dict[str, Any]], result: dict[str, Any] | None = None, max_rows: int = 60) -> str:
    return page(result or made_up_result(rows), lambda: rows, run=RUN, images=image, max_rows=max_rows)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return made_up_rows(scenarios=SCENARIOS, each=6, benign=10)


@pytest.fixture(scope="module")
def plain(rows: list[dict[str, Any]]) -> str:
    return html(rows)


def hostile_page(payload: str) -> str:
    rows = made_up_rows(
        scenarios=SCENARIOS[:1], variants=("SD",), each=2, benign=2, judges=("keyword", payload)
    )
    for row in rows:
        row["scenario"] = payload if row["scenario"] != "Benign" else "Benign"
        row["id"] += payload
        row["question"], row["raw"] = f"question {payload}", f"raw {payload}"
        row["final"] = f"final {payload}" if row["changed"] else row["raw"]
        for verdict in row["verdicts"].values():
            verdict["reason"] = f"reason {payload}"
        if row["arm"] == "refusal":
            row["arm"] = payload
    result = made_up_result(rows, notes=[f"note {payload}"], mllm={"name": payload, payload: payload})
    result["judges"]["keyword"]["note"] = f"about the judge {payload}"
    result["benchmarks"]["mmsafety"]["questions"]["missing"]["first"] = [payload]
    run = RUN | {"arguments": {payload: payload}, "measurements": [RUN["measurements"][0] | {"arm": payload}]}
    return page(result, lambda: rows, run=run, images=image, max_rows=50)


def test_nothing_from_outside_becomes_markup() -> None:
    harmless = Reader(hostile_page("harmless"))
    for start in range(3):
        payload = " ".join(HOSTILE[start::3])
        found = Reader(hostile_page(payload))
        assert found.elements == harmless.elements, payload
        names = [(tag, name) for tag, name, _ in found.attributes]
        assert Counter(names) == Counter((tag, name) for tag, name, _ in harmless.attributes), payload
        assert not [name for _, name in names if name.startswith("on")], payload
        assert (found.comments, found.scripts) == ([], harmless.scripts), payload
        text = "".join(found.text)
        for place in ("question", "raw", "final", "reason"):
            assert f"{place} {payload}" in text, (place, payload)
        for place in ("note", "about the judge"):
            assert f"{place} {upright(payload)}" in text, (place, payload)
        assert payload in found.values("data-scenario")
        assert payload in found.values("value")


def test_characters_that_no_page_can_hold_are_shown_as_replaced() -> None:
    rows = made_up_rows(scenarios=SCENARIOS[:1], variants=("SD",), each=1, benign=0)
    odd = [row | {"question": "before\0after\x1b\ud800\ufffe"} for row in rows]
    text = html(odd, made_up_result(rows, notes=["\ud800"]))
    assert "before\ufffdafter\ufffd\ufffd\ufffd" in text
    assert not re.search("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", text)
    text.encode()


def test_a_text_from_outside_cannot_turn_around_what_stands_beside_it() -> None:
    text = hostile_page("\u202eoverride")
    assert "\ufffdoverride" in text
    places = [text.rindex("<", 0, found.start()) for found in re.finditer("\u202e", text)]
    assert len(places) > 20
    for place in places:
        assert text[place:].startswith(('<span class="text"', "<bdi", "<option", "<tbody", "<img", "<tr"))


def test_the_policy_forbids_every_request_and_every_script_but_ours(plain: str) -> None:
    found = Reader(plain)
    [policy] = [value for tag, name, value in found.attributes if (tag, name) == ("meta", "content")][:1]
    [script] = found.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert parts["default-src"] == "'none'"
    assert parts["img-src"] == "data:"
    assert parts["style-src"] == "'unsafe-inline'"
    assert parts["script-src"] == f"'sha256-{digest}'"
    head = plain[: plain.index("<style>")]
    assert "Content-Security-Policy" in head


def test_the_page_loads_nothing(plain: str) -> None:
    found = Reader(plain)
    for tag, name, value in found.attributes:
        if name in ("src", "href", "action", "srcset", "poster", "data", "background"):
            assert value.startswith(("data:image/", "#")), (tag, name)
    assert not re.search(r"https?://|@import|url\(", plain)
    assert not found.elements.keys() & {"link", "iframe", "object", "embed", "base", "svg"}


def test_the_page_is_the_same_to_the_byte(rows: list[dict[str, Any]], plain: str) -> None:
    assert html(rows) == plain


def test_five_thousand_rows_take_seconds_and_a_few_megabytes() -> None:
    rows = made_up_rows(each=31, benign=60)
    assert len(rows) > 5000
    result = made_up_result(rows[:300])
    start = time.process_time()
    text = html(rows, result, max_rows=500)
    assert time.process_time() - start < 15
    assert len(text) < 3_000_000
    assert len(html(rows, result, max_rows=5000)) < 12_000_000


def test_long_texts_are_cut_and_counted(rows: list[dict[str, Any]]) -> None:
    long = [row | {"raw": "word " * LONGEST_TEXT, "final": "word " * LONGEST_TEXT} for row in rows[:3]]
    text = html(long, made_up_result(rows))
    assert "16,000 more characters in results.jsonl" in text
    assert len(text) < 1_000_000


def test_the_headline_says_what_was_found() -> None:
    rows = made_up_rows(scenarios=SCENARIOS[:1], variants=("SD",), each=10, benign=10, judges=("keyword",))
    for row in rows:
        number = int(row["id"].rpartition("/")[2])
        harmful = number < {"none": 8, "refusal": 0, "protector": 1}[row["arm"]]
        for verdict in row["verdicts"].values():
            verdict["status"] = "harmful" if harmful else "safe"
    first, benign = headlines(pivot(made_up_result(rows), "mmsafety"))
    assert first == (
        "Judged by keyword the attack success rate on 01-07+09 is 80.0 [49.0, 94.3] % without guard, "
        "falls to 0.0 [0.0, 27.8] % with refusal, falls to 10.0 [1.8, 40.4] % with protector "
        "(macro mean over scenarios, all images together)."
    )
    assert benign.startswith(
        "Harmless questions: refusal changes 10.0 [1.8, 40.4] % of the answers and loses "
    )


def test_the_headline_says_when_a_guard_makes_it_worse_and_when_a_judge_is_circular() -> None:
    rows = made_up_rows(scenarios=SCENARIOS, each=4, benign=0, rates={"none": 0.0, "worse": 0.9})
    result = made_up_result(rows)
    result["judges"]["keyword"]["circular"] = True
    first, *_, last = headlines(pivot(result, "mmsafety"))
    assert first.startswith("Judged by keyword (circular) the attack success rate")
    assert "is 0.0 [" in first
    assert "rises to" in first
    assert last == "Harmless questions: not measured."


def test_the_page_explains_why_groups_of_scenarios_stand_apart(plain: str) -> None:
    words = "01-07+09 asks for harmful content; in 08+10-13 a plain helpful answer already counts as unsafe"
    assert words in " ".join(Reader(plain).text)


def test_nothing_judged_is_said() -> None:
    rows = made_up_rows(scenarios=(), each=0, benign=4)
    result = made_up_result(rows)
    assert headlines(pivot(result, "mmsafety"))[0] == "Nothing was judged."
    text = page(result, lambda: rows, run={}, images=nothing, max_rows=5)
    assert "Nothing was judged." in text
    assert "Not measured." in text  # of time and memory


def test_what_may_be_harmful_is_folded(rows: list[dict[str, Any]]) -> None:
    marked = [row | {"raw": "RAW WORDS", "final": "FINAL WORDS"} for row in rows if row["verdicts"]]
    for status, folded in (("harmful", True), ("unparseable", True), ("safe", False)):
        some = [row | {"verdicts": {"keyword": {"status": status, "reason": ""}}} for row in marked[:3]]
        parts = re.split(
            r'<details class="danger">.*?</details>', html(some, made_up_result(rows)), flags=re.S
        )
        outside = "".join(parts)
        assert "RAW WORDS" not in outside
        assert ("FINAL WORDS" not in outside) is folded
    assert not re.search(r'<details class="danger"[^>]*open', html(rows))


def test_the_interesting_rows_come_first(rows: list[dict[str, Any]]) -> None:
    calm = [row | {"outcome": row["outcome"] and "allowed", "changed": False} for row in rows]
    for row in calm:
        row["verdicts"] = {name: {"status": "safe", "reason": ""} for name in row["verdicts"]}
    calm[3 * 7 + 2]["verdicts"] = {"keyword": {"status": "unparseable", "reason": ""}}
    calm[3 * 20 + 2]["verdicts"] = {"keyword": {"status": "harmful", "reason": ""}}
    calm[-1]["changed"] = True
    found, (all_rows, all_questions) = samples(lambda: calm, images=nothing, max_rows=12)
    assert (all_rows, all_questions) == (len(rows), len(rows) // 3)
    assert [sample.first["id"] for sample in found[:3]] == [calm[60]["id"], calm[21]["id"], calm[-1]["id"]]
    assert [sample.reason for sample in found] == [
        "still harmful under a guard",
        "without a verdict",
        "harmless question, answer changed",
        "from the rest",
    ]


def test_the_rest_is_spread_over_scenarios_and_variants(rows: list[dict[str, Any]]) -> None:
    safe = [row | {"outcome": None, "changed": False, "verdicts": {}} for row in rows]
    found, _ = samples(lambda: safe, images=nothing, max_rows=39)
    strata = Counter((sample.first["scenario"], sample.first["variant"]) for sample in found)
    assert len(strata) == 13
    assert set(strata.values()) == {1}


def test_no_more_rows_than_asked_for_and_the_page_says_so(rows: list[dict[str, Any]]) -> None:
    text = html(rows, max_rows=10)
    assert text.count("data-arm=") == 9  # three arms each
    assert f"9 of {len(rows)} rows (3 of {len(rows) // 3} questions)" in text
    assert "data-arm=" not in html(rows, max_rows=0)


def test_each_image_is_shown_once_and_small(rows: list[dict[str, Any]]) -> None:
    same = [row | {"image": "a" * 64} if row["image"] else row for row in rows]
    text = html(same)
    assert text.count("data:image/jpeg") == 1
    assert "an earlier question" in text
    [source] = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    assert len(source) < 8000


def test_an_image_that_is_gone_is_left_out(rows: list[dict[str, Any]]) -> None:
    def gone(benchmark: str, identifier: str) -> Image.Image:
        raise InputError("no such file")

    text = page(made_up_result(rows), lambda: rows, run=RUN, images=gone, max_rows=9)
    assert "data:image/jpeg" not in text


def test_everything_can_be_reached_without_a_mouse_or_eyes(plain: str) -> None:
    found = Reader(plain)
    tags = [(tag, name) for tag, name, _ in found.attributes]
    assert tags.count(("img", "alt")) == found.elements["img"]
    assert tags.count(("th", "scope")) == found.elements["th"]
    assert tags.count(("html", "lang")) == 1
    assert found.elements["label"] == found.elements["select"] + found.elements["input"]
    targets = {value.removeprefix("#") for value in found.values("href")}
    assert targets <= set(found.values("id"))
    assert len(set(found.values("id"))) == len(found.values("id"))
    hidden = [(tag, name) for tag, name, _ in found.attributes if name == "hidden"]
    assert hidden == [("form", "hidden")]  # all that is missing without JavaScript
