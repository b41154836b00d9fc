import unicodedata
from itertools import product

import numpy as np

from mllm_protector.data.duplicates import question_digest
from mllm_protector.data.queries import opening_key, query_key
from mllm_protector.data.splits import held_out
from mllm_protector.records import LabelledAnswer

QUERY = "Don't caf\u00e9s bake bread, at home?"
SPELLINGS = (
    QUERY.upper(),
    f"  {QUERY}\n".replace(" ", "  "),
    QUERY.replace(",", "").rstrip("?"),
    QUERY.replace("?", "\uff1f!"),
    QUERY.replace("'", "\u2019"),
    unicodedata.normalize("NFD", QUERY),
    unicodedata.normalize("NFD", QUERY).replace("\u0301", "\u200b\u0301"),
    "\u200b".join(QUERY),
    "\ufeff" + QUERY.replace("bread", "br\u00ade\u2060ad\ufe0f"),
    QUERY.replace("home", "\u202eho\u2066me\U000e0041"),
    QUERY.replace("bread", "\uff42\uff52\uff45\uff41\uff44"),
)


def answers(*queries: str) -> list[LabelledAnswer]:
    return [LabelledAnswer(query=query, answer="a", harmful=False) for query in queries]


def test_queries_that_people_read_alike_have_one_key_for_every_purpose() -> None:
    for spelling in SPELLINGS:
        assert query_key(spelling) == query_key(QUERY) == opening_key(spelling), ascii(spelling)
        assert question_digest(spelling) == question_digest(QUERY), ascii(spelling)
    assert query_key(QUERY) != query_key(QUERY.replace("bread", "rye bread"))


def test_queries_without_words_are_told_apart_by_their_signs() -> None:
    assert query_key(" ?\u200b ") == query_key("\uff1f") == "?"
    assert query_key("?") != query_key("!") != query_key("")


def test_no_spelling_of_a_query_lands_in_another_split() -> None:
    different = [f"How are {number} breads baked?" for number in range(300)]
    spelled = [
        spelling
        for query in different
        for spelling in (query, query.upper(), query.rstrip("?"), "\u200b".join(query))
    ]
    for seed in (0, 1):
        held = held_out(answers(*spelled), 0.3, seed).reshape(-1, 4)
        assert (held == held[:, :1]).all()
        assert held[:, 0].sum() == 90


def test_queries_of_one_spelling_are_split_as_ever() -> None:
    """A trained part knows its data by the split, so the split of plain queries must not move."""
    queries = [f"Question {number}?" for number in range(12)]
    held = np.flatnonzero(held_out(answers(*queries), 0.25, 0))
    assert held.tolist() == [6, 7, 11]


def test_dialogues_that_begin_alike_share_their_opening_and_their_split() -> None:
    openings = [f"Human: question {number}" for number in range(40)]
    more = [
        f"{opening}\n\nAssistant: {reply}\n\nHuman: {then}"
        for opening, reply, then in product(openings, ("yes", "no"), ("why?", "and then?"))
    ]
    assert {opening_key(dialogue) for dialogue in more} == {f"question {number}" for number in range(40)}
    assert len({query_key(dialogue) for dialogue in more}) == len(more)
    held = held_out(answers(*more, *(opening.removeprefix("Human: ") for opening in openings)), 0.25, 0)
    of_dialogues, alone = held[:160].reshape(40, 4), held[160:]
    assert (of_dialogues == alone[:, None]).all()
    assert alone.sum() == 10
