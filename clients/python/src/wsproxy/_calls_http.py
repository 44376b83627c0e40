"""Calls over HTTP: one request for each, with server-sent events where progress is asked for."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote

import httpx

from ._calls import (
    GRACE,
    Call,
    Progress,
    answer_of,
    failure,
    is_failure,
    not_done,
    progress_of,
    read_object,
    repeated,
    written,
)
from ._sse import Parser, ServerSentEvent
from .errors import CallTimeout, NotFound, Unavailable, WsproxyError


class HttpCalls:
    """All methods of :class:`wsproxy._calls.Calls`, over the client of a worker's backend.

    ``error_of`` and ``failure_of`` give the backend's errors, for a refusal and for no answer; ``close`` closes the
    backend where it is this object's own.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        error_of: Callable[[httpx.Response], WsproxyError],
        failure_of: Callable[[httpx.HTTPError], WsproxyError],
        close: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self._client = client
        self._error_of = error_of
        self._failure_of = failure_of
        self._close = close

    async def call(self, call: Call, retry_for: float) -> Any:
        return await repeated(call, retry_for, self._attempt)

    async def _attempt(self, call: Call) -> Any:
        try:
            # The instance that took the call waits for the agent's instance a little longer than the call lasts.
            async with asyncio.timeout(call.timeout + 2 * GRACE):
                return await self._call(call)
        except _CallbackFailed as failed:
            raise failed.error from None
        except TimeoutError:
            text = f"The gateway did not answer in time for the agent of {call.user}."
            raise CallTimeout(text, request_id=call.request_id) from None
        except WsproxyError as error:
            again = not_done(error, call.has_key)
            if again is None:
                raise
            raise again from error

    async def _call(self, call: Call) -> Any:
        headers = {"content-type": "application/json", "accept": "application/json"}
        if call.on_progress is not None:
            headers["accept"] = "text/event-stream"
        if call.has_key:
            headers["idempotency-key"] = call.request_id
        if call.traceparent is not None:
            headers["traceparent"] = call.traceparent
        head = written({"tool": call.tool, "timeout_ms": max(1, round(call.timeout * 1000))})
        # The gateway waits as long as the call lasts; the deadline around this ends a silent connection.
        request = self._client.stream(
            "POST",
            f"{_path(call.user)}/calls",
            headers=headers,
            content=f'{head[:-1]},"params":{call.params}}}'.encode(),
            timeout=httpx.Timeout(10.0, read=None),
        )
        try:
            async with request as response:
                if response.headers.get("content-type", "").startswith("text/event-stream"):
                    return await self._follow(response, call)
                await response.aread()
                return self._result(response.content, call, response)
        except httpx.HTTPError as error:
            raise self._failure_of(error) from error

    async def _follow(self, response: httpx.Response, call: Call) -> Any:
        heard = _Heard()
        # Reading goes on while a callback runs: a slow one gets the newest progress, and holds up the result only once.
        reading = asyncio.get_running_loop().create_task(heard.read(response), name="wsproxy-call")
        reading.add_done_callback(lambda _: heard.changed.set())
        try:
            while True:
                await heard.changed.wait()
                heard.changed.clear()
                progress, heard.progress = heard.progress, None
                if progress is not None:
                    await _tell(progress, call)
                elif reading.done():
                    return self._result(reading.result(), call, None)
                if reading.done():
                    heard.changed.set()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def _result(self, payload: bytes | str, call: Call, response: httpx.Response | None) -> Any:
        message, problem = read_object(payload)
        request_id = message.get("request_id")
        request_id = request_id if isinstance(request_id, str) else call.request_id
        error = message.get("error")
        if isinstance(error, Mapping):
            code, text = str(error.get("code", "")), str(error.get("message", ""))
            outcome = message.get("outcome")
            code = outcome if isinstance(outcome, str) and is_failure(outcome) else code
            if response is None or is_failure(code):
                raise failure(code, text, request_id)
        if response is not None and not response.is_success:
            refused = self._error_of(response)
            # The gateway knows that it has not begun the call.
            if isinstance(refused, Unavailable) and isinstance(error, Mapping) and error.get("retryable") is True:
                refused.in_doubt = False
            raise refused
        if "outcome" not in message:
            # For example, the page of a proxy that says 200 while the gateway is deployed.
            raise Unavailable("The answer is no call's, so it is not the gateway's.", in_doubt=True)
        return answer_of(message, problem, request_id)

    async def cancel(self, user: str, request_id: str) -> None:
        try:
            await self._once("DELETE", f"{_path(user)}/calls/{quote(request_id, safe='')}")
        except NotFound:
            # The call has ended, or never was: nothing is to be cancelled.
            return

    async def is_connected(self, user: str) -> bool:
        try:
            await self._once("GET", _path(user))
        except NotFound:
            return False
        return True

    async def _once(self, method: str, path: str) -> None:
        try:
            response = await self._client.request(method, path)
        except httpx.HTTPError as error:
            raise self._failure_of(error) from error
        if not response.is_success:
            raise self._error_of(response)

    async def aclose(self) -> None:
        if self._close is not None:
            await self._close()


class _CallbackFailed(Exception):
    """An exception of the callback for progress, which is no failure of the request around it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _Heard:
    """The newest progress of a call's event stream."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.changed = asyncio.Event()

    async def read(self, response: httpx.Response) -> str:
        """Returns the result's text."""
        parser = Parser()
        async for chunk in response.aiter_bytes():
            for event in parser.feed(chunk):
                if event.event == "result" and event.data is not None:
                    return event.data
                self.progress = _progress(event) or self.progress
                self.changed.set()
        raise Unavailable("The event stream ended without a result.", in_doubt=True)


def _progress(event: ServerSentEvent) -> Progress | None:
    if event.event != "progress" or event.data is None:
        return None
    message, problem = read_object(event.data)
    return progress_of(message) if problem is None else None


async def _tell(progress: Progress, call: Call) -> None:
    if call.on_progress is None:
        return
    try:
        told = call.on_progress(progress)
        if inspect.isawaitable(told):
            await told
    except Exception as failed:
        raise _CallbackFailed(failed) from failed


def _path(user: str) -> str:
    return f"agents/{quote(user, safe='')}"
