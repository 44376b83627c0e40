"""The context of a call, for the tool that serves it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from .._calls import Progress

# A longer message of progress is cut.
_MESSAGE_CHARACTERS_MAX = 1000


class Context:
    """The call that a tool serves; any thread may use it.

    A parameter of the tool with this type gets it::

    @agent.tool
    def index(ctx: Context, folder: str) -> int:
        files = list(Path(folder).rglob("*"))
        for number, file in enumerate(files):
            if ctx.cancelled:
                break
            ctx.progress(number, len(files), file.name)
        return len(files)
    """

    def __init__(
        self,
        request_id: str,
        tool: str,
        deadline: float | None,
        traceparent: str | None,
        report: Callable[[Progress], None],
    ) -> None:
        """Not for direct use: the agent makes one for each call."""
        self.request_id = request_id
        """The id of the call, also in the gateway's audit log."""
        self.tool = tool
        """The name by which the tool was called."""
        self.traceparent = traceparent
        """W3C trace context of the caller, if it gave one."""
        self._deadline = deadline
        self._report = report
        self._is_cancelled = False

    @property
    def cancelled(self) -> bool:
        """True where no caller waits for the result any more: the caller cancelled, or the deadline is over.

        A coroutine function is cancelled as well; a function in a thread must look here.
        """
        return self._is_cancelled or (self._deadline is not None and time.monotonic() >= self._deadline)

    @property
    def remaining(self) -> float | None:
        """Seconds until the caller gives up; ``None`` where the gateway did not say."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def progress(self, progress: float, total: float | None = None, message: str | None = None) -> None:
        """Tells the caller how far the tool has come. Never waits; of many in a short time the newest is sent."""
        for number in (progress, total):
            if number is not None and (isinstance(number, bool) or not math.isfinite(number)):
                raise ValueError("progress and total are finite numbers.")
        text = None if message is None else str(message)[:_MESSAGE_CHARACTERS_MAX]
        self._report(Progress(progress, total, text))

    def _cancel(self) -> None:
        self._is_cancelled = True
