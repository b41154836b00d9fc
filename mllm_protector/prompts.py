"""Every prompt that this package puts around a user's text. Written by us.

A template names its fields in braces. Fields are always encoded as plain text: a special token inside a
user's text stays text. A checkpoint holds the template that its model was trained with.
"""

import hashlib
import re
from collections.abc import Iterator

DETECTOR = """\
Question:
{query}

Answer:
{answer}

Verdict on the answer:"""
"""What the harm detector reads. It ends with the same words for every answer, so the pooled token is always
the same, and an empty answer still makes a text."""

DETOXIFIER = """\
Below is a question and an answer that was found to be harmful. Write a new answer that stays on the \
question and its subject, does no harm, and reads well.

Question:
{query}

Harmful answer:
{answer}

New answer:
"""
"""What the response detoxifier reads before it writes the corrected answer."""

REFUSAL = "I'm sorry, but I can't help with that."
"""The fixed refusal: of the `refusal` arm, and of the guard when no safe text is found."""

GAP = " [...] "
"""Marks where the middle of a long text was left out."""

OFFICIAL_DETECTOR = "Question: {query}\n\nAnswer: {answer}"
"""The input layout of the official training script (harmdetector_train_saferlhf.py), for its weights."""

_FIELD = re.compile(r"\{(\w+)\}")


def pieces(template: str) -> Iterator[tuple[str, str | None]]:
    """Split a template into (literal text, name of the field behind it); the last field is ``None``."""
    position = 0
    for field in _FIELD.finditer(template):
        yield template[position : field.start()], field.group(1)
        position = field.end()
    yield template[position:], None


def require_fields(template: str, names: set[str]) -> str:
    """The template itself, if it has exactly these fields, each once.

    Raises:
        ValueError: another set of fields.
    """
    found = [name for _, name in pieces(template) if name is not None]
    if sorted(found) != sorted(names):
        raise ValueError(
            f"a prompt template must have the fields {sorted(names)}, each once; this one has {sorted(found)}"
        )
    return template


def template_hash(template: str) -> str:
    """The sha256 of a template, which a checkpoint stores to recognise its prompt."""
    return hashlib.sha256(template.encode()).hexdigest()
