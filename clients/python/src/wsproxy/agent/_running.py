"""The calls that an agent runs: bounded, cancelled on request, each answered once. It knows no connection's loss."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from .._calls import Progress, written
from ..client._transport import Lost
from ..errors import InvalidRequest, ToolError
from ._context import Context
from ._tool import BadParams, Tool

_log = logging.getLogger("wsproxy")

# Calls that run or wait for a place; the gateway's own bound is 256.
_CALLS_MAX = 1024
# Answers that are kept for a call that is sent again after a reconnect, as long as a gateway remembers keys.
_KEPT_MAX = 64
_KEPT_BYTES_MAX = 4 * 1024 * 1024
_KEPT_SECONDS = 600.0
# All calls together send at most so many messages of progress a second: a gateway limits messages.
_PROGRESS_PER_SECOND = 60
_PROGRESS_PAUSE_MIN = 0.05
_ERROR_CHARACTERS_MAX = 4096


class Link(Protocol):
    """A connection to the gateway."""

    is_v2: bool

    async def send(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class _Body:
    """Content of a call, which tells a repeated call from another one with the same id."""

    tool: str
    params: Any


@dataclass(slots=True)
class _Kept:
    body: _Body
    text: str
    at: float


class _Run:
    """A call that runs or waits for its place."""

    def __init__(self, running: Running, link: Link, message: Mapping[str, Any], request_id: str, body: _Body) -> None:
        deadline, trace = message.get("deadlineMs"), message.get("traceparent")
        self.begun = time.monotonic()
        ends = self.begun + deadline / 1000 if isinstance(deadline, int | float) else None
        self.context = Context(request_id, body.tool, ends, trace if isinstance(trace, str) else None, self._report)
        self.body = body
        # The connection that gets the answer: that over which the call came last.
        self.link = link
        self.task: asyncio.Task[None] | None = None
        self._running = running
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._newest: Progress | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._sent_at = 0.0

    def cancel(self) -> None:
        """Ends the call: no caller waits for the result any more."""
        self.context._cancel()
        if self.task is not None:
            self.task.cancel()

    def _report(self, progress: Progress) -> None:
        if threading.get_ident() == self._thread:
            # At once, since a tool may report and return without a pause.
            self._note(progress)
            return
        # Tools in threads report too, perhaps when the loop is gone.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._note, progress)

    def _note(self, progress: Progress) -> None:
        self._newest = progress
        if self._timer is None and self.task is not None and not self.task.done():
            pause = max(_PROGRESS_PAUSE_MIN, self._running.count / _PROGRESS_PER_SECOND)
            wait = max(0.0, self._sent_at + pause - self._loop.time())
            self._timer = self._loop.call_later(wait, lambda: self._running.spawn(self.flush()))

    async def flush(self) -> None:
        """Sends the newest progress, if there is one that was not sent."""
        newest, self._newest = self._newest, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if newest is None or not self.link.is_v2 or self.context.cancelled:
            return
        self._sent_at = self._loop.time()
        message = {"type": "tool_progress", "requestId": self.context.request_id, "progress": newest.progress}
        if newest.total is not None:
            message["total"] = newest.total
        if newest.message is not None:
            message["message"] = newest.message
        try:
            await self.link.send(written(message))
        except InvalidRequest as error:
            _log.warning("Progress of %s is not sent: %s", self.context.tool, error)
        except Lost:
            pass


class Running:
    """All calls of an agent."""

    def __init__(self, tools: Mapping[str, Tool], concurrency: int, result_bytes_max: int) -> None:
        self._tools = tools
        self._result_bytes_max = result_bytes_max
        self._places = asyncio.Semaphore(concurrency)
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="wsproxy-tool")
        self._runs: dict[str, _Run] = {}
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._kept_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_ending = False

    @property
    def count(self) -> int:
        """Number of calls that run or wait for a place."""
        return len(self._runs)

    def spawn(self, work: Any) -> asyncio.Task[None]:
        """Runs work in a task that this object holds."""
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def begin(self, link: Link, message: Mapping[str, Any], problem: str | None) -> None:
        """Begins a call; every call that cannot run is answered with the reason."""
        request_id = message.get("requestId")
        if not isinstance(request_id, str):
            _log.warning("A call without an id is dropped.")
            return
        reason = f"The call cannot be read: {problem}." if problem else self._begin(link, message, request_id)
        if reason is not None:
            self.spawn(self._send(link, _response(request_id, _Answer(None, reason), 0)))

    def _begin(self, link: Link, message: Mapping[str, Any], request_id: str) -> str | None:
        """Returns why a call cannot run."""
        body = _Body(str(message.get("tool")), message.get("params", {}))
        if (kept := self._kept_answer(request_id)) is not None and kept.body == body:
            # Sent again after a reconnect: the tool ran, and does not run twice.
            self.spawn(self._send(link, kept.text))
            return None
        if (run := self._runs.get(request_id)) is not None:
            if run.body != body:
                return "Another call with this id runs."
            run.link = link
            return None
        tool = self._tools.get(body.tool)
        if tool is None:
            return f"There is no tool {body.tool!r}; there are: {', '.join(sorted(self._tools)) or 'none'}."
        if self._is_ending:
            return "The agent is ending."
        if len(self._runs) >= _CALLS_MAX:
            return "The agent has too many calls."
        try:
            arguments = tool.arguments(body.params)
        except BadParams as error:
            return str(error)
        run = self._runs[request_id] = _Run(self, link, message, request_id, body)
        run.task = self.spawn(self._run(run, tool, arguments))
        # Also for a task that is cancelled before it has begun.
        run.task.add_done_callback(lambda _: self._forget(run))
        return None

    def cancel(self, request_id: object) -> None:
        """Cancels a call; the gateway has ended it already, so that no answer is due."""
        run = self._runs.get(request_id) if isinstance(request_id, str) else None
        if run is not None:
            run.cancel()

    async def aclose(self, grace: float) -> None:
        """Waits for calls in flight, and then cancels them."""
        self._is_ending = True
        if self._runs:
            await asyncio.wait([run.task for run in self._runs.values() if run.task is not None], timeout=grace)
        for run in list(self._runs.values()):
            run.cancel()
        # The last messages must reach the connection.
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=1.0)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, run: _Run, tool: Tool, arguments: dict[str, Any]) -> None:
        request_id = run.context.request_id
        try:
            async with asyncio.timeout(run.context.remaining) as deadline, self._places:
                answer = await self._answer(run, tool, arguments)
        except TimeoutError:
            # Only the deadline's own comes here; the gateway has answered.
            assert deadline.expired()
            _log.debug("The call %s of %s did not end within its deadline.", request_id, tool.name)
            return
        # From here on, the same call gets the kept answer.
        self._forget(run)
        if run.context.cancelled:
            return
        took = round((time.monotonic() - run.begun) * 1000)
        text = _response(request_id, answer, took)
        if (size := len(text.encode())) > self._result_bytes_max:
            reason = f"The result has {size} bytes, and at most {self._result_bytes_max} are sent."
            text = _response(request_id, _Answer(None, reason), took)
        await run.flush()
        self._keep(request_id, run.body, text)
        await self._send(run.link, text)

    def _forget(self, run: _Run) -> None:
        if self._runs.get(run.context.request_id) is run:
            del self._runs[run.context.request_id]

    async def _answer(self, run: _Run, tool: Tool, arguments: dict[str, Any]) -> _Answer:
        call = tool.bound(arguments, run.context)
        try:
            if tool.is_async:
                result = await call()
            else:
                context = contextvars.copy_context()
                work = asyncio.get_running_loop().run_in_executor(self._threads, context.run, _caught, call)
                result, error = await work
                if error is not None:
                    raise error
            if inspect.isawaitable(result):
                result = await result
        except ToolError as error:
            return _Answer(None, str(error))
        except (Exception, SystemExit) as error:
            _log.warning("The tool %s failed.", tool.name, exc_info=True)
            return _Answer(None, f"{type(error).__name__}: {error}".rstrip(": "))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Something inside was cancelled, not this call.
            return _Answer(None, f"{tool.name} failed: what it waited for was cancelled.")
        try:
            return _Answer(written(result), None)
        except InvalidRequest as error:
            return _Answer(None, f"The result of {tool.name} cannot be sent: {error}.")

    async def _send(self, link: Link, text: str) -> None:
        try:
            await link.send(text)
        except Lost:
            _log.info("The connection was lost before an answer was sent; its caller has been told.")

    def _keep(self, request_id: str, body: _Body, text: str) -> None:
        if (before := self._kept.pop(request_id, None)) is not None:
            self._kept_bytes -= len(before.text)
        self._kept[request_id] = _Kept(body, text, time.monotonic())
        self._kept_bytes += len(text)
        while len(self._kept) > _KEPT_MAX or self._kept_bytes > _KEPT_BYTES_MAX:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= len(dropped.text)

    def _kept_answer(self, request_id: str) -> _Kept | None:
        kept = self._kept.get(request_id)
        return kept if kept is not None and time.monotonic() - kept.at < _KEPT_SECONDS else None


@dataclass(frozen=True, slots=True)
class _Answer:
    """The result as JSON, or the error."""

    result: str | None
    error: str | None


def _caught(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """Result or exception of a function: not every exception can be that of a future."""
    try:
        return call(), None
    except BaseException as error:
        return None, error


def _response(request_id: str, answer: _Answer, took: int) -> str:
    if answer.error is None:
        outcome = f'"success":true,"result":{answer.result},"error":null'
    else:
        # Not every text of an exception can be sent.
        text = answer.error[:_ERROR_CHARACTERS_MAX].encode("utf-8", "replace").decode()
        outcome = f'"success":false,"result":null,"error":{json.dumps(text, ensure_ascii=False)}'
    return f'{{"type":"tool_response","requestId":{json.dumps(request_id)},{outcome},"executionTime":{took}}}'
