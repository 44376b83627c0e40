"""A token stream as its worker sees it: text goes in, and however the block ends, the clients are told."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from ._backend import Backend, StreamCall, StreamReply, retrying
from ._feeds import Consumer
from .errors import (
    InvalidRequest,
    StreamConflict,
    StreamEnded,
    StreamError,
    StreamNotFound,
    Unavailable,
    WsproxyError,
)
from .types import Outcome, UpstreamMessage, encode

_log = logging.getLogger("wsproxy")

# A message must fit into the gateway's limit even where JSON writes six bytes for a character.
_CHARACTERS_PER_APPEND = 64 * 1024
# Text that waits for the flush interval is sent earlier when it is as long as this.
_FLUSH_CHARACTERS = 16 * 1024
# No stream waits longer than this until a stop could be heard.
_FOLLOW_SECONDS = 5.0
# A worker that is being stopped does not wait longer than this to say so.
_GOODBYE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """Options of a stream; :meth:`wsproxy.Worker.stream` explains each."""

    meta: Mapping[str, Any] | None
    lease: float
    flush_interval: float
    watch_stop: bool
    cancel_on_stop: bool
    on_cancel: Literal["cancelled", "leave"]
    adopt: bool
    retry_for: float


class TokenStream:
    """An open token stream of a session; made by :meth:`wsproxy.Worker.stream`, used with ``async with``.

    While the block runs, the lease is renewed in the background: a worker that dies is noticed by the gateway after
    the lease, and its clients are told ``error`` with code ``worker_lost`` instead of waiting for ever.

    Every append carries its number and is repeated as it was, so that one whose answer was lost is neither lost nor
    doubled. Where Redis came back empty, the next append or the end opens the stream anew with all its text.
    """

    def __init__(self, backend: Backend, session: str, stream: str | None, options: StreamOptions) -> None:
        self._backend = backend
        self._options = options
        self._session = session
        self._id = stream if stream is not None else secrets.token_hex(12)
        self._seq = 0
        self._text: list[str] = []
        self._waiting: list[str] = []
        self._sent_at = -math.inf
        # Length of the text whose append may have arrived: it is repeated as it was, so that number and text tell.
        self._doubtful = 0
        # True where text was given up that clients will never see.
        self._is_cut = False
        self._outcome: str | None = None
        self._left = False
        self._failure: WsproxyError | None = None
        self._sending = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._flusher: asyncio.Task[None] | None = None
        self._consumer: Consumer | None = None
        self._owner: asyncio.Task[Any] | None = None
        self._cancelled_by_stop = False
        self._cancelling = 0
        self.stopped: asyncio.Event = asyncio.Event()
        """Set when a client asked to stop; with ``watch_stop`` only."""

    @property
    def id(self) -> str:
        """The stream's id, which the messages to the clients carry."""
        return self._id

    @property
    def session(self) -> str:
        """The session that it belongs to."""
        return self._session

    @property
    def seq(self) -> int:
        """The number of the last append that is kept."""
        return self._seq

    @property
    def text(self) -> str:
        """All text that is kept or waits to be sent. Text that was given up, after an error, is not in it."""
        return "".join(self._text) + "".join(self._waiting)

    @property
    def outcome(self) -> str | None:
        """The outcome; ``None`` while the stream is open or left open."""
        return self._outcome

    async def append(self, text: str) -> None:
        """Adds text. While the bus answers, it is kept and on its way to the clients within the flush interval.

        Text after a pause is sent before this returns. Text that follows sooner waits for the rest of the interval, so
        that many tokens share one call. An error of that call is raised by a later one, or by the end of the stream;
        after :class:`Unavailable` the text waits on, and a later call sends it.

        Raises :class:`StreamEnded` when another worker or the gateway ended the stream (the gateway, after the lease
        ran out), :class:`StreamConflict` when another worker took it over, :class:`TooLarge` beyond 4 MiB of text,
        :class:`StreamNotFound` when Redis does not keep the stream, and :class:`Unavailable` when the bus stays away
        for longer than the worker's ``retry_for``. After :class:`TooLarge` the text that was not sent is given up, and
        the stream takes no more: it can be ended, and a ``finish`` becomes an ``error``.
        """
        self._check_open()
        if not text:
            return
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest("The text holds half of a surrogate pair.") from error
        self._waiting.append(text)
        loop = asyncio.get_running_loop()
        rest = self._sent_at + self._options.flush_interval - loop.time()
        if rest <= 0 or sum(map(len, self._waiting)) >= _FLUSH_CHARACTERS:
            await self.flush()
        elif self._flusher is None or self._flusher.done():
            self._flusher = loop.create_task(self._flush_later())

    async def flush(self) -> None:
        """Sends what waits for the flush interval. Raises what :meth:`append` raises."""
        async with self._sending:
            due, is_anew = "".join(self._waiting), False
            # Text waits until it is kept: whether or not a failed call arrived, the number tells when it is sent again.
            self._waiting = [due]
            if due:
                self._sent_at = asyncio.get_running_loop().time()
            while due:
                size = self._doubtful or _CHARACTERS_PER_APPEND
                part, self._doubtful = due[:size], min(size, len(due))
                call = self._call("append", text=part, seq=self._seq + 1)
                try:
                    self._seq = (await self._retrying(lambda _, call=call: self._backend.stream(call))).seq
                except StreamNotFound:
                    if is_anew:
                        # A stream that Redis does not keep is not opened for ever.
                        raise
                    is_anew = True
                    await self._reopen()
                    # Text that was appended meanwhile stays behind these two.
                    self._waiting[:2] = ["".join(self._waiting[:2])]
                    due = self._waiting[0]
                    continue
                except (StreamError, InvalidRequest) as error:
                    # The stream is no longer this worker's, or is full: what was not sent never will be.
                    self._failure, self._waiting, self._is_cut = error, [], True
                    raise
                self._doubtful = 0
                self._text.append(part)
                due = self._waiting[0] = due[size:]
            del self._waiting[0]

    async def finish(self) -> None:
        """Ends the stream as complete. Without this call the end of the block does it.

        A stream that lacks text ends as ``error`` with code ``worker_error``, and the reason is raised.
        """
        await self._end("finish")

    async def error(self, code: str, message: str) -> None:
        """Ends the stream as failed, with a code and a message that the clients get to see."""
        error = {"code": code, "message": message}
        encode(error)
        await self._end("error", error)

    async def cancel(self) -> None:
        """Ends the stream as cancelled."""
        await self._end("cancelled")

    def leave(self) -> None:
        """Leaves the stream open for another worker, which must adopt it before the lease runs out."""
        self._left = True

    async def __aenter__(self) -> TokenStream:
        if self._options.watch_stop:
            # The subscription comes before the stream, so that no stop can come too early.
            self._consumer = self._backend.follow_upstream(self._session, False)
        try:
            if self._consumer is not None:
                await self._confirmed(self._consumer)
            if not (self._options.adopt and await self._adopt()):
                await self._retrying(self._open)
        except BaseException:
            self._close()
            raise
        self._owner = asyncio.current_task()
        self._cancelling = self._owner.cancelling() if self._owner else 0
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._renew(), name=f"wsproxy-lease {self._id}"))
        if self._consumer is not None:
            self._tasks.append(loop.create_task(self._watch(self._consumer), name=f"wsproxy-stop {self._id}"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        by_stop = self._cancelled_by_stop and isinstance(error, asyncio.CancelledError)
        swallow = False
        if by_stop and self._owner is not None:
            # Only our own cancellation is taken back; one from outside goes on.
            swallow = self._owner.uncancel() <= self._cancelling
        try:
            if error is None:
                if not (self._left or self._outcome):
                    await self._end("cancelled" if self.stopped.is_set() else "finish")
                elif self._left and not isinstance(self._failure, StreamError):
                    await self.flush()
            else:
                await self._say_goodbye(error, by_stop)
        finally:
            self._close()
        return swallow

    async def _say_goodbye(self, error: BaseException, by_stop: bool) -> None:
        """Tells the clients of an end by exception, which must not be hidden by another one."""
        cancelled = isinstance(error, asyncio.CancelledError | GeneratorExit)
        if self._outcome or isinstance(error, StreamError):
            return
        leave = self._left or (cancelled and not by_stop and self._options.on_cancel == "leave")

        async def say() -> None:
            async with asyncio.timeout(_GOODBYE_SECONDS):
                if leave:
                    await self.flush()
                elif cancelled:
                    await self._end("cancelled")
                else:
                    await self._end("error", {"code": "worker_error", "message": "The worker failed."})

        # This runs in a separate task, since the cancelled one may be cancelled again.
        task = asyncio.ensure_future(say())
        try:
            await asyncio.shield(task)
        except (WsproxyError, TimeoutError) as failure:
            _log.warning("The end of stream %s could not be told: %s", self._id, failure)

    async def _end(self, outcome: Outcome, error: dict[str, str] | None = None) -> None:
        if self._outcome is not None:
            if self._outcome == outcome:
                return
            raise StreamEnded("The stream has ended already.", self._outcome)
        is_anew = False
        while self._outcome is None:
            while self._waiting:
                try:
                    await self.flush()
                except InvalidRequest:
                    # Text that was given up must not keep the clients from the end.
                    if not self._is_cut:
                        raise
            if isinstance(self._failure, StreamConflict) or (self._is_cut and isinstance(self._failure, StreamEnded)):
                # The end of the stream is for the worker that took it over, or was told by another one.
                raise self._failure
            told, why = outcome, error
            if self._is_cut and outcome == "finish":
                told, why = "error", {"code": "worker_error", "message": "The text is incomplete."}
            call = self._call("end", outcome=told, error=why)
            async with self._sending:
                try:
                    await self._retrying(lambda _, call=call: self._backend.stream(call))
                    self._outcome = told
                except StreamNotFound:
                    if is_anew:
                        raise
                    is_anew = True
                    await self._reopen()
        if self._outcome != outcome and self._failure is not None:
            raise self._failure

    async def _reopen(self) -> None:
        """Opens the stream anew, since Redis came back without it. All its text waits again."""
        _log.warning("Stream %s is gone and is opened anew.", self._id)
        self._waiting.insert(0, "".join(self._text))
        self._text, self._seq, self._doubtful = [], 0, 0
        await self._retrying(self._open)

    async def _open(self, _attempt: int) -> StreamReply:
        return await self._backend.stream(self._call("open"))

    async def _adopt(self) -> bool:
        state = await self._backend.stream_state(self._session, self._id)
        if state is None:
            return False
        if state.state != "open":
            raise StreamEnded("The stream has ended already.", state.state)
        self._seq, self._text = state.seq, [state.text]
        await self._retrying(lambda _: self._backend.stream(self._call("renew")))
        return True

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._options.lease / 3)
            try:
                await self._backend.stream(self._call("renew"))
            except StreamEnded as error:
                self._failure = error
                return
            except StreamNotFound:
                # Opened anew by the next append or by the end, which know the text.
                continue
            except WsproxyError as error:
                _log.debug("The lease of stream %s was not renewed: %s", self._id, error)

    async def _confirmed(self, consumer: Consumer) -> None:
        try:
            async with asyncio.timeout(min(_FOLLOW_SECONDS, self._options.retry_for)):
                await consumer.confirmed()
        except TimeoutError:
            # The subscription is tried further; a stream that cannot be stopped yet is better than none.
            _log.warning("Stream %s cannot be stopped by its clients yet.", self._id)

    async def _watch(self, consumer: Consumer) -> None:
        async for message in _messages(consumer):
            if b'"stream_stop"' not in message.data:
                continue
            try:
                asked = json.loads(message.data)
            except ValueError:
                continue
            if isinstance(asked, dict) and asked.get("type") == "stream_stop" and asked.get("stream") == self._id:
                self.stopped.set()
                if self._options.cancel_on_stop and self._owner is not None and not self._owner.done():
                    self._cancelled_by_stop = True
                    self._owner.cancel()
                return

    async def _flush_later(self) -> None:
        # Text that comes while a call is under way waits for the next one.
        while self._waiting:
            await asyncio.sleep(self._sent_at + self._options.flush_interval - asyncio.get_running_loop().time())
            try:
                await self.flush()
            except WsproxyError as error:
                self._failure = error
                return

    async def _retrying(self, call: Any) -> StreamReply:
        reply: StreamReply = await retrying(call, self._options.retry_for, in_doubt_too=True)
        return reply

    def _call(self, op: Literal["open", "append", "renew", "end"], **arguments: Any) -> StreamCall:
        meta = self._options.meta if op == "open" else None
        return StreamCall(self._session, self._id, op, self._options.lease, meta=meta, **arguments)

    def _check_open(self) -> None:
        if self._outcome is not None:
            raise StreamEnded("The stream has ended already.", self._outcome)
        if isinstance(self._failure, Unavailable):
            # Text that was not sent still waits, and the next flush sends it.
            self._failure = None
        elif self._failure is not None:
            raise self._failure

    def _close(self) -> None:
        for task in [*self._tasks, *([self._flusher] if self._flusher else [])]:
            task.cancel()
        self._tasks.clear()
        if self._consumer is not None:
            self._consumer.close()


async def _messages(consumer: Consumer) -> AsyncIterator[UpstreamMessage]:
    while True:
        item = await consumer.next()
        if isinstance(item, UpstreamMessage):
            yield item
