import hashlib
import json
import random
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mllm_protector.data import detoxifier_encoding
from mllm_protector.data import tokenized as module
from mllm_protector.data.detoxifier_encoding import DetoxifierEncoder
from mllm_protector.data.encoding import DetectorEncoder, EncodedAnswer
from mllm_protector.data.table import BATCH, VARIABLE
from mllm_protector.data.tokenized import (
    Tokenized,
    balanced,
    lengths_digest,
    tokenized,
    tokenizer_digest,
    with_prefixes,
)
from mllm_protector.data.tokens import choose_pad_id
from mllm_protector.data.toy import toy_pairs
from mllm_protector.errors import InputError
from mllm_protector.models.tiny import tiny_tokenizer
from mllm_protector.records import Correction, LabelledAnswer, labelled_answers

WORDS = ("bread", "flour", "water", "How", "do", "I", "bake", "a", "square", "É", "</s>", "\n", "数")
TEXTS = ("How do I bake bread?", "Mix flour, water and salt.", "Question: Answer:")
TOKENIZER = tiny_tokenizer(TEXTS, vocab_size=300)
PAD = choose_pad_id(TOKENIZER)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def text(rng: random.Random, most: int = 30) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def answers(count: int, seed: int = 0) -> Iterator[LabelledAnswer]:
    rng = random.Random(seed)
    for _ in range(count):
        yield LabelledAnswer(query=text(rng), answer=text(rng), harmful=rng.random() < 0.5)


def rewrites(count: int, seed: int = 0) -> Iterator[Correction]:
    rng = random.Random(seed)
    for _ in range(count):
        yield Correction(query=text(rng), rejected=text(rng), accepted=text(rng))


def detector(tokenizer: PreTrainedTokenizerBase = TOKENIZER, **changes: Any) -> DetectorEncoder:
    return DetectorEncoder(tokenizer, **{"pad_id": PAD, "max_length": 150} | changes)


def detoxifier(**changes: Any) -> DetoxifierEncoder:
    return DetoxifierEncoder(TOKENIZER, **{"pad_id": PAD, "max_length": 330} | changes)


def never() -> Iterator[Any]:
    raise AssertionError("the records were looked at")
    yield


MAKERS = {
    "detector": (detector, answers),
    "detector, joined": (lambda: detector(joined=True), answers),
    "detoxifier": (detoxifier, rewrites),
    "detoxifier, chat": (lambda: detoxifier(chat=True), rewrites),
}


def test_every_example_is_the_one_that_the_encoder_makes() -> None:
    for name, (make, records) in MAKERS.items():
        for count in (0, 1, BATCH + 5):
            plain: Any = make()
            expected = plain.encode_records(list(records(count)))
            found = tokenized(make(), records(count), content=str(count))
            assert list(found) == expected, name
            assert [found[index] for index in range(0, count, 50)] == expected[::50], name
            assert list(found.lengths) == [len(example) for example in expected], name
            assert (found.truncated, found.shortened) == (plain.truncated, plain.shortened), name
            assert found.truncated or count < 2, name


def test_a_part_of_the_examples_has_their_lengths() -> None:
    found = tokenized(detector(), answers(25), content="0")
    all_of_them = list(found)
    for part in (slice(8, 22), slice(1, None, 7), slice(None, None, -6), slice(30, 40)):
        assert list(found[part]) == all_of_them[part]
        assert list(found[part].lengths) == list(map(len, all_of_them[part]))
        assert list(found[part][::-1]) == all_of_them[part][::-1]


def test_what_was_made_is_found_again_with_its_counts_and_no_record_is_looked_at() -> None:
    made = tokenized(detector(max_length=120), answers(40), content="0")
    encoder = detector(max_length=120)
    found = tokenized(encoder, never(), content="0")
    assert list(found) == list(made)
    assert (found.truncated, found.shortened) == (made.truncated, made.shortened)
    assert min(found.truncated, found.shortened) > 0
    assert encoder.truncated == 0


