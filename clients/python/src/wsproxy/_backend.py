"""The interface of a way to the gateway, over Redis or over HTTP; the worker knows only this."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from ._backoff import Backoff
from ._calls import Calls
from ._feeds import Consumer, Kept, Subscription
from .errors import Unavailable
from .types import (
    Failure,
    GapCallback,
    History,
    Outcome,
    Presence,
    Receipt,
    RoomEvent,
    RoomMember,
    SessionToken,
    UpstreamMessage,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """Destination of a message: all users, or a user, a connection or a session by its id."""

    kind: Literal["broadcast", "user", "connection", "session"]
    id: str = ""

    def __str__(self) -> str:
        return self.kind if self.kind == "broadcast" else f"{self.kind}:{self.id}"


@dataclass(frozen=True, slots=True)
class Publication:
    """A message that is ready to go out."""

    target: Target
    payload: bytes
    history: bool = True
    event_id: str | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class StreamReply:
    """State of a token stream after an operation."""

    seq: int
    event_id: str | None


@dataclass(frozen=True, slots=True)
class StreamState:
    """A token stream as it is kept: enough for another worker to go on with it."""

    seq: int
    text: str
    state: str


@dataclass(frozen=True, slots=True)
class StreamCall:
    """One operation on a token stream; what an operation does not use is left as it is."""

    session: str
    stream: str
    op: Literal["open", "append", "renew", "end"]
    lease: float
    meta: Mapping[str, Any] | None = None
    text: str = ""
    seq: int | None = None
    outcome: Outcome = "finish"
    error: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """Kind and lifetime (seconds) of a session's token that is to be issued."""

    agent: str
    session: str
    ttl: float
    event_stream: bool
    bound: bool


@dataclass(frozen=True, slots=True)
class Disconnection:
    """The connections to the event endpoint that are ended, and the seconds for which their tokens are refused."""

    user: str | None
    connection: str | None
    jti: str | None
    code: int | None
    reason: str | None
    revoke: float | None


class RoomCalls(Protocol):
    """A way to rooms; :class:`wsproxy.Rooms` knows only this."""

    async def publish(self, room: str, payload: bytes, *, is_json: bool) -> Receipt: ...
    async def kick(self, room: str, client: str | None, user: str | None, reason: str | None) -> int: ...
    async def close(self, room: str, reason: str | None) -> int: ...
    async def members(self, room: str) -> list[RoomMember]: ...
    def listen(self, room: str, on_gap: GapCallback | None) -> Subscription[RoomEvent]: ...


class Backend(Protocol):
    """A way to the gateway. Every method raises an error of this package, and is done once or says it is in doubt."""

    async def issue_token(self, request: TokenRequest) -> SessionToken: ...
    async def publish(self, publication: Publication) -> Receipt: ...
    async def batch(self, publications: Sequence[Publication]) -> list[Receipt | Failure]: ...
    async def stream(self, call: StreamCall) -> StreamReply: ...
    async def stream_state(self, session: str, stream: str) -> StreamState | None: ...
    async def close_session(
        self, session: str, code: int | None, reason: str | None, connection: str | None
    ) -> int: ...
    async def disconnect(self, request: Disconnection) -> int: ...
    async def presence(self, user: str) -> list[Presence]: ...
    async def history(self, target: Target, after: str, limit: int) -> History: ...

    is_kept_on: bool
    """True where kept messages stay after they were handed out."""

    async def claim(self, sessions: Sequence[str], owner: str, lease: float) -> list[bool]: ...
    async def held(self, sessions: Sequence[str], owner: str) -> list[bool]:
        """Returns true where another worker serves them."""

    async def release(self, session: str, owner: str) -> None: ...
    async def has_clients(self, sessions: Sequence[str]) -> list[bool]: ...
    def open_sessions(self, agent: str) -> AsyncIterator[tuple[str, str]]:
        """Sessions and their connections that the gateways keep as open; none where this is not known."""

    def kept_messages(self, session: str) -> Kept | None: ...
    def follow_upstream(self, session: str, kept: bool) -> Consumer: ...
    def follow_sessions(self, agent: str) -> Consumer: ...
    def read_sessions(
        self, agent: str, after: str, parse: Callable[[UpstreamMessage], T | None], on_gap: GapCallback | None
    ) -> Subscription[T]: ...
    def calls(self, owned: bool) -> Calls: ...
    def rooms(self) -> RoomCalls: ...
    async def aclose(self) -> None: ...


async def retrying(call: Callable[[int], Awaitable[T]], seconds: float, *, in_doubt_too: bool) -> T:
    """Calls ``call`` with the number of the attempt until it succeeds, for at most ``seconds``.

    A call that may have been done already is repeated only with ``in_doubt_too``.
    """
    end, backoff, attempt = time.monotonic() + seconds, Backoff(base=0.05, cap=2.0), 0
    while True:
        try:
            return await call(attempt)
        except Unavailable as error:
            pause = backoff.next(error.retry_after or 0.0)
            if (error.in_doubt and not in_doubt_too) or time.monotonic() + pause > end:
                raise
        attempt += 1
        await asyncio.sleep(pause)
