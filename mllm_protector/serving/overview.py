"""What ``GET /state`` tells, and the page shows: this front, its guard and its upstream."""

import time
from typing import Any

from mllm_protector.serving.state import State

CHECKED_S = 5.0
"""Seconds for which an answer about the upstream holds."""


class Overview:
    """The state of one front; it asks the upstream now and then, whoever asks however often."""

    def __init__(self, state: State) -> None:
        """Bind the parts; nothing is asked."""
        self._state = state
        self._reachable = False
        self._checked = float("-inf")

    async def content(self, trusted: bool) -> dict[str, Any]:
        """All for a client that is ``trusted``; for others whether the parts answer, and counts."""
        state = self._state
        found: dict[str, Any] = {
            "guard_ready": state.guard.ready,
            "upstream_reachable": await self._upstream(),
            "keys_required": bool(state.settings.keys),
            "minutes": state.hour.minutes(),
        }
        if trusted:
            found |= {"latencies": state.hour.latencies(), **self._guard(), "policy": self._policy()}
        return found

    async def _upstream(self) -> bool:
        if time.monotonic() - self._checked > CHECKED_S:
            self._checked = time.monotonic()
            self._reachable = await self._state.upstream.reachable({})
        return self._reachable

    def _guard(self) -> dict[str, Any]:
        """The threshold in force and, where it is the detector's own, what it was chosen for."""
        said, policy = self._state.guard.state, self._state.settings.policy
        own = policy.threshold is None
        return {
            "threshold": said.get("threshold") if own else policy.threshold,
            "threshold_of": "detector" if own else "config",
            "promise": said.get("promise") if own else None,
            "other_thresholds": len(policy.model_thresholds) + len(policy.key_thresholds),
            "waiting": {name: said.get(f"{name}_waiting") for name in ("scoring", "rewriting")},
        }

    def _policy(self) -> dict[str, Any]:
        policy = self._state.settings.policy
        names = ("streaming", "on_flag", "on_error", "shadow")
        return {name: getattr(policy, name) for name in names}
