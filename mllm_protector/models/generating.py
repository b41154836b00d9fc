"""What models that write texts share: batches that fit, control tokens made plain, texts out of tokens."""

import gc
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from mllm_protector.records import CutText

T = TypeVar("T")
R = TypeVar("R")

OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""In the messages of CUDA and of PyTorch's CPU allocators, which raise plain ``RuntimeError``."""


class Batches(Generic[T, R]):
    """Work on batches, which are halved when memory runs out and stay that small."""

    def __init__(self, work: Callable[[Sequence[T]], list[R]], size: int) -> None:
        """Bind the work, which gives one result per row, and the most rows of a batch."""
        self._work = work
        self.size = size

    def run(self, rows: Sequence[T]) -> list[R | Exception]:
        """The result of each row, in order; of a row that fails on its own, the exception.

        Raises:
            Exception: every one of several rows failed with it (memory apart), so no row is to blame.
        """
        results = self._in_batches(rows)
        first = results[0] if len(rows) > 1 else None
        alike = len({type(result) for result in results}) == 1
        if alike and isinstance(first, Exception) and not is_out_of_memory(first):
            raise first
        return results

    def _in_batches(self, rows: Sequence[T]) -> list[R | Exception]:
        results: list[R | Exception] = []
        while len(results) < len(rows):
            results += self._batch(rows[len(results) : len(results) + self.size])
        return results

    def _batch(self, rows: Sequence[T]) -> list[R | Exception]:
        try:
            return [*self._work(rows)]
        except Exception as error:
            problem = error
        lacking = is_out_of_memory(problem)
        if lacking:
            problem = problem.with_traceback(None)  # its frames would keep the failed tensors alive
            release_memory()
        if len(rows) == 1:
            return [problem]
        if not lacking:
            return [result for row in rows for result in self._batch([row])]
        before, self.size = self.size, -(-len(rows) // 2)
        results = self._in_batches(rows)
        if any(isinstance(result, Exception) and is_out_of_memory(result) for result in results):
            self.size = before  # a row that is too large on its own says nothing about the others
        return results


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def release_memory() -> None:
    """Free what failed work left behind, so that the next attempt has all the memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def control_tokens(tokenizer: PreTrainedTokenizerBase, others: Iterable[str] = ()) -> re.Pattern[str]:
    """Matches the first character of each control token in a text; see ``plain``.

    They are the special and added tokens of the tokenizer, and ``others``, such as a processor's. Added
    tokens that are mere words or white space are left alone: they mean the same as token and as text.
    """
    tokens = {*others, *tokenizer.all_special_tokens}
    for added in tokenizer.added_tokens_decoder.values():
        if added.special or not added.content[0].isalnum():
            tokens.add(added.content)
    control = sorted(token for token in tokens if len(token) > 1 and not token.isspace())
    return re.compile(f"(?=(?:{'|'.join(map(re.escape, control)) or '(?!)'})).", flags=re.DOTALL)


def plain(text: str, control: re.Pattern[str]) -> str:
    """The text with a space inside each control token, which makes it words again."""
    return control.sub(r"\g<0> ", text)


def decoded(
    tokenizer: PreTrainedTokenizerBase, new: torch.Tensor, ends: int | Sequence[int] | None
) -> list[str]:
    """The texts of generated tokens; ``CutText`` where generation ran out of room before an end.

    ``new`` is (B, T) int64, the new tokens only, padded on the right; ``ends`` are those that end a text.
    """
    end_ids = torch.tensor([ends] if isinstance(ends, int) else [*(ends or ())], dtype=new.dtype)
    ended = torch.isin(new, end_ids.to(new.device)).any(dim=1).tolist()
    texts = [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return [text if whole else CutText(text) for text, whole in zip(texts, ended, strict=True)]
