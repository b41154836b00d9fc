"""Text to be judged, made fit to stand in a judge's prompt: readable, and unable to leave its place.

Only the copy in the prompt is changed, never the answer that is kept.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

from mllm_protector.prompts import pieces, require_fields

_NEW_LINE = re.compile(r"\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_MARK = re.compile(r"[\[［【〔](?=\W*(?:BEGIN|END)\b)", re.IGNORECASE)
_TOKEN = re.compile(
    r"<(?=\||｜|<SYS|<?/SYS"
    r"|/?(?:s|bos|eos|pad|unk|think|start_of_turn|end_of_turn|image|video|audio)>)|\[(?=/?INST\])",
    re.IGNORECASE,
)


def readable(text: str) -> str:
    r"""A copy without invisible characters, that no reader can take for marks of ours or of a chat template.

    Zero-width and bidirectional controls go; line ends become ``\n``; the bracket of what looks like one of
    our marks becomes round; what looks like a special token is broken by a space.
    """
    shown = "".join(
        character
        for character in _NEW_LINE.sub("\n", text)
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
    )
    return _TOKEN.sub(lambda found: f"{found.group()} ", _MARK.sub("(", shown))


def nonce(settings: str, texts: Sequence[str]) -> str:
    """Hex digits that none of the texts contains; the same texts and settings always get the same.

    A text cannot hold its own digest; it is lengthened all the same until it does not occur.
    """
    digest = hashlib.sha256("\0".join([settings, *texts]).encode()).hexdigest()
    inside = "\0".join(texts).lower()
    return next(digest[:length] for length in range(8, 65, 4) if digest[:length] not in inside)


def fenced(name: str, text: str, nonce: str) -> str:
    """The text between marks that carry the nonce."""
    return f"[BEGIN {name} {nonce}]\n{text}\n[END {name} {nonce}]"


def checked(template: str) -> str:
    """A pasted template, if it has the field ``{answer}`` and no other but ``{question}``, each once.

    Raises:
        ValueError: other fields.
    """
    with_question = any(name == "question" for _, name in pieces(template))
    return require_fields(template, {"answer", "question"} if with_question else {"answer"})


def filled(template: str, *, question: str, answer: str) -> str:
    """A template with its fields filled in; braces in the texts stay as they are."""
    values = {"question": question, "answer": answer}
    return "".join(text + (values[name] if name else "") for text, name in pieces(template))
