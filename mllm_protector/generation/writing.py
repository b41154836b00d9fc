"""From scenarios to pairs, in rounds: questions, two answers to each, a verdict on both.

A round asks for as many questions as pairs are missing; the next one makes up for what was dropped. Replies
are known by what was asked for and by number, so a run that is started again walks the same rounds over the
stored replies and pays for what is missing only.
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mllm_protector.data.duplicates import near_duplicates
from mllm_protector.data.queries import words
from mllm_protector.errors import RunError
from mllm_protector.files import content_key
from mllm_protector.generation.language import is_in
from mllm_protector.generation.ledger import Ledger
from mllm_protector.generation.paid import PaidChat
from mllm_protector.generation.pairs import CONFIRMED, Candidate, Progress
from mllm_protector.generation.replies import Form, answer_in, questions_in
from mllm_protector.generation.scenario_file import Scenario
from mllm_protector.generation.wording import SHOWN, STAND_IN, Wording
from mllm_protector.judges.keyword import find_refusal
from mllm_protector.protocols import Judge
from mllm_protector.records import Answer, Failure, Question, Status

log = logging.getLogger(__name__)

PARSED = "a list of questions"
DUPLICATE, NEAR_DUPLICATE = "question: duplicate", "question: near duplicate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a run asks for and accepts.

    Attributes:
        seed: of the replies.
        per_call: questions in one reply.
        dry_calls: calls for questions in a row that may lead to no pair before a scenario is given up.
        question_tokens: longest list of questions.
        answer_tokens: longest answer.
        form: how lists of questions are written.
        language: that of all texts; ``None`` does not look.
        near_duplicate: the least share of words in common that makes two questions one.
        unconfirmed: what becomes of pairs whose labels the judges do not confirm.
    """

    seed: int
    per_call: int
    dry_calls: int
    question_tokens: int
    answer_tokens: int
    form: Form
    language: str | None
    near_duplicate: float
    unconfirmed: Literal["drop", "mark"]


