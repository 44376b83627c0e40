"""The client's loop: connect, resume, deliver once and in order, and come back. It knows no transport."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, TypeAlias

import httpx

from .._backoff import Backoff
from .._positions import order, parse
from ..errors import ConnectionClosed, GiveUp, InvalidRequest, NotSupported, Refused, Unavailable, WsproxyError
from ..types import Payload, SessionToken, encode
from ._advice import SLOW, Advice, after_close, after_refusal, is_normal
from ._message import Message
from ._transport import OPEN_TIMEOUT, Connection, Frame, Lost, NotOpened, Transport
from .streams import MergedStreams

_log = logging.getLogger("wsproxy")

Token: TypeAlias = str | SessionToken
TokenSource: TypeAlias = Token | Callable[[], Awaitable[Token] | Token]
"""A token, or a function that fetches a fresh one for each connection."""

State: TypeAlias = Literal["connecting", "open", "waiting", "closed"]
StateCallback: TypeAlias = Callable[[State], None]

# Messages that wait for the loop; beyond them the network waits, and the gateway decides.
_QUEUE_MAX = 1000
# Positions by which a repeated delivery is recognised.
_RECENT_MAX = 10_000
# The code of a try for which there was no token.
_NO_TOKEN = "no_token"
# A token function that takes longer has failed, in seconds.
_TOKEN_TIMEOUT = 30.0
# Seconds between two questions for a fresh token while one is in use.
_REFRESH_PAUSE_MIN = 1.0
# A connection that stood for so many seconds was a good one: the next pause is short again.
_STABLE = 5.0
# Seconds without a connection after which it is worth a warning, and between two of them.
_WARN_EVERY = 30.0


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a client."""

    token: TokenSource
    last_event_id: str | None
    give_up_after: float | None
    on_state: StateCallback | None
    events: bool
    auto_ack: bool = True
    refresh_ahead: float = 30.0


