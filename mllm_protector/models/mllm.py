"""Any open multimodal model that transformers can load, through its own chat template.

Images reach the model as pixels only: nothing here opens a URL or a path, whatever a question says. What a
user writes stays text: a literal ``<image>`` takes neither the place nor the image of another row.
"""

import contextlib
import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mllm_protector.arguments import Asked, as_questions
from mllm_protector.errors import InputError
from mllm_protector.files import file_digest
from mllm_protector.models.backbone import load_whole, loading, pick_device
from mllm_protector.models.generating import Batches, control_tokens, decoded, is_out_of_memory, plain
from mllm_protector.prompts import require_fields
from mllm_protector.protocols import Card
from mllm_protector.ranges import Count, Share
from mllm_protector.records import Failure, Question

log = logging.getLogger(__name__)

HASHED = (".json", ".jinja", ".model", ".py", ".safetensors", ".txt")
"""The files of a local model folder that its answers depend on."""


class HuggingFaceMLLM:
    """A multimodal model and its processor; implements ``protocols.MLLM``."""

    def __init__(
        self,
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
    ) -> None:
        """Load a model from a folder or the hub. Pickled weights are refused.

        Args:
            name: a local folder, or else a name on the Hugging Face hub.
            batch_size: questions answered together, fewer where memory runs out.
            max_new_tokens: the longest answer in tokens.
            revision: the commit to take from the hub; pin it, hub contents change.
            dtype: of the weights (``float32``, ``bfloat16``); ``auto`` takes what the checkpoint says.
            device: ``None`` takes the GPU if there is one.
            temperature: 0 decodes greedily; above it, answers are sampled one question at a time.
            top_p: sampled are the likeliest tokens that together have this probability.
            prompt: what goes around the question's words, with the field ``{question}``.
            system_prompt: a system turn in front of each question; not every chat template has one.
            chat_template: a ``.jinja`` file that replaces the processor's own template.
            attention: transformers' ``attn_implementation``; ``None`` lets transformers choose.
            trust_remote_code: run code that comes with the model. Leave it off unless you have read it.

        Raises:
            InputError: a number out of its range, a prompt without its field, or a model that cannot be
                loaded, is not whole, is not multimodal or has no chat template.
        """
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
        origin = {"revision": revision, "trust_remote_code": trust_remote_code}
        with loading(name):
            # The config comes first because a wrong name then costs one lookup on the hub, not one per file.
            config = AutoConfig.from_pretrained(name, **origin)
            processor: Any = AutoProcessor.from_pretrained(name, **origin)
        settings = {**origin, "config": config, "attn_implementation": attention}
        model = load_whole(AutoModelForImageTextToText, name, "multimodal model", dtype=dtype, **settings)
        if chat_template is not None:
            processor.chat_template = _read_template(chat_template)
        _require_chat(name, processor)
        self.model = model.to(pick_device(device)).eval()
        self.processor = processor
        self.source = _source(name, getattr(config, "_commit_hash", None) or revision)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.system_prompt = system_prompt
        # Padding on the right is silently wrong: the first new token would follow the padding.
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        own = [token for field, token in vars(processor).items() if field.endswith("_token") and token]
        self._control = control_tokens(processor.tokenizer, own)
        self._batches = Batches(self._answers, batch_size if temperature == 0 else 1)

    def generate(self, questions: Sequence[Asked]) -> list[str | Failure]:
        """One answer for each question, or why there is none.

        An image that cannot be read, a processor that chokes on a row, and a row that is too large for the
        memory on its own cost that row only. Where memory runs out, batches are halved.

        Raises:
            InputError: not a list of questions (see ``arguments.as_questions``).
            Exception: what every row failed with, as no question is to blame for it.
        """
        asked = as_questions(questions)
        # Similar rows together, so that little is padding; the largest first, so that memory runs out early.
        order = sorted(range(len(asked)), key=lambda index: _size(asked[index]), reverse=True)
        before = self._batches.size
        answers = dict(zip(order, self._batches.run([asked[index] for index in order]), strict=True))
        if self._batches.size < before:
            log.warning("out of memory: answering %d questions at once from here on", self._batches.size)
        return [_or_failure(answers[index]) for index in range(len(asked))]

    @property
    def card(self) -> Card:
        """What the answers depend on; not the batch size."""
        sampling = {"decoding": "sampling", "temperature": self.temperature, "top_p": self.top_p}
        return Card(
            identity={
                **self.source,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "max_new_tokens": self.max_new_tokens,
                **({"decoding": "greedy"} if self.temperature == 0 else sampling),
                "prompt": self.prompt,
                "system_prompt": self.system_prompt,
                "chat_template": hashlib.sha256(str(self.processor.chat_template).encode()).hexdigest(),
                "transformers": transformers.__version__,
            }
        )

    def encode(
        self, questions: Sequence[Question], images: Sequence[list[Image.Image]] | None = None
    ) -> transformers.BatchFeature:
        """One batch for the model: ``input_ids`` and ``attention_mask`` (B, T) int64, padded on the left.

        The inputs for the images (``pixel_values``) depend on the model. ``images`` are those of each
        question, where they are loaded already.

        Raises:
            InputError: an image cannot be read.
        """
        images = [_images(question) for question in questions] if images is None else images
        prompts: list[str] = self.processor.apply_chat_template(
            [self._conversation(question) for question in questions],
            tokenize=False,
            add_generation_prompt=True,
        )
        begin = self.processor.tokenizer.bos_token
        batch = self.processor(
            text=prompts,
            images=images if any(images) else None,
            padding=True,
            padding_side="left",
            add_special_tokens=not (begin and prompts[0].startswith(begin)),  # never two of them
            return_tensors="pt",
        )
        return batch.to(self.model.device, dtype=self.model.dtype)

    def _answers(self, questions: Sequence[Question]) -> list[str | Failure]:
        """Answers of a batch; one question only where they are sampled."""
        answers: list[str | Failure] = []
        readable: list[tuple[Question, list[Image.Image]]] = []
        for question in questions:
            try:
                readable.append((question, _images(question)))
                answers.append("")
            except InputError as error:
                answers.append(Failure(reason=" ".join(str(error).split())))
        texts = iter(self._texts(*zip(*readable, strict=True)) if readable else ())
        return [next(texts) if answer == "" else answer for answer in answers]

    @torch.inference_mode()
    def _texts(self, questions: Sequence[Question], images: Sequence[list[Image.Image]]) -> list[str]:
        batch = self.encode(questions, images)
        tokenizer = self.processor.tokenizer
        settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature > 0:
            # Left out, top_k would be 50 and the others what the checkpoint says.
            settings = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
            settings |= {"top_k": 0, "min_p": None, "typical_p": 1.0}
        with self._rng(questions[0]):
            generated = self.model.generate(
                **batch,
                **settings,
                max_new_tokens=self.max_new_tokens,
                num_beams=1,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = generated[:, batch["input_ids"].shape[1] :]
        return decoded(tokenizer, new, self.model.generation_config.eos_token_id)

    @contextlib.contextmanager
    def _rng(self, question: Question) -> Iterator[None]:
        """Random numbers that depend on the question alone, not on batches, order or processes."""
        seed = hashlib.sha256(f"{question.repeat} {question.text}".encode(errors="surrogatepass")).digest()
        device = self.model.device
        cuda = device.type == "cuda"
        with torch.random.fork_rng(devices=[device] if cuda else []):
            generator = torch.cuda.default_generators[device.index] if cuda else torch.default_generator
            generator.manual_seed(int.from_bytes(seed[:8]))
            yield

    def _conversation(self, question: Question) -> list[dict[str, Any]]:
        # No image, path or URL goes in here: transformers would fetch what such an item names.
        content = [{"type": "image"}] if question.image is not None else []
        words = self.prompt.replace("{question}", plain(question.text, self._control))
        content.append({"type": "text", "text": words})
        turns = [{"role": "user", "content": content}]
        if self.system_prompt is not None:
            turns.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        return turns


load_mllm = HuggingFaceMLLM
"""The name under which the package offers it."""


def _require_chat(name: str, processor: Any) -> None:
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise InputError(f"{name}: has no image processor, so it is not a multimodal model")
    if processor.chat_template is None:
        raise InputError(f"{name}: its processor has no chat template; give a .jinja file as chat_template")


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"chat_template={path}: not a readable text file ({error})") from error


def _images(question: Question) -> list[Image.Image]:
    return [] if question.image is None else [question.image.load()]


def _size(question: Question) -> tuple[bool, int]:
    """What makes a row large: an image above all, then the words."""
    return question.image is not None, len(question.text)


def _or_failure(answer: str | Failure | Exception) -> str | Failure:
    if not isinstance(answer, Exception):
        return answer
    if is_out_of_memory(answer):
        return Failure(reason="out of memory, also when asked alone")
    return Failure(reason=f"{type(answer).__name__} when asked alone")  # its words may quote the question


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
