"""The WebSocket transport, on the ``websockets`` library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

try:
    from websockets.asyncio.client import ClientConnection, connect
    from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
    from websockets.typing import Subprotocol
except ImportError as error:  # pragma: no cover
    raise ImportError("WebSockets need the extra: pip install 'wsproxy[client]'; or use transport='sse'.") from error

from ._pace import Pace
from ._transport import OPEN_TIMEOUT, Connection, Frame, Lost, NotOpened, not_opened, url

# Selected where there is a history: `<position>\n<payload>`, whatever the payload is.
_WITH_IDS = Subprotocol("wsproxy.id.v1")
_PLAIN = Subprotocol("wsproxy.v1")
DEFAULTS: Mapping[str, Any] = {"open_timeout": OPEN_TIMEOUT, "close_timeout": 3.0, "max_size": 64 * 1024 * 1024}
"""Options of every WebSocket, which an application may replace."""


class WebSocketTransport:
    """Opens WebSockets; ``options`` go to :func:`websockets.asyncio.client.connect`."""

    sends = True

    def __init__(self, base_url: str, path: str, options: Mapping[str, Any]) -> None:
        self._url = url(base_url, path, websocket=True)
        self._options: dict[str, Any] = {**DEFAULTS, **options}

    async def open(self, token: str, last_event_id: str) -> Connection:
        headers = {**self._options.get("additional_headers", {}), "Authorization": f"Bearer {token}"}
        asked = f"{self._url}?last_event_id={quote(last_event_id, safe='')}"
        options = self._options | {"subprotocols": [_WITH_IDS, _PLAIN], "additional_headers": headers}
        return _WebSocket(await dial(asked, options))

    async def aclose(self) -> None:
        pass


class _WebSocket:
    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._with_ids = connection.subprotocol == _WITH_IDS
        # One per connection: the gateway counts anew for each.
        self._pace = Pace()

    async def receive(self) -> Frame:
        try:
            data = await self._connection.recv()
        except ConnectionClosed as error:
            raise lost(error) from error
        if not self._with_ids:
            return Frame(data, None)
        if isinstance(data, str):
            event_id, _, text = data.partition("\n")
            return Frame(text, event_id)
        head, _, payload = data.partition(b"\n")
        return Frame(payload, head.decode("ascii", "replace"))

    async def send(self, text: str) -> None:
        await self._pace.turn()
        try:
            await self._connection.send(text)
        except ConnectionClosed as error:
            raise lost(error) from error

    async def close(self) -> None:
        await self._connection.close()


async def dial(url: str, options: Mapping[str, Any]) -> ClientConnection:
    """Opens a WebSocket with options of :func:`websockets.asyncio.client.connect`; raises :class:`NotOpened`."""
    try:
        return await connect(url, **options)
    except InvalidStatus as error:
        answer = error.response
        raise not_opened(answer.status_code, bytes(answer.body or b""), answer.headers.get("Retry-After")) from error
    except (OSError, TimeoutError, InvalidHandshake, EOFError) as error:
        raise NotOpened(0, "unreachable", f"The gateway cannot be reached: {error}") from error


def lost(error: ConnectionClosed) -> Lost:
    """The loss that the end of a connection is."""
    return Lost(error.rcvd.code, error.rcvd.reason) if error.rcvd is not None else Lost()
