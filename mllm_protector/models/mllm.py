"""Any open multimodal model that transformers can load, through its own chat template.

Pictures reach the model as pixels only: nothing here opens a URL or a path, whatever a question says. What
a user writes stays text: a literal ``<image>`` cannot take the place, or the picture, of another row.
"""

import contextlib
import hashlib
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from mllm_protector.arguments import Asked, as_questions
from mllm_protector.errors import InputError
from mllm_protector.files import file_digest
from mllm_protector.models.backbone import loading, pick_device
from mllm_protector.models.decoding import decoded
from mllm_protector.models.memory import Attempts, is_out_of_memory
from mllm_protector.prompts import require_fields
from mllm_protector.ranges import Count, Share
from mllm_protector.records import Failure, Question

log = logging.getLogger(__name__)

HASHED = (".json", ".jinja", ".model", ".py", ".safetensors", ".txt")
"""The files of a local model folder that its answers depend on."""

_Row = tuple[Question, list[Image.Image]]


class HuggingFaceMLLM:
    """A multimodal model and its processor; implements ``protocols.MLLM``."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        source: Mapping[str, Any],
        batch_size: int,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        prompt: str = "{question}",
        system_prompt: str | None = None,
    ) -> None:
        """Bind a model to its processor; the model is put into evaluation mode.

        Args:
            model: on its device and in its dtype.
            processor: of the same model, with a chat template.
            source: what names the weights (name, revision or hash), for ``identity``.
            batch_size: questions that are answered together, fewer where the memory is not enough.
            max_new_tokens: the longest answer in tokens.
            temperature: 0 decodes greedily; above it, answers are drawn one question at a time.
            top_p: drawn are the likeliest tokens that together have this probability.
            prompt: what goes around the question's words, with the field ``{question}``.
            system_prompt: a system turn in front of each question; not every chat template has one.

        Raises:
            InputError: no image processor, no chat template, a number out of its range, or a prompt without
                its field.
        """
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise InputError(f"{source['name']}: has no image processor, so it is not a multimodal model")
        if processor.chat_template is None:
            raise InputError(
                f"{source['name']}: its processor has no chat template; give a .jinja file as chat_template"
            )
        for key, number in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if number < 1:
                raise InputError(f"{key}={number}: must be at least 1")
        if not 0 <= temperature < math.inf:
            raise InputError(f"temperature={temperature}: must be 0 (greedy) or more")
        if not 0 < top_p <= 1:
            raise InputError(f"top_p={top_p}: must be above 0 and at most 1")
        try:
            self.prompt = require_fields(prompt, {"question"})
        except ValueError as error:
            raise InputError(f"prompt: {error}") from None
        self.model = model.eval()
        self.processor = processor
        self.source = dict(source)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.system_prompt = system_prompt
        # Padding on the right is silently wrong: the first new token would follow the padding.
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        self._control = _control_pattern(processor)
        self._attempts = Attempts(self._answer, batch_size if temperature == 0 else 1)

    def generate(self, questions: Sequence[Asked]) -> list[str | Failure]:
        """One answer for each question, or why there is none.

        A picture that cannot be read, a processor that chokes on a row, and a row that is too large for the
        memory by itself cost that row only. Where the memory is not enough for a batch, it is halved.

        Raises:
            InputError: not a list of questions (see ``arguments.as_questions``).
            Exception: what every row of a batch failed with, as that is no fault of a question.
        """
        asked = as_questions(questions)
        answers: dict[int, str | Failure] = {}
        # Alike rows together, so that little is padding; the largest first, so that sizes are found early.
        waiting = sorted(range(len(asked)), key=lambda index: _size(asked[index]), reverse=True)
        while waiting:
            before = self._attempts.size
            chosen, waiting = waiting[:before], waiting[before:]
            rows: dict[int, _Row] = {}
            for index in chosen:
                try:
                    rows[index] = asked[index], _pictures(asked[index])
                except InputError as error:
                    answers[index] = Failure(reason=" ".join(str(error).split()))
            outcomes = self._attempts.run(list(rows.values()))
            if self._attempts.size < before:
                log.warning("out of memory: answering %d questions at once from here on", self._attempts.size)
            answers |= zip(rows, map(_answer_or_failure, outcomes), strict=True)
        return [answers[index] for index in range(len(asked))]

    def identity(self) -> dict[str, Any]:
        """What the answers depend on. The batch size is no part of it."""
        return {
            **self.source,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "max_new_tokens": self.max_new_tokens,
            **self._decoding(),
            "prompt": self.prompt,
            "system_prompt": self.system_prompt,
            "chat_template": hashlib.sha256(str(self.processor.chat_template).encode()).hexdigest(),
            "transformers": transformers.__version__,
        }

    def encode(self, questions: Sequence[Question]) -> transformers.BatchFeature:
        """One batch for the model: ``input_ids`` and ``attention_mask`` (B, T) int64, padded on the left.

        What stands for the pictures beside them (``pixel_values``) depends on the model.

        Raises:
            InputError: a picture cannot be read.
        """
        return self._encode([(question, _pictures(question)) for question in questions])

    def _encode(self, rows: Sequence[_Row]) -> transformers.BatchFeature:
        pictures = [found for _, found in rows]
        prompts: list[str] = self.processor.apply_chat_template(
            [self._conversation(question) for question, _ in rows],
            tokenize=False,
            add_generation_prompt=True,
        )
        begin = self.processor.tokenizer.bos_token
        batch = self.processor(
            text=prompts,
            images=pictures if any(pictures) else None,
            padding=True,
            padding_side="left",
            add_special_tokens=not (begin and prompts[0].startswith(begin)),  # never two of them
            return_tensors="pt",
        )
        return batch.to(self.model.device, dtype=self.model.dtype)

    @torch.inference_mode()
    def _answer(self, rows: Sequence[_Row]) -> list[str]:
        """Answers of a batch; one row only where they are drawn."""
        batch = self._encode(rows)
        tokenizer = self.processor.tokenizer
        settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature > 0:
            # Left out, top_k would be 50 and the others what the checkpoint says.
            settings = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
            settings |= {"top_k": 0, "min_p": None, "typical_p": 1.0}
        with self._dice(rows[0][0]):
            generated = self.model.generate(
                **batch,
                **settings,
                max_new_tokens=self.max_new_tokens,
                num_beams=1,
                pad_token_id=tokenizer.pad_token_id,
            )
        written = generated[:, batch["input_ids"].shape[1] :]
        return decoded(tokenizer, written, self.model.generation_config.eos_token_id)

    @contextlib.contextmanager
    def _dice(self, question: Question) -> Iterator[None]:
        """Random numbers that depend on the question alone, not on batches, order or processes."""
        seed = hashlib.sha256(f"{question.repeat} {question.text}".encode(errors="surrogatepass")).digest()
        device = self.model.device
        cuda = device.type == "cuda"
        with torch.random.fork_rng(devices=[device] if cuda else []):
            generator = torch.cuda.default_generators[device.index] if cuda else torch.default_generator
            generator.manual_seed(int.from_bytes(seed[:8]))
            yield

    def _decoding(self) -> dict[str, Any]:
        if self.temperature == 0:
            return {"decoding": "greedy"}
        return {"decoding": "sampling", "temperature": self.temperature, "top_p": self.top_p}

    def _conversation(self, question: Question) -> list[dict[str, Any]]:
        # No picture, path or URL goes in here: transformers would fetch what such an item names.
        content = [{"type": "image"}] if question.image is not None else []
        words = self._control.sub(r"\g<0> ", question.text)
        content.append({"type": "text", "text": self.prompt.replace("{question}", words)})
        turns = [{"role": "user", "content": content}]
        if self.system_prompt is not None:
            turns.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        return turns


def load_mllm(
    *,
    name: str,
    batch_size: Count,
    max_new_tokens: Count,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    temperature: float = 0.0,
    top_p: Share = 1.0,
    prompt: str = "{question}",
    system_prompt: str | None = None,
    chat_template: str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> HuggingFaceMLLM:
    """Load a multimodal model from a folder or the hub. Pickled weights are refused.

    Args:
        name: a local folder, or else a name on the Hugging Face hub.
        batch_size: questions that are answered together.
        max_new_tokens: the longest answer in tokens.
        revision: the commit to take from the hub; pin it, hub contents change.
        dtype: of the weights (``float32``, ``bfloat16``); ``auto`` takes what the checkpoint says.
        device: ``None`` takes the GPU if there is one.
        temperature: 0 decodes greedily.
        top_p: only where the temperature is above 0.
        prompt: what goes around the question's words, with the field ``{question}``.
        system_prompt: a system turn in front of each question.
        chat_template: a ``.jinja`` file that replaces the processor's own template.
        attention: transformers' ``attn_implementation``; ``None`` lets transformers choose.
        trust_remote_code: run code that comes with the model. Leave it off unless you have read that code.

    Raises:
        InputError: the model cannot be loaded, or not whole, or lacks a chat template.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype={dtype}: use auto, float32, bfloat16 or float16")
    origin = {"revision": revision, "trust_remote_code": trust_remote_code}
    with loading(name):
        # The config comes first because a wrong name then costs one lookup on the hub, not one per file.
        config = AutoConfig.from_pretrained(name, **origin)
        processor = AutoProcessor.from_pretrained(name, **origin)
        model, report = AutoModelForImageTextToText.from_pretrained(
            name,
            **origin,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{name}: not a whole model, {missing[0]} is missing from its weights")
    if chat_template is not None:
        processor.chat_template = _read_template(Path(chat_template))
    return HuggingFaceMLLM(
        model.to(pick_device(device)),
        processor,
        source=_source(name, getattr(config, "_commit_hash", None) or revision),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        prompt=prompt,
        system_prompt=system_prompt,
    )


def _pictures(question: Question) -> list[Image.Image]:
    """The question's picture, if it has one."""
    return [] if question.image is None else [question.image.load()]


def _size(question: Question) -> tuple[bool, int]:
    """What makes a row large: a picture above all, then the words."""
    return question.image is not None, len(question.text)


def _answer_or_failure(outcome: str | Exception) -> str | Failure:
    if isinstance(outcome, str):
        return outcome
    if is_out_of_memory(outcome):
        return Failure(reason="out of memory, also when asked alone")
    return Failure(reason=f"{type(outcome).__name__} when asked alone")  # its words may quote the question


def _control_pattern(processor: Any) -> re.Pattern[str]:
    """Matches the first character of whatever the processor or its tokenizer reads as a control token.

    A space behind that character makes it plain text again. Added tokens that are mere words or white
    space are left alone: as a token they mean what they mean as text.
    """
    tokenizer = processor.tokenizer
    tokens = {value for name, value in vars(processor).items() if name.endswith("_token") and value}
    tokens.update(tokenizer.all_special_tokens)
    for added in tokenizer.added_tokens_decoder.values():
        if added.special or not added.content[0].isalnum():
            tokens.add(added.content)
    control = sorted(token for token in tokens if len(token) > 1 and not token.isspace())
    return re.compile(f"(?=(?:{'|'.join(map(re.escape, control)) or '(?!)'})).", flags=re.DOTALL)


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"chat_template={path}: not a readable text file ({error})") from error


def _source(name: str, revision: str | None) -> dict[str, Any]:
    """What names the weights: the commit on the hub, or a hash over a local folder's files."""
    folder = Path(name)
    if not folder.is_dir():
        return {"name": name, "revision": revision}
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in HASHED:
            digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return {"name": folder.resolve().name, "sha256": digest.hexdigest()}
