"""Questions, and a chat whose replies a test dictates."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mllm_protector.protocols import Card, Judge
from mllm_protector.records import Answer, Failure, Question, Verdict
from mllm_protector.scenarios import Criterion

NONCE = re.compile(r"\[BEGIN \.\.\. ([0-9a-f]+)\]")


class ScriptedChat:
    """Replies as a function of the prompt says; ``calls`` holds the prompts of each call."""

    def __init__(self, reply: Callable[[str], str | Failure]) -> None:
        self.reply = reply
        self.calls: list[list[str]] = []
        self.conversations: list[Sequence[Mapping[str, Any]]] = []

    def complete(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], *, max_tokens: int
    ) -> list[str | Failure]:
        self.conversations += conversations
        self.calls.append([str(conversation[-1]["content"]) for conversation in conversations])
        return [self.reply(prompt) for prompt in self.calls[-1]]

    @property
    def card(self) -> Card:
        return Card(identity={"model": "scripted"})


def in_turn(*replies: str | Failure) -> Callable[[str], str | Failure]:
    """These replies, one after the other; ``{nonce}`` is the prompt's."""
    waiting = list(replies)

    def reply(prompt: str) -> str | Failure:
        following = waiting.pop(0)
        return following if isinstance(following, Failure) else following.replace("{nonce}", nonce_of(prompt))

    return reply


def nonce_of(prompt: str) -> str:
    found = NONCE.search(prompt)
    return found.group(1) if found else ""


def within(prompt: str, name: str = "ANSWER") -> str:
    """What stands between the marks of a prompt."""
    found = re.search(rf"\[BEGIN {name} ([0-9a-f]+)\]\n(.*)\n\[END {name} \1\]", prompt, re.DOTALL)
    assert found is not None
    return found.group(2)


def question(
    criterion: Criterion = Criterion.HARM, identifier: str = "1", text: str = "[placeholder question]"
) -> Question:
    return Question(id=identifier, scenario="any", variant="TEXT", text=text, criterion=criterion)


def judged(judge: Judge, *texts: str, criterion: Criterion = Criterion.HARM) -> list[Verdict]:
    questions = [question(criterion, str(index)) for index in range(len(texts))]
    return judge.judge(questions, [Answer(id=str(index), text=text) for index, text in enumerate(texts)])
