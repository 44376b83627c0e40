"""All sessions of an agent, served by as many workers as there are: each session by one of them at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from ._backend import Backend
from ._backoff import Backoff
from ._feeds import Subscription
from ._follower import entry
from .errors import InvalidRequest, Unavailable, WsproxyError
from .stream import TokenStream
from .types import Gap, GapCallback, Payload, Receipt, SessionEvent, UpstreamMessage

if TYPE_CHECKING:
    from .worker import Worker

_log = logging.getLogger("wsproxy")

# Sessions that are known to be open, of this worker and of others; further ones are passed over.
_KNOWN_MAX = 200_000
# A start does not wait longer than this for the way to the gateway, in seconds.
_START_SECONDS = 5.0
# Announcements of a moment are taken together, in seconds.
_MOMENT = 0.05
# Interval of the question whether clients are connected at all, in seconds.
_SWEEP_EVERY = 60.0
# Ended sessions of which the last handed-out message is remembered.
_REMEMBERED_MAX = 10_000
# Sessions in one call.
_BATCH = 500
# A worker that ends waits so long to give a session back, in seconds.
_GOODBYE = 2.0


class ServedSession:
    """A session that this worker serves: an asynchronous iterator over what its clients send.

    The iteration ends when the last client has been gone for a while, or the application ends, behind all messages
    that have come until then.
    """

    def __init__(self, worker: Worker, agent: str, session: str, is_kept_on: bool) -> None:
        """Not for direct use: :meth:`wsproxy.Worker.serve` makes them."""
        self._worker = worker
        self._agent = agent
        self._id = session
        self._messages: Subscription[UpstreamMessage] | None = None
        self._handed = 0
        # The last kept message that was handed out, where they stay and come again.
        self._is_kept_on = is_kept_on
        self._kept = (0, 0)
        self._is_over = False
        self._woken = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        """The session's id."""
        return self._id

    @property
    def agent(self) -> str:
        """The agent id under which its clients connected."""
        return self._agent

    def __aiter__(self) -> ServedSession:
        return self

    async def __anext__(self) -> UpstreamMessage:
        assert self._messages is not None
        while True:
            message = await anext(self._messages)
            kept = entry(message.event_id) if self._is_kept_on else None
            if kept is None or kept > self._kept:
                self._kept = kept or self._kept
                self._handed += 1
                return message

    async def send(self, message: Payload, **options: Any) -> Receipt:
        """Sends to all its clients: :meth:`wsproxy.Worker.send`."""
        return await self._worker.send(self._id, message, **options)

    def stream(self, stream_id: str | None = None, **options: Any) -> TokenStream:
        """A token stream to all its clients: :meth:`wsproxy.Worker.stream`."""
        return self._worker.stream(self._id, stream_id, **options)

    async def close(self, *, code: int | None = None, reason: str | None = None) -> int:
        """Ends all its connections: :meth:`wsproxy.Worker.close_session`."""
        return await self._worker.close_session(self._id, code=code, reason=reason)

    def _opened(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._woken.set()

    def _left(self, linger: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(linger, self._finish)

    def _finish(self) -> None:
        self._is_over = True
        self._woken.set()
        if self._messages is not None:
            self._messages.finish()


Handler: TypeAlias = Callable[[ServedSession], Awaitable[object]]
"""Serves one session: a coroutine function that iterates over it."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Options of serving; :meth:`wsproxy.Worker.serve` explains each."""

    lease: float
    linger: float
    grace: float
    sessions_max: int
    on_gap: GapCallback | None


class Serving:
    """Sessions being served; made by :meth:`wsproxy.Worker.serve`, used with ``async with``."""

    def __init__(self, worker: Worker, backend: Backend, agent: str, handler: Handler, options: ServeOptions) -> None:
        self._worker = worker
        self._backend = backend
        self._agent = agent
        self._handler = handler
        self._options = options
        self._me = secrets.token_hex(12)
        # Connections of each open session, also of those that other workers serve.
        self._open: dict[str, set[str]] = {}
        # Sessions that were opened since the last look.
        self._new: set[str] = set()
        self._changed = asyncio.Event()
        self._mine: dict[str, ServedSession] = {}
        # Sessions without a listening gateway at the last sweep.
        self._silent: set[str] = set()
        self._swept = time.monotonic()
        # Sessions that no worker served at the last look, and that this worker had no room for.
        self._passed: set[str] = set()
        self._warned = 0.0
        self._is_ending = False
        # Position behind which announcements are followed; `None` where the gateway keeps none.
        self._after: str | None = "0"
        self._kept: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._events: Subscription[SessionEvent] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def sessions(self) -> dict[str, ServedSession]:
        """The sessions that this worker serves now, by id."""
        return dict(self._mine)

    async def __aenter__(self) -> Serving:
        self._events = self._follow_anew()
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._confirmed()
        except TimeoutError:
            _log.warning("The sessions of %s cannot be served yet; it is tried on.", self._agent)
        except BaseException:
            await self._events.aclose()
            raise
        loop = asyncio.get_running_loop()
        for work, name in ((self._follow(), "follow"), (self._look_after(), "look after")):
            self._tasks.append(loop.create_task(work, name=f"wsproxy-serve {self._agent}: {name}"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_ending = True
        serving = [each._task for each in self._mine.values() if each._task is not None]
        for served in list(self._mine.values()):
            served._finish()
        try:
            if serving:
                await asyncio.wait(serving, timeout=self._options.grace)
        finally:
            for task in [*serving, *self._tasks]:
                task.cancel()
            if self._events is not None:
                await self._events.aclose()
            await asyncio.gather(*serving, *self._tasks, return_exceptions=True)

    # ---- which sessions there are ----

    def _follow_anew(self) -> Subscription[SessionEvent]:
        return self._worker.session_events(self._agent, after=self._after, on_gap=self._gap)

    async def _confirmed(self) -> None:
        assert self._events is not None
        try:
            await self._events.confirmed()
        except InvalidRequest:
            # Over HTTP, a gateway that keeps no announcements says so.
            await self._events.aclose()
            self._after = None
            self._events = self._follow_anew()
            await self._events.confirmed()

    async def _follow(self) -> None:
        backoff = Backoff(base=1.0, cap=30.0)
        while self._events is not None:
            try:
                await self._confirmed()
                # This comes before the log, which holds the changes since then.
                await self._read_open()
                async for event in self._events:
                    self._note(event)
                return
            except WsproxyError as error:
                _log.error("The sessions of %s cannot be followed; it is tried on: %s", self._agent, error)
            await self._events.aclose()
            await asyncio.sleep(backoff.next())
            self._events = self._follow_anew()

    async def _gap(self, gap: Gap) -> None:
        self._warn(f"Announcements of the sessions of {self._agent} were missed ({gap.reason}).")
        # This comes before the announcements behind the gap, which are handed out when this returns.
        await self._read_open()

    async def _read_open(self) -> None:
        """Learns of sessions whose opening the bounded log no longer has, where the gateways keep what is open."""
        try:
            async for session, connection in self._backend.open_sessions(self._agent):
                if connection not in self._open.get(session, ()):
                    self._note_opened(session, connection)
        except Unavailable:
            raise
        except WsproxyError as error:
            # For example, an ACL that allows the channels only.
            self._warn(f"Sessions of {self._agent} that the log no longer has are not found: {error}")

    def _note(self, event: SessionEvent) -> None:
        session = event.session_id
        if event.event == "opened":
            self._note_opened(session, event.connection_id)
        elif session in self._open:
            self._open[session].discard(event.connection_id)
            if not self._open[session]:
                self._forget(session)

    def _note_opened(self, session: str, connection: str) -> None:
        if session not in self._open and len(self._open) >= _KNOWN_MAX:
            self._warn(f"More than {_KNOWN_MAX} sessions are open: further ones are passed over.")
            return
        self._open.setdefault(session, set()).add(connection)
        self._silent.discard(session)
        self._new.add(session)
        self._changed.set()
        if (served := self._mine.get(session)) is not None:
            served._opened()

    def _forget(self, session: str) -> None:
        """Forgets a session without a connected client."""
        self._open.pop(session, None)
        self._new.discard(session)
        if (served := self._mine.get(session)) is not None:
            served._left(self._options.linger)

    # ---- whose they are ----

    async def _look_after(self) -> None:
        looked = 0.0
        while True:
            # All sessions now and then, which renews the leases; otherwise the new ones.
            is_full = time.monotonic() - looked >= self._options.lease / 3
            sessions = {*self._mine, *self._open} if is_full else set(self._new)
            self._new.clear()
            self._changed.clear()
            try:
                passed = await self._claim(list(sessions))
                if is_full:
                    self._say_passed(passed)
                    looked = time.monotonic()
                    await self._sweep()
            except WsproxyError as error:
                self._warn(f"The sessions of {self._agent} cannot be looked after: {error}")
                await asyncio.sleep(1.0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, looked + self._options.lease / 3 - time.monotonic())):
                    await self._changed.wait()
                    await asyncio.sleep(_MOMENT)

    def _room(self) -> int:
        return 0 if self._is_ending else self._options.sessions_max - len(self._mine)

    async def _claim(self, sessions: list[str]) -> set[str]:
        """Renews the leases of this worker's sessions, and takes others while it has room.

        Answers some of those that it had no room for and that no other worker serves.
        """
        mine = [each for each in sessions if each in self._mine]
        others = [each for each in sessions if each not in self._mine]
        for start in range(0, len(mine), _BATCH):
            await self._hold(mine[start : start + _BATCH])
        # Each worker begins elsewhere, so that not all of them want the same sessions; those that wait come first.
        first = random.randrange(len(others)) if others else 0
        others = others[first:] + others[:first]
        others.sort(key=lambda each: each not in self._passed)
        for start in range(0, len(others), _BATCH):
            if self._is_ending:
                break
            part = others[start : start + _BATCH]
            if len(part) > self._room():
                # Sessions that others serve must not use up the room.
                held = await self._backend.held(part, self._me)
                part = [each for each, is_held in zip(part, held, strict=True) if not is_held]
            while part and (room := self._room()) > 0:
                await self._hold(part[:room])
                part = part[room:]
            if self._room() <= 0:
                return set(part)
        return set()

    async def _hold(self, sessions: list[str]) -> None:
        answers = await self._backend.claim(sessions, self._me, self._options.lease)
        for session, is_mine in zip(sessions, answers, strict=True):
            served = self._mine.get(session)
            if served is not None and not is_mine and served._task is not None:
                _log.warning("Session %s was taken over by another worker.", session)
                served._task.cancel()
            elif served is None and is_mine:
                await self._begin(session)

    def _say_passed(self, passed: set[str]) -> None:
        # One that was opened a moment ago finds another worker until the next look.
        if passed & self._passed:
            self._warn(f"This worker serves {self._options.sessions_max} sessions: further ones must wait.")
        self._passed = passed

    async def _begin(self, session: str) -> None:
        if session not in self._open or self._is_ending:
            await self._backend.release(session, self._me)
            return
        served = self._mine[session] = ServedSession(self._worker, self._agent, session, self._backend.is_kept_on)
        served._kept = self._kept.pop(session, served._kept)
        served._task = asyncio.get_running_loop().create_task(self._serve(served), name=f"wsproxy-serve {session}")
        # One that is cancelled before it began has no chance to say that it is over.
        served._task.add_done_callback(
            lambda _: self._mine.pop(session, None) if self._mine.get(session) is served else None
        )

    async def _sweep(self) -> None:
        """Forgets sessions whose end was not announced: no gateway listens for their clients, twice in a row."""
        if time.monotonic() - self._swept < _SWEEP_EVERY:
            return
        self._swept = time.monotonic()
        silent: set[str] = set()
        sessions = list(self._open)
        for start in range(0, len(sessions), _BATCH):
            part = sessions[start : start + _BATCH]
            heard = await self._backend.has_clients(part)
            silent.update(each for each, is_heard in zip(part, heard, strict=True) if not is_heard)
        for session in silent & self._silent:
            self._forget(session)
        self._silent = silent - self._silent

    # ---- one session ----

    async def _serve(self, served: ServedSession) -> None:
        try:
            async with self._worker.upstream(served.id, on_gap=self._options.on_gap) as messages:
                served._messages = messages
                if served._is_over:
                    messages.finish()
                await self._handle(served, messages)
        except WsproxyError:
            _log.exception("Session %s cannot be served.", served.id)
        finally:
            if served._timer is not None:
                served._timer.cancel()
            if served._messages is not None and (left := served._messages.waiting):
                _log.warning("Session %s ends with %d messages that no handler got.", served.id, left)
            self._mine.pop(served.id, None)
            self._kept[served.id] = served._kept
            if len(self._kept) > _REMEMBERED_MAX:
                self._kept.popitem(last=False)
            with contextlib.suppress(WsproxyError, TimeoutError):
                async with asyncio.timeout(_GOODBYE):
                    await self._backend.release(served.id, self._me)
            if served.id in self._open:
                # A client came back in the last moment.
                self._new.add(served.id)
                self._changed.set()

    async def _handle(self, served: ServedSession, messages: Subscription[UpstreamMessage]) -> None:
        backoff, handed = Backoff(base=0.5, cap=30.0), -1
        while True:
            served._woken.clear()
            try:
                await self._handler(served)
            except Exception:
                # A message that its handler cannot bear would be the end of the session, given again and again.
                _log.exception("The handler of session %s failed. It goes on behind the present message.", served.id)
                await messages.settle()
                if served._is_over and served._handed == handed:
                    return
                if served._handed > handed:
                    backoff.reset()
                handed = served._handed
                await asyncio.sleep(backoff.next())
                continue
            if not served._is_over:
                # The handler wants no more of the present clients. The next one that connects begins anew.
                await served._woken.wait()
            if served._is_over:
                return

    def _warn(self, what: str) -> None:
        if time.monotonic() - self._warned > 30:
            self._warned = time.monotonic()
            _log.warning("%s", what)
