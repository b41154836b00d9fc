"""Questions of published test sets, as digests: what a guard is measured with, it must not be trained on.

The file beside this module holds no text, so every training can look for them. To add a set, add
``"name": "".join(sorted(map(question_digest, queries)))`` to it.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mllm_protector.data.duplicates import Contamination, Finding, question_digest
from mllm_protector.files import read_json

FILE = Path(__file__).with_name("test_questions.json")

DIGITS = 16
"""Of one digest."""


def known() -> dict[str, frozenset[str]]:
    """The digests (``question_digest``) of each test set's questions, by its name."""
    return {
        name: frozenset(row[start : start + DIGITS] for start in range(0, len(row), DIGITS))
        for name, row in read_json(FILE).items()
    }


def find(texts: Iterable[str]) -> Contamination:
    """The texts that are, word by word, a question of a test set; sets without a find are left out."""
    sets = known()
    anywhere = frozenset().union(*sets.values())
    rows, found = array("q"), Counter[str]()
    for row, text in enumerate(texts):
        if (digest := question_digest(text)) in anywhere:
            rows.append(row)
            found[digest] += 1
    findings = {}
    for name, digests in sets.items():
        if here := {digest: found[digest] for digest in sorted(digests & found.keys())}:
            findings[name] = Finding(
                questions=len(digests),
                fingerprint=hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest(),
                threshold=1.0,
                rows=sum(here.values()),
                found=here,
                examples=[],
            )
    return Contamination(rows=np.array(rows, np.int64), findings=findings)
