"""The transport of server-sent events, on httpx alone; it only receives."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from .._sse import Parser, ServerSentEvent
from ..errors import NotSupported
from ._transport import OPEN_TIMEOUT, Connection, Frame, Lost, NotOpened, not_opened, url

# The gateway sends a comment every 15 s of silence (`[sse] keep_alive`).
_SILENCE_MAX = 45.0
# Bytes of a refusal that are read.
_REFUSAL_MAX = 64 * 1024


class SseTransport:
    """Opens event streams; ``options`` go to :class:`httpx.AsyncClient`."""

    sends = False

    def __init__(self, base_url: str, path: str, options: Mapping[str, Any]) -> None:
        self._url = url(base_url, path, websocket=False)
        timeout = httpx.Timeout(OPEN_TIMEOUT, read=_SILENCE_MAX)
        self._client = httpx.AsyncClient(**{"timeout": timeout, **options})

    async def open(self, token: str, last_event_id: str) -> Connection:
        request = self._client.build_request(
            "GET",
            self._url,
            params={"last_event_id": last_event_id},
            headers={"accept": "text/event-stream", "authorization": f"Bearer {token}", "cache-control": "no-store"},
        )
        try:
            response = await self._client.send(request, stream=True)
            if not _is_event_stream(response):
                body = await _beginning(response)
                raise not_opened(response.status_code, body, response.headers.get("retry-after"))
        except httpx.HTTPError as error:
            raise NotOpened(0, "unreachable", f"The gateway cannot be reached: {error!r}") from error
        return _EventStream(response)

    async def aclose(self) -> None:
        await self._client.aclose()


class _EventStream:
    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._chunks: AsyncIterator[bytes] = response.aiter_bytes()
        self._parser = Parser()
        self._events: deque[ServerSentEvent] = deque()

    async def receive(self) -> Frame:
        while True:
            while not self._events:
                try:
                    self._events.extend(self._parser.feed(await anext(self._chunks)))
                except StopAsyncIteration:
                    raise Lost(1006, "the stream ended") from None
                except (httpx.HTTPError, httpx.StreamError, ValueError) as error:
                    raise Lost(1006, repr(error)) from error
            event = self._events.popleft()
            if event.event == "close":
                raise _closed(event)
            # Gateways before this one sent an id alone, without data.
            is_position = event.event == "position" or event.data is None
            if event.data is not None and not is_position:
                return Frame(event.data, event.last_event_id if event.own_id else "")
            if event.own_id:
                return Frame(None, event.last_event_id)

    async def send(self, text: str) -> None:
        raise NotSupported("Server-sent events only receive: use transport='websocket'.")

    async def close(self) -> None:
        await self._response.aclose()


def _is_event_stream(response: httpx.Response) -> bool:
    # A network's sign-in page also says 200.
    return response.status_code == 200 and response.headers.get("content-type", "").startswith("text/event-stream")


async def _beginning(response: httpx.Response) -> bytes:
    """Reads as much of a refusal as the gateway would write; a proxy in its place may send more, or never end."""
    body = b""
    try:
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > _REFUSAL_MAX:
                break
    finally:
        await response.aclose()
    return body


def _closed(event: ServerSentEvent) -> Lost:
    try:
        told = json.loads(event.data or "")
        return Lost(int(told["code"]), str(told.get("reason", "")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return Lost()
