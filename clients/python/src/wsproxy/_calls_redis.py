"""Calls over Redis: one subscription of a process gets the answers of all its calls."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from ._calls import GRACE, Call, NotDone, Progress, answer_of, not_done, progress_of, read_object, repeated, written
from ._feeds import Consumer, Subscribed
from ._listener import Listener
from ._server import Server
from .errors import AgentOffline, CallError, CallTimeout, InvalidRequest, Unavailable, WsproxyError
from .types import UpstreamMessage

# Commands of calls that are in flight to Redis at a time.
_COMMANDS_MAX = 16


class _Waiting:
    """A call in flight with all its attempts, for the task that waits for it.

    The answer to an attempt may come at any time until the next one is answered: between two attempts, too.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.state: Literal["subscribing", "publishing", "sent", "over"] = "subscribing"
        self.progress: Progress | None = None
        self.answer: tuple[Mapping[str, Any], str | None] | None = None
        self.error: WsproxyError | None = None
        # The life of the subscription in which the answer is heard.
        self.life = 0
        self.changed = asyncio.Event()

    @property
    def is_out(self) -> bool:
        """True from when the agent may have the call until its answer is taken."""
        return self.state in ("publishing", "sent")

    @property
    def is_answered(self) -> bool:
        return self.answer is not None or self.error is not None

    async def pause(self, seconds: float) -> None:
        """Waits between two attempts, no longer than until there is an answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.is_answered:
                    self.changed.clear()
                    await self.changed.wait()


class RedisCalls:
    """All methods of :class:`wsproxy._calls.Calls`, over the connections of a worker's backend.

    ``do`` runs commands with the backend's errors and repetitions; ``close`` closes the backend where it is this
    object's own.
    """

    def __init__(
        self,
        redis: Server,
        listener: Listener,
        prefix: str,
        once: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]],
        close: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self._redis = redis
        self._listener = listener
        self._prefix = prefix
        self._once = once
        self._close = close
        # A name of this process's own. The gateway adds the prefix.
        self._reply_to = f"response:{uuid.uuid4().hex}"
        self._waiting: dict[tuple[str, str], list[_Waiting]] = {}
        # Each command in flight takes a connection, of which Redis and its client library allow so many.
        self._turns = asyncio.Semaphore(_COMMANDS_MAX)
        self._consumer: Consumer | None = None
        self._dispatcher: asyncio.Task[None] | None = None
        self._cancelling: set[asyncio.Task[None]] = set()
        self._standing = asyncio.Event()
        self._overflows = 0
        self._is_closed = False

    async def call(self, call: Call, retry_for: float) -> Any:
        waiting = _Waiting(call)
        others = self._waiting.setdefault((call.user, call.request_id), [])
        # To the gateway all tasks of a process are one caller, which gets one answer to a call that is in flight.
        if any((each.call.tool, each.call.params) != (call.tool, call.params) for each in others):
            raise InvalidRequest("The idempotency key is that of another call, which is in flight.")
        others.append(waiting)
        try:
            return await repeated(call, retry_for, lambda attempt: self._attempt(attempt, waiting), waiting.pause)
        finally:
            others.remove(waiting)
            if not others:
                del self._waiting[call.user, call.request_id]
                # A call that its last task has given up ends for the agent too, unless other processes wait for it.
                if waiting.is_out:
                    self._leave_later(call)

    async def _attempt(self, call: Call, waiting: _Waiting) -> Any:
        try:
            async with asyncio.timeout(call.timeout + GRACE) as deadline:
                if not waiting.is_answered:
                    await self._send(call, waiting)
                return await self._answer(call, waiting)
        except TimeoutError:
            # The callback for progress may raise one of its own.
            if not deadline.expired():
                raise
            silence = self._silence(call, waiting)
            # The gateway has the same deadline.
            waiting.state = "over"
            raise silence from None

    def _silence(self, call: Call, waiting: _Waiting) -> WsproxyError:
        """The error of a call that got no answer in time."""
        if waiting.state == "publishing":
            return Unavailable("Redis did not answer in time.", in_doubt=True)
        if waiting.life != self._life():
            return Unavailable("There was no answer; it may have come while Redis was away.", in_doubt=True)
        return CallTimeout(f"The agent of {call.user} did not answer in time.", request_id=call.request_id)

    async def _send(self, call: Call, waiting: _Waiting) -> None:
        end = time.monotonic() + call.timeout
        try:
            async with asyncio.timeout(call.timeout):
                await self._subscribed(waiting)
        except TimeoutError as error:
            text = "Redis cannot be reached: there is no subscription for the answer."
            raise Unavailable(text, in_doubt=waiting.is_out) from error
        command = {
            "type": "tool_call",
            "requestId": call.request_id,
            "tool": call.tool,
            "timeout": max(1, round((end - time.monotonic()) * 1000)),
            "replyTo": self._reply_to,
        }
        if call.on_progress is not None:
            command["progress"] = True
        if call.traceparent is not None:
            command["traceparent"] = call.traceparent
        # The parameters as they were written: the gateway compares their bytes where a call is sent again.
        payload = f'{written(command)[:-1]},"params":{call.params}}}'.encode()
        # An answer to the attempt before may come still.
        before, waiting.state = waiting.state, "publishing"
        try:
            async with self._turns:
                is_heard = await self._once(lambda: self._tell(self._commands(call.user), payload))
        except Unavailable as error:
            if not error.in_doubt:
                waiting.state = before
            again = not_done(error, call.has_key)
            if again is None:
                raise
            raise again from error
        waiting.state = "sent"
        if not is_heard and not waiting.is_answered:
            waiting.state = before
            text = f"No agent of {call.user} is connected."
            raise NotDone(AgentOffline(text, request_id=call.request_id), is_absent=True)

    async def _tell(self, channel: str, payload: bytes) -> bool:
        """Publishes a call; returns false where no agent has it.

        On a Cluster the agents are counted before: one that leaves at once may have it.
        """
        before = await self._redis.present(channel)
        if before.is_whole and before.counts[0] == 0:
            return False
        counted = await self._redis.tell(channel, channel, payload)
        return counted > 0 or self._redis.counts_its_own_alone

    async def _subscribed(self, waiting: _Waiting) -> None:
        """Waits until an answer would be heard."""
        if self._is_closed:
            raise Unavailable("The calls are closed.")
        if self._consumer is None:
            self._consumer = self._listener.open(self._prefix + self._reply_to)
            self._dispatcher = asyncio.get_running_loop().create_task(
                self._dispatch(self._consumer), name="wsproxy-calls"
            )
        while not self._listener.is_confirmed(self._prefix + self._reply_to):
            self._standing.clear()
            await self._standing.wait()
            if waiting.error is not None:
                raise waiting.error
        waiting.life = self._life()

    def _life(self) -> int:
        """Changes whenever answers may have been lost."""
        return self._listener.life + self._overflows

    async def _answer(self, call: Call, waiting: _Waiting) -> Any:
        while True:
            progress, waiting.progress = waiting.progress, None
            if progress is not None and call.on_progress is not None:
                told = call.on_progress(progress)
                if inspect.isawaitable(told):
                    await told
            if waiting.answer is not None:
                answer, waiting.answer, waiting.state = waiting.answer, None, "over"
                try:
                    return answer_of(*answer, call.request_id)
                except CallError as error:
                    again = not_done(error, call.has_key)
                    if again is None:
                        raise
                    raise again from error
            if waiting.error is not None:
                waiting.state = "over"
                raise waiting.error
            if waiting.life != self._life() and call.has_key:
                # Sent again, it joins the call that runs.
                raise NotDone(Unavailable("The subscription to the answer was interrupted.", in_doubt=True))
            if waiting.progress is None:
                waiting.changed.clear()
                await waiting.changed.wait()

    async def _dispatch(self, consumer: Consumer) -> None:
        error: WsproxyError = Unavailable("The calls are closed.", in_doubt=True)
        try:
            while True:
                item = await consumer.next()
                if isinstance(item, UpstreamMessage):
                    self._take(item.data)
                elif isinstance(item, Subscribed):
                    self._standing.set()
                else:
                    if item.reason == "overflow":
                        self._overflows += 1
                    for waiting in self._in_flight():
                        waiting.changed.set()
        except WsproxyError as failed:
            error = failed
        finally:
            consumer.close()
            self._consumer = None
            for waiting in self._in_flight():
                waiting.error = error
                waiting.changed.set()
            self._standing.set()

    def _in_flight(self) -> list[_Waiting]:
        return [waiting for each in self._waiting.values() for waiting in each]

    def _take(self, payload: bytes) -> None:
        message, problem = read_object(payload)
        is_progress = payload.startswith(b'{"type":"tool_progress"')
        if problem is not None and is_progress:
            return
        # Two users may have calls of the same key.
        name = str(message.get("userId")), str(message.get("requestId"))
        for waiting in self._waiting.get(name, ()):
            if not waiting.is_out:
                continue
            if is_progress:
                waiting.progress = progress_of(message)
            else:
                waiting.answer = waiting.answer or (message, problem)
            waiting.changed.set()

    def _commands(self, user: str) -> str:
        return f"{self._prefix}agent:{user}:commands"

    async def cancel(self, user: str, request_id: str) -> None:
        await self._cancel(user, {"requestId": request_id})

    async def _cancel(self, user: str, which: dict[str, str]) -> None:
        command = written({"type": "tool_cancel", **which}).encode()
        async with self._turns:
            channel = self._commands(user)
            await self._once(lambda: self._redis.tell(channel, channel, command))

    def _leave_later(self, call: Call) -> None:
        """Ends a call for its own caller, from a task that is being cancelled and so cannot wait."""

        async def leave() -> None:
            # The gateway ends the call at its deadline in any case.
            with contextlib.suppress(WsproxyError):
                await self._cancel(call.user, {"requestId": call.request_id, "replyTo": self._reply_to})

        task = asyncio.get_running_loop().create_task(leave(), name="wsproxy-cancel")
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def is_connected(self, user: str) -> bool:
        return bool(await self._once(lambda: self._redis.exists(f"{self._prefix}agent:{user}:server")))

    async def aclose(self) -> None:
        self._is_closed = True
        if self._dispatcher is not None:
            self._dispatcher.cancel()
            await asyncio.wait({self._dispatcher})
        if self._cancelling:
            await asyncio.wait(self._cancelling, timeout=1.0)
        if self._close is not None:
            await self._close()
