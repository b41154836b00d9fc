import json
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mllm_protector import prompts
from mllm_protector.data.encoding import DetectorEncoder
from mllm_protector.data.tokens import (
    OVERLAP,
    SENTENCE,
    choose_pad_id,
    encode_texts,
    ends,
    fill,
    lay_out,
    window_starts,
)
from mllm_protector.errors import InputError
from mllm_protector.normalisation import normalised

TEXTS = [
    "Question: How do I bake bread?\n\nAnswer: Mix flour, water and salt.",
    "Question: What is this?\n\nAnswer: Sure, the image shows a red square.",
    "Question: Why?\n\nAnswer: Sure, because it is so.",
]
PAIRS = [
    ("How do I bake bread?", "Sure, mix flour."),
    ("Why?", ""),
    ("", "Sure"),
    (" {answer} ", "{query} </s> <s>"),
    ("What is \u00e9 \U0001f600?", " The image\n\nshows\u2028\U0001f600 "),
]
QUERIES, ANSWERS = map(list, zip(*PAIRS, strict=True))


def spm_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece makes them: a space belongs to the word behind it, unknown characters are bytes."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=390, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([" ".join(text.split("\n")) for text in TEXTS * 3], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the bytes are ordinary tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return spm_tokenizer()


def encoder(
    tokenizer: PreTrainedTokenizerBase, max_length: int = 512, *, joined: bool = True
) -> DetectorEncoder:
    return DetectorEncoder(
        tokenizer,
        pad_id=choose_pad_id(tokenizer),
        max_length=max_length,
        prompt=prompts.OFFICIAL_DETECTOR,
        joined=joined,
    )


def in_one_piece(tokenizer: PreTrainedTokenizerBase, query: str, answer: str) -> list[int]:
    return tokenizer("Question: " + query + "\n\nAnswer: " + answer, split_special_tokens=True)["input_ids"]


