import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from mllm_protector.data.encoding import DetectorEncoder
from mllm_protector.data.tokens import choose_pad_id, fill
from mllm_protector.errors import InputError, RunError
from mllm_protector.models import export
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.models.export import export_detector, renders_alike
from mllm_protector.normalisation import readings
from tests.models.builders import save_tiny_classifier_base
from tests.models.fixtures import FULL, LORA

QUERIES = ["How do I bake bread?", "What is this?", "x", "Why?"]
ANSWERS = ["Mix flour and water.", "The image shows a red square.", "No.", "Ask a baker."]
ODD_QUERIES = ["", " ", "</s> <pad>", "\n\n"]
ODD_ANSWERS = ["", "</s>", "Mix <s> flour \n", " "]

Maker = Callable[..., HarmDetector]


def write(detector: Path, folder: Path, **changes: Any) -> Path:
    given = {"base": None, "push_to": None, "private": True} | changes
    return export_detector(detector=str(detector), output_dir=str(folder), **given)


@pytest.fixture(scope="module")
def detector(make_detector: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "detector"
    make_detector(tuning=LORA).save(folder)
    return folder


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def exported(detector: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(detector, tmp_path_factory.mktemp("exported") / "model")


def scores(folder: Path, queries: list[str] = QUERIES, answers: list[str] = ANSWERS) -> list[float]:
    return load_detector(folder, device="cpu").score(queries=queries, answers=answers)


def stock_scores(folder: Path, batch_size: int = 4) -> list[float]:
    """What ``transformers`` alone makes of plain text."""
    prompt = read(folder / "guard.json")["prompt"]
    texts = [fill(prompt, query, answer) for query, answer in zip(QUERIES, ANSWERS, strict=True)]
    stock = pipeline("text-classification", model=str(folder), function_to_apply="sigmoid", device="cpu")
    replies = stock(texts, batch_size=batch_size)
    assert [reply["label"] for reply in replies] == ["HARMFUL"] * 4
    return [reply["score"] for reply in replies]


def with_offset(made: HarmDetector, offset: float) -> HarmDetector:
    return HarmDetector(made.model, made.encoder, replace(made.guard, offset=offset))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2", "bert"])
@pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
def test_an_export_scores_as_the_detector_did(
    make_detector: Maker, tmp_path: Path, family: str, tuning: Any
) -> None:
    make_detector(family, tuning=tuning).save(tmp_path / "detector")
    folder = write(tmp_path / "detector", tmp_path / "exported")
    pairs = QUERIES + ODD_QUERIES[:1], ANSWERS + ODD_ANSWERS[:1]
    assert scores(folder, *pairs) == pytest.approx(scores(tmp_path / "detector", *pairs), abs=1e-6)
    assert not (folder / "adapter_config.json").exists()
    config, guard = read(folder / "config.json"), read(folder / "guard.json")
    assert config["id2label"] == {"0": "HARMFUL"}
    assert config["pad_token_id"] == guard["pad_id"]
    assert (guard["tuning"], list(guard["weights"])) == ("full", ["model.safetensors"])


def test_the_stock_pipeline_gives_the_calibrated_score(detector: Path, exported: Path) -> None:
    assert read(detector / "guard.json")["temperature"] == 1.5
    assert read(exported / "guard.json")["temperature"] == 1.0
    assert "The pipeline's score is the score above." in (exported / "README.md").read_text()
    for batch_size in (1, 4):
        assert stock_scores(exported, batch_size) == pytest.approx(scores(detector), abs=1e-6), batch_size


def test_an_export_tells_logits_of_known_answers_and_no_other_part_does(
    detector: Path, exported: Path
) -> None:
    assert "known" not in read(detector / "guard.json")
    known = read(exported / "guard.json")["known"]
    assert len({each["logit"] for each in known}) == len(known) == 4
    model = AutoModelForSequenceClassification.from_pretrained(exported, use_safetensors=True).eval()
    with torch.inference_mode():
        for each in known:
            logit = model(input_ids=torch.tensor([each["ids"]])).logits[0, 0].item()
            assert each["logit"] == pytest.approx(logit, abs=1e-6)


@pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
def test_an_offset_goes_into_the_bias_of_the_head(make_detector: Maker, tmp_path: Path, tuning: Any) -> None:
    made = with_offset(make_detector("bert", tuning=tuning), -0.75)
    if tuning is FULL:
        with torch.no_grad():
            made.model.classifier.bias += 0.3  # so that dividing it matters
    made.save(tmp_path / "detector")
    folder = write(tmp_path / "detector", tmp_path / "exported")
    guard = read(folder / "guard.json")
    assert (guard["temperature"], guard["offset"], guard["threshold"]) == (1.0, 0.0, 0.4)
    model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True).eval()
    encoder = load_detector(folder, device="cpu").encoder
    with torch.inference_mode():
        stock = [
            torch.sigmoid(model(input_ids=torch.tensor([ids])).logits[0, 0]).item()
            for ids in encoder.encode(queries=QUERIES, answers=ANSWERS)
        ]
    assert stock == pytest.approx(scores(tmp_path / "detector"), abs=1e-6)
    assert scores(folder) == pytest.approx(scores(tmp_path / "detector"), abs=1e-6)


def test_a_head_without_a_bias_leaves_the_offset_to_the_guard_file_and_the_card_says_so(
    make_detector: Maker, tmp_path: Path
) -> None:
    with_offset(make_detector("llama", tuning=LORA), -0.75).save(tmp_path / "detector")
    folder = write(tmp_path / "detector", tmp_path / "exported")
    guard = read(folder / "guard.json")
    assert (guard["temperature"], guard["offset"]) == (1.0, pytest.approx(-0.5))
    assert scores(folder) == pytest.approx(scores(tmp_path / "detector"), abs=1e-6)
    assert code_scores(folder) == pytest.approx(scores(tmp_path / "detector"), abs=1e-6)
    card = (folder / "README.md").read_text()
    assert "head has no bias to take the offset" in card
    assert "offset = -0.5 |" in card


def code_scores(folder: Path, queries: list[str] = QUERIES, answers: list[str] = ANSWERS) -> list[float]:
    """What the code in the card gives."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace('folder = "."', f"folder = {str(folder)!r}"), names)  # noqa: S102 - our own words
    return [names["score"](query, answer) for query, answer in zip(queries, answers, strict=True)]


def test_the_code_of_the_card_gives_the_score_of_any_text(detector: Path, exported: Path) -> None:
    queries, answers = QUERIES + ODD_QUERIES, ANSWERS + ODD_ANSWERS
    read = [readings(*pair) for pair in zip(queries, answers, strict=True)]
    found = [max(code_scores(exported, *map(list, zip(*pairs, strict=True)))) for pairs in read]
    assert found == pytest.approx(scores(detector, queries, answers), abs=1e-6)


def test_plain_text_will_not_do_where_a_token_spans_prompt_and_text(tmp_path: Path) -> None:
    words = [" How", " What", " Why", " Mix", " Because"] * 9
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_classifier_base("llama", tmp_path / "base", words))
    settings = {"pad_id": choose_pad_id(tokenizer), "max_length": 256}
    assert renders_alike(DetectorEncoder(tokenizer, **settings, prompt="Q:\n{query}\nA:\n{answer}\n"))
    assert not renders_alike(DetectorEncoder(tokenizer, **settings, prompt="Q: {query} A: {answer}"))


def test_the_card_tells_data_figures_and_thresholds_but_no_place(detector: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    _, front, body = card.split("---\n", maxsplit=2)
    assert yaml.safe_load(front)["pipeline_tag"] == "text-classification"
    guard = read(detector / "guard.json")
    assert "temperature = 1.0, offset = 0.0" in body
    assert "harmful at or above 0.4" in body
    assert guard["prompt"] in body
    assert json.dumps(guard["data"]["account"]) in body
    assert "0x" not in body
    for path in (exported / "README.md", exported / "guard.json", exported / "config.json"):
        assert str(detector.parent.parent) not in path.read_text()


def test_a_text_of_the_data_cannot_leave_its_block(make_detector: Maker, tmp_path: Path) -> None:
    make_detector(tuning=FULL).save(tmp_path / "detector")
    path = tmp_path / "detector" / "guard.json"
    path.write_text(json.dumps(read(path) | {"data": {"account": "```\n# Not ours"}}))
    card = (write(tmp_path / "detector", tmp_path / "exported") / "README.md").read_text()
    assert "````json" in card
    assert "\n# Not ours" not in card


def test_a_lost_head_is_noticed(detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(model: Any, folder: Path, guard: Any) -> torch.nn.Module:
        merged = model.merge_and_unload()
        torch.nn.init.normal_(merged.score.weight)
        return merged

    monkeypatch.setattr(export, "_merged", forgetful)
    with pytest.raises(RunError, match="does not score as"):
        write(detector, tmp_path / "exported")
    assert not (tmp_path / "exported" / "guard.json").exists()


def test_an_adapter_that_was_trained_on_few_bits_is_merged_into_whole_weights(
    make_detector: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_detector(tuning=LORA).save(tmp_path / "detector")
    whole = scores(tmp_path / "detector")
    path = tmp_path / "detector" / "guard.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"base": content["base"] | {"quantization": "4bit"}}))
    folder = write(tmp_path / "detector", tmp_path / "exported")
    assert scores(folder) == pytest.approx(whole, abs=1e-6)
    assert "choose its threshold again" in caplog.text


class Hub:
    """Stands for ``huggingface_hub.HfApi``."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def create_repo(self, name: str, **options: Any) -> None:
        self.calls.append(("create", {"name": name, **options}))

    def upload_folder(self, **options: Any) -> None:
        files = {path.name for path in Path(options["folder_path"]).iterdir()} & {*options["allow_patterns"]}
        self.calls.append(("upload", {"name": options["repo_id"], "files": files}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


def test_only_the_files_of_the_model_are_published(detector: Path, tmp_path: Path, hub: type[Hub]) -> None:
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.yaml").write_text("output_dir: /home/me")
    (tmp_path / "exported" / "notes.txt").write_text("mine")
    write(detector, tmp_path / "exported")
    assert hub.calls == [], "nothing is published unless asked for"
    write(detector, tmp_path / "exported", push_to="me/guard")
    files = {path.name for path in (tmp_path / "exported").iterdir()} - {"config.yaml", "notes.txt"}
    assert {"README.md", "config.json", "guard.json", "model.safetensors", "tokenizer.json"} <= files
    assert hub.calls == [
        ("create", {"name": "me/guard", "private": True, "exist_ok": True}),
        ("upload", {"name": "me/guard", "files": files}),
    ]


def test_what_cannot_be_written_is_refused_first(detector: Path, tmp_path: Path, hub: type[Hub]) -> None:
    with pytest.raises(InputError, match="the detector's own folder"):
        write(detector, detector)
    with pytest.raises(InputError, match="push_to=a/b/c: not a name on the hub"):
        write(detector, tmp_path / "exported", push_to="a/b/c")
    assert not (tmp_path / "exported").exists()


def test_a_refusal_of_the_hub_is_one_line_and_keeps_the_export(
    detector: Path, tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Hub, name: str, **options: Any) -> None:
        raise OSError("token hf_secret refused")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(InputError) as error:
        write(detector, tmp_path / "exported", push_to="me/guard")
    assert "hf auth login" in str(error.value)
    assert "hf_secret" not in str(error.value)
    assert scores(tmp_path / "exported") == pytest.approx(scores(detector), abs=1e-6)
