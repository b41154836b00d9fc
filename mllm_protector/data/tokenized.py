"""Training examples: prefixes of answers, token ids on the disk, and a balance of the labels."""

import hashlib
import json
import logging
import random
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
import transformers
from datasets import List
from numpy.typing import NDArray
from pyarrow.compute import list_value_length
from transformers import PreTrainedTokenizerBase

from mllm_protector import prompts
from mllm_protector import records as record_types
from mllm_protector.data import detoxifier_encoding, encoding, table, tokens
from mllm_protector.data.encoding import E, EncodedAnswer, PromptEncoder, R
from mllm_protector.data.table import (
    Table,
    cached,
    code_digest,
    in_batches,
    open_table,
    write_facts,
    write_table,
)
from mllm_protector.errors import InputError
from mllm_protector.files import content_key, file_digest
from mllm_protector.progress import Progress
from mllm_protector.records import LabelledAnswer

log = logging.getLogger(__name__)

Balance = Literal["none", "undersample", "oversample"]
"""Use every answer once; or leave out some of the more frequent label; or repeat some of the rarer one."""

MADE_BY = [
    tokenizers.__version__,
    transformers.__version__,
    code_digest(record_types, prompts, encoding, detoxifier_encoding, tokens, table),
    file_digest(Path(__file__)),
]
"""The code that makes records and ids; taken when it is loaded, as it may be edited while it runs."""

LONGEST, SHORTEST, SHORTEST_HARMFUL = 0.9, 0.1, 0.5
"""Shares of an answer that a prefix may have."""

_WORD_END = re.compile(r"(?<=\w)(?![\w'’-])")


class Tokenized(Table[E]):
    """Examples in a file; ``truncated`` and ``shortened`` are the encoder's counts while it made them.

    Attributes:
        lengths: (N,) int32, the tokens of each.
    """

    def __init__(
        self, rows: Any, make: Any, lengths: NDArray[np.int32], truncated: int = 0, shortened: int = 0
    ) -> None:
        """Show each row as an example."""
        super().__init__(rows, make)
        self.lengths = lengths
        self.truncated = truncated
        self.shortened = shortened

    def take(self, places: NDArray[np.int64]) -> "Tokenized[E]":
        """The examples at these places, in this order, some perhaps several times. Reads nothing."""
        return Tokenized(self.rows.select(places), self._make, self.lengths[places])


def tokenized(encoder: PromptEncoder[R, E], records: Iterable[R], *, content: str) -> Tokenized[E]:
    """The records as an encoder renders them.

    They lie in the cache (``table.cached``), by their content and by everything that makes their ids: the
    encoder's prompt and limits, the tokenizer's own files, the versions of the libraries, and our code.

    Args:
        encoder: a detector's or a detoxifier's.
        records: read only if the cache does not have them, once and in batches: a stream will do.
        content: a hash of the records and their order.

    Raises:
        InputError: a record cannot be encoded, or what lies in the cache is damaged.
        RunError: the cache cannot be written.
    """
    key = content_key(content, encoder.identity(), tokenizer_digest(encoder.tokenizer), MADE_BY)

    def make(folder: Path) -> None:
        before = encoder.truncated, encoder.shortened
        write_table(folder, _encoded(encoder, records), encoder.example)
        truncated, shortened = encoder.truncated - before[0], encoder.shortened - before[1]
        write_facts(folder, truncated=truncated, shortened=shortened)

    folder = cached("tokens", key, make)
    log.info("tokenised: %s", folder)
    rows, facts = open_table(folder)
    return Tokenized(rows, encoder.example, _lengths(rows), facts["truncated"], facts["shortened"])


def balanced(examples: Tokenized[EncodedAnswer], how: Balance, *, seed: int) -> Tokenized[EncodedAnswer]:
    """The examples with equally many of both labels.

    Which are left out or repeated is drawn at random; all of a label are repeated as evenly as can be.

    Raises:
        InputError: examples of one label only.
    """
    if how == "none":
        return examples
    harmful = np.fromiter((example.label > 0.5 for example in examples), np.bool_, len(examples))
    rare, frequent = sorted((np.flatnonzero(harmful), np.flatnonzero(~harmful)), key=len)
    if not len(rare):
        raise InputError(f"balance={how}: all answers have one label")
    rng = np.random.default_rng(seed)
    if how == "undersample":
        frequent = rng.permutation(frequent)[: len(rare)]
    else:
        times, more = divmod(len(frequent), len(rare))
        rare = np.concatenate([np.tile(rare, times), rng.permutation(rare)[:more]])
    return examples.take(np.sort(np.concatenate([rare, frequent])))


def with_prefixes(records: Iterable[LabelledAnswer], *, share: float, seed: int) -> Iterator[LabelledAnswer]:
    """The records, and prefixes of a share of their answers, each behind its record.

    A prefix ends with a word, has 10 to 90 % of the answer's characters, and the label of its whole answer.
    That is always true of a harmless answer. But the first words of a harmful answer are often harmless, and
    a detector that learnt to flag them would flag harmless answers that begin alike. So a prefix of a harmful
    answer has at least half of it. (Where the harm is in the second half, the label is wrong all the same.)

    Answers too short to be cut so, such as single words, give none. Which answers are cut, and where, depends
    on the seed and the record alone, not on the records around it.
    """
    for record in records:
        yield record
        rng = random.Random(f"{seed}\n{record.query}\n{record.answer}")
        if rng.random() < share and (cuts := _cuts(record)):
            answer = record.answer[: rng.choice(cuts)]
            yield replace(record, answer=answer)


def _cuts(record: LabelledAnswer) -> list[int]:
    """The ends of words within the bounds, without the last word's: what is left out has words too."""
    shortest = SHORTEST_HARMFUL if record.harmful else SHORTEST
    length = len(record.answer)
    ends = [match.start() for match in _WORD_END.finditer(record.answer)][:-1]
    return [end for end in ends if shortest * length <= end <= LONGEST * length]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a tokenizer as it is saved, equal for equal ones however they were used before."""
    # A fast tokenizer is saved with the padding and truncation of its last call; this one has neither.
    tokenizer("a", add_special_tokens=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        saved = sorted(path for path in folder.rglob("*") if path.is_file())
        return content_key([[str(path.relative_to(folder)), file_digest(path)] for path in saved])


def lengths_of(examples: Sequence[Sized]) -> "array[int]":
    """The length of each example in tokens, 4 bytes each; a sequence that has ``lengths`` is not read."""
    return array("i", examples.lengths if hasattr(examples, "lengths") else map(len, examples))


def lengths_digest(lengths: Sequence[int]) -> str:
    """The sha256 of the lengths as a JSON array."""
    return hashlib.sha256(json.dumps(list(lengths)).encode()).hexdigest()


def _encoded(encoder: PromptEncoder[R, E], records: Iterable[R]) -> Iterator[E]:
    with Progress("tokenising", "row") as bar:
        for some in in_batches(records):
            yield from encoder.encode_records(some)
            bar.update(len(some))


def _lengths(rows: Any) -> NDArray[np.int32]:
    """(N,) the tokens of each row, read from where its lists begin and end."""
    lists = [rows.data.column(name) for name, kind in rows.features.items() if isinstance(kind, List)]
    return sum((list_value_length(column).to_numpy() for column in lists), np.zeros(len(rows), np.int32))