def test_joined_ids_are_those_of_the_whole_text_and_others_are_not(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    read = [(normalised(query), normalised(answer)) for query, answer in PAIRS]
    whole = [in_one_piece(tokenizer, query, answer) for query, answer in read]
    assert whole[0] == tokenizer(fill(prompts.OFFICIAL_DETECTOR, *read[0]))["input_ids"]
    assert encoder(tokenizer).encode(queries=QUERIES, answers=ANSWERS) == whole
    apart = encoder(tokenizer, joined=False).encode(queries=QUERIES, answers=ANSWERS)
    assert all(one != other for one, other in zip(whole, apart, strict=True))


def test_a_pair_that_fits_in_one_piece_is_not_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    query, answer = "How do I bake bread?", " ".join(["Mix flour, water and salt."] * 9)
    whole = in_one_piece(tokenizer, query, answer)
    tight = encoder(tokenizer, len(whole))
    assert tight.windows(queries=[query], answers=[answer]) == [[whole]]
    assert len(encoder(tokenizer, len(whole), joined=False).windows(queries=[query], answers=[answer])[0]) > 1
    assert len(encoder(tokenizer, len(whole) - 1).windows(queries=[query], answers=[answer])[0]) > 1


def test_special_tokens_in_a_joined_text_stay_words(tokenizer: PreTrainedTokenizerFast) -> None:
    [ids] = encoder(tokenizer).encode(queries=["</s> <s> <unk>"], answers=["</s>"])
    assert [at for at in ids if at in tokenizer.all_special_ids] == [tokenizer.bos_token_id]


def test_joined_windows_hold_a_long_answer_and_each_has_the_question(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    numbers = [f"n{number}." for number in range(300)]
    reader = encoder(tokenizer, 256)
    [rows] = reader.windows(queries=["Why?"], answers=[" ".join(numbers)], window=100)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert all(text.startswith("Question: Why?\n\nAnswer: ") for text in texts)
    assert all(any(number in text for text in texts) for number in numbers)
    for row, text in zip(rows, texts, strict=True):
        assert row == in_one_piece(tokenizer, "Why?", text.removeprefix("Question: Why?\n\nAnswer: "))
    assert (reader.truncated, reader.shortened) == (0, 0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    query=st.text(max_size=60).map(normalised),
    answer=st.text(max_size=300).map(normalised),
    max_length=st.integers(min_value=60, max_value=200),
    window=st.none() | st.integers(min_value=1, max_value=200),
)
def test_no_joined_row_is_too_long(
    tokenizer: PreTrainedTokenizerFast, query: str, answer: str, max_length: int, window: int | None
) -> None:
    reader = encoder(tokenizer, max_length)
    [rows] = reader.windows(queries=[query], answers=[answer], window=window)
    assert max(map(len, rows)) <= max_length
    whole = in_one_piece(tokenizer, query, answer)
    if window is None:
        assert (rows == [whole]) == (len(whole) <= max_length)


def test_a_long_joined_question_keeps_its_head_and_tail(tokenizer: PreTrainedTokenizerFast) -> None:
    reader = encoder(tokenizer, 100)
    query = f"First {'bake ' * 200}last?"
    [row] = reader.encode(queries=[query], answers=["Sure " * 200])
    text = tokenizer.decode(row, skip_special_tokens=True)
    assert text.startswith("Question: First bake")
    assert "bake last?\n\nAnswer: Sure Sure" in text
    assert prompts.GAP in text
    assert len(row) <= 100
    assert (reader.truncated, reader.shortened) == (1, 1)


def test_a_tokenizer_that_does_not_tell_where_its_tokens_are_is_refused(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda _: False))
    encoder(tokenizer, joined=False)
    with pytest.raises(InputError, match="does not tell where"):
        encoder(tokenizer)


def test_a_pad_id_that_stands_in_a_joined_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    letter = in_one_piece(tokenizer, "", "Z")[-1]
    reader = DetectorEncoder(tokenizer, pad_id=letter, max_length=99, prompt="{query}|{answer}", joined=True)
    with pytest.raises(InputError, match="occurs in a text"):
        reader.encode(queries=["q"], answers=["Z"])


def test_half_of_a_surrogate_pair_is_a_character_like_another(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_texts(tokenizer, ["a\ud83d"]) == encode_texts(tokenizer, ["a\ufffd"])


# Layout: what happens to ids

LENGTHS = st.integers(min_value=0, max_value=3000)
SIZES = st.integers(min_value=1, max_value=400)


def test_the_texts_are_in_their_gaps_between_the_affixes() -> None:
    layout = lay_out("a{query}b{answer}c", lambda text: [ord(text)], first=[1], last=[2, 3])
    assert layout.fill([7], [8, 8]) == [1, ord("a"), 7, ord("b"), 8, 8, ord("c"), 2, 3]
    assert layout.size == 6


@given(LENGTHS, SIZES)
def test_windows_cover_every_token_in_order_and_share_what_they_should(length: int, size: int) -> None:
    starts = window_starts(length, size)
    assert starts == sorted(set(starts))
    windows = [range(start, min(start + size, length)) for start in starts]
    assert {token for window in windows for token in window} == set(range(length))
    assert windows[-1].stop == length
    assert all(len(window) == min(size, length) for window in windows)
    shared = [one + size - other for one, other in pairwise(starts)]
    assert all(each >= min(max(OVERLAP * size, SENTENCE), size // 2) for each in shared)
    assert all(each <= (size + 1) // 2 + SENTENCE for each in shared[:-1])
    assert len(window_starts(length, size)) * min(size, length) <= 2 * length + 2 * size


@given(LENGTHS, st.integers(min_value=2 * SENTENCE, max_value=400), st.integers(min_value=0))
def test_a_sentence_lies_whole_in_a_window(length: int, size: int, where: int) -> None:
    sentence = range(where % max(1, length - SENTENCE + 1), length)[:SENTENCE]
    assert any(
        start <= sentence.start and sentence.stop <= start + size for start in window_starts(length, size)
    )


def test_a_text_that_fits_is_one_window() -> None:
    assert window_starts(0, 8) == window_starts(0, 0) == window_starts(8, 8) == [0]
    assert window_starts(9, 8) == [0, 1]


def test_a_cut_text_keeps_its_head_and_its_tail() -> None:
    text, gap = list(range(20)), [-1, -1]
    assert ends(text, 20, gap) == text
    assert ends(text, 9, gap) == [0, 1, 2, 3, *gap, 17, 18, 19]
    assert ends(text, 4, gap) == [0, *gap, 19]
    assert ends(text, 3, gap) == [0, 1, 19]
    assert ends(text, 0, gap) == []
