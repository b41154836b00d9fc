"""The page in a browser, in front of the demo's upstream with a guard that goes by words."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllm_protector.records import Question
from mllm_protector.serving.demo import demo_server
from mllm_protector.serving.proxy import Front
from mllm_protector.serving.settings import ApiKey
from tests.serving.browser import CHROMIUM, Page, browser
from tests.serving.builders import front_settings, policy_settings, upstream_settings
from tests.serving.fakes import HTTP, SAFE, WordGuard, serving

HOSTILE = "<img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script><b>bold</b>"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


class Echo:
    """Answers with the question, and with the size of the image."""

    def generate(self, questions: Sequence[Question]) -> list[str]:
        found = []
        for question in questions:
            size = "" if question.image is None else f" {question.image.load().size}"
            found.append(question.text + size)
        return found

    @property
    def card(self) -> Any:
        raise NotImplementedError


@contextmanager
def fronted(**changes: Any) -> Iterator[str]:
    with demo_server(Echo()) as upstream:
        settings = front_settings(upstream=upstream_settings(url=upstream), **changes)
        with serving(Front(settings, WordGuard()).app()) as url:
            yield url


def ask(page: Page, question: str) -> None:
    page.run(f"document.getElementById('question').value = {json.dumps(question)}")
    page.run("document.getElementById('reply').hidden = true")
    page.run("document.getElementById('ask').click()")
    page.until("!document.getElementById('reply').hidden && !document.getElementById('ask').disabled")


def text(page: Page, name: str) -> str:
    return str(page.run(f"document.getElementById('{name}').textContent"))


@needs_browser
def test_a_question_is_answered_and_every_answer_is_shown_as_text(tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    Image.new("RGB", (30, 20)).save(image)
    with fronted() as url, browser(tmp_path / "profile") as page:
        page.open(f"{url}/")
        page.until("document.getElementById('model').value === 'demo'")
        assert text(page, "guard") == "Guard: ready"
        assert text(page, "upstream") == "Upstream: reachable"
        assert "0.5 or more" in text(page, "threshold")
        assert "a toy's promise" in text(page, "promise")

        ask(page, HOSTILE)
        assert text(page, "answer") == HOSTILE
        assert page.run("document.getElementById('answer').childElementCount") == 0
        assert page.run("document.title") == "Guarded model"
        assert (text(page, "outcome"), text(page, "score")) == ("Allowed", "score 0.1")

        ask(page, "FORBIDDEN words")
        assert (text(page, "answer"), text(page, "outcome")) == (SAFE, "Rewritten")
        assert "raw answer is hidden" in text(page, "hidden")
        page.run("document.getElementById('question').value = ''")
        assert "FORBIDDEN" not in page.run("document.documentElement.outerHTML")

        page.choose("#image", image)
        ask(page, "What is this?")
        assert text(page, "answer") == "What is this? (30, 20)"
        page.until("document.getElementById('counts').textContent.includes('66.7 %')")
        assert page.run("document.querySelectorAll('#chart rect').length") >= 2

        ask(page, "BUSY")
        assert text(page, "outcome") == "No answer"
        assert "too much to do" in text(page, "answer")
        assert not page.complaints
        assert all(each.startswith((url, "data:")) for each in page.requested)


@needs_browser
def test_with_keys_the_page_wants_one_and_shows_the_rest_behind_it(tmp_path: Path) -> None:
    key = ApiKey(name="ann", sha256=hashlib.sha256(b"secret").hexdigest())
    with fronted(keys=[key]) as url, browser(tmp_path) as page:
        page.open(f"{url}/")
        page.until("!document.getElementById('key-field').hidden")
        assert page.run("document.getElementById('threshold-part').hidden")
        ask(page, "Hello")
        assert "API key is missing" in text(page, "answer")
        page.run("document.getElementById('key').value = 'secret'")
        page.run("document.getElementById('key').dispatchEvent(new Event('change'))")
        page.until("document.getElementById('model').value === 'demo'")
        page.until("!document.getElementById('threshold-part').hidden")
        ask(page, "Hello")
        assert text(page, "answer") == "Hello"


@needs_browser
def test_the_page_fits_a_phone_and_shows_what_a_shadow_does_not_change(tmp_path: Path) -> None:
    with fronted(policy=policy_settings(shadow=True)) as url, browser(tmp_path) as page:
        page.show(360, 740, "dark")
        page.open(f"{url}/")
        page.until("!document.getElementById('notice').hidden")
        ask(page, "FORBIDDEN " + 100 * "long")
        assert text(page, "outcome") == "Shadow: Rewritten"
        assert page.run("document.documentElement.scrollWidth <= 360")
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"


def test_the_page_loads_nothing_and_runs_one_script() -> None:
    with fronted() as url:
        first, second = HTTP.get(f"{url}/"), HTTP.get(f"{url}/")
        policy = first.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        [nonce] = {part for part in policy.replace(";", " ").split() if part.startswith("'nonce-")}
        assert nonce not in second.headers["content-security-policy"]
        assert first.text.count("<script") == 1
        assert f'<script nonce="{nonce[7:-1]}">' in first.text
        assert not [
            word
            for word in ("http://", "https://", "innerHTML", " style=", "onclick")
            if word in first.text.replace("http://www.w3.org/2000/svg", "")
        ]


def test_state_tells_strangers_no_more_than_counts() -> None:
    key = ApiKey(name="ann", sha256=hashlib.sha256(b"secret").hexdigest())
    body = {"model": "demo", "messages": [{"role": "user", "content": "FORBIDDEN"}]}
    known = {"authorization": "Bearer secret"}
    with fronted(keys=[key]) as url:
        HTTP.post(f"{url}/v1/chat/completions", json=body, headers=known)
        for headers in ({}, {"authorization": "Bearer wrong"}):
            state = HTTP.get(f"{url}/state", headers=headers).json()
            assert state.keys() == {"guard_ready", "upstream_reachable", "keys_required", "minutes"}
            assert state["minutes"][-2:].count({"rewritten": 1}) == 1
            assert len(state["minutes"]) == 60
        state = HTTP.get(f"{url}/state", headers=known).json()
        assert (state["threshold"], state["promise"]) == (0.5, "a toy's promise")
        assert state["latencies"].keys() == {"all", "upstream", "guard"}
        assert state["latencies"]["all"]["p95"] >= state["latencies"]["guard"]["p50"] >= 0
    with fronted(policy=policy_settings(threshold=0.3)) as url:
        state = HTTP.get(f"{url}/state").json()
        assert (state["threshold"], state["threshold_of"], state["promise"]) == (0.3, "config", None)
