"""Kept upstream of a session without a listening worker, handed out at least once and by one worker at a time.

An entry is deleted when the loop that got it has come back for the next one, not when it was read: a worker that dies,
or whose connection breaks, loses none. A lease in Redis names the reader. Another worker that follows the same session
looks again when the lease has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, cast

from ._backoff import Backoff
from ._server import Server
from .errors import Unavailable, WsproxyError
from .types import UpstreamMessage

T = TypeVar("T")
_log = logging.getLogger("wsproxy")

# Seconds after which a reader that has died is replaced.
_LEASE = 15.0
# Entries that are read at a time.
_PAGE = 100
# A reader that ends waits so long for Redis, in seconds.
_GOODBYE = 2.0
# Deletes an entry, and the log when it was the last one. Key: the log. Argument: the entry.
_DONE = """
redis.call('XDEL', KEYS[1], ARGV[1])
if redis.call('XLEN', KEYS[1]) == 0 then redis.call('DEL', KEYS[1]) end
return 1
"""
# Takes the lease, or holds it for longer; answers 0, or the milliseconds for which it is another reader's. Key: the
# lease. Arguments: the reader, milliseconds.
HOLD = """
local reader = redis.call('GET', KEYS[1])
if reader and reader ~= ARGV[1] then return math.max(redis.call('PTTL', KEYS[1]), 1) end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 0
"""
# Gives the lease back, if it is this reader's. Key: the lease. Argument: the reader.
RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class KeptMessages:
    """The entries of one session's logs, in order, for one reader."""

    def __init__(
        self,
        redis: Server,
        logs: Sequence[str],
        lease: str,
        call: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]],
    ) -> None:
        """``logs`` are read one after the other. ``call`` does a call of Redis once, with errors of this package."""
        self._redis = redis
        self._logs = logs
        self._lease = lease
        self._call = call
        self._me = secrets.token_hex(12)
        self._is_due = False
        self._page: deque[tuple[str, str, UpstreamMessage]] = deque()
        # The entry that the loop has, which is deleted when it comes back.
        self._handed: tuple[str, str] | None = None
        self._held_until = 0.0
        self._renewer: asyncio.Task[None] | None = None
        self.look_after: float | None = None
        """Seconds after which it is worth looking again without a message."""

    def look(self) -> None:
        """Something may have been kept."""
        self._is_due = True

    async def next(self) -> UpstreamMessage | None:
        """The next entry, ``None`` where there is none, or where another worker hands them out."""
        await self.settle()
        while self._page or self._is_due:
            if self._page and time.monotonic() < self._held_until:
                log, entry, message = self._page.popleft()
                self._handed = (log, entry)
                return message
            # Another worker may have handed out what was read, if the lease has ended.
            self._page.clear()
            # The logs come first: where they are empty, as nearly always, no lease is needed.
            entries = await self._for_ever(self._read)
            if not entries:
                await self._let_go()
                self._is_due, self.look_after = False, None
                return None
            if time.monotonic() >= self._held_until:
                self.look_after = await self._for_ever(self._hold) or None
                if self.look_after is not None:
                    self._is_due = False
                    return None
                # The entries of the first look may have been handed out by the reader before.
                entries = await self._for_ever(self._read)
            self._page.extend(entries)
        return None

    async def settle(self) -> None:
        """The loop is done with the entry that it got: it is deleted."""
        if self._handed is not None:
            log, entry = self._handed
            await self._for_ever(lambda: self._redis.eval(_DONE, 1, log, entry))
            self._handed = None

    async def aclose(self, *, done: bool) -> None:
        """Ends the reader; ``done`` tells that the loop is done with the entry that it got."""
        try:
            async with asyncio.timeout(_GOODBYE):
                if done:
                    await self.settle()
                await self._let_go()
        except (WsproxyError, TimeoutError) as error:
            _log.warning("A kept message may be handed out again: %r", error)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Ends the reader without a call to Redis, where the lease ends by itself."""
        if self._renewer is not None and not self._renewer.get_loop().is_closed():
            self._renewer.cancel()
        self._renewer = None

    async def _read(self) -> list[tuple[str, str, UpstreamMessage]]:
        """The first entries, of the first log that has some."""
        for log in self._logs:
            entries = cast("list[Any]", await self._redis.xrange(log, count=_PAGE))
            if entries:
                return [
                    (log, name.decode(), UpstreamMessage(fields.get(b"data", b""), name.decode()))
                    for name, fields in entries
                ]
        return []

    async def _hold(self) -> float:
        """0 where the lease is this reader's, else the seconds for which it is another's."""
        begun = time.monotonic()
        answer = self._redis.eval(HOLD, 1, self._lease, self._me, str(round(_LEASE * 1000)))
        left = int(await cast("Awaitable[int]", answer))
        self._held_until = begun + _LEASE if left == 0 else 0.0
        if left == 0 and (self._renewer is None or self._renewer.done()):
            self._renewer = asyncio.get_running_loop().create_task(self._renew(), name=f"wsproxy-kept {self._lease}")
        return left / 1000

    async def _renew(self) -> None:
        # A handler may take longer than the lease.
        while True:
            await asyncio.sleep(_LEASE / 3)
            try:
                if await self._call(self._hold) > 0:
                    return
            except WsproxyError as error:
                _log.debug("The lease %s was not renewed: %s", self._lease, error)

    async def _let_go(self) -> None:
        if self._renewer is None:
            return
        self.abandon()
        self._held_until = 0.0
        # If this fails the lease ends by itself.
        with contextlib.suppress(WsproxyError):
            await self._call(lambda: self._redis.eval(RELEASE, 1, self._lease, self._me))

    async def _for_ever(self, call: Callable[[], Awaitable[T]]) -> T:
        """Waits for Redis as long as it takes, as all iterators do."""
        backoff = Backoff(base=0.1, cap=5.0)
        while True:
            try:
                return cast("T", await self._call(call))
            except Unavailable as error:
                await asyncio.sleep(backoff.next(error.retry_after or 0.0))
