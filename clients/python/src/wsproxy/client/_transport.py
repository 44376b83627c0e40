"""The interface of a transport to the gateway, and its failures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

from ._advice import RETRY_AFTER_MAX, refusal

# No client waits longer than this for one attempt to connect, in seconds.
OPEN_TIMEOUT = 15.0


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame from the gateway. ``data`` is ``None`` where only the position moves.

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
    """The gateway, or a proxy in its place, did not open a connection; with status 0 there was no answer at all.

    ``code`` is the gateway's word, and empty where the answer is not its own.
    """

    def __init__(
        self, status: int, code: str, message: str, retry_after: float = 0.0, *, retryable: bool = True
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after
        self.retryable = retryable


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
    """Opens connections; raises :class:`NotOpened`. ``sends`` tells whether its connections send, too."""

    sends: bool

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
    """An answer that did not open a connection."""
    answer = refusal(status, body)
    text = (retry_after or "").strip()
    seconds = min(float(text), RETRY_AFTER_MAX) if text.isascii() and text.isdigit() else 0.0
    return NotOpened(status, answer.code, answer.message, seconds, retryable=answer.retryable)
