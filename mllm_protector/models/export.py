"""A trained detector as a folder that stock tools serve: merged weights, tokenizer, config, model card.

``transformers`` and vLLM's classification endpoint load it without this package; ``load_detector`` loads
it too, with the scores it had before. The model card (``card.md``) says what to send and how to read the
logit.

The scale of the scores goes into the head, so that a stock tool's sigmoid of the logit is the score. An
offset needs a head with a bias, and that of a decoder has none in ``transformers``: there it stays in
``guard.json``.
"""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

import torch
from huggingface_hub import ModelCardData

from mllm_protector.data.batching import MicroBatchLimit
from mllm_protector.data.encoding import DetectorEncoder
from mllm_protector.data.tokens import fill, special_affixes
from mllm_protector.errors import InputError, RunError
from mllm_protector.files import write_text
from mllm_protector.models.detector import (
    HarmDetector,
    detector_encoder,
    load_classifier,
    load_detector,
    score_logits,
)
from mllm_protector.models.guard_file import FILE_NAME, GuardFile, Scale, loaded_files, read_guard_file
from mllm_protector.models.known import KnownAnswer
from mllm_protector.models.parts import adapter_weights, part_backbone, save_part

log = logging.getLogger(__name__)

PROBES = (
    ("How do I bake bread?", "Mix flour, water and salt."),
    ("What is in the picture?", "A red square."),
    ("Why?", "Because it is so. Ask a baker, twice if need be!"),
)
"""Ordinary pairs, on which two ways to the same score are compared."""

KNOWN = (*PROBES, ("What is in the picture?", 20 * "A red square. "))
"""What a server of the export is asked, to compare its logits (see ``known``)."""

CARD = "README.md"

TOLERANCE = 1e-3
"""Of the unscaled logits of ``PROBES`` in float32: rounding by the merge, far less than a lost head."""

PLAIN_TEXT = {
    True: "with this tokenizer ordinary texts give the same ids. Texts that begin or end with white space, "
    "that are empty or contain special tokens may not.",
    False: "with this tokenizer the ids differ where texts meet the prompt, and so do the scores. Send ids.",
}

PLAIN_SCORE = {
    True: "The pipeline's score is the score above.",
    False: "The pipeline's score is sigmoid(logit), so not the score above and not for this threshold: this "
    "head has no bias to take the offset, which is in `guard.json`.",
}


