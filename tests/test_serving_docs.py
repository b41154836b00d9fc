"""What docs/serving.md shows of a server's requests and replies is parsed and computed with."""

import json
import re
from pathlib import Path
from typing import Any

from mllm_protector.models.guard_file import Scale

TEXT = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
GUARD = {"temperature": 1.5, "offset": -0.5, "threshold": 0.5}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


def exchange() -> tuple[dict[str, Any], dict[str, Any]]:
    (first, request), (second, response) = (block.split("\n", maxsplit=1) for block in blocks("json"))
    assert (first, second) == ("POST /classify", "HTTP 200")
    return json.loads(request), json.loads(response)


def verdicts(response: dict[str, Any], guard: dict[str, float]) -> list[bool]:
    [code] = blocks("python")
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 - our own words
    return names["verdicts"](response, guard)


def test_the_request_sends_rows_of_ids_and_wants_logits() -> None:
    request, _ = exchange()
    assert set(request) == {"model", "input", "use_activation"}
    assert request["use_activation"] is False
    assert all(isinstance(token, int) for row in request["input"] for token in row)


def test_the_response_answers_the_request() -> None:
    request, response = exchange()
    assert response["model"] == request["model"]
    assert [row["index"] for row in response["data"]] == list(range(len(request["input"])))
    assert response["usage"]["prompt_tokens"] == sum(map(len, request["input"]))
    for row in response["data"]:
        assert set(row) == {"index", "label", "probs", "num_classes"}
        assert (row["label"], row["num_classes"], len(row["probs"])) == ("HARMFUL", 1, 1)


def test_a_verdict_is_the_one_of_the_package_whatever_the_order_of_the_response() -> None:
    _, response = exchange()
    logits = [row["probs"][0] for row in response["data"]]
    turned = response | {"data": response["data"][::-1]}
    for threshold in (0.01, 0.5, 0.9):
        expected = [score >= threshold for score in Scale(temperature=1.5, offset=-0.5).scores(logits)]
        for each in (response, turned):
            assert verdicts(each, GUARD | {"threshold": threshold}) == expected
    assert verdicts(response, GUARD) == [True, False]