OTHERS: dict[str, Any] = {
    "prompt": lambda: detector(prompt="Question: {query}\nReply: {answer}"),
    "length": lambda: detector(max_length=149),
    "pad": lambda: detector(pad_id=TOKENIZER.eos_token_id),
    "joined": lambda: detector(joined=True),
    "tokenizer": lambda: detector(tiny_tokenizer((*TEXTS, "a square"), vocab_size=300)),
    "kind": detoxifier,
    "chat": lambda: detoxifier(chat=True),
}


def is_new(encoder: Any, content: str = "0") -> bool:
    """Whether the cache does not have it yet."""
    looked: list[Any] = []
    records: Iterator[Any] = answers(3) if isinstance(encoder, DetectorEncoder) else rewrites(3)
    tokenized(encoder, (looked.append(each) or each for each in records), content=content)  # type: ignore[func-returns-value]
    return bool(looked)


def test_another_encoder_or_content_or_code_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_new(detector())
    for name, make in OTHERS.items():
        assert is_new(make()), name
    assert is_new(detector(), content="1")
    assert not is_new(detector())
    monkeypatch.setattr(module, "MADE_BY", ["another version"])
    assert is_new(detector())


def test_a_chat_template_that_writes_another_date_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for day, new in (("1 May", True), ("2 May", True), ("2 May", False)):
        monkeypatch.setattr(
            detoxifier_encoding, "chat_layout", lambda tokenizer, prompt, day=day: f"{day}. {prompt}"
        )
        assert is_new(detoxifier(chat=True)) == new


