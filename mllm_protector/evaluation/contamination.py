"""What is known of a benchmark's questions in the data that a guard was trained on.

The trainings look for the questions and write into ``guard.json`` which ones they found, as digests. This
only brings those together with the questions that are asked now.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_protector.data.duplicates import Finding, check_contamination, question_digest
from mllm_protector.records import Question


def seen_in_training(
    questions: Sequence[Question], name: str, trained: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any] | None]:
    """What the training of each part found of the questions.

    Args:
        questions: those that are asked.
        name: of the benchmark.
        trained: part of the guard -> the ``data`` of its guard file.

    Returns:
        Part -> ``None`` where nobody looked, else ``same_questions``: whether just these were looked for;
        ``asked``: how many different ones there are; ``found``: how many of them stand in the data;
        ``scenarios``: those by scenario; ``rows``: the texts that hold them (at most so many, if others were
        looked for); ``removed``: whether those were not learnt from; ``threshold``: see ``QuestionIndex``.
    """
    # A search in no text at all counts the questions and tells their fingerprint, as the training's did.
    asked = check_contamination((), {name: [question.text for question in questions]}).findings[name]
    scenarios = {question_digest(question.text): question.scenario for question in questions}
    found: dict[str, dict[str, Any] | None] = {}
    for part, data in trained.items():
        checked: Mapping[str, Mapping[str, Any]] = data.get("contamination") or {}
        same = (entry for entry in checked.values() if entry["fingerprint"] == asked.fingerprint)
        entry = next(same, checked.get(name))
        found[part] = None if entry is None else _among(asked, scenarios, entry)
    return found


def _among(asked: Finding, scenarios: Mapping[str, str], entry: Mapping[str, Any]) -> dict[str, Any]:
    """What was found of the questions that are asked, by digest, where others may have been looked for."""
    rows = {digest: count for digest, count in entry["found"].items() if digest in scenarios}
    return {
        "same_questions": entry["fingerprint"] == asked.fingerprint,
        "asked": asked.questions,
        "found": len(rows),
        "scenarios": dict(sorted(Counter(scenarios[digest] for digest in rows).items())),
        "rows": min(entry["rows"], sum(rows.values())),
        "removed": entry["removed"],
        "threshold": entry["threshold"],
    }


def contamination_notes(name: str, contamination: Mapping[str, dict[str, Any] | None]) -> list[str]:
    """What nobody may overlook: parts of the guard that learnt from a benchmark's questions."""
    learnt = [
        f"{part} ({found['found']:,} of {found['asked']:,} different questions)"
        for part, found in contamination.items()
        if found and found["found"] and not found["removed"]
    ]
    if not learnt:
        return []
    return [
        f"Contaminated: questions of {name} stand, nearly word for word, in the training data of"
        f" the {' and the '.join(learnt)}, so on new questions the guard may do worse than these figures say."
    ]
