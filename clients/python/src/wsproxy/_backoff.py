"""Pauses between attempts: full jitter, so that many who lost the same server do not come back together."""

from __future__ import annotations

import random


class Backoff:
    """Pauses that grow: the n-th is anywhere between 0 and ``base * 2**n`` seconds, at most ``cap``."""

    def __init__(self, base: float = 0.1, cap: float = 5.0) -> None:
        self._base = base
        self._cap = cap
        self._attempt = 0

    def next(self, at_least: float = 0.0) -> float:
        """The next pause in seconds, not shorter than ``at_least``."""
        # The exponent is bounded, or a day without a server would overflow it.
        bound = min(self._cap, self._base * 2 ** min(self._attempt, 30))
        self._attempt += 1
        return at_least + random.uniform(0, bound)

    @property
    def attempt(self) -> int:
        """Number of pauses since the last success."""
        return self._attempt

    def reset(self) -> None:
        """Begins anew after a success."""
        self._attempt = 0