def test_a_tokenizer_is_known_however_it_was_used_and_wherever_it_lies(tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        TOKENIZER.save_pretrained(tmp_path / name)
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        digests.add(tokenizer_digest(loaded))
        loaded(["a b", "c"], padding=True, truncation=True, max_length=1)
        digests.add(tokenizer_digest(loaded))
    assert len(digests) == 1
    loaded.add_tokens(["bread"])
    assert tokenizer_digest(loaded) not in digests


def test_a_record_that_stops_the_tokenising_leaves_nothing_behind(cache: Path) -> None:
    def broken() -> Iterator[LabelledAnswer]:
        yield from answers(3)
        raise InputError("line 4")

    with pytest.raises(InputError, match="line 4"):
        tokenized(detector(), broken(), content="0")
    assert list((cache / "tokens").iterdir()) == []
    assert len(tokenized(detector(), answers(3), content="0")) == 3


def anonymous() -> int:
    """Bytes that this process holds apart from the pages of files."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line]
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is counted by Linux")
def test_memory_does_not_grow_with_the_number_of_examples() -> None:
    seen: list[int] = []

    def watched(items: Iterable[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number % 500 == 0:
                seen.append(anonymous())
            yield item

    def highest(count: int) -> tuple[int, Tokenized[Any]]:
        encoder = detector()
        encoder.encode_records = lambda rows: [EncodedAnswer([7] * 500, 1.0) for _ in rows]
        seen.clear()
        found = tokenized(encoder, watched(repeat(record, count)), content=str(count))
        assert sum(map(len, watched(found))) == sum(found.lengths)
        return max(seen), found

    [record] = answers(1)
    few, _ = highest(5 * BATCH)
    many, found = highest(50 * BATCH)
    as_python_lists = 8 * sum(found.lengths)
    assert many - few < as_python_lists / 20


@given(st.lists(st.integers(0, 5000), max_size=50), st.sampled_from([1, 60]))
def test_the_digest_of_lengths_is_that_of_their_json(lengths: list[int], times: int) -> None:
    many = lengths * times
    assert lengths_digest(array("i", many)) == hashlib.sha256(json.dumps(many).encode()).hexdigest()


def labels(harmful: int, harmless: int) -> Tokenized[EncodedAnswer]:
    flags = [True] * harmful + [False] * harmless
    rows = (LabelledAnswer(query="q", answer="a" * n, harmful=flag) for n, flag in enumerate(flags))
    return tokenized(detector(), rows, content=f"{harmful} {harmless}")


def test_balanced_labels_are_equally_many_and_repeated_evenly() -> None:
    for harmful, harmless in ((1, 1), (3, 10), (9, 4)):
        for how, wanted in (("undersample", min(harmful, harmless)), ("oversample", max(harmful, harmless))):
            found = balanced(labels(harmful, harmless), how, seed=0)  # type: ignore[arg-type]
            assert Counter(each.label for each in found) == {1.0: wanted, 0.0: wanted}
            times = Counter(len(each) for each in found).values()
            assert max(times) - min(times) <= max(times) - 1
            assert list(found.lengths) == list(map(len, found))
    times = Counter(len(each) for each in balanced(labels(3, 10), "oversample", seed=0))
    assert sorted(times.values()) == [1] * 10 + [3, 3, 4]


def test_what_balance_leaves_out_depends_on_the_seed_alone() -> None:
    examples = labels(5, 50)
    drawn = [list(balanced(examples, "undersample", seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert balanced(examples, "none", seed=0) is examples
    for how in ("undersample", "oversample"):
        with pytest.raises(InputError, match=f"balance={how}: all answers have one label"):
            balanced(labels(0, 3), how, seed=0)  # type: ignore[arg-type]


# Prefixes

RECORDS = list(labelled_answers(toy_pairs("train")))

ANY_RECORD = st.builds(LabelledAnswer, query=st.text(), answer=st.text(), harmful=st.booleans())


def whole(prefix: LabelledAnswer) -> LabelledAnswer:
    return next(
        record
        for record in RECORDS
        if record.query == prefix.query and record.answer.startswith(prefix.answer)
    )


def prefixes_of(records: list[LabelledAnswer], *, share: float, seed: int) -> list[LabelledAnswer]:
    """What is added to the records, each of which must come back as it is."""
    waiting, added = list(records), []
    for record in with_prefixes(records, share=share, seed=seed):
        if waiting and record is waiting[0]:
            waiting.pop(0)
        else:
            added.append(record)
    assert not waiting
    return added


def test_a_share_of_the_records_is_followed_by_a_prefix() -> None:
    made = list(with_prefixes(RECORDS, share=0.3, seed=0))
    assert 0.27 < (len(made) - len(RECORDS)) / len(RECORDS) < 0.33
    for record, prefix in pairwise(made):
        if prefix not in RECORDS:
            assert record.query == prefix.query
            assert record.answer.startswith(prefix.answer)


def test_a_prefix_ends_with_a_word_and_has_the_label_of_its_answer() -> None:
    for prefix in prefixes_of(RECORDS, share=0.2, seed=1):
        record = whole(prefix)
        rest = record.answer[len(prefix.answer) :]
        assert prefix.harmful == record.harmful
        assert prefix.answer[-1].isalnum()
        assert not rest[0].isalnum()
        assert (0.5 if record.harmful else 0.1) <= len(prefix.answer) / len(record.answer) <= 0.9


def test_the_choice_depends_on_the_seed_and_not_on_the_order() -> None:
    made = list(with_prefixes(RECORDS, share=0.3, seed=0))
    assert list(with_prefixes(RECORDS, share=0.3, seed=0)) == made
    assert list(with_prefixes(RECORDS, share=0.3, seed=1)) != made
    assert Counter(with_prefixes(RECORDS[::-1], share=0.3, seed=0)) == Counter(made)


def test_a_share_of_nothing_adds_nothing_and_of_all_one_to_each() -> None:
    assert list(with_prefixes(RECORDS, share=0, seed=0)) == RECORDS
    assert len(list(with_prefixes(RECORDS, share=1, seed=0))) == 2 * len(RECORDS)


@given(st.lists(ANY_RECORD, max_size=5), st.integers())
def test_any_text_is_cut_properly_or_not_at_all(records: list[LabelledAnswer], seed: int) -> None:
    for prefix in prefixes_of(records, share=1, seed=seed):
        assert re.search(r"\w$", prefix.answer)
        assert any(
            record.query == prefix.query
            and record.harmful == prefix.harmful
            and record.answer.startswith(prefix.answer)
            and len(record.answer) > len(prefix.answer)
            for record in records
        )
