"""The same texts for every arm, in the same order."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from mllm_protector.data.detoxifier_encoding import DetoxifierEncoder
from mllm_protector.data.encoding import DetectorEncoder, EncodedAnswer, EncodedCorrection
from mllm_protector.data.sources import Source
from mllm_protector.data.tokens import choose_pad_id
from mllm_protector.errors import InputError
from mllm_protector.models.tiny import tiny_tokenizer
from mllm_protector.records import AnswerPair, corrections, labelled_answers
from speed.shape import Shape

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Workload(Generic[R]):
    """Rows, one round after the other."""

    rows: Sequence[R]
    per_round: int

    def rounds(self, count: int) -> Iterator[Sequence[R]]:
        """The rows of each round; the rows repeat where there are not enough."""
        available = len(self.rows) // self.per_round
        for number in range(count):
            start = number % available * self.per_round
            yield self.rows[start : start + self.per_round]


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Everything that goes through the models.

    Attributes:
        tokenizer: trained on the texts themselves.
        pad_id: an id that no text contains.
        detector_encoder: renders questions with answers.
        detoxifier_encoder: renders questions with harmful answers.
        detector: both answers of each pair, the harmless one first.
        detoxifier: one row for each pair.
        pairs: the same as texts.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    detector_encoder: DetectorEncoder
    detoxifier_encoder: DetoxifierEncoder
    detector: Workload[EncodedAnswer]
    detoxifier: Workload[EncodedCorrection]
    pairs: Workload[AnswerPair]


def read_texts(data: Source, shape: Shape, *, pairs: int, rewrites: int, max_length: int, seed: int) -> Texts:
    """Shuffle the pairs of the training split and encode them.

    Args:
        data: pairs.
        shape: its vocabulary limits the tokenizer's.
        pairs: in one round of training or scoring.
        rewrites: in one round of generation.
        max_length: longest row in tokens; longer ones are cut.
        seed: of the order.

    Raises:
        InputError: fewer pairs of a harmless and a harmful answer than a round takes.
    """
    found = [record for record in data.load().train if isinstance(record, AnswerPair)]
    # Exactly one harmful answer each, so that both parts and a pairwise peer see the same texts.
    usable = [pair for pair in found if pair.rejected_harmful and not pair.accepted_harmful]
    if len(usable) < max(pairs, rewrites):
        raise InputError(
            f"the data has only {len(usable)} pairs of a harmless and a harmful answer; a round takes "
            f"pairs={pairs}, a round of generation {rewrites}"
        )
    random.Random(seed).shuffle(usable)
    texts = [text for pair in usable for text in (pair.query, pair.accepted, pair.rejected)]
    tokenizer = tiny_tokenizer(texts, vocab_size=shape.vocab)
    pad_id = choose_pad_id(tokenizer)
    detector = DetectorEncoder(tokenizer, pad_id=pad_id, max_length=max_length)
    detoxifier = DetoxifierEncoder(tokenizer, pad_id=pad_id, max_length=max_length)
    return Texts(
        tokenizer=tokenizer,
        pad_id=pad_id,
        detector_encoder=detector,
        detoxifier_encoder=detoxifier,
        detector=Workload(detector.encode_records(list(labelled_answers(usable))), 2 * pairs),
        detoxifier=Workload(detoxifier.encode_records(list(corrections(usable))), pairs),
        pairs=Workload(usable, rewrites),
    )
