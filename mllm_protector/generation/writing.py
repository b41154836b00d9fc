"""From scenarios to pairs, in rounds: questions, two answers to each, a verdict on both.

A round asks for as many questions as pairs are missing; the next one makes up for what was lost. A prompt and
its seed decide which reply is used, so a run that is started again takes the same rounds over the kept
replies and asks only for what is missing.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mllm_protector.data.duplicates import near_duplicates
from mllm_protector.data.queries import words
from mllm_protector.files import content_key
from mllm_protector.generation.prompts import STAND_IN, Prompts
from mllm_protector.generation.replies import NOT_SENT, Form, KeptChat, answer_in, questions_in
from mllm_protector.generation.scenario_file import Scenario
from mllm_protector.protocols import Judge
from mllm_protector.records import Answer, Failure, Question, Status, Verdict
from mllm_protector.refusals import find_refusal

log = logging.getLogger(__name__)

PARSED = "a list of questions"
DUPLICATE = "question: duplicate"
CONFIRMED = "confirmed"
"""The outcome of a question whose pair every judge confirms."""


@dataclass(slots=True)
class Candidate:
    """A question on its way to a pair.

    Attributes:
        outcome: ``CONFIRMED``, or why not; ``None`` while it is open.
        written: whether it is a pair.
    """

    scenario: Scenario
    query: str
    accepted: str = ""
    rejected: str = ""
    outcome: str | None = None
    written: bool = False

    def row(self) -> dict[str, Any]:
        """The pair as ``data=pairs`` reads it, and what the judges found."""
        return {
            "query": self.query,
            "accepted": self.accepted,
            "rejected": self.rejected,
            "accepted_harmful": False,
            "rejected_harmful": True,
            "scenario": self.scenario.name,
            "verified": self.outcome == CONFIRMED,
            "verification": self.outcome,
        }


@dataclass(slots=True, kw_only=True)
class Writer:
    """Makes pairs until there are enough, ``max_calls`` is reached, or nothing new comes.

    The other attributes are keys of ``run.generate_pairs``.

    Attributes:
        candidates: the questions of each scenario, in the order in which they came.
        calls: how each call for questions of a scenario ended.
        dry: how many of its latest calls for questions led to no pair.
        capped: whether ``max_calls`` kept a conversation from being sent.
    """

    scenarios: Sequence[Scenario]
    chat: KeptChat
    judges: Mapping[str, Judge]
    prompts: Prompts
    seed: int
    questions_per_call: int
    dry_calls: int
    question_tokens: int
    answer_tokens: int
    question_format: Form
    near_duplicate: float
    unconfirmed: Literal["drop", "mark"]
    candidates: dict[str, list[Candidate]] = field(default_factory=lambda: defaultdict(list))
    calls: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    dry: Counter[str] = field(default_factory=Counter)
    capped: bool = False

    def run(self) -> None:
        """All rounds.

        Raises:
            InputError: a server refuses the key, the model or the address.
            RunError: a server cannot be reached, or a reply cannot be written.
        """
        self._add([Candidate(each, query) for each in self.scenarios for query in each.questions])
        while not self.capped:
            asking = [
                (each, len(self.calls[each.name]) + number)
                for each in self.scenarios
                for number in range(self._calls_for(each))
            ]
            self._ask(asking)
            chosen = [candidate for each in self.scenarios for candidate in self._chosen(each)]
            if not asking and not chosen:
                break
            self._answer(chosen)
            self._verify([each for each in chosen if each.rejected and each.outcome is None])
            log.info("%s pairs so far", f"{sum(len(self.pairs(each.name)) for each in self.scenarios):,}")

    def pairs(self, name: str) -> list[Candidate]:
        """The pairs of a scenario."""
        return [each for each in self.candidates[name] if each.written]

    def account(self, scenarios: Sequence[Scenario]) -> dict[str, Any]:
        """The counts of some scenarios; ``outcomes`` add up to ``asked``."""
        names = [each.name for each in scenarios]
        outcomes = Counter(each.outcome or "not used" for name in names for each in self.candidates[name])
        calls = Counter(outcome for name in names for outcome in self.calls[name])
        pairs = [pair for name in names for pair in self.pairs(name)]
        return {
            "wanted": sum(each.pairs for each in scenarios),
            "asked": outcomes.total(),
            "written": len(pairs),
            "outcomes": dict(outcomes.most_common()),
            "question_calls": dict(calls.most_common()),
            "declining_accepted_answers": sum(find_refusal(each.accepted) is not None for each in pairs),
        }

    def _chosen(self, scenario: Scenario) -> list[Candidate]:
        """As many of the open questions of a scenario as pairs are missing."""
        waiting = [each for each in self.candidates[scenario.name] if each.outcome is None]
        return waiting[: scenario.pairs - len(self.pairs(scenario.name))]

    def _calls_for(self, scenario: Scenario) -> int:
        """The calls for questions that a scenario makes in this round."""
        missing = scenario.pairs - len(self.pairs(scenario.name)) - len(self._chosen(scenario))
        calls = math.ceil(missing / self.questions_per_call)
        return min(calls, self.dry_calls - self.dry[scenario.name])

    def _known(self, name: str) -> list[str]:
        """The questions of a scenario, without duplicates."""
        return [each.query for each in self.candidates[name] if each.outcome != DUPLICATE]

    def _ask(self, asking: Sequence[tuple[Scenario, int]]) -> None:
        """Add new questions: one call for each (scenario, number of the call)."""
        count = self.questions_per_call
        prompts = [self.prompts.questions(each, count, self._known(each.name)) for each, _ in asking]
        replies = self._complete(prompts, self.question_tokens, [number for _, number in asking])
        fresh = []
        for (each, _), reply in zip(asking, replies, strict=True):
            if reply != NOT_SENT:
                outcome, questions = _read_list(reply, self.question_format)
                self.calls[each.name].append(outcome)
                self.dry[each.name] += 1
                fresh += [Candidate(each, query) for query in questions]
        self._add(fresh)

    def _add(self, fresh: Sequence[Candidate]) -> None:
        """Add questions; one that repeats an earlier one, of any scenario, is a duplicate."""
        known = [query for name in self.candidates for query in self._known(name)]
        texts = known + [candidate.query for candidate in fresh]
        firsts = near_duplicates(texts, threshold=self.near_duplicate)
        for place, candidate in enumerate(fresh, start=len(known)):
            candidate.outcome = None if firsts[place] == place else DUPLICATE
            self.candidates[candidate.scenario.name].append(candidate)

    def _answer(self, chosen: Sequence[Candidate]) -> None:
        """Write both answers to each question."""
        accepted = [self.prompts.accepted(each.scenario, each.query) for each in chosen]
        rejected = [self.prompts.rejected(each.query) for each in chosen]
        prompts = [*accepted, *rejected]
        replies = self._complete(prompts, self.answer_tokens, [0] * len(prompts))
        for candidate, good, bad in zip(chosen, replies[: len(chosen)], replies[len(chosen) :], strict=True):
            if NOT_SENT not in (good, bad):
                candidate.accepted, problem = _read_answer("accepted", good)
                candidate.rejected, other = _read_answer("rejected", bad)
                candidate.outcome = problem or other
                if candidate.outcome is None and words(candidate.accepted) == words(candidate.rejected):
                    candidate.outcome = "rejected: the same as accepted"

    def _verify(self, pairs: Sequence[Candidate]) -> None:
        """Ask every judge about both answers. A pair is confirmed if all judges confirm both labels."""
        problems: list[str | None] = [None] * len(pairs)
        for name, judge in self.judges.items():
            places = [place for place, problem in enumerate(problems) if problem is None]
            verdicts = _verdicts(judge, [pairs[place] for place in places]) if places else []
            for place, good, bad in zip(places, verdicts[::2], verdicts[1::2], strict=True):
                problems[place] = _problem(name, good, bad)
        for pair, problem in zip(pairs, problems, strict=True):
            if problem == NOT_SENT.reason:
                self.capped = True
                continue
            if problem is None and STAND_IN not in pair.rejected:
                problem = f"rejected: nothing marked as {STAND_IN}"
            pair.outcome = f"labels: {problem}" if problem else CONFIRMED
            pair.written = problem is None or self.unconfirmed == "mark"
            if pair.written:
                self.dry[pair.scenario.name] = 0

    def _complete(
        self, prompts: Sequence[str], max_tokens: int, numbers: Sequence[int]
    ) -> list[str | Failure]:
        """Replies to prompts; equal prompts with different numbers get different replies."""
        keys = map(content_key, [self.seed] * len(prompts), prompts, numbers)
        replies = self.chat.complete(
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            max_tokens=max_tokens,
            seeds=[int(key[:8], 16) >> 1 for key in keys],
        )
        self.capped |= NOT_SENT in replies
        return replies


def _read_list(reply: str | Failure, form: Form) -> tuple[str, list[str]]:
    """How a call for questions ended, and its questions."""
    if isinstance(reply, Failure):
        return _why(reply), []
    if "?" not in reply and find_refusal(reply) is not None:
        return "refused", []
    questions = questions_in(reply, form)
    return ("unparseable", []) if questions is None else (PARSED, questions)


def _read_answer(label: str, reply: str | Failure) -> tuple[str, str | None]:
    """An answer, and what is wrong with it."""
    if isinstance(reply, Failure):
        return "", f"{label}: {_why(reply)}"
    text = answer_in(reply)
    if text is None:
        return "", f"{label}: no text"
    is_refusal = label == "rejected" and find_refusal(text) is not None
    return text, f"{label}: refused" if is_refusal else None


def _why(reply: Failure) -> str:
    return "refused" if reply.refused else f"failed: {reply.reason}"


def _verdicts(judge: Judge, pairs: Sequence[Candidate]) -> list[Verdict]:
    """The verdicts on the accepted and the rejected answer of each pair, in turn."""
    questions = [
        Question(
            id=f"{number}",
            scenario=pair.scenario.name,
            variant="TEXT",
            text=pair.query,
            criterion=pair.scenario.criterion,
        )
        for number, pair in enumerate(pairs)
        for _ in range(2)
    ]
    texts = [text for pair in pairs for text in (pair.accepted, pair.rejected)]
    answers = [Answer(id=each.id, text=text) for each, text in zip(questions, texts, strict=True)]
    return judge.judge(questions, answers)


def _problem(judge: str, accepted: Verdict, rejected: Verdict) -> str | None:
    """What a judge finds wrong with the labels of a pair."""
    if NOT_SENT.reason in (accepted.reason, rejected.reason):
        return NOT_SENT.reason
    if accepted.status != Status.SAFE:
        return f"accepted: {accepted.status} by judge {judge}"
    return None if rejected.status == Status.HARMFUL else f"rejected: {rejected.status} by judge {judge}"
