"""The response detoxifier: a causal LM that rewrites a harmful answer into a harmless one.

Source: paper arXiv 2401.02906, section 3. It reads the query and the harmful answer (the official code
trains with the query and runs without it) and writes the corrected answer.
"""

import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mllm_protector.arguments import require_texts
from mllm_protector.data.batching import MicroBatchLimit, by_length
from mllm_protector.data.detoxifier_encoding import DetoxifierEncoder
from mllm_protector.models.backbone import Backbone, inference, pick_device, to_device
from mllm_protector.models.generating import decoded
from mllm_protector.models.guard_file import GuardFile, read_guard_file
from mllm_protector.models.parts import add_adapter, find_base, part_backbone, save_part
from mllm_protector.protocols import Card

log = logging.getLogger(__name__)

TEMPERATURE = 0.7
TOP_P = 0.95
"""Of attempts after the first: away from a greedy loop or copy, but not far from what was learnt."""


class Detoxifier:
    """A trained detoxifier, ready to write."""

    def __init__(
        self,
        model: torch.nn.Module,
        encoder: DetoxifierEncoder,
        guard: GuardFile,
        *,
        max_new_tokens: int | None = None,
        batch_size: int = 32,
    ) -> None:
        """Bind a causal LM, perhaps wrapped by PEFT, to how it is used.

        ``max_new_tokens`` is the longest rewrite, ``None`` for the longest that was learnt. The prompt never
        takes this room; a shorter rewrite leaves the prompt no more room than it had in training.

        Raises:
            InputError: ``max_new_tokens`` leaves no room for a prompt.
        """
        self.model = model
        self.encoder = encoder
        self.guard = guard
        self.max_new_tokens = encoder.longest_target if max_new_tokens is None else max_new_tokens
        self.batch_size = batch_size
        encoder.room(reserve=self.max_new_tokens)
        self._decoding = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=encoder.pad_id,
            eos_token_id=encoder.end_id,
        )
        # What the base's own settings ask for (a repetition penalty, say) is merged in at generation.
        model.generation_config = self._decoding

    def correct(self, *, queries: Sequence[str], answers: Sequence[str], attempt: int = 0) -> list[str]:
        """A corrected answer for each flagged answer; empty if the model wrote none.

        Attempt 0 decodes greedily. Later ones are sampled (``TEMPERATURE``, ``TOP_P``) from a seed of the
        row's texts and the attempt, whatever it is batched with.

        Raises:
            InputError: not two lists of texts of the same length.
        """
        require_texts(queries=queries, answers=answers)
        before = self.encoder.truncated
        prompts = self.encoder.encode(queries=queries, answers=answers, reserve=self.max_new_tokens)
        if cut := self.encoder.truncated - before:
            log.warning("%d of %d answers were too long: their head and tail were read", cut, len(prompts))
        seeds = [seed_of(*row, attempt) for row in zip(queries, answers, strict=True)]
        texts = [""] * len(prompts)
        with inference(self.model):
            for chosen in by_length([len(ids) for ids in prompts], MicroBatchLimit(examples=self.batch_size)):
                batch = to_device(self.encoder.pad_prompts([prompts[index] for index in chosen]), self.model)
                sampling = [NucleusSampling([seeds[index] for index in chosen])] if attempt else []
                written = self.model.generate(  # type: ignore[operator]
                    **batch,
                    generation_config=self._decoding,
                    logits_processor=LogitsProcessorList(sampling),
                )
                new = written[:, batch["input_ids"].shape[1] :]
                ended = decoded(self.encoder.tokenizer, new, self.encoder.end_id)
                for index, text in zip(chosen, ended, strict=True):
                    texts[index] = text
        return texts

    @property
    def card(self) -> Card:
        """What the rewrites depend on: weights, prompt, lengths, sampling."""
        return Card(
            identity={
                **self.guard.identity,
                "max_new_tokens": self.max_new_tokens,
                "room": self.encoder.room(reserve=self.max_new_tokens),
                "sampling": {"temperature": TEMPERATURE, "top_p": TOP_P},
            }
        )

    def save(self, folder: Path) -> None:
        """Write weights, tokenizer and ``guard.json`` (last) to a folder."""
        save_part(self.model, self.encoder.tokenizer, self.guard, folder)


