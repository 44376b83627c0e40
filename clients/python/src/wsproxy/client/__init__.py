"""The client's side: connections that come back and lose nothing.

:func:`connect_session` and :func:`connect_events` give a :class:`Client`, an asynchronous iterator over messages. With
the transport ``websocket`` (the default) the extra ``wsproxy[client]`` is needed; ``sse`` needs nothing, and only
receives.
"""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import quote

from ._engine import Client, Options, StateCallback, TokenSource
from ._message import Message
from ._sse import SseTransport
from ._transport import Transport
from .streams import MergedStream, MergedStreams

__all__ = ["Client", "MergedStream", "MergedStreams", "Message", "connect_events", "connect_session"]

TransportName = Literal["websocket", "sse"]


def connect_session(
    base_url: str,
    agent: str,
    session: str,
    *,
    token: TokenSource,
    last_event_id: str | None = None,
    transport: TransportName = "websocket",
    give_up_after: float | None = None,
    on_state: StateCallback | None = None,
    **options: Any,
) -> Client:
    """A client of one session.

    ``base_url`` is the gateway's (``https://…`` or ``wss://…``). ``token`` is the session's token or, so that the
    client can come back, a function that fetches a fresh one each time (it may be a coroutine function)::

        async def token() -> str:
            answer = await http.post("https://app.example/sessions", params={"session_id": "s-1"})
            return answer.json()["token"]

        async with connect_session("https://gateway.example", "demo", "s-1", token=token) as client:
            await client.send({"type": "prompt", "text": "hello"})
            async for message in client:
                print(message.json())

    A function that fails, in whatever way, is called again; one that raises :class:`~wsproxy.GiveUp` ends the client.

    A token that was issued with ``event_stream`` needs no function: it opens event streams (``transport="sse"``) until
    it expires, and no WebSocket.

    ``last_event_id`` continues where an earlier client stopped (:attr:`Client.last_event_id`); ``"0"`` begins with
    everything that is kept. ``give_up_after`` seconds without a connection the iterator raises
    :class:`~wsproxy.Unavailable`; ``None`` means never. ``options`` go to ``websockets`` or
    :class:`httpx.AsyncClient`.
    """
    path = f"/{quote(agent, safe='@+=~')}/ws/{quote(session, safe='@+=~')}"
    return Client(
        _transport(transport, base_url, path, options),
        Options(token, last_event_id, give_up_after, on_state, events=False),
    )


def connect_events(
    base_url: str,
    *,
    token: TokenSource,
    last_event_id: str | None = None,
    transport: TransportName = "websocket",
    auto_ack: bool = True,
    refresh_ahead: float = 30.0,
    give_up_after: float | None = None,
    on_state: StateCallback | None = None,
    path: str = "/ws",
    **options: Any,
) -> Client:
    """A client of the event endpoint; see :func:`connect_session` for what both share.

    ``token`` is a JWT or a function that fetches one: it is called again ``refresh_ahead`` seconds before the token
    expires, but not before half of the time that is left, and the new one is handed over in place. Pings are answered.
    A message that asks for an acknowledgement gets it when the loop comes back for the next one; with
    ``auto_ack=False`` call :meth:`Client.ack`. Over ``sse`` nothing can be acknowledged, and a new token means a new
    connection.
    """
    return Client(
        _transport(transport, base_url, path, options),
        Options(
            token, last_event_id, give_up_after, on_state, events=True, auto_ack=auto_ack, refresh_ahead=refresh_ahead
        ),
    )


def _transport(name: TransportName, base_url: str, path: str, options: dict[str, Any]) -> Transport:
    if name == "sse":
        return SseTransport(base_url, path, options)
    # Imported here, so that the package works without the extra.
    from ._websocket import WebSocketTransport

    return WebSocketTransport(base_url, path, options)
