"""The same texts for every arm, in the same order."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from mllm_protector.benchmarking.flops import language_head, score_head, training_flops
from mllm_protector.benchmarking.shape import Shape
from mllm_protector.data.detoxifier_encoding import DetoxifierEncoder
from mllm_protector.data.encoding import DetectorEncoder, EncodedAnswer, EncodedCorrection
from mllm_protector.data.sources import Source
from mllm_protector.data.tokens import choose_pad_id
from mllm_protector.errors import InputError
from mllm_protector.models.tiny import tiny_tokenizer
from mllm_protector.records import AnswerPair, corrections, labelled_answers

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload(Generic[R]):
    """Rows in rounds.

    Attributes:
        rows: of one round behind the other.
        per_round: how many make a round.
    """

    rows: Sequence[R]
    per_round: int

    def rounds(self, count: int) -> Iterator[Sequence[R]]:
        """The rows of each round; the rows begin again where there are not enough."""
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
        detector: both answers of each pair behind each other, the harmless one first.
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
        pairs: in one round of a training or of scoring.
        rewrites: in one round of generation.
        max_length: longest row in tokens; longer ones are cut.
        seed: of the order.

    Raises:
        InputError: single labelled answers, or fewer pairs than a round takes.
    """
    records = data.load().train
    found = [record for record in records if isinstance(record, AnswerPair)]
    # Exactly one harmful answer each, so that both parts and a pairwise peer see the same texts.
    usable = [pair for pair in found if pair.rejected_harmful and not pair.accepted_harmful]
    if len(usable) < max(pairs, rewrites):
        raise InputError(
            f"the data has only {len(usable)} pairs of a harmless and a harmful answer; "
            f"a round takes pairs={pairs}, one of generation {rewrites}"
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
        detector=Workload(rows=detector.encode_records(list(labelled_answers(usable))), per_round=2 * pairs),
        detoxifier=Workload(rows=detoxifier.encode_records(list(corrections(usable))), per_round=pairs),
        pairs=Workload(rows=usable, per_round=rewrites),
    )


def useful_training_flops(shape: Shape, rows: Sequence[EncodedAnswer] | Sequence[EncodedCorrection]) -> int:
    """What a training step on some rows cannot do without."""
    lengths = [len(row) for row in rows]
    targets = [len(row.target) for row in rows if isinstance(row, EncodedCorrection)]
    if targets:
        head = language_head(shape, sum(targets))
        return training_flops(shape, lengths, head=head, head_trained=False)
    return training_flops(shape, lengths, head=score_head(shape, len(rows)), head_trained=True)
