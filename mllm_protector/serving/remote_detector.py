"""A detector whose weights are elsewhere: texts become token ids here, and logits in vLLM's ``/classify``.

Scores are those of ``HarmDetector``: the same ids in the same windows, the highest logit of an answer, the
scale of ``guard.json``. A server is used once it has given the logits of the known answers in ``guard.json``.
It is asked for them again every few seconds, and after each failure before it is used.
"""

import asyncio
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mllm_protector.arguments import require_texts
from mllm_protector.data.encoding import DetectorEncoder
from mllm_protector.errors import InputError
from mllm_protector.models.detector import card_of, detector_encoder, worst_logits
from mllm_protector.models.guard_file import GuardFile, read_guard_file
from mllm_protector.models.known import TOLERANCE, difference
from mllm_protector.protocols import Card
from mllm_protector.serving.replicas import CHECK_S, Ask, ReplicaError, Replicas

ROWS = 32
"""Rows of one request; those of a batch are spread over all servers."""

HINTS = {
    400: "does it take token ids? A detector is served by vLLM, by its export",
    401: "it wants a key, whose environment variable the config names",
    404: "is this the server's root, without /v1, and was it started with --runner pooling?",
    422: "does it take token ids? A detector is served by vLLM, by its export",
}
"""What an error status to the known answers may mean."""


class RemoteDetector:
    """A detector behind vLLM; implements ``protocols.Detector``.

    Attributes:
        known: as in ``HarmDetector``.
    """

    def __init__(
        self,
        folder: str | Path,
        urls: Sequence[str],
        *,
        timeout_s: float = 10.0,
        tolerance: float = TOLERANCE,
        api_key_env: str | None = None,
        check_s: float = CHECK_S,
    ) -> None:
        """Ask every server for the known answers.

        Args:
            folder: of the exported detector; it may lack the weights.
            urls: the roots of the servers, such as ``http://10.0.0.5:8000``.
            timeout_s: the longest that one request may take; it is made twice at most.
            tolerance: in logits, of the known answers.
            api_key_env: the environment variable with the servers' key; ``None`` sends none.
            check_s: seconds between two checks.

        Raises:
            InputError: as ``read_guard_file``; no known answers, or others than the encoder makes; not an
                address, or no key.
            RunError: no server can be used; the message says why, for each.
        """
        folder = Path(folder)
        self.guard = read_guard_file(folder, "detector", served=True)
        self.encoder = detector_encoder(folder, self.guard)
        self.tolerance = tolerance
        self.known: dict[bytes, float] | None = None
        _require_known(self.encoder, self.guard)
        self._replicas = Replicas(
            "detector_urls",
            urls,
            self._examine,
            timeout_s=timeout_s,
            api_key_env=api_key_env,
            check_s=check_s,
        )

    @property
    def threshold(self) -> float:
        """Scores at or above it are harmful."""
        return self.guard.harmful_from

    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        """P(harmful) in [0, 1] of each answer to its query.

        Raises:
            InputError: not two lists of texts of the same length.
            RunError: the servers fail, or do not take these texts.
        """
        require_texts(queries=queries, answers=answers)
        windows = self.encoder.windows(queries=queries, answers=answers, window=self.guard.window)
        worst = worst_logits(windows, lambda rows: self._replicas.run(self._logits(rows)), self.known)
        return self.guard.scale.scores(worst)

    @property
    def card(self) -> Card:
        """What the scores depend on, wherever the servers are."""
        served = {"served": True, "tolerance": self.tolerance}
        return Card(identity={**card_of(self.guard, self.guard.window).identity, **served})

    def close(self) -> None:
        """Leave the servers alone."""
        self._replicas.close()

    async def _logits(self, rows: Sequence[Sequence[int]]) -> list[float]:
        parts = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
        found = await asyncio.gather(*(logits_of(self._replicas.ask, part) for part in parts))
        return [logit for logits in found for logit in logits]

    async def _examine(self, ask: Ask) -> str | None:
        known = self.guard.known
        try:
            found = await logits_of(ask, [each["ids"] for each in known])
        except ReplicaError as error:
            hint = HINTS.get(error.status or 0)
            return f"{error}; {hint}" if hint else str(error)
        return difference(known, found, self.tolerance)


async def logits_of(ask: Ask, rows: Sequence[Sequence[int]]) -> list[float]:
    """The logit of each row of ids.

    Raises:
        ReplicaError: as ``Ask``, or the answer holds something else.
    """
    body = {"input": [list(row) for row in rows], "use_activation": False}
    return await ask("/classify", body, partial(_read, rows))


def _read(rows: Sequence[Sequence[int]], content: Any) -> list[float]:
    data = sorted(content["data"], key=lambda each: each["index"])
    if [each["index"] for each in data] != [*range(len(rows))]:
        raise ValueError(f"answers {len(data)} rows of {len(rows)}")
    if widths := {len(each["probs"]) for each in data} - {1}:
        raise ValueError(f"gives {min(widths)} values for a text: a detector has one logit")
    read, sent = content["usage"]["prompt_tokens"], sum(map(len, rows))
    if read != sent:
        raise ValueError(f"has read {read} tokens of {sent}: it cuts texts or adds tokens")
    logits = [math.nan if (value := each["probs"][0]) is None else value for each in data]
    if not all(isinstance(logit, int | float) for logit in logits):
        raise ValueError("gives values that are not numbers")
    return logits


def _require_known(encoder: DetectorEncoder, guard: GuardFile) -> None:
    known = guard.known
    if not known:
        raise InputError(
            "detector_urls: guard.json has no known answers to compare those of a server with; export the "
            "detector again (python scripts/export_detector.py) and serve the export"
        )
    queries, answers = [each["query"] for each in known], [each["answer"] for each in known]
    made = encoder.windows(queries=queries, answers=answers, window=guard.window)
    if [rows[0] for rows in made] != [each["ids"] for each in known]:
        raise InputError(
            "detector_urls: this tokenizer makes other token ids than at the export; install the versions "
            f"that guard.json names ({guard.versions}), or export the detector again"
        )


load_remote_detector = RemoteDetector
"""The name under which the documentation offers it."""
