"""The agent's WebSocket, on the ``websockets`` library. It knows no messages."""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

try:
    from websockets.asyncio.client import ClientConnection
    from websockets.exceptions import ConnectionClosed
    from websockets.typing import Subprotocol

    from ..client._websocket import DEFAULTS, dial, lost
except ImportError as error:  # pragma: no cover
    raise ImportError("An agent needs the extra: pip install 'wsproxy[client]'.") from error

_V2 = Subprotocol("wsproxy.agent.v2")
# Text that may stand in a header that lists subprotocols.
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+\-.^_`|~]+")
# The library writes whole handshakes to its log where that is at DEBUG, and the secret is in them.
_log = logging.getLogger("wsproxy.websocket")
_log.setLevel(logging.INFO)


async def open_socket(url: str, user: str, secret: str, options: Mapping[str, Any]) -> Socket:
    """Opens a connection; raises :class:`NotOpened`. The secret is a subprotocol, never a part of the URL."""
    defaults: dict[str, Any] = {
        **DEFAULTS,
        # Heartbeats of messages show that the connection lives, both ways.
        "ping_interval": None,
        "logger": _log,
    }
    subprotocols = [_V2, Subprotocol(_bearer(secret))]
    asked = f"{url}?userId={quote(user, safe='')}"
    return Socket(await dial(asked, defaults | dict(options) | {"subprotocols": subprotocols}))


def _bearer(secret: str) -> str:
    if _TOKEN.fullmatch(secret):
        return f"bearer.{secret}"
    return "bearer64." + base64.urlsafe_b64encode(secret.encode()).decode().rstrip("=")


class Socket:
    """An open connection."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self.is_v2 = connection.subprotocol == _V2
        """True where the gateway knows progress and cancellation."""

    async def receive(self) -> str | bytes:
        """The next message; raises :class:`Lost`."""
        try:
            return await self._connection.recv()
        except ConnectionClosed as error:
            raise lost(error) from error

    async def send(self, text: str) -> None:
        """Hands a message over to the network; raises :class:`Lost`."""
        try:
            await self._connection.send(text)
        except ConnectionClosed as error:
            raise lost(error) from error

    async def close(self) -> None:
        """Ends the connection politely."""
        await self._connection.close()
