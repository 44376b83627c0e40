"""The rate of a client's messages: the gateway closes a connection that sends faster than its limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

# The gateway's defaults are 100 a second and 200 at once; a network may deliver what several pauses held back at once.
_PER_SECOND = 90.0
_BURST = 100


class Pace:
    """A bucket of ``burst`` messages that fills with ``per_second``; who waits is served in order."""

    def __init__(
        self,
        per_second: float = _PER_SECOND,
        burst: int = _BURST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_second = per_second
        self._burst = float(burst)
        self._clock = clock
        self._left = self._burst
        self._filled_at = clock()
        self._turns = asyncio.Lock()

    def wait(self) -> float:
        """The seconds until a message may be sent."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._filled_at) * self._per_second)
        self._filled_at = now
        return max(0.0, (1.0 - self._left) / self._per_second)

    async def turn(self) -> None:
        """Returns when a message may be sent, and counts it."""
        async with self._turns:
            await asyncio.sleep(self.wait())
            self._left -= 1.0
