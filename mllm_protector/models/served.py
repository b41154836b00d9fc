"""A multimodal model behind an OpenAI-compatible address.

Images travel as pixels inside the request: no URL or path of a question is ever sent to be opened, and what a
question says is sent as it stands.
"""

import base64
import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from PIL import Image

from mllm_protector.arguments import Asked, as_questions
from mllm_protector.errors import InputError
from mllm_protector.models.chat import ServedChat
from mllm_protector.protocols import Card
from mllm_protector.ranges import Amount, Count, Positive, Temperature
from mllm_protector.records import Failure, Question


class ServedMLLM:
    """A served model as an MLLM; implements ``protocols.MLLM``."""

    def __init__(
        self,
        *,
        model: str,
        max_new_tokens: Count,
        concurrency: Count,
        timeout: Positive,
        max_retries: Amount,
        temperature: Temperature | None,
        base_url: str | None = None,
        api_key_env: str | None = "OPENAI_API_KEY",
        seed: int | None = None,
        length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        identity: str | None = None,
        system_prompt: str | None = None,
        image_format: Literal["png", "jpeg"] = "png",
        max_image_side: Count | None = None,
    ) -> None:
        """Bind a model to how it is asked; nothing is sent.

        What is not explained here is as in ``ServedChat``. Unless the temperature is 0, each question has its
        own seed, made of ``seed``, its text and which repeat it is. ``system_prompt`` is a turn in front of
        each question. Images larger than ``max_image_side`` pixels are scaled down to that.

        Raises:
            InputError: as ``ServedChat``.
        """
        self.chat = ServedChat(
            model=model,
            base_url=base_url,
            api_key_env=api_key_env,
            concurrency=concurrency,
            timeout=timeout,
            max_retries=max_retries,
            temperature=temperature,
            seed=seed,
            length_field=length_field,
            identity=identity,
        )
        self.max_new_tokens = max_new_tokens
        self.system_prompt = system_prompt
        self.image_format = image_format
        self.max_image_side = max_image_side

    def generate(self, questions: Sequence[Asked]) -> list[str | Failure]:
        """One answer for each question, or why there is none.

        All images of one call are in memory, encoded, until it returns.

        Raises:
            InputError: as ``ServedChat.complete``, or not a list of questions.
            RunError: as ``ServedChat.complete``.
        """
        asked = as_questions(questions)
        with ThreadPoolExecutor(self.chat.concurrency) as pool:
            turns = list(pool.map(self._turns, asked))
        pairs = zip(asked, turns, strict=True)
        sent = [(turn, self._seed(question)) for question, turn in pairs if isinstance(turn, list)]
        greedy = self.chat.temperature == 0
        replies = iter(
            self.chat.complete(
                [turn for turn, _ in sent],
                max_tokens=self.max_new_tokens,
                seeds=None if greedy else [seed for _, seed in sent],
            )
        )
        return [next(replies) if isinstance(turn, list) else turn for turn in turns]

    @property
    def card(self) -> Card:
        """What the answers depend on: not how many are asked for at once, or how patiently."""
        return Card(
            identity={
                **self.chat.card.identity,
                "max_new_tokens": self.max_new_tokens,
                "system_prompt": self.system_prompt,
                "image_format": self.image_format,
                "max_image_side": self.max_image_side,
            }
        )

    def _turns(self, question: Question) -> list[dict[str, Any]] | Failure:
        content: str | list[dict[str, Any]] = question.text
        if question.image is not None:
            try:
                address = {"url": self._data_uri(question.image.load())}
            except InputError as error:
                return Failure(reason=str(error))
            content = [{"type": "image_url", "image_url": address}, {"type": "text", "text": question.text}]
        turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system_prompt is not None:
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        return turns

    def _data_uri(self, image: Image.Image) -> str:
        if self.max_image_side is not None:
            image = image.copy()
            image.thumbnail((self.max_image_side, self.max_image_side), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, self.image_format)
        return f"data:image/{self.image_format};base64,{base64.b64encode(file.getvalue()).decode()}"

    def _seed(self, question: Question) -> int:
        """31 bits, which every server takes."""
        origin = f"{self.chat.seed}\0{question.repeat}\0{question.text}".encode(errors="surrogatepass")
        return int.from_bytes(hashlib.sha256(origin).digest()[:4]) >> 1
