"""A causal language model from a folder or the hub that replies to conversations.

Nothing here knows what the conversations are about. What a user or a model has written stays text: control
tokens in it take no part in the chat template.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from jinja2 import TemplateError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mllm_protector.data.tokens import choose_pad_id
from mllm_protector.errors import InputError
from mllm_protector.models.backbone import inference, load_whole, loading, pick_device
from mllm_protector.models.generating import Batches, control_tokens, decoded, plain
from mllm_protector.models.guard_file import weight_hashes
from mllm_protector.protocols import Card
from mllm_protector.ranges import Count
from mllm_protector.records import Failure


class LocalChat:
    """A causal language model with its own chat template, decoded greedily; implements ``protocols.Chat``."""

    def __init__(
        self,
        *,
        name: str,
        batch_size: Count,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Load a model from a folder or the hub. Pickled weights are refused.

        Arguments as in ``HuggingFaceMLLM``; ``batch_size`` is of conversations.

        Raises:
            InputError: the model cannot be loaded, or not whole, or has no chat template.
        """
        origin = {"revision": revision, "trust_remote_code": trust_remote_code}
        with loading(name):
            # The config comes first because a wrong name then costs one lookup on the hub, not many.
            config = AutoConfig.from_pretrained(name, **origin)
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **origin)
        model = load_whole(AutoModelForCausalLM, name, "causal language model", **origin, dtype=dtype)
        if tokenizer.chat_template is None:
            raise InputError(f"{name}: its tokenizer has no chat template; use a model that was made to chat")
        tokenizer.padding_side = "left"  # on the right the first new token would follow the padding
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(choose_pad_id(tokenizer))
        # Only what ends a reply is taken over from the model's own settings, no penalty and no sampling.
        ends = model.generation_config.eos_token_id
        model.generation_config = GenerationConfig(
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        )
        self.name = name
        self.batch_size = batch_size
        self.tokenizer = tokenizer
        self.model: PreTrainedModel = model.to(pick_device(device)).eval()
        self._revision = getattr(config, "_commit_hash", None) or revision
        self._positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._control = control_tokens(tokenizer)

    def complete(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], *, max_tokens: int
    ) -> list[str | Failure]:
        """The likeliest reply to each conversation, or why there is none.

        The reply is the assistant's also where the last turn was, which is how models that judge a dialogue
        work. Where memory runs out, batches are halved, and stay that small.

        Raises:
            InputError: the chat template refuses a conversation, or it holds more than text.
        """
        prompts = [self._encode(conversation) for conversation in conversations]
        replies: list[str | Failure] = [
            Failure(reason=f"the prompt of {len(ids)} tokens leaves no room for a reply of {max_tokens}")
            for ids in prompts
        ]
        room = None if self._positions is None else self._positions - max_tokens
        fitting = [index for index, ids in enumerate(prompts) if room is None or len(ids) <= room]
        fitting.sort(key=lambda index: len(prompts[index]), reverse=True)  # similar lengths, little padding
        work = partial(self._generate, max_tokens=max_tokens)
        batches: Batches[list[int], str] = Batches(work, self.batch_size)
        texts = batches.run([prompts[index] for index in fitting])
        self.batch_size = batches.size
        for index, text in zip(fitting, texts, strict=True):
            if isinstance(text, Exception):
                replies[index] = Failure(reason=f"no reply ({type(text).__name__})")
            else:
                replies[index] = text
        return replies

    @property
    def card(self) -> Card:
        """What the replies depend on; not the batch size."""
        folder = Path(self.name)
        source: dict[str, Any] = {"model": self.name, "revision": self._revision}
        if folder.is_dir():
            source = {"model": folder.resolve().name, "weights": weight_hashes(folder)}
        template = json.dumps(self.tokenizer.chat_template, sort_keys=True)
        return Card(
            identity={
                **source,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "decoding": "greedy",
                "chat_template": hashlib.sha256(template.encode()).hexdigest(),
                "transformers": transformers.__version__,
            }
        )

    def _encode(self, conversation: Sequence[Mapping[str, Any]]) -> list[int]:
        turns = [
            {"role": turn["role"], "content": plain(_words(turn["content"]), self._control)}
            for turn in conversation
        ]
        try:
            prompt = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError:
            roles = ", ".join(str(turn["role"]) for turn in turns)
            raise InputError(f"{self.name}: its chat template takes no turns of {roles}") from None
        # The template has written what goes around a text.
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids

    def _generate(self, prompts: Sequence[list[int]], max_tokens: int) -> list[str]:
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(self.model.device)
        with inference(self.model):
            generated = self.model.generate(**batch, max_new_tokens=max_tokens)
        new = generated[:, batch["input_ids"].shape[1] :]
        return decoded(self.tokenizer, new, self.model.generation_config.eos_token_id)


def _words(content: Any) -> str:
    """The text of a turn."""
    if isinstance(content, str):
        return content
    if any(part.get("type") != "text" for part in content):
        raise InputError("chat: a language model reads text only; judge without images or use chat: served")
    return "\n".join(part["text"] for part in content)
