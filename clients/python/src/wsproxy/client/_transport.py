"""What the engine needs of a way to the gateway, and how such a way fails."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

# No client waits longer than this for one attempt to connect, in seconds.
OPEN_TIMEOUT = 15.0


@dataclass(frozen=True, slots=True)
class Frame:
    """Something from the gateway. ``data`` is ``None`` where only the position moves.

    ``event_id`` is the position, ``None`` where the connection carries none, and empty where the message has none.
    """

    data: str | bytes | None
    event_id: str | None


class Lost(Exception):
    """The connection ended, with a WebSocket close code (1006: without one)."""

    def __init__(self, code: int = 1006, reason: str = "") -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


class NotOpened(Exception):
    """The gateway answered with another status than the one that opens, or (status 0) not at all."""

    def __init__(self, status: int, code: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after


class Connection(Protocol):
    """An open connection."""

    async def receive(self) -> Frame:
        """The next frame; raises :class:`Lost`."""
        ...

    async def send(self, text: str) -> None:
        """Hands a message over to the network; raises :class:`Lost`."""
        ...

    async def close(self) -> None: ...


class Transport(Protocol):
    """Opens connections; raises :class:`NotOpened`."""

    async def open(self, token: str, last_event_id: str) -> Connection: ...

    async def aclose(self) -> None: ...


def url(base: str, path: str, websocket: bool) -> str:
    """The address of an endpoint, whichever of the two kinds of schemes the base has."""
    parts = urlsplit(base)
    secure = parts.scheme in ("https", "wss")
    if not secure and parts.scheme not in ("http", "ws"):
        raise ValueError(f"{base!r} begins with none of http, https, ws and wss")
    scheme = ("wss" if secure else "ws") if websocket else ("https" if secure else "http")
    return urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") + path, "", ""))


def not_opened(status: int, body: bytes, retry_after: str | None) -> NotOpened:
    """A refusal as the gateway writes it."""
    code, message = "", f"status {status}"
    try:
        error = json.loads(body)["error"]
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        pass
    seconds = float(retry_after) if retry_after is not None and retry_after.isdigit() else 0.0
    return NotOpened(status, code, message, seconds)
