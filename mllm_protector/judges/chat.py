"""The chat judge: a language model decides by the benchmark's own criteria.

MM-SafetyBench's judge is GPT-4, which sees the answer only, and one of six criteria by scenario (its
``evaluation.py``). Our wording is our own, so figures compare with published ones only where a user pastes
the official wording and names the same model.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from mllm_protector.errors import InputError
from mllm_protector.judges import criteria, replies
from mllm_protector.judges.asking import AskingJudge, Request
from mllm_protector.judges.fencing import checked, fenced, filled, nonce, readable
from mllm_protector.protocols import Card, Chat
from mllm_protector.ranges import Count
from mllm_protector.records import Question
from mllm_protector.scenarios import Criterion


class ChatJudge(AskingJudge):
    """Asks a chat model for a verdict on each answer.

    The answer stands between marks with a nonce that it cannot contain, and with our wording a verdict counts
    only if it repeats the nonce: an answer that dictates a verdict dictates the wrong line. A pasted wording
    keeps its own form of reply, the one word "safe" or "unsafe", so there an answer may still talk a judge
    into it. A reply that is no verdict is asked for once more.
    """

    if_cut = "raise judges.chat.max_tokens; a model that thinks aloud needs 1024 or more"

    def __init__(
        self,
        *,
        chat: Callable[[], Chat],
        max_tokens: Count,
        show_question: bool,
        templates: Mapping[str, str] | None = None,
    ) -> None:
        """Set the judge up; the model is only made when it is needed.

        Args:
            chat: makes the model.
            max_tokens: the longest reply.
            show_question: also show the question, not the answer alone; a pasted template says so itself.
            templates: criterion -> wording that replaces ours, with the field ``{answer}`` and, if it wants
                it, ``{question}``; it must ask for one of the words safe and unsafe and nothing else.

        Raises:
            InputError: an unknown criterion, or a template with other fields.
        """
        super().__init__(chat, max_tokens)
        self.show_question = show_question
        self.templates: dict[Criterion, str] = {}
        for name, template in (templates or {}).items():
            try:
                self.templates[Criterion(name)] = checked(template)
            except ValueError as error:
                known = f" (criteria: {', '.join(Criterion)})" if name not in list(Criterion) else ""
                raise InputError(f"templates.{name}: {error}{known}") from None
        self._settings = _digest(
            {
                "ours": [criteria.JUDGE, criteria.DATA, criteria.AGAIN, criteria.SAFE],
                "pasted": self.templates,
                "show_question": show_question,
                "parser": replies.VERSION,
            }
        )

    @property
    def card(self) -> Card:
        """The model, the wording, and how replies are read."""
        return Card(
            identity={
                "judge": "chat",
                "chat": self.chat.card.identity,
                "wording": self._settings,
                "pasted": sorted(self.templates),
                "show_question": self.show_question,
                "max_tokens": self.max_tokens,
                "parser": replies.VERSION,
            },
            reads_question=self.show_question
            or any("{question}" in text for text in self.templates.values()),
        )

    def _request(self, question: Question, answer: str) -> Request:
        template = self.templates.get(question.criterion)
        asked, shown = readable(question.text), readable(answer)
        with_question = self.show_question if template is None else "{question}" in template
        # What is not shown must not change the prompt: the same prompt is judged once.
        mark = nonce(self._settings, [asked, shown] if with_question else [shown])
        query, text = fenced("QUESTION", asked, mark), fenced("ANSWER", shown, mark)
        data = criteria.DATA.format(nonce=mark)
        if template is None:
            prompt = criteria.JUDGE.format(
                data=data,
                fenced=f"{query}\n\n{text}" if with_question else text,
                safe=criteria.SAFE[question.criterion],
                nonce=mark,
            )
        else:
            prompt = f"{data}\n\n{filled(template, question=query, answer=text)}"
        return Request(
            messages=(("user", prompt),),
            read=lambda reply: replies.single_word(reply, shown) if template else replies.stated(reply, mark),
            again=(("user", f"{prompt}\n\n{criteria.AGAIN}"),),
        )


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
