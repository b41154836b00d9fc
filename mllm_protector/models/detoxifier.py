"""The response detoxifier: a causal LM that rewrites a harmful answer into a harmless one.

Source: paper arXiv 2401.02906, section 3. It reads the query and the harmful answer (the official code
trains with the query and runs without it) and writes the corrected answer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from mllm_protector.data.batching import MicroBatchLimit, by_length
from mllm_protector.data.encoding import DetoxifierEncoder
from mllm_protector.models.backbone import Backbone, inference, pick_device, to_device
from mllm_protector.models.guard_file import (
    GuardFile,
    add_adapter,
    part_backbone,
    read_guard_file,
    save_part,
)


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
        """Bind weights, encoder and settings.

        Args:
            model: a causal LM, or one wrapped by PEFT.
            encoder: the renderer that it was trained with.
            guard: what the checkpoint says of itself.
            max_new_tokens: the longest rewrite; ``None`` for the longest that was learnt. It is room of its
                own, never shared with the prompt.
            batch_size: answers rewritten at once.

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

    def correct(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[str]:
        """A corrected answer for each flagged answer, greedily decoded; empty if the model wrote none."""
        prompts = self.encoder.encode(queries=queries, answers=answers, reserve=self.max_new_tokens)
        texts = [""] * len(prompts)
        with inference(self.model):
            for chosen in by_length([len(ids) for ids in prompts], MicroBatchLimit(examples=self.batch_size)):
                batch = to_device(self.encoder.pad_prompts([prompts[index] for index in chosen]), self.model)
                written = self.model.generate(  # type: ignore[operator]
                    **batch, generation_config=self._decoding
                )
                new = written[:, batch["input_ids"].shape[1] :]
                decoded = self.encoder.tokenizer.batch_decode(new, skip_special_tokens=True)
                for index, text in zip(chosen, decoded, strict=True):
                    texts[index] = text.strip()
        return texts

    def identity(self) -> dict[str, Any]:
        """What the rewrites depend on: weights, prompt, lengths."""
        return {
            "kind": "detoxifier",
            "base": self.guard.base["name"],
            "weights": self.guard.weights,
            "prompt_sha256": self.guard.prompt_sha256,
            "max_length": self.guard.max_length,
            "max_new_tokens": self.max_new_tokens,
        }

    def save(self, folder: Path) -> None:
        """Write weights, tokenizer and ``guard.json`` (last) to a folder."""
        save_part(self.model, self.encoder.tokenizer, self.guard, folder)


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
        base: where the backbone of an adapter is now, if not where it was at training.
        device: ``None`` takes the GPU if there is one.
        max_new_tokens: the longest rewrite; ``None`` for the longest that was learnt.
        batch_size: answers rewritten at once.
        trust_remote_code: run code that comes with the model. Leave it off unless you have read that code.

    Raises:
        InputError: not a detoxifier, another prompt or weights than it was saved with, or no room for
            ``max_new_tokens``.
    """
    folder = Path(folder)
    guard = read_guard_file(folder, "detoxifier")
    device_to_use = pick_device(device)
    tokenizer = Backbone(name=str(folder), trust_remote_code=trust_remote_code).load_tokenizer()
    backbone = part_backbone(guard, folder, base, trust_remote_code=trust_remote_code)
    base_model = backbone.load_causal_lm()
    model = add_adapter(base_model, folder) if guard.tuning == "lora" else base_model
    encoder = DetoxifierEncoder(
        tokenizer, pad_id=guard.pad_id, max_length=guard.max_length, prompt=guard.prompt, chat=guard.chat
    )
    model.to(device_to_use).eval()
    return Detoxifier(model, encoder, guard, max_new_tokens=max_new_tokens, batch_size=batch_size)
