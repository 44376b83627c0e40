"""The agent itself: it connects, comes back, and hands calls to its tools. It knows nothing of how tools run."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar, overload
from urllib.parse import urlsplit

from .._backoff import Backoff
from .._calls import read_object
from .._ids import check_id
from ..client._advice import SLOW, after_close, after_refusal
from ..client._transport import Lost, NotOpened, url
from ..errors import AgentReplaced, ConnectionClosed, InvalidRequest, Refused, WsproxyError
from ._running import Running
from ._socket import Socket, open_socket
from ._tool import Tool

_log = logging.getLogger("wsproxy")

F = TypeVar("F", bound=Callable[..., Any])

# The gateway's own bound of a message is 1 MiB (`limits.max_message_bytes`).
_RESULT_BYTES_MAX = 1024 * 1024
# An error must fit, however its characters are written.
_RESULT_BYTES_MIN = 32 * 1024
# Until `connected` says otherwise, in seconds.
_HEARTBEAT = 30.0
_HEARTBEAT_MS_MAX = 3_600_000
# Each heartbeat is acknowledged; a connection that stays silent for so much longer than their interval is dead.
_ACK_WITHIN = 15.0
# A connection that stood for so many seconds was a good one: the next pause is short again.
_STABLE = 5.0
_WARN_EVERY = 30.0
_REPLACED = 4001


class Agent:
    """A user's agent: it offers tools, which the application calls through the gateway.

    Functions become tools by :meth:`tool`; :meth:`run` serves them until the agent is cancelled or told to stop::

        agent = Agent("wss://gateway.example", "u1", secret)

        @agent.tool
        async def read_file(ctx: Context, path: str, limit: int = 65536) -> str:
            ctx.progress(0, message="reading")
            return await asyncio.to_thread(read, path, limit)

        @agent.tool
        def list_files(folder: str = ".") -> list[str]:  # In a thread.
            return os.listdir(folder)

        asyncio.run(agent.run())

    In an application that does more, ``async with agent:`` serves the tools while the block runs.

    - ``url``: the gateway's, with the path of its ``[agents] path`` where that is not ``/``. It never holds the secret,
      which goes in a header.
    - ``concurrency``: tools that run at a time; further calls wait, within their deadlines.
    - ``result_bytes_max``: a larger result is answered with an error. At most the gateway's
      ``[limits] max_message_bytes``, which closes connections that send more.
    - ``grace``: seconds for which the end waits for tools that run.
    - ``version``: of your agent, shown in the gateway's list.
    - ``options`` go to :func:`websockets.asyncio.client.connect` (such as ``ssl``).

    **Outages.** The agent comes back after every loss, with pauses that grow to half a minute and full jitter. A call
    in flight ends at once for its caller (:class:`~wsproxy.AgentGone`); its tool goes on until its deadline. If the
    caller sends the same call again, with its idempotency key, it gets the tool's answer, and the tool does not run
    twice: the agent keeps its last 64 answers (4 MiB, ten minutes) for that.

    **The end.** The agent stops, and :meth:`run` raises, where to come back is no use:
    :class:`~wsproxy.AgentReplaced` (another agent has this credential), :class:`~wsproxy.Refused` (status 403: the
    secret is wrong, expired or revoked), :class:`~wsproxy.ConnectionClosed` (4401: the secret was revoked; 4004: ended
    by the application).
    """

    def __init__(
        self,
        url: str,
        user_id: str,
        secret: str,
        *,
        concurrency: int = 8,
        result_bytes_max: int = _RESULT_BYTES_MAX,
        grace: float = 5.0,
        version: str = "",
        **options: Any,
    ) -> None:
        self._url = _address(url)
        self._user = check_id("user", user_id)
        if not isinstance(secret, str) or not secret:
            raise InvalidRequest("The secret is a text that is not empty.")
        if concurrency < 1 or result_bytes_max < 1024 or grace < 0:
            raise InvalidRequest(
                "concurrency must be at least 1, result_bytes_max 1024, and grace not below 0 seconds."
            )
        self._secret = secret
        self._concurrency = concurrency
        self._result_bytes_max = result_bytes_max
        self._grace = grace
        self._version = version
        self._options = options
        self._tools: dict[str, Tool] = {}
        self._running: Running | None = None
        self._task: asyncio.Task[None] | None = None
        self._socket: Socket | None = None
        self._interval = _HEARTBEAT
        self._connected = asyncio.Event()
        self._error: WsproxyError | None = None
        # An agent that never was connected tells its first failure at once: its address may be wrong.
        self._down_since = self._warned = -math.inf
        self._beats: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @overload
    def tool(self, function: F, /) -> F: ...
    @overload
    def tool(self, /, *, name: str) -> Callable[[F], F]: ...

    def tool(self, function: F | None = None, /, *, name: str | None = None) -> F | Callable[[F], F]:
        """Makes a function a tool, under its own name or ``name``.

        The members of a call's ``params`` become its arguments, checked against its annotations: the plain types of
        JSON, ``list``, ``dict``, ``tuple``, unions, ``Literal``, enumerations, ``pathlib.Path``, dataclasses,
        ``TypedDict`` and models of pydantic. A parameter of the type :class:`Context` gets the call itself. A call that
        does not fit is answered with all that is wrong, and the function does not run.

        What it returns is written as JSON. What it raises is the caller's :class:`~wsproxy.ToolError`, with the
        exception's name and text; a :class:`~wsproxy.ToolError` that it raises itself gives its text alone.
        """

        def register(function: F) -> F:
            called = name if name is not None else getattr(function, "__name__", "")
            if not called:
                raise InvalidRequest("A tool needs a name.")
            if called in self._tools:
                raise InvalidRequest(f"There are two tools of the name {called!r}.")
            self._tools[called] = Tool(called, function)
            return function

        return register if function is None else register(function)

    @property
    def is_connected(self) -> bool:
        """True while the gateway holds the agent's connection."""
        return self._connected.is_set()

    async def run(self) -> None:
        """Serves the tools until the agent is cancelled or the gateway refuses it for good; raises why."""
        async with self:
            await self.wait()

    async def __aenter__(self) -> Agent:
        if self._task is not None:
            raise InvalidRequest("The agent runs already, or has ended: make another one.")
        self._running = Running(self._tools, self._concurrency, self._result_bytes_max)
        self._task = asyncio.get_running_loop().create_task(self._serve(self._running), name="wsproxy-agent")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def ready(self) -> None:
        """Waits until the agent is connected; raises why it never will be."""
        task = self._started()
        opened = asyncio.ensure_future(self._connected.wait())
        try:
            await asyncio.wait({task, opened}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            opened.cancel()
        self._raise()
        if not self.is_connected:
            raise WsproxyError("The agent has ended.")

    async def wait(self) -> None:
        """Waits until the agent has ended, and raises why; returns where :meth:`aclose` ended it."""
        await asyncio.wait({self._started()})
        self._raise()

    async def aclose(self) -> None:
        """Ends the agent: waits up to ``grace`` seconds for its tools, then cancels them and closes the connection."""
        if self._running is None or self._task is None:
            return
        try:
            await self._running.aclose(self._grace)
        finally:
            self._task.cancel()
            await asyncio.wait({self._task, *self._closing})

    def _started(self) -> asyncio.Task[None]:
        if self._task is None:
            raise InvalidRequest("The agent does not run: use run() or async with.")
        return self._task

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    # ---- the loop ----

    async def _serve(self, running: Running) -> None:
        try:
            await self._connections(running)
        except WsproxyError as error:
            self._error = error
        except Exception as error:
            # Such as an option that the library below does not know.
            self._error = WsproxyError(f"The agent failed: {error!r}")
            self._error.__cause__ = error
        _log.error("The agent of %s has ended: %s", self._user, self._error)

    async def _connections(self, running: Running) -> None:
        backoff = Backoff(base=0.5, cap=30.0)
        while True:
            try:
                socket = await open_socket(self._url, self._user, self._secret, self._options)
            except NotOpened as error:
                pause = self._after_refusal(error)
            else:
                opened = time.monotonic()
                lost = await self._hold(socket, running)
                self._down_since = time.monotonic()
                # One that is opened and lost at once, over and over, must not be tried without a pause.
                if self._down_since - opened > _STABLE:
                    backoff.reset()
                pause = self._after_loss(lost)
            await asyncio.sleep(backoff.next(pause))

    def _after_refusal(self, error: NotOpened) -> float:
        """Returns the least pause before the next attempt; raises where there is none."""
        if error.code and error.status == 409:
            raise AgentReplaced(_REPLACED, f"while it connected: {error}") from error
        advice = after_refusal(error.status, error.code, error.retryable)
        # The secret stays the same, so that a refused one is refused for good.
        if advice in ("final", "credentials"):
            raise Refused(f"The gateway refused the agent: {error}", error.status, error.code) from error
        now = time.monotonic()
        if now - self._down_since > _WARN_EVERY and now - self._warned > _WARN_EVERY:
            self._warned = now
            _log.warning("The agent of %s is not connected and tries again: %s", self._user, error)
        return max(error.retry_after, SLOW if advice == "slow" and not error.retry_after else 0.0)

    def _after_loss(self, lost: Lost) -> float:
        if lost.code == _REPLACED:
            raise AgentReplaced(lost.code, lost.reason)
        advice = after_close(lost.code, lost.reason)
        if lost.code >= 3000 and advice in ("final", "credentials"):
            raise ConnectionClosed(lost.code, lost.reason)
        if lost.code not in (1000, 1001, 1006, 1012):
            _log.warning("The connection was closed with %s, and the agent comes back.", lost)
        # A message that the gateway does not accept is no reason to stop for ever: others may be accepted.
        return 0.0 if advice == "retry" else SLOW

    async def _hold(self, socket: Socket, running: Running) -> Lost:
        """Serves a connection until it ends."""
        self._socket, self._interval = socket, _HEARTBEAT
        try:
            while True:
                async with asyncio.timeout(self._interval + _ACK_WITHIN):
                    text = await socket.receive()
                await self._take(socket, running, text)
        except Lost as lost:
            return lost
        except TimeoutError:
            return Lost(1006, "silence")
        finally:
            self._connected.clear()
            if self._beats is not None:
                self._beats.cancel()
            # Closing politely must not hold the next attempt up.
            closing = asyncio.get_running_loop().create_task(socket.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _take(self, socket: Socket, running: Running, text: str | bytes) -> None:
        message, problem = read_object(text)
        kind = message.get("type") if problem is None else "tool_call"
        match kind:
            case "tool_call":
                running.begin(socket, message, problem)
            case "tool_cancel":
                running.cancel(message.get("requestId"))
            case "connected" if not self.is_connected:
                await self._greet(socket, message)
            case "error":
                _log.warning("The gateway complains: %s %s", message.get("code"), message.get("message"))

    async def _greet(self, socket: Socket, message: Mapping[str, Any]) -> None:
        heartbeat = message.get("heartbeat")
        interval = heartbeat.get("interval") if isinstance(heartbeat, dict) else None
        if isinstance(interval, int | float) and 0 < interval <= _HEARTBEAT_MS_MAX:
            self._interval = interval / 1000
        if socket.is_v2:
            hello = {"type": "hello", "version": self._version or _version(), "platform": sys.platform}
            await socket.send(json.dumps(hello | {"capabilities": ["cancel", "progress"]}))
        self._beats = asyncio.get_running_loop().create_task(self._beat(socket))
        self._connected.set()

    async def _beat(self, socket: Socket) -> None:
        try:
            while True:
                await socket.send(json.dumps({"type": "heartbeat", "timestamp": round(time.time() * 1000)}))
                await asyncio.sleep(self._interval)
        except Lost:
            # The reader learns it too.
            return


def _version() -> str:
    from .. import __version__

    return f"wsproxy-python {__version__}"


def _address(base: str) -> str:
    parts = urlsplit(base)
    if parts.query or parts.fragment or parts.password:
        raise InvalidRequest(
            "The URL of the gateway has no query and no password: the secret is an argument of its own."
        )
    try:
        return url(base, "" if parts.path.strip("/") else "/", websocket=True)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