class Client:
    """A connection that comes back: an asynchronous iterator over messages, each once and in order.

    Notices of the gateway that concern the reader are among them: ``error`` (with ``code`` ``history_lost``, see
    :attr:`Message.is_history_lost`) and ``bus_recovered``. The iteration ends when the client or a worker ended the
    connection (:attr:`closed` says how). It raises :class:`~wsproxy.Refused` or :class:`~wsproxy.ConnectionClosed`
    where the gateway itself says that to come back is no use, and :class:`~wsproxy.GiveUp` where the token function
    raised that. Everything else passes, and the client tries again.
    """

    def __init__(self, transport: Transport, options: Options) -> None:
        """Not for direct use: :func:`connect_session` and :func:`connect_events` make clients."""
        if not callable(options.token) and not _text_of(options.token):
            raise InvalidRequest("The token must be a text, a SessionToken, or a function that gives one.")
        self._transport = transport
        self._options = options
        self._token_in_use = ""
        # The gateway's clock when this machine's monotonic one began.
        self._gateway_epoch: float | None = None
        self._refreshing = False
        # Until a worker's message comes over a connection, the gateway may still say where it begins.
        self._greeting = True
        self._down_since = time.monotonic()
        self._warned = 0.0
        self._position = options.last_event_id or ""
        self._resuming = False
        self._delivered = options.last_event_id
        self._queue: asyncio.Queue[Message | None] = asyncio.Queue(_QUEUE_MAX)
        self._recent: OrderedDict[str, bool] = OrderedDict()
        # Since the last loss of history: the streams that are known from their beginning.
        self._whole: set[str] | None = None
        self._asked_for: set[str] = set()
        self._unacked: Message | None = None
        self._connection: Connection | None = None
        self._is_open = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._refresher: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Future[None]] = set()
        self._error: WsproxyError | None = None
        self._given_up = False
        self._silence_max: float | None = None
        self._state: State = "connecting"
        self.streams: MergedStreams = MergedStreams()
        """The session's token streams as merged texts, up to date with the message that the loop has."""
        self.connection_id: str | None = None
        """The gateway's id of the connection, once known; another one after each reconnect."""
        self.closed: tuple[int, str] | None = None
        """Close code and reason, after the end."""

    @property
    def last_event_id(self) -> str | None:
        """The position of the last message that the loop got: keep it to go on later with another client."""
        return self._delivered

    @property
    def state(self) -> State:
        """``connecting``, ``open``, ``waiting`` (for the next attempt) or ``closed``."""
        return self._state

    async def __aenter__(self) -> Client:
        self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Client:
        return self

    async def __anext__(self) -> Message:
        self._start()
        if self._unacked is not None:
            done, self._unacked = self._unacked, None
            await self.ack(done)
        message = await self._queue.get() if not self._given_up else None
        if message is None or self._given_up:
            # A further call gets the same answer.
            self._given_up = True
            if self._error is not None:
                raise self._error
            raise StopAsyncIteration
        # Over a connection that carries no positions the notice names its own.
        told = message.object.get("event_id") if message.is_history_lost else None
        self._delivered = message.event_id or told or self._delivered
        self.streams.feed(message.object)
        if message.object.get("ack") is True and self._options.events and self._options.auto_ack:
            self._unacked = message
        return message

    async def send(self, message: Payload, *, timeout: float = 30.0) -> None:
        """Sends a message, JSON, to the workers; waits up to ``timeout`` seconds for a connection.

        At most once: what was handed to a connection that was lost in that moment may be gone. Raises
        :class:`~wsproxy.Unavailable` without a connection, :class:`~wsproxy.NotSupported` over ``sse``.
        """
        self._start()
        text = encode(message).decode()
        try:
            async with asyncio.timeout(timeout):
                while True:
                    await self._is_open.wait()
                    if self._error is not None:
                        raise self._error
                    connection = self._connection
                    if connection is None:
                        raise Unavailable("The client is closed.")
                    try:
                        return await connection.send(text)
                    except Lost:
                        self._forget(connection)
        except TimeoutError as error:
            raise Unavailable(f"There was no connection for {timeout:g} s.") from error

    async def stop_stream(self, stream_id: str) -> None:
        """Asks the worker of a token stream to stop."""
        await self.send({"type": "stream_stop", "stream": stream_id})

    async def ack(self, message: Message) -> None:
        """Acknowledges a message; it is remembered, and said again if the gateway asks again."""
        event_id = _ack_id(message)
        if event_id is None:
            return
        if message.event_id:
            self._recent[message.event_id] = True
        await self._send_quietly({"type": "ack", "event_id": event_id})

    async def aclose(self) -> None:
        """Ends the connection."""
        connection, self._given_up = self._connection, True
        if not self._queue.full():
            self._queue.put_nowait(None)
        for task in (self._task, self._refresher):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if connection is not None:
            await _close(connection)
        await asyncio.gather(*self._closing)
        await self._transport.aclose()
        self._end(1000, "")

    # ---- the loop ----

    def _start(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="wsproxy-client")

    async def _run(self) -> None:
        try:
            await self._connections()
        except WsproxyError as error:
            self._error = error
            self._end(*(self.closed or (1006, str(error))))
        except Exception as error:
            # Such as an option that the library below does not know: the caller's to see.
            self._error = WsproxyError(f"The client failed: {error!r}")
            self._error.__cause__ = error
            self._end(1006, repr(error))
        # Behind all messages that came before the end, however many the loop has not read yet.
        await self._queue.put(None)

    async def _connections(self) -> None:
        backoff = Backoff(base=0.25, cap=10.0)
        self._down_since = time.monotonic()
        while True:
            self._set_state("connecting")
            try:
                connection = await self._open()
            except NotOpened as error:
                advice, at_least = after_refusal(error.status, error.code, error.retryable), error.retry_after
                if self._is_final(advice):
                    raise Refused(str(error), error.status, error.code) from error
                self._complain(error, advice)
            else:
                lost = await self._read(connection, backoff)
                advice, at_least = after_close(lost.code, lost.reason), 0.0
                if self._is_final(advice):
                    self.closed = (lost.code, lost.reason)
                    if advice != "final" or not is_normal(lost.code):
                        raise ConnectionClosed(lost.code, lost.reason)
                    self._end(lost.code, lost.reason)
                    return
                self._down_since = time.monotonic()
            self._set_state("waiting")
            await self._rest(backoff, advice, at_least)

    def _is_final(self, advice: Advice) -> bool:
        # A fixed token will not be replaced by another one.
        return advice == "final" or (advice == "credentials" and not callable(self._options.token))

    async def _rest(self, backoff: Backoff, advice: Advice, at_least: float) -> None:
        if advice == "slow":
            at_least = at_least or SLOW
        is_first = backoff.attempt == 0
        pause = backoff.next(at_least)
        if advice == "credentials" and is_first:
            pause = 0.0
        await asyncio.sleep(min(pause, self._patience()))
        if self._patience() <= 0:
            raise self._impatient()

    def _patience(self) -> float:
        """Seconds that may still pass without a connection."""
        give_up = self._options.give_up_after
        return math.inf if give_up is None else max(0.0, self._down_since + give_up - time.monotonic())

    def _impatient(self) -> Unavailable:
        return Unavailable(f"There was no connection for {self._options.give_up_after:g} s.")

    def _complain(self, error: NotOpened, advice: Advice) -> None:
        """Says what keeps the client away: at once what concerns its token, everything else when it lasts."""
        now = time.monotonic()
        is_due = advice == "credentials" or error.code == _NO_TOKEN or now - self._down_since > _WARN_EVERY
        if is_due and now - self._warned > _WARN_EVERY:
            self._warned = now
            _log.warning("The client is not connected and tries again: %s", error)
        else:
            _log.debug("Not connected: %s", error)

    async def _open(self) -> Connection:
        token = await self._token()
        self._token_in_use = token
        limit = min(OPEN_TIMEOUT + 5.0, self._patience())
        try:
            async with asyncio.timeout(limit):
                self._resuming, self._whole = bool(self._position), None
                return await self._transport.open(token, self._position)
        except TimeoutError as error:
            raise NotOpened(0, "unreachable", "The gateway did not answer in time.") from error

    async def _token(self) -> str:
        """A token; however the function fails, that passes, unless it says otherwise."""
        source = self._options.token
        try:
            async with asyncio.timeout(min(_TOKEN_TIMEOUT, self._patience())):
                answer = source() if callable(source) else source
                token = await answer if inspect.isawaitable(answer) else answer
        except GiveUp:
            raise
        except Exception as error:
            raise NotOpened(0, _NO_TOKEN, f"The token function failed: {error!r}") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Something inside was cancelled, not this client.
            raise NotOpened(0, _NO_TOKEN, "What the token function waited for was cancelled.") from error
        text = _text_of(token)
        if not text:
            raise NotOpened(0, _NO_TOKEN, f"The token function gave no token, but {type(token).__name__}.")
        return text

    async def _read(self, connection: Connection, backoff: Backoff) -> Lost:
        self._connection = connection
        self._greeting, self._refreshing = True, False
        self._is_open.set()
        self._set_state("open")
        opened = time.monotonic()
        try:
            while True:
                async with asyncio.timeout(self._silence_max):
                    frame = await connection.receive()
                await self._take(frame)
        except Lost as lost:
            return lost
        except TimeoutError:
            return Lost(4002, "silence")
        finally:
            # One that is opened and lost at once, over and over, must not be tried without a pause.
            if time.monotonic() - opened > _STABLE:
                backoff.reset()
            self._forget(connection)
            if self._refresher is not None:
                self._refresher.cancel()
            # Closing politely must not hold the next attempt up.
            closing = asyncio.ensure_future(_close(connection))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _take(self, frame: Frame) -> None:
        if frame.data is None:
            self._position = frame.event_id or self._position
            return
        message = Message(frame.data, frame.event_id or None)
        notice = message.object
        if frame.event_id is None:
            # The connection carries no positions, so that a JSON object has its own as a member; so may be something
            # of the application's, which says nothing about the history.
            member = notice.get("event_id")
            if isinstance(member, str) and parse(member) is not None:
                message = Message(frame.data, member)
        if await self._take_notice(message, frame):
            return
        self._greeting = False
        if self._whole is not None:
            self._check_stream(message, self._whole)
        if message.event_id and not await self._is_new(message, message.event_id):
            return
        await self._queue.put(message)

    def _check_stream(self, message: Message, whole: set[str]) -> None:
        """After a loss in mid-connection: a stream whose beginning was lost is asked for by connecting anew."""
        stream = message.object.get("stream")
        if message.type in ("stream_open", "stream_snapshot") and isinstance(stream, str):
            whole.add(stream)
        elif message.type in ("stream_append", "stream_end") and isinstance(stream, str) and stream not in whole:
            whole.add(stream)
            if stream not in self._asked_for:
                self._asked_for.add(stream)
                # From the start of what is kept; what the loop had is not given to it again.
                self._position = "0"
                raise Lost(1006, "the beginning of a stream is missing")

    async def _take_notice(self, message: Message, frame: Frame) -> bool:
        """Takes what the gateway itself says, and nothing that a worker says in the same words."""
        notice, kind = message.object, message.type
        if _is_published(frame, notice):
            return False
        if kind == "error" and message.is_history_lost:
            # From here on: everything before is gone, and said to be.
            self._position = str(notice.get("event_id") or self._position)
            self._whole = set()
            await self._queue.put(message)
            return True
        if self._options.events and kind == "ping":
            await self._send_quietly({"type": "pong"})
        if self._options.events and kind == "error" and notice.get("code") == "invalid_token":
            self._refreshing = False
            _log.warning("The gateway refused the new token: %s", notice.get("message"))
        if not self._is_own(kind, notice):
            return False
        if kind in ("opened", "connected"):
            self.connection_id = notice.get("connection_id")
            # While something is still to be resumed, the position is that of the last message we have.
            if not self._resuming:
                self._position = notice.get("event_id") or self._position
        if kind in ("connected", "refreshed"):
            self._refreshing = False
            self._plan_refresh(notice.get("expires_at"), notice.get("timestamp"))
        heartbeat = notice.get("heartbeat")
        if isinstance(heartbeat, dict):
            self._silence_max = float(heartbeat.get("interval", 30)) + float(heartbeat.get("timeout", 60))
        return True

    def _is_own(self, kind: str, notice: dict[str, Any]) -> bool:
        """Returns true where a notice is the gateway's, by its endpoint, its place and its members."""
        members, events = notice.keys(), self._options.events
        match kind:
            case "opened":
                return not events and self._greeting and members == {"type", "connection_id", "event_id"}
            case "connected":
                return events and self._greeting and "connection_id" in members
            case "resumed":
                return self._greeting and members == {"type", "count", "last_event_id"}
            case "refreshed":
                return events and self._refreshing and "expires_at" in members
            case "ping" | "pong":
                return events and members <= {"type", "timestamp"}
        return False

    async def _is_new(self, message: Message, event_id: str) -> bool:
        is_repeated = event_id in self._recent
        # One that is sent again for want of an acknowledgement must not take the position back. Any other that is lower
        # is of another life of the log.
        is_old = is_repeated or message.object.get("ack") is True
        if not is_old or order(event_id) >= order(self._position):
            self._position = event_id
        if is_repeated:
            # Sent again for want of an acknowledgement, which was lost if the loop is done with it.
            ack_id = _ack_id(message)
            if self._recent[event_id] and ack_id is not None:
                await self._send_quietly({"type": "ack", "event_id": ack_id})
            return False
        self._recent[event_id] = False
        if len(self._recent) > _RECENT_MAX:
            self._recent.popitem(last=False)
        return True

    # ---- tokens that expire ----

    def _plan_refresh(self, expires_at: object, timestamp: object) -> None:
        if self._refresher is not None:
            self._refresher.cancel()
        if (told := _seconds(timestamp)) is not None:
            self._gateway_epoch = told - time.monotonic()
        if not isinstance(expires_at, int | float) or not callable(self._options.token) or not self._transport.sends:
            return
        # By the gateway's clock: this machine's may be wrong.
        now = time.time() if self._gateway_epoch is None else self._gateway_epoch + time.monotonic()
        end = time.monotonic() + expires_at - now
        self._refresher = asyncio.get_running_loop().create_task(self._refresh(end))

    async def _refresh(self, end: float) -> None:
        """Hands a fresh token over before the monotonic time ``end``; asks for it a few times at most."""
        while (left := end - time.monotonic()) > 0:
            # A token that lives shorter than `refresh_ahead`, or that a cache gives again, is asked for a few times.
            await asyncio.sleep(max(left - self._options.refresh_ahead, left / 2, _REFRESH_PAUSE_MIN))
            try:
                token = await self._token()
            except (NotOpened, GiveUp) as error:
                # If it lasts, the connection ends with 4401, and the next one asks for a token again.
                _log.warning("There is no new token: %s", error)
                continue
            if token == self._token_in_use:
                continue
            self._token_in_use, self._refreshing = token, True
            # The answer plans anew.
            await self._send_quietly({"type": "refresh", "token": token})

    # ---- small things ----

    async def _send_quietly(self, message: dict[str, Any]) -> None:
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(Lost, NotSupported):
                await connection.send(json.dumps(message))

    def _forget(self, connection: Connection) -> None:
        if self._connection is connection:
            self._connection = None
            self._is_open.clear()

    def _end(self, code: int, reason: str) -> None:
        if self._state == "closed":
            return
        self.closed = self.closed or (code, reason)
        self._set_state("closed")
        # Senders that wait must learn of it.
        self._is_open.set()

    def _set_state(self, state: State) -> None:
        if state != self._state:
            self._state = state
            if self._options.on_state is not None:
                self._options.on_state(state)


def _text_of(token: object) -> str:
    """The token in what a token function gave; empty where there is none."""
    text = token.token if isinstance(token, SessionToken) else token
    return text.strip() if isinstance(text, str) else ""


def _seconds(timestamp: object) -> float | None:
    """A time as the gateway writes it, in seconds since 1970."""
    try:
        return datetime.fromisoformat(str(timestamp)).timestamp()
    except ValueError:
        return None


def _is_published(frame: Frame, message: dict[str, Any]) -> bool:
    """Returns true where a message with the gateway's words is a worker's: it has a position that it does not name."""
    return bool(frame.event_id) and frame.event_id not in (message.get("event_id"), message.get("last_event_id"))


def _ack_id(message: Message) -> str | None:
    if message.object.get("ack") is not True:
        return None
    own = message.object.get("event_id")
    return own if isinstance(own, str) and own else message.event_id


async def _close(connection: Connection) -> None:
    try:
        await connection.close()
    except (OSError, Lost, httpx.HTTPError) as error:
        _log.debug("The connection was not closed politely: %r", error)
