import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_protector.data.queries import words
from mllm_protector.generation.ledger import SPENT, Budget, Ledger
from mllm_protector.generation.pairs import together
from mllm_protector.generation.scenario_file import Scenario
from mllm_protector.generation.wording import Wording
from mllm_protector.generation.writing import Rules, Writer, pairs_of
from mllm_protector.judges.keyword import KeywordJudge
from mllm_protector.records import Failure


class Erratic:
    """A model that replies by chance, well or badly, until its patience ends."""

    def __init__(self, seed: int, quality: float, ledger: Ledger, patience: int) -> None:
        self.draw = random.Random(seed)
        self.quality = quality
        self.ledger = ledger
        self.patience = patience

    def complete(self, conversations: Sequence[Any], **_: Any) -> list[str | Failure]:
        return [self.reply(conversation[0]["content"]) for conversation in conversations]

    def reply(self, prompt: str) -> str | Failure:
        self.patience -= 1
        if self.patience < 0:
            self.ledger.denied = SPENT
            return Failure(reason=SPENT)
        if self.draw.random() > self.quality:
            bad = ["", "[", "\0", '["a"', "I'm sorry, but I can't help with that.", "Нет, это не так."]
            failures = [Failure(reason="the server failed (HTTP 500)"), Failure(reason="no", refused=True)]
            return self.draw.choice([*bad, *failures])
        if "different questions" in prompt:
            things = self.draw.choices(["tea", "bees", "snow", "maps", "rain", "bread", "chess"], k=3)
            return json.dumps([f"Why {thing} {self.draw.randint(0, 9)}?" for thing in things])
        if "Write only the hull" in prompt:
            return self.draw.choice(["Sure, [left out].", "Of course, [left out] first.", "Sure."])
        return self.draw.choice(["I'm sorry, but I can't help with that.", "Here it is."])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    quality=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    patience=st.sampled_from([0, 5, 30, 1000]),
    unconfirmed=st.sampled_from(["drop", "mark"]),
    pairs=st.lists(st.integers(1, 6), min_size=1, max_size=3),
)
def test_whatever_a_model_replies_the_counts_add_up_and_no_question_stands_there_twice(
    seed: int, quality: float, patience: int, unconfirmed: Literal["drop", "mark"], pairs: list[int]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder), Budget(calls=None, tokens=None))
        scenarios = [
            Scenario(
                name=f"{number}", description="made up", pairs=count, questions=("Why tea 1?", "Why me?")
            )
            for number, count in enumerate(pairs)
        ]
        rules = Rules(
            seed=0,
            per_call=3,
            dry_calls=2,
            question_tokens=1,
            answer_tokens=1,
            form="json",
            language="English",
            near_duplicate=0.85,
            unconfirmed=unconfirmed,
        )
        chat: Any = Erratic(seed, quality, ledger, patience)
        judges = {"keyword": KeywordJudge()}
        wording = Wording({}, "English", "json")
        writer = Writer(scenarios, chat=chat, judges=judges, wording=wording, rules=rules, ledger=ledger)
        writer.run()
    accounts = [each.account() for each in writer.progress]
    for account in [*accounts, together(accounts)]:
        assert account["asked"] == account["written"] + sum(account["dropped"].values())
        assert account["written"] <= account["wanted"]
    written = pairs_of(writer.progress)
    assert len({" ".join(words(pair.query)) for pair in written}) == len(written)
    assert all(pair.accepted and pair.rejected for pair in written)
    assert unconfirmed == "mark" or all(pair.row()["verified"] for pair in written)
    assert ledger.denied or all(not each.missing or each.dry >= 2 for each in writer.progress)
