"""Several texts end to end in one row, so that no position is padding.

A packed batch says where its texts begin (``cu_seq_lens``) and counts positions anew in each; attention
must stay within them (``models.packing``).
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from mllm_protector.data.encoding import IGNORED, Batch, EncodedAnswer, EncodedCorrection

BORDERS = "cu_seq_lens"


def pack(texts: Sequence[list[int]]) -> Batch:
    """``input_ids`` and ``position_ids``, both (1, T) int64, and ``cu_seq_lens`` (S + 1,) int32: 0, then the
    end of each text.
    """
    return {
        "input_ids": torch.tensor([[token for ids in texts for token in ids]]),
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in texts])[None],
        BORDERS: torch.tensor([0, *accumulate(map(len, texts))], dtype=torch.int32),
    }


def pack_answers(rows: Sequence[EncodedAnswer]) -> Batch:
    """The detector's rows: ``pack`` plus ``labels`` (S,) float32, one for each text."""
    batch = pack([row.ids for row in rows])
    batch["labels"] = torch.tensor([row.label for row in rows], dtype=torch.float32)
    return batch


def pack_corrections(rows: Sequence[EncodedCorrection]) -> Batch:
    """The detoxifier's rows: ``pack`` plus ``labels`` (1, T) int64, the target's ids at the target's
    positions, ``IGNORED`` elsewhere (so also at the first position of each text).
    """
    batch = pack([row.prompt + row.target for row in rows])
    labels = [label for row in rows for label in [IGNORED] * len(row.prompt) + row.target]
    batch["labels"] = torch.tensor([labels])
    return batch


def is_packed(batch: Batch) -> bool:
    """Whether the texts stand end to end."""
    return BORDERS in batch


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; the borders stay on the CPU, where their values are looked at."""
    return {name: tensor if name == BORDERS else tensor.to(device) for name, tensor in batch.items()}


def count_tokens(batch: Batch) -> tuple[int, int]:
    """The real tokens of a batch, and all its positions."""
    positions = batch["input_ids"].numel()
    return (positions if is_packed(batch) else int(batch["attention_mask"].sum())), positions
