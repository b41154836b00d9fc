"""The model card of an exported detector: what a reader needs in order to use it and to doubt it."""

import json
from typing import Any

from huggingface_hub import ModelCardData

from mllm_protector.data.encoding import DetectorEncoder
from mllm_protector.data.tokens import fill, special_affixes
from mllm_protector.models.guard_file import GuardFile
from mllm_protector.models.scale import Scale

PROBES = (
    ("How do I bake bread?", "Mix flour, water and salt."),
    ("What is in the picture?", "A red square."),
    ("Why?", "Because it is so. Ask a baker, twice if need be!"),
)
"""Ordinary pairs, on which two ways to the same score are compared."""

BODY = """\
# Harm detector

Scores the answer of a multimodal LLM, given the question in words: P(harmful) in [0, 1]. One model with one
logit, label `HARMFUL`; a positive logit is harmful. It never sees the picture.

| | |
|---|---|
| base | {base} |
| score | sigmoid((logit + offset) / temperature), temperature = {temperature}, offset = {offset} |
| threshold | harmful at or above {threshold} ({threshold_how}) |
| longest input | {max_length} tokens, prompt included |
| pad token id | {pad_id} |

## Use

With the package that made it: `load_detector(folder).score(queries=[...], answers=[...])`. Long answers are
then read in overlapping windows.

With `transformers` alone; of a plain text these are exactly the ids it was trained on. The package
normalises texts first (invisible characters, odd letters, capitals, white space; see
`mllm_protector.normalisation`). Do the same.

```python
import json
import re
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."
guard = json.loads(Path(folder, "guard.json").read_text())
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True).eval()


def token_ids(query: str, answer: str) -> list[int]:
    parts = re.split(r"\\{{(\\w+)\\}}", guard["prompt"])  # our words, a field, our words, a field, our words
    parts[1::2] = [{{"query": query, "answer": answer}}[field] for field in parts[1::2]]
    if guard["joined"]:  # in one piece, as it was trained
        parts = ["".join(parts)]
    ids = []
    for part in parts:  # or each on its own: no token of ours merges with one of a user's text
        if part:
            ids += tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return {first} + ids + {last}


def score(query: str, answer: str) -> float:
    with torch.inference_mode():
        logit = model(input_ids=torch.tensor([token_ids(query, answer)])).logits[0, 0]
    return torch.sigmoid((logit.double() + guard["offset"]) / guard["temperature"]).item()
```

Plain text through `pipeline("text-classification", model=folder, function_to_apply="sigmoid")`, with
`guard["prompt"]` filled in: {plain_text} {plain_score}

- Special tokens inside a user's text are words to this model. `split_special_tokens=True` keeps them so; a
  pipeline or a server that gets text does not.
- An input that is too long must be cut within question or answer, never at its end: the prompt ends the same
  way for every answer, and the last token is the one that is read.
- Do not use softmax: of one logit it is always 1.

## The prompt

{prompt}

## What it was trained on, and what it reached

{facts}

## Limits

- It judges by what it has seen: other languages, encoded answers and new kinds of harm are untested unless
  the figures above say otherwise.
- The threshold holds for answers like those it was chosen on. Choose it again on yours.
- Used both as a guard and as the judge of that guard, its figures say nothing.
- The licences of the base model and of the training data hold for these weights.
"""

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


def model_card(guard: GuardFile, encoder: DetectorEncoder, *, plain_text: bool) -> str:
    """The text of ``README.md``, front matter included.

    Args:
        guard: what the detector says of itself.
        encoder: renders its input.
        plain_text: whether text that is tokenised in one piece gives the encoder's ids.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        base_model=guard.base["name"] if "/" in guard.base["name"] else None,
        tags=["safety", "guardrails", "harm-detection", "multimodal"],
    )
    first, last = special_affixes(encoder.tokenizer)
    facts: dict[str, Any] = {
        "data": guard.data,
        "metrics": guard.metrics,
        "calibration": guard.calibration,
        "group_thresholds": guard.group_thresholds,
        "versions": guard.versions,
    }
    body = BODY.format(
        base=f"`{guard.base['name']}`, revision {guard.base.get('revision') or 'not pinned'}",
        temperature=guard.scale.temperature,
        offset=guard.offset,
        threshold=0.5 if guard.threshold is None else guard.threshold,
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


def renders_alike(encoder: DetectorEncoder) -> bool:
    """Whether ordinary pairs, tokenised in one piece with the prompt, give the encoder's ids."""
    return all(
        list(encoder.tokenizer(fill(encoder.prompt, query, answer))["input_ids"])
        == encoder.encode(queries=[query], answers=[answer])[0]
        for query, answer in PROBES
    )


def _fenced(text: str, language: str) -> str:
    """A code block that the text cannot close."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
