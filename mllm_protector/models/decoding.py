"""From generated tokens to texts."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from mllm_protector.records import CutText


def decoded(
    tokenizer: PreTrainedTokenizerBase, written: torch.Tensor, ends: int | Sequence[int] | None
) -> list[str]:
    """The texts of generated tokens; ``CutText`` where generation ran out of room before an end.

    Args:
        tokenizer: of the model.
        written: (B, T) int64, the new tokens only, padded on the right.
        ends: the token or tokens that end a text; ``None`` where a model has none.
    """
    end_ids = torch.tensor([ends] if isinstance(ends, int) else [*(ends or ())], dtype=written.dtype)
    ended = torch.isin(written, end_ids.to(written.device)).any(dim=1).tolist()
    texts = [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
    return [text if whole else CutText(text) for text, whole in zip(texts, ended, strict=True)]