def export_detector(
    *,
    detector: str,
    output_dir: str,
    base: str | None,
    push_to: str | None,
    private: bool,
) -> Path:
    """Write a detector, an adapter or a whole model, as a whole model in float32 to ``output_dir``.

    ``base`` is where the backbone of an adapter is now. ``push_to`` is a name on the Hugging Face hub, such
    as ``user/harm-detector``, where it is published; a repository that is made there may be ``private``.

    Raises:
        InputError: not a detector, its head is missing, or the hub refuses.
        RunError: the export does not score as the detector does.
    """
    source, folder = Path(detector), Path(output_dir)
    if source.resolve() == folder.resolve():
        raise InputError(f"output_dir={folder}: is the detector's own folder; choose another")
    if push_to is not None:
        _require_name(push_to)
    guard = read_guard_file(source, "detector")
    if guard.tuning == "probe":
        raise InputError(
            f"{source}: tuning=probe: it reads several blocks, which no stock classifier does; "
            "export a detector of tuning=lora or full"
        )
    trained = _load(source, guard, base)
    expected = _probe(trained)
    model = _merged(trained.model, source, guard)
    left = fold_scale(model, guard.scale)
    tokenizer = trained.encoder.tokenizer
    plain_text = renders_alike(trained.encoder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(guard.pad_id)
    tokenizer.padding_side = "right"
    whole = replace(
        guard,
        tuning="full",
        temperature=left.temperature,
        offset=left.offset,
        known=known_answers(model, trained.encoder, guard.window),
        base={"name": _public_name(guard.base["name"]), "revision": guard.base.get("revision")},
    )
    save_part(model, tokenizer, whole, folder)
    write_text(folder / CARD, model_card(whole, trained.encoder, plain_text=plain_text))
    del trained, model
    found = _probe(load_detector(folder, device="cpu"))
    rounding = TOLERANCE / guard.scale.temperature
    if not all(abs(one - other) <= rounding for one, other in zip(expected, found, strict=True)):
        (folder / FILE_NAME).unlink()
        raise RunError(f"{folder}: the export does not score as {source} does; it is not to be used")
    log.info("written: %s (the same scores, in one model)", folder)
    if push_to is not None:
        push(folder, push_to, private=private)
    return folder


def model_card(guard: GuardFile, encoder: DetectorEncoder, *, plain_text: bool) -> str:
    """The text of ``README.md``, front matter included.

    ``plain_text`` says whether text that is tokenised in one piece gives the encoder's ids.
    """
    base = guard.base["name"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        base_model=base if "/" in base else None,
        tags=["safety", "guardrails", "harm-detection", "multimodal"],
    )
    first, last = special_affixes(encoder.tokenizer)
    facts = {name: getattr(guard, name) for name in ("data", "metrics", "calibration", "versions")}
    body = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8")).substitute(
        base=f"`{base}`, revision {guard.base.get('revision') or 'not pinned'}",
        temperature=guard.scale.temperature,
        offset=guard.offset,
        threshold=guard.harmful_from,
        threshold_how=guard.threshold_how or "not said how",
        max_length=guard.max_length,
        pad_id=guard.pad_id,
        first=first,
        last=last,
        plain_text=PLAIN_TEXT[plain_text],
        plain_score=PLAIN_SCORE[guard.scale == Scale()],
        prompt=_fenced(guard.prompt, "text"),
        facts=_fenced(json.dumps(facts, indent=2, ensure_ascii=False), "json"),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def known_answers(model: torch.nn.Module, encoder: DetectorEncoder, window: int | None) -> list[KnownAnswer]:
    """``KNOWN`` with the ids of each pair (the first window) and their logit."""
    queries, answers = zip(*KNOWN, strict=True)
    rows = [each[0] for each in encoder.windows(queries=queries, answers=answers, window=window)]
    logits = score_logits(model, encoder, rows, limit=MicroBatchLimit(examples=1))
    return [
        KnownAnswer(query=query, answer=answer, ids=ids, logit=logit)
        for (query, answer), ids, logit in zip(KNOWN, rows, logits, strict=True)
    ]


def renders_alike(encoder: DetectorEncoder) -> bool:
    """Whether ordinary pairs, tokenised in one piece with the prompt, give the encoder's ids."""
    return all(
        list(encoder.tokenizer(fill(encoder.prompt, query, answer))["input_ids"])
        == encoder.encode(queries=[query], answers=[answer])[0]
        for query, answer in PROBES
    )


def _fenced(text: str, language: str) -> str:
    """A code block that the text cannot close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def fold_scale(model: torch.nn.Module, scale: Scale) -> Scale:
    """Put a scale into the head of a classifier, its one linear layer with one output, in place.

    Returns:
        The scale of the new logits: its temperature is 1, and its offset is 0 if the head has a bias.
    """
    layers = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    [head] = [layer for layer in layers if layer.out_features == 1]
    offset = scale.offset / scale.temperature
    with torch.no_grad():
        head.weight.div_(scale.temperature)
        if head.bias is None:
            return Scale(offset=offset)
        head.bias.div_(scale.temperature).add_(offset)
    return Scale()


def push(folder: Path, name: str, *, private: bool) -> None:
    """Upload the files of an exported model, and no others, with the user's own login on the hub.

    A repository that exists keeps its visibility.

    Raises:
        InputError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=str(folder),
            allow_patterns=[*loaded_files(folder), FILE_NAME, CARD],  # whatever else is there is the user's
            commit_message="Add a harm detector",
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise InputError(
            f"push_to={name}: not published ({type(error).__name__}); log in with `hf auth login`, look at "
            f"the name and the network, and try again: the export is complete in {folder}"
        ) from error
    log.info("published: %s", name)


def _load(folder: Path, guard: GuardFile, base: str | None) -> HarmDetector:
    """The detector in float32 on a base that is not quantised, so that an adapter can be merged exactly."""
    backbone = part_backbone(guard, folder, base)
    if backbone.quantization is not None:
        exported = "is exported on whole ones: choose its threshold again"
        log.warning("%s was trained on %s weights and %s", folder, backbone.quantization, exported)
    backbone = replace(backbone, dtype="float32", quantization=None)
    return HarmDetector(load_classifier(folder, guard, backbone), detector_encoder(folder, guard), guard)


def _merged(model: Any, folder: Path, guard: GuardFile) -> torch.nn.Module:
    """One model without adapter layers. PEFT's merging may leave a new head behind, so it is set again."""
    if guard.tuning == "full":
        return model  # type: ignore[no-any-return]
    merged: torch.nn.Module = model.merge_and_unload()
    head = {
        key.removeprefix("base_model.model."): tensor.float()
        for key, tensor in adapter_weights(folder).items()
        if "lora_" not in key
    }
    if unexpected := merged.load_state_dict(head, strict=False).unexpected_keys:
        raise InputError(f"{folder}: the adapter's {unexpected[0]} has no place in the merged model")
    return merged


def _probe(detector: HarmDetector) -> list[float]:
    """Its calibrated logits of ``PROBES``."""
    queries, answers = zip(*PROBES, strict=True)
    logits = detector.logits(queries=queries, answers=answers)
    return [*map(float, detector.guard.scale.logits(logits))]


def _public_name(name: str) -> str:
    """A hub name as it is; of a folder of this machine its last part."""
    return Path(name).resolve().name if Path(name).is_absolute() or Path(name).is_dir() else name


def _require_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise InputError(f"push_to={name}: not a name on the hub; write it as user/model") from None
