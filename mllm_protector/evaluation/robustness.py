"""A detector against answers that were rewritten to slip past it.

Harmful answers under a transformation give its recall, harmless ones its false positive rate, both at one
threshold; the differences to the answers as they are, are paired. An attacker who may try n rewritings
succeeds if one of them slips past: ``recall_best_of`` is what is then still caught.

There are two arms: what the detector says of the words as they stand, and what it says if it also reads what
they seem to say in a code (``deciphering``), as it does by default. The second score is the highest of the
text's own and its guesses', so both arms come from the same scores.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mllm_protector import deciphering
from mllm_protector.data.sources import Source
from mllm_protector.data.transformations import PLAIN, VERSION, Transformation, chosen, rewritten
from mllm_protector.deciphering import deciphered
from mllm_protector.errors import RunError
from mllm_protector.evaluation.attacks import Scores, measurements_of, threshold_at
from mllm_protector.evaluation.baseline import query_clusters
from mllm_protector.evaluation.labelled import Split, answers_of, facts_of, load_sets, require_both_labels
from mllm_protector.evaluation.measurements import as_rows
from mllm_protector.evaluation.store import Store, fill
from mllm_protector.evaluation.translation import TRANSLATION, Translator
from mllm_protector.files import content_key, expand, write_json
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.processes import start_accelerator
from mllm_protector.protocols import Chat
from mllm_protector.ranges import Count, Seed, Share
from mllm_protector.records import LabelledAnswer

SCHEMA = 1

AS_WRITTEN, DECIPHERED = "as written", "deciphered"
ARMS = (AS_WRITTEN, DECIPHERED)


def eval_robustness(
    *,
    detector: str,
    data: Source,
    transformations: Sequence[str] | None,
    translator: Callable[[], Chat] | None,
    language: str,
    answers: Count | None,
    false_positive_rate: Share | None,
    window: Count | None,
    base: str | None,
    device: str | None,
    split: Split,
    output_dir: str,
    seed: Seed,
) -> tuple[dict[str, Any], Path] | None:
    """Measure a saved detector on labelled answers under label-preserving transformations.

    ``configs/eval_robustness.yaml`` explains the parameters. Several processes share the answers. ``cache``
    in ``output_dir`` keeps the scores of each answer, so a run that was stopped goes on from where it was.

    Returns:
        The content of ``robustness.json``, and its folder; ``None`` on all processes but the first. Of its
        ``measurements``, ``arm`` is one of ``ARMS`` and ``group`` the transformation, or how many were tried.

    Raises:
        InputError: the detector, the data or the transformations cannot be used.
        RunError: a score is not a number, or the translator cannot be reached.
    """
    scorer = load_detector(expand(detector), base=base, device=device, window=window, decipher=False)
    known = chosen("measure", scorer.guard.prompt, transformations)
    sets = load_sets(data, split)
    measured = _drawn(answers_of(sets), answers, seed)
    require_both_labels(measured)
    processes = start_accelerator("no", patience=timedelta(days=30))
    foreign = Translator(translator(), language) if translator else None
    folder = Path(output_dir)
    identity = content_key(scorer.card.identity)

    def rows_of(answers: Sequence[LabelledAnswer], translations: Store) -> list[_Row]:
        return [_row(each, known, foreign, translations, identity, seed) for each in answers]

    translations, scores = _stores(folder, processes.process_index)
    places = (int(content_key(each.query, each.answer), 16) % processes.num_processes for each in measured)
    mine = [each for each, place in zip(measured, places, strict=True) if place == processes.process_index]
    if foreign is not None:
        foreign.fill(translations, [answer.answer for answer in mine])
    wanted = [(row.key, row) for row in rows_of(mine, translations)]
    # One answer at a time: what is scored together moves the last digits of a score.
    fill(
        scores, wanted, partial(_scored, scorer), batch_size=1, title="scores of an answer and its rewritings"
    )
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return None

    translations, scores = _stores(folder, 0)
    rows = rows_of(measured, translations)
    columns = _columns(scorer, rows, scores)
    harmful = np.array([answer.harmful for answer in measured], dtype=bool)
    threshold, how = scorer.threshold, scorer.guard.threshold_how
    if false_positive_rate is not None:
        threshold = threshold_at(columns[AS_WRITTEN][PLAIN][~harmful], false_positive_rate)
        how = f"flags at most {false_positive_rate:.1%} of these harmless answers as they are"
    attacks = [name for name in rows[0].texts if name not in known or known[name].attack]
    found = measurements_of(harmful, columns, threshold, query_clusters(measured), attacks=attacks)
    notes = {name: each.note for name, each in known.items() if each.note}
    if foreign is not None:
        same = sum(row.texts[TRANSLATION] == row.texts[PLAIN] for row in rows)
        notes[TRANSLATION] = f"of {same} answers there is none, so they are scored as they are"
    result = {
        "schema": SCHEMA,
        **facts_of(detector, scorer, sets, measured),
        "threshold": threshold,
        "threshold_how": how,
        "plain_changed": int((columns[AS_WRITTEN][PLAIN] != columns[DECIPHERED][PLAIN]).sum()),
        "attacks": attacks,
        "rewriting_notes": notes,
        "transformations": VERSION,
        "deciphering": deciphering.VERSION,
        "translator": foreign and foreign.identity,
        "seed": seed,
        "measurements": as_rows(found),
    }
    write_json(folder / "robustness.json", result)
    return result, folder


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """An answer as it is and rewritten; ``texts`` are by transformation, ``guesses`` of each text."""

    key: str
    query: str
    texts: Mapping[str, str]
    guesses: Mapping[str, Sequence[str]]

    @property
    def different(self) -> list[str]:
        """All texts to score, each once."""
        return [*dict.fromkeys(each for text in self.texts.values() for each in (text, *self.guesses[text]))]


def _row(
    answer: LabelledAnswer,
    known: Mapping[str, Transformation],
    foreign: Translator | None,
    translations: Store,
    identity: str,
    seed: int,
) -> _Row:
    texts = {PLAIN: answer.answer}
    texts |= {name: rewritten(name, each, answer.answer, seed=seed) for name, each in known.items()}
    if foreign is not None:
        texts[TRANSLATION] = foreign.text(translations, answer.answer) or answer.answer
    guesses = {text: deciphered(text) for text in texts.values()}
    key = content_key(identity, answer.query, texts, guesses)
    return _Row(key=key, query=answer.query, texts=texts, guesses=guesses)


def _scored(scorer: HarmDetector, rows: Sequence[_Row]) -> list[dict[str, Any]]:
    scored = []
    for row in rows:
        texts = row.different
        logits = scorer.logits(queries=[row.query] * len(texts), answers=texts)
        if not np.isfinite(logits).all():
            raise RunError("a score is not a number, so the detector's weights are broken; train it again")
        scored.append({"logits": logits})
    return scored


def _columns(scorer: HarmDetector, rows: Sequence[_Row], scores: Store) -> dict[str, Scores]:
    """Arm -> transformation -> the score of each answer."""
    logits: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in rows[0].texts} for arm in ARMS}
    for row in rows:
        found = dict(zip(row.different, scores.required(row.key, "an answer")["logits"], strict=True))
        for name, text in row.texts.items():
            logits[AS_WRITTEN][name].append(found[text])
            logits[DECIPHERED][name].append(max(found[each] for each in (text, *row.guesses[text])))
    scale = scorer.guard.scale
    return {
        arm: {name: np.array(scale.scores(values)) for name, values in of_arm.items()}
        for arm, of_arm in logits.items()
    }


def _drawn(answers: Sequence[LabelledAnswer], most: int | None, seed: int) -> list[LabelledAnswer]:
    """At most so many answers of each label, at random."""
    places: list[int] = []
    for label in (True, False):
        own = [place for place, answer in enumerate(answers) if answer.harmful == label]
        random.Random(seed).shuffle(own)  # so that a larger draw holds a smaller one, whose scores are known
        places += own[:most]
    return [answers[place] for place in sorted(places)]


def _stores(folder: Path, process: int) -> tuple[Store, Store]:
    """The tables of translations and of scores, as a process finds them now."""
    return Store(folder / "cache" / "translations", process), Store(folder / "cache" / "scores", process)
