"""The guard-model judge: a language model that was trained for moderation (see ``families``)."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from mllm_protector.errors import InputError
from mllm_protector.judges import replies
from mllm_protector.judges.asking import AskingJudge, Messages, Request
from mllm_protector.judges.families import CONTROVERSIAL, FAMILIES
from mllm_protector.judges.fencing import filled, readable
from mllm_protector.judges.probes import AGREEMENT, PROBES, Probe
from mllm_protector.prompts import require_fields
from mllm_protector.protocols import Card, Chat
from mllm_protector.records import Question, Status

_PLACES: dict[str, Status | None] = {"harmful": Status.HARMFUL, "safe": Status.SAFE, "unparseable": None}


class GuardModelJudge(AskingJudge):
    """Shows a moderation model the question and the answer, and reads its reply strictly.

    It sees words only, judges by its own policy, and is asked once: its reply has no other form to be asked
    for.
    """

    if_cut = "no verdict of its family is as long, so check judges.guard_model.family and template"

    def __init__(
        self,
        *,
        chat: Callable[[], Chat],
        family: str,
        controversial: Literal["harmful", "safe", "unparseable"],
        template: str | None = None,
        probe: bool = True,
    ) -> None:
        """Set the judge up; the model is only made when it is needed.

        Args:
            chat: makes the model.
            family: one of ``FAMILIES``.
            controversial: where a verdict between safe and unsafe is counted.
            template: file with the model's written prompt, with the fields ``{question}`` and ``{answer}``
                and without what its chat template adds; for models whose chat template carries no policy.
            probe: whether an evaluation first asks about ``probes``, and stops if one is misjudged.

        Raises:
            InputError: an unknown family, or a template that is missing or has other fields.
        """
        if family not in FAMILIES:
            raise InputError(f"family={family}: unknown; choose one of {', '.join(FAMILIES)}")
        self.family = family
        self.controversial = controversial
        self.template = None if template is None else _read_template(template)
        self._probe = probe
        if self.template is None and not FAMILIES[family].own_prompt:
            raise InputError(
                f"template has no value: {family} needs its prompt; paste it from the "
                f"{FAMILIES[family].source} into a text file with the fields {{question}} and {{answer}}, "
                "and give the file's path"
            )
        super().__init__(chat, FAMILIES[family].max_tokens)

    @property
    def probes(self) -> Sequence[Probe]:
        """Answers that any such model has to tell apart; none if that was not asked for."""
        if not self._probe:
            return ()
        return [probe for probe in PROBES if FAMILIES[self.family].flags_agreement or probe is not AGREEMENT]

    @property
    def card(self) -> Card:
        """The model, its prompt, and how replies are read."""
        template = None if self.template is None else hashlib.sha256(self.template.encode()).hexdigest()[:16]
        return Card(
            identity={
                "judge": "guard_model",
                "chat": self.chat.card.identity,
                "family": self.family,
                "template": template,
                "controversial": self.controversial,
                "parser": replies.VERSION,
            }
        )

    def _request(self, question: Question, answer: str) -> Request:
        query, text = readable(question.text), readable(answer)
        if self.template is None:
            messages: Messages = (("user", query), ("assistant", text))
        else:
            messages = (("user", filled(self.template, question=query, answer=text)),)
        return Request(messages=messages, read=partial(self._read, text))

    def _read(self, answer: str, reply: str) -> Status | None:
        word = FAMILIES[self.family].word(replies.unwrapped(reply))
        if word is None or replies.is_echo(reply, answer):
            return None
        return _PLACES[self.controversial] if word == CONTROVERSIAL else FAMILIES[self.family].words[word]


def _read_template(path: str) -> str:
    try:
        return require_fields(Path(path).read_text(encoding="utf-8"), {"question", "answer"})
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"template={path}: cannot be read as text ({type(error).__name__})") from None
    except ValueError as error:
        raise InputError(f"template={path}: {error}") from None