class NucleusSampling(LogitsProcessor):  # type: ignore[misc]
    """Leaves each row's sampled token as the only choice, so that greedy decoding takes it.

    Each row draws from its own random numbers, once per token: the result does not depend on the rows beside
    it, on the device, or on the global random state. Source: Holtzman et al., "The Curious Case of Neural
    Text Degeneration" (arXiv 1904.09751).
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        """Take one seed for each row of the batch."""
        self._rngs = [random.Random(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Map logits (B, V) to 0 for the sampled token and -inf for all others."""
        chances, order = (scores.float() / TEMPERATURE).softmax(-1).sort(descending=True, stable=True)
        sums = chances.cumsum(-1)
        kept = (sums - chances < TOP_P).sum(-1, keepdim=True)  # the fewest tokens that hold TOP_P together
        drawn = torch.tensor([[rng.random()] for rng in self._rngs], device=scores.device)
        place = (sums <= drawn * sums.gather(-1, kept - 1)).sum(-1, keepdim=True).minimum(kept - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, order.gather(-1, place), 0.0)


def seed_of(query: str, answer: str, attempt: int) -> int:
    """The seed of a row's sampled attempt: 256 bits."""
    content = json.dumps([query, answer, attempt])  # escapes what is not Unicode, such as half surrogates
    return int.from_bytes(hashlib.sha256(content.encode()).digest())


def load_detoxifier(
    folder: str | Path,
    *,
    base: str | None = None,
    device: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    trust_remote_code: bool = False,
) -> Detoxifier:
    """Load a trained detoxifier.

    Args:
        folder: what ``train_detoxifier`` wrote.
        base: where the backbone of an adapter is now; ``None`` to look where it was, and near the folder.
        device: ``None`` takes the GPU if there is one.
        max_new_tokens: as in ``Detoxifier``.
        batch_size: answers rewritten at once.
        trust_remote_code: run code that comes with the model. Leave it off unless you have read that code.

    Raises:
        InputError: not a detoxifier, another prompt or other files than it was saved with, another base than
            it was trained on, or no room for ``max_new_tokens``.
    """
    folder = Path(folder)
    guard = read_guard_file(folder, "detoxifier")
    where = pick_device(device)
    backbone = part_backbone(guard, folder, base, trust_remote_code=trust_remote_code)
    base_model = backbone.load_causal_lm()
    model = add_adapter(base_model, folder) if guard.tuning == "lora" else base_model
    encoder = detoxifier_encoder(folder, guard, trust_remote_code=trust_remote_code)
    return Detoxifier(
        model.to(where).eval(), encoder, guard, max_new_tokens=max_new_tokens, batch_size=batch_size
    )


def load_untrained(
    folder: str | Path,
    *,
    base: str | None = None,
    device: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
) -> Detoxifier:
    """The backbone of a trained detoxifier as it was before its training: the baseline, asked the same way.

    Arguments and errors are those of ``load_detoxifier``.
    """
    folder = Path(folder)
    guard = read_guard_file(folder, "detoxifier")
    model = find_base(guard, folder, base).load_causal_lm().to(pick_device(device)).eval()
    untrained = replace(guard, weights={}, metrics={})
    encoder = detoxifier_encoder(folder, guard)
    return Detoxifier(model, encoder, untrained, max_new_tokens=max_new_tokens, batch_size=batch_size)


def detoxifier_encoder(
    folder: Path, guard: GuardFile, *, trust_remote_code: bool = False
) -> DetoxifierEncoder:
    """The renderer that a detoxifier was trained with."""
    return DetoxifierEncoder(
        Backbone(name=str(folder), trust_remote_code=trust_remote_code).load_tokenizer(),
        pad_id=guard.pad_id,
        max_length=guard.max_length,
        prompt=guard.prompt,
        chat=guard.chat,
    )