class Writer:
    """Makes pairs until there are as many as wanted, the budget ends, or nothing more comes."""

    def __init__(
        self,
        scenarios: Sequence[Scenario],
        *,
        chat: PaidChat,
        judges: Mapping[str, Judge],
        wording: Wording,
        rules: Rules,
        ledger: Ledger,
    ) -> None:
        self.progress = [Progress(scenario) for scenario in scenarios]
        self._of = {each.scenario.name: each for each in self.progress}
        self._chat = chat
        self._judges = judges
        self._wording = wording
        self._rules = rules
        self._ledger = ledger
        self._distinct: list[str] = []
        self._waiting: list[Candidate] = []
        self._unreachable: str | None = None

    def run(self) -> None:
        """All rounds.

        Raises:
            InputError: a model refuses its key, its name or its address.
            RunError: nobody answers, or replies cannot be stored.
        """
        self._take_in(
            [
                Candidate(scenario=each.scenario, query=query)
                for each in self.progress
                for query in each.scenario.questions
            ]
        )
        rounds = 0
        while self._ledger.denied is None:
            wanting = self._wanting()
            self._take_in(self._ask(wanting))
            chosen = self._chosen()
            if not wanting and not chosen:
                break
            self._answer(chosen)
            self._verify([candidate for candidate in chosen if candidate.dropped is None])
            rounds += 1
            log.info(
                "round %d: %s of %s pairs; %s",
                rounds,
                f"{sum(each.written for each in self.progress):,}",
                f"{sum(each.scenario.pairs for each in self.progress):,}",
                spent_in_words(self._ledger),
            )
            if self._unreachable is not None:
                raise RunError(
                    f"{self._unreachable}; every reply so far is kept, start the same command again"
                )
        for candidate in self._waiting:
            candidate.dropped = f"question: {self._ledger.denied or 'more than wanted'}"

    def _wanting(self) -> list[tuple[Progress, int]]:
        """The scenarios that want more questions, and how many calls each may have for them."""
        waiting = Counter(candidate.scenario.name for candidate in self._waiting)
        wanting = []
        for name, each in self._of.items():
            calls = math.ceil((each.missing - waiting[name]) / self._rules.per_call)
            calls = min(calls, self._rules.dry_calls - each.dry)
            if calls > 0:
                wanting.append((each, calls))
        return wanting

    def _ask(self, wanting: Sequence[tuple[Progress, int]]) -> list[Candidate]:
        """New questions."""
        asked = [(each, len(each.calls) + number) for each, calls in wanting for number in range(calls)]
        prompts = [
            self._wording.questions(each.scenario, self._rules.per_call, _taken(each)) for each, _ in asked
        ]
        # The questions that are there already are no part of a key: after a failure they may be others.
        bare = [self._wording.questions(each.scenario, self._rules.per_call, ()) for each, _ in asked]
        replies = self._complete(
            prompts,
            self._rules.question_tokens,
            parts=[("questions", prompt, number) for prompt, (_, number) in zip(bare, asked, strict=True)],
        )
        found = []
        for (each, number), reply in zip(asked, replies, strict=True):
            if isinstance(reply, Failure) and self._ended(reply):
                continue
            outcome, questions = self._read_list(reply)
            each.calls.append(outcome)
            found += [Candidate(scenario=each.scenario, query=query, call=number) for query in questions]
        return found

    def _read_list(self, reply: str | Failure) -> tuple[str, list[str]]:
        """How a call for questions ended, and what it brought."""
        if isinstance(reply, Failure):
            return _why(reply), []
        if "?" not in reply and find_refusal(reply) is not None:
            return "refused", []
        if (questions := questions_in(reply, self._rules.form)) is not None:
            return PARSED, questions
        if not self._in_language(reply):
            return "wrong language", []
        return "unparseable", []

    def _take_in(self, fresh: Sequence[Candidate]) -> None:
        """Let those wait for answers that are in the right language and not there already."""
        for candidate in fresh:
            self._of[candidate.scenario.name].candidates.append(candidate)
            if candidate.call is not None and not self._in_language(candidate.query):
                candidate.dropped = "question: wrong language"
        rest = [candidate for candidate in fresh if candidate.dropped is None]
        if not rest:
            return
        known = len(self._distinct)
        texts = self._distinct + [candidate.query for candidate in rest]
        firsts = near_duplicates(texts, threshold=self._rules.near_duplicate)
        for place, candidate in enumerate(rest, start=known):
            first = int(firsts[place])
            if first == place:
                self._distinct.append(candidate.query)
                self._waiting.append(candidate)
            else:
                equal = words(texts[first]) == words(candidate.query)
                candidate.dropped = DUPLICATE if equal else NEAR_DUPLICATE

    def _chosen(self) -> list[Candidate]:
        """As many of those that wait as pairs are missing."""
        room = {name: each.missing for name, each in self._of.items()}
        chosen: list[Candidate] = []
        waiting: list[Candidate] = []
        for candidate in self._waiting:
            room[candidate.scenario.name] -= 1
            (chosen if room[candidate.scenario.name] >= 0 else waiting).append(candidate)
        self._waiting = waiting
        return chosen

    def _answer(self, asked: Sequence[Candidate]) -> None:
        """Both answers to each question."""
        prompts = [
            prompt
            for candidate in asked
            for prompt in (
                self._wording.accepted(candidate.scenario, candidate.query),
                self._wording.rejected(candidate.query),
            )
        ]
        replies = self._complete(
            prompts, self._rules.answer_tokens, parts=[("answer", prompt) for prompt in prompts]
        )
        for candidate, accepted, rejected in zip(asked, replies[::2], replies[1::2], strict=True):
            candidate.accepted, problem = self._read_answer("accepted", accepted)
            candidate.rejected, other = self._read_answer("rejected", rejected)
            candidate.dropped = problem or other
            if candidate.dropped is None:
                if words(str(candidate.accepted)) == words(str(candidate.rejected)):
                    candidate.dropped = "rejected: the same as accepted"
                candidate.declines = find_refusal(str(candidate.accepted)) is not None

    def _read_answer(self, kind: str, reply: str | Failure) -> tuple[str | None, str | None]:
        """An answer, or why it is none."""
        if isinstance(reply, Failure):
            return None, f"{kind}: {self._ended(reply) or _why(reply)}"
        text = answer_in(reply)
        if text is None:
            return None, f"{kind}: no text"
        if kind == "rejected" and find_refusal(text) is not None:
            return text, f"{kind}: refused"
        if not self._in_language(text.replace(STAND_IN, "")):
            return text, f"{kind}: wrong language"
        return text, None

    def _verify(self, pairs: Sequence[Candidate]) -> None:
        """Ask every judge about both answers; what one of them does not confirm is not confirmed."""
        for name, judge in self._judges.items():
            self._judge(name, judge, [each for each in pairs if each.verification is each.dropped is None])
        for candidate in pairs:
            if candidate.dropped is not None:
                continue
            if candidate.verification is None and STAND_IN not in str(candidate.rejected):
                candidate.verification = f"rejected: nothing marked as {STAND_IN}"
            candidate.verification = candidate.verification or CONFIRMED
            if candidate.verification != CONFIRMED and self._rules.unconfirmed == "drop":
                candidate.dropped = f"labels: {candidate.verification}"

    def _judge(self, name: str, judge: Judge, pairs: Sequence[Candidate]) -> None:
        questions, answers = [], []
        for number, candidate in enumerate(pairs):
            for text in (candidate.accepted, candidate.rejected):
                questions.append(
                    Question(
                        id=f"{candidate.scenario.name}/{number}",
                        scenario=candidate.scenario.name,
                        variant="TEXT",
                        text=candidate.query,
                        criterion=candidate.scenario.criterion,
                    )
                )
                answers.append(Answer(id=questions[-1].id, text=str(text)))
        verdicts = judge.judge(questions, answers) if pairs else []
        for candidate, accepted, rejected in zip(pairs, verdicts[::2], verdicts[1::2], strict=True):
            for kind, wanted, found in (
                ("accepted", Status.SAFE, accepted),
                ("rejected", Status.HARMFUL, rejected),
            ):
                if found.status == Status.JUDGE_ERROR and found.reason == self._ledger.denied:
                    candidate.dropped = f"labels: {found.reason}"  # nobody looked
                elif found.status != wanted and candidate.verification is None:
                    candidate.verification = f"{kind}: {found.status} by judge {name}"

    def _complete(
        self, prompts: Sequence[str], max_tokens: int, parts: Sequence[tuple[str | int, ...]]
    ) -> list[str | Failure]:
        keys = [content_key(self._rules.seed, *part) for part in parts]
        return self._chat.complete(
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            max_tokens=max_tokens,
            seeds=[int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) >> 1 for key in keys],
            keys=keys,
        )

    def _ended(self, reply: Failure) -> str | None:
        """Why the run has to end, if a reply says so."""
        if reply.unreachable:
            self._unreachable = reply.reason
        return reply.reason if reply.unreachable or reply.reason == self._ledger.denied else None

    def _in_language(self, text: str) -> bool:
        return self._rules.language is None or is_in(text, self._rules.language)


def spent_in_words(ledger: Ledger) -> str:
    """What was spent, of how much, in all runs."""
    limits = (ledger.budget.calls, ledger.budget.tokens)
    calls, tokens = ("" if limit is None else f" of {limit:,}" for limit in limits)
    return f"spent {ledger.calls:,}{calls} calls, {ledger.tokens:,}{tokens} tokens"


def pairs_of(progress: Iterable[Progress]) -> list[Candidate]:
    """What is written, scenario by scenario."""
    return [candidate for each in progress for candidate in each.candidates if candidate.written]


def _taken(progress: Progress) -> list[str]:
    """The questions that another call should not repeat."""
    repeats = (DUPLICATE, NEAR_DUPLICATE)
    return [each.query for each in progress.candidates if each.dropped not in repeats][-SHOWN:]


def _why(reply: Failure) -> str:
    return "refused" if reply.refused else f"failed: {reply.reason}"
