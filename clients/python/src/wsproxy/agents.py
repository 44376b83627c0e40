"""The caller's side of users' agents: one interface over Redis or over the gateway's HTTP API."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from ._calls import Call, Calls, ProgressCallback, written
from ._http import HttpBackend
from ._ids import check_id
from ._redis import RedisBackend
from .errors import InvalidRequest
from .types import Limits, encode

_TIMEOUT_MAX = 24 * 3600.0
_TOOL_CHARACTERS_MAX = 256
_TRACEPARENT = re.compile(r"[!-~]{1,255}")


class Agents:
    """Users' agents, as an application calls them. Make one per process, with :meth:`redis` or :meth:`http`.

    A worker has one already: ``worker.agents``. All calls are safe from many tasks of one event loop::

        async with Agents.redis("redis://127.0.0.1:6379") as agents:
            text = await agents.call("u1", "read_file", {"path": "notes.txt"})
    """

    def __init__(self, calls: Calls) -> None:
        """Not for direct use: :meth:`redis`, :meth:`http` and ``Worker.agents`` make them."""
        self._calls = calls

    @classmethod
    def redis(cls, url: str, *, prefix: str = "", **options: Any) -> Agents:
        """Over Redis, at a URL as for :meth:`wsproxy.Worker.redis`.

        ``prefix`` is the gateway's ``[redis] channel_prefix``. ``options`` go to redis-py. Nothing is connected before
        the first call.
        """
        return cls(RedisBackend(url, prefix, Limits(), 30.0, options).calls(owned=True))

    @classmethod
    def http(cls, base_url: str, api_key: str, **options: Any) -> Agents:
        """Over the gateway's HTTP API; the key needs the scope ``agents``. ``options`` go to httpx."""
        return cls(HttpBackend(base_url, api_key, 30.0, options).calls(owned=True))

    async def __aenter__(self) -> Agents:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes all connections. Calls in flight end with :class:`~wsproxy.Unavailable`."""
        await self._calls.aclose()

    async def call(
        self,
        user: str,
        tool: str,
        params: Mapping[str, Any] | None = None,
        *,
        timeout: float = 30.0,
        idempotency_key: str | None = None,
        on_progress: ProgressCallback | None = None,
        retry_for: float | None = None,
        traceparent: str | None = None,
    ) -> Any:
        """Calls a tool on a user's agent, wherever it is connected, and returns the result.

        - ``params``: a JSON object.
        - ``timeout``: seconds for the whole call, retries included.
        - ``idempotency_key``: names the call, so that it may be sent again: a call whose answer was lost, or whose
          agent went away, is then repeated within the timeout. The gateway that holds the agent runs a key once; the
          key has the characters of an id.
        - ``on_progress``: called with each :class:`~wsproxy.Progress` that arrives; it may be a coroutine function.
          Its exceptions end the call.
        - ``retry_for``: seconds for which an agent that is offline or busy is tried again; ``None``: all the timeout,
          0: not at all.
        - ``traceparent``: W3C trace context, handed to the agent.

        Cancelling the task cancels the call: the agent is told.

        Raises :class:`~wsproxy.ToolError` where the tool answered with an error; :class:`~wsproxy.AgentOffline` and
        :class:`~wsproxy.AgentBusy` where the tool was not called; :class:`~wsproxy.AgentGone`,
        :class:`~wsproxy.CallTimeout` and :class:`~wsproxy.CallCancelled` where it may have run;
        :class:`~wsproxy.CallDuplicate` for a key whose call has ended; :class:`~wsproxy.Unavailable` (``in_doubt`` says
        whether it may have run) without Redis or the gateway.
        """
        check_id("user", user)
        if not tool or len(tool) > _TOOL_CHARACTERS_MAX:
            raise InvalidRequest(f"The name of a tool has 1 to {_TOOL_CHARACTERS_MAX} characters.")
        if not 0 < timeout <= _TIMEOUT_MAX:
            raise InvalidRequest(f"timeout must be above 0 and at most {_TIMEOUT_MAX:.0f} seconds.")
        if traceparent is not None and not _TRACEPARENT.fullmatch(traceparent):
            raise InvalidRequest("A traceparent has at most 255 visible characters of ASCII.")
        if params is not None and not isinstance(params, Mapping):
            raise InvalidRequest("The parameters of a call are a JSON object.")
        try:
            text = written(dict(params or {}))
        except InvalidRequest as error:
            raise InvalidRequest(f"The parameters of {tool} cannot be sent: {error}.") from error
        request_id = uuid.uuid4().hex if idempotency_key is None else check_id("request", idempotency_key)
        call = Call(
            user,
            request_id,
            tool,
            text,
            timeout,
            idempotency_key is not None,
            on_progress,
            traceparent,
        )
        encode(tool)
        return await self._calls.call(call, timeout if retry_for is None else retry_for)

    async def cancel(self, user: str, idempotency_key: str) -> None:
        """Cancels a call by its key, from any process. Its caller gets :class:`~wsproxy.CallCancelled`."""
        await self._calls.cancel(check_id("user", user), check_id("request", idempotency_key))

    async def is_connected(self, user: str) -> bool:
        """Returns true where an agent of the user is connected now; a call may find it otherwise."""
        return await self._calls.is_connected(check_id("user", user))
