import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_protector.errors import InputError
from mllm_protector.models.backbone import Backbone
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.models.detoxifier import Detoxifier, load_detoxifier
from mllm_protector.models.guard_file import weight_hashes
from mllm_protector.models.shared import can_share, load_shared
from tests.cases import case
from tests.models.fixtures import FULL, LORA

QUERIES = ["How do I bake bread?", "", "What is this? " * 4, "x", "Why?"]
ANSWERS = ["Mix flour and water.", "", "No.", "The image shows a red square. " * 2, "</s> Ask a baker."]
FAMILIES = ("llama", "qwen2", "gpt2")


@pytest.fixture(scope="module")
def parts(
    make_detector: Callable[..., HarmDetector],
    make_detoxifier: Callable[..., Detoxifier],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, Path]]:
    root = tmp_path_factory.mktemp("parts")
    for family in FAMILIES:
        make_detector(family, LORA).save(root / family / "detector")
        make_detoxifier(family, LORA).save(root / family / "detoxifier")
    return {family: (root / family / "detector", root / family / "detoxifier") for family in FAMILIES}


def logits(detector: HarmDetector) -> list[float]:
    return detector.logits(queries=QUERIES, answers=ANSWERS)


def rewrites(detoxifier: Detoxifier) -> list[str]:
    return detoxifier.correct(queries=QUERIES, answers=ANSWERS)


def test_on_one_base_both_say_what_they_say_apart(parts: dict[str, tuple[Path, Path]]) -> None:
    for family in FAMILIES:
        with case(family):
            one, two = parts[family]
            detector, detoxifier = load_shared(one, two, max_new_tokens=8, device="cpu")
            scorer = load_detector(one, device="cpu")
            writer = load_detoxifier(two, max_new_tokens=8, device="cpu")
            expected, texts = logits(scorer), rewrites(writer)
            assert logits(detector) == pytest.approx(expected, abs=1e-5)
            assert rewrites(detoxifier) == texts
            assert logits(detector) == pytest.approx(expected, abs=1e-5)
            assert any(texts)
            assert len({round(logit, 3) for logit in expected}) > 3
            assert detector.card.identity == scorer.card.identity
            assert detoxifier.card.identity == writer.card.identity


def test_the_parts_may_be_used_from_threads(parts: dict[str, tuple[Path, Path]]) -> None:
    detector, detoxifier = load_shared(*parts["llama"], max_new_tokens=8, device="cpu")
    expected, texts = logits(detector), rewrites(detoxifier)
    scored: list[list[float]] = []
    written: list[list[str]] = []
    threads = [threading.Thread(target=lambda: scored.extend(logits(detector) for _ in range(6)))]
    threads += [threading.Thread(target=lambda: written.extend(rewrites(detoxifier) for _ in range(3)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == [texts] * 3
    assert len(scored) == 6
    for one in scored:
        assert one == pytest.approx(expected, abs=1e-5)


def test_the_base_is_in_memory_once(parts: dict[str, tuple[Path, Path]]) -> None:
    one, two = parts["llama"]
    detector, detoxifier = load_shared(one, two, device="cpu")
    together = count(detector.model, detoxifier.model)
    apart = count(load_detector(one, device="cpu").model, load_detoxifier(two, device="cpu").model)
    base = count(Backbone(name=guard_file(one)["base"]["name"]).load_causal_lm())
    adapters = sum(tensor.numel() for folder in (one, two) for tensor in adapter(folder).values())
    assert together == base + adapters
    # Adapters weigh much on a model so small; what they leave is the base, once instead of twice.
    head = detector.model.shared.model.lm_head.weight.numel()
    assert (together - adapters) / (apart - adapters + head) == pytest.approx(0.5, abs=0.02)


def count(*models: torch.nn.Module) -> int:
    unique = {id(weight): weight.numel() for model in models for weight in model.parameters()}
    return sum(unique.values())


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def guard_file(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "guard.json").read_text())


@pytest.fixture
def copies(parts: dict[str, tuple[Path, Path]], tmp_path: Path) -> tuple[Path, Path]:
    one, two = parts["llama"]
    return (
        Path(shutil.copytree(one, tmp_path / "detector")),
        Path(shutil.copytree(two, tmp_path / "detoxifier")),
    )


def rewrite(folder: Path, **changes: object) -> None:
    content = guard_file(folder) | changes | {"weights": weight_hashes(folder)}
    (folder / "guard.json").write_text(json.dumps(content))


def test_parts_on_different_bases_and_whole_models_are_refused(
    copies: tuple[Path, Path], make_detector: Callable[..., HarmDetector], tmp_path: Path
) -> None:
    one, two = copies
    base = guard_file(two)["base"]
    for field, value in (("name", "another/model"), ("revision", "abc"), ("dtype", "bfloat16")):
        rewrite(two, base=base | {field: value})
        assert not can_share(one, two)
        with pytest.raises(InputError, match=f"{field}={value}; load the parts apart"):
            load_shared(one, two)
    make_detector(tuning=FULL).save(tmp_path / "whole")
    assert not can_share(tmp_path / "whole", two)
    with pytest.raises(InputError, match="tuning=full; only adapters"):
        load_shared(tmp_path / "whole", two)


def drop_weight(folder: Path, word: str) -> None:
    weights = adapter(folder)
    del weights[next(name for name in sorted(weights) if word in name)]
    save_file(weights, folder / "adapter_model.safetensors")
    rewrite(folder)


def test_a_part_that_lacks_weights_is_refused(copies: tuple[Path, Path]) -> None:
    one, two = copies
    drop_weight(one, "score")
    with pytest.raises(InputError, match="head \\(score\\) is missing; scores would be random"):
        load_shared(one, two)
    drop_weight(one, "lora")
    with pytest.raises(InputError, match="does not fit its base model"):
        load_shared(one, two)
