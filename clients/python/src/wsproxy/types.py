"""The values that go in and out of a worker. They know nothing of Redis or HTTP."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

from ._envelope import read
from .errors import InvalidRequest

Payload: TypeAlias = bytes | str | Mapping[str, Any] | Sequence[Any] | int | float | bool | None
"""A message: ``bytes`` and ``str`` go out verbatim, everything else as compact JSON."""

Outcome: TypeAlias = Literal["finish", "error", "cancelled"]
"""Outcome of a token stream."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a log's history; give the worker the limits that the gateway has.

    ``entries_max`` messages, ``bytes_max`` bytes of data, and no longer than ``ttl`` seconds after the last message.
    """

    entries_max: int = 1000
    bytes_max: int = 1024 * 1024
    ttl: float = 3600.0


@dataclass(frozen=True, slots=True)
class SessionToken:
    """A token that opens a session within ``expires_in`` seconds: one connection or event stream, once.

    With ``event_stream`` any number of event streams until then, and no WebSocket.
    """

    agent_id: str
    session_id: str
    token: str = field(repr=False)
    expires_in: float
    event_stream: bool = False

    @property
    def path(self) -> str:
        """The path to connect to, below the gateway's address."""
        return f"/{self.agent_id}/ws/{self.session_id}"

    def as_dict(self) -> dict[str, str | float]:
        """The fields for the page, ready to be an HTTP answer."""
        return {
            "path": self.path,
            "session_id": self.session_id,
            "token": self.token,
            "expires_in": self.expires_in,
        }


@dataclass(frozen=True, slots=True)
class Receipt:
    """The result of a publish.

    ``receivers`` counts gateway instances that had a client to deliver to, not clients; 0 means that no client
    is connected now. On a Redis Cluster a number above 0 means "at least". ``event_id`` is the position in history
    (``None`` without history): a client that comes back with an earlier one gets the message. ``duplicate`` is true
    where the idempotency key was used before and no message was sent.
    """

    receivers: int
    event_id: str | None
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """One message of a batch that was not sent, and why."""

    code: str
    message: str
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """One message of the event endpoint, as :meth:`Worker.batch` takes it.

    ``ack`` asks the client for an acknowledgement; ``timestamp`` (RFC 3339) is now where it is absent.
    """

    type: str
    data: Any = None
    event_id: str | None = None
    ack: bool = False
    timestamp: str | None = None


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message of a batch. ``to`` is ``broadcast``, ``user:U``, ``connection:C`` or ``session:S``."""

    to: str
    message: Event | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Gap:
    """Messages may be missing here: the way to the bus was interrupted for ``seconds``.

    ``reason`` is ``connection`` (the way was interrupted), ``bus`` (the gateway lost its bus), ``overflow`` (the
    reader of the iterator was too slow and the oldest messages were dropped) or ``history_lost`` (the log that is
    read no longer has the entry behind which to go on).
    """

    seconds: float
    reason: Literal["connection", "bus", "overflow", "history_lost"]


GapCallback: TypeAlias = Callable[[Gap], Awaitable[None] | None]
"""Called in sequence with the messages, in the task that iterates."""


@dataclass(frozen=True, slots=True)
class UpstreamMessage:
    """A message from a client of a session: JSON, as the gateway let it through.

    ``event_id`` is the entry's id in the log of the session's upstream, where the message was kept while no worker
    listened.
    """

    data: bytes
    event_id: str | None = None

    def json(self) -> Any:
        """The parsed message."""
        return json.loads(self.data)

    @property
    def text(self) -> str:
        """The message as it was sent."""
        return self.data.decode()


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """A connection of a session was opened or closed. The fields from ``reason`` on are there for ``closed`` only.

    With the ``reason`` ``server_lost`` the gateway instance of the connection was killed, and
    ``duration_ms`` is unknown. ``event_id`` is the position in the log, where announcements are kept. ``raw`` is the
    whole announcement.
    """

    event: Literal["opened", "closed"]
    agent_id: str
    session_id: str
    connection_id: str
    server_id: str
    timestamp: str
    reason: str | None = None
    code: int | None = None
    duration_ms: int | None = None
    event_id: str | None = field(default=None, compare=False)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Presence:
    """One live connection of a user to the event endpoint."""

    connection_id: str
    server_id: str
    connected_at: str
    transport: str | None = None


@dataclass(frozen=True, slots=True)
class RoomMember:
    """One member of a room. ``since`` is the time at which it joined (RFC 3339); ``name`` is for people."""

    client_id: str
    user_id: str
    name: str | None
    server_id: str
    since: str


@dataclass(frozen=True)
class RoomMessage:
    """A message in a room, from a member or from a worker.

    ``sender`` is the member's client id, empty for a worker, and for positions, whose entries name their senders.
    ``kind`` names the payload, such as ``chat_message``, ``custom`` or ``position_batch``. ``raw`` has the bytes that
    were published: protobuf, or the JSON of a worker. A message that is no envelope has the kind ``opaque``, no
    ``sender`` and no ``message``.
    """

    sender: str
    kind: str
    raw: bytes = field(repr=False)

    @cached_property
    def message(self) -> Mapping[str, Any] | None:
        """The JSON form of the envelope (``spec/rooms/v1/rooms.proto``), which is decoded when it is asked for."""
        found = None if self.kind == "opaque" else read(self.raw)
        if found is not None and not self.sender:
            # A worker's own word about the sender does not count.
            found.pop("sender", None)
        return found

    @property
    def body(self) -> Any:
        """The payload, such as ``{"message": "hi"}`` of a ``chat_message``."""
        first, *others = self.kind.split("_")
        return (self.message or {}).get(first + "".join(map(str.capitalize, others)))


@dataclass(frozen=True, slots=True)
class RoomJoin:
    """A client became a member of the room. A member that comes back in time with another connection does not join."""

    member: RoomMember


@dataclass(frozen=True, slots=True)
class RoomLeave:
    """A member left the room."""

    client_id: str


RoomEvent: TypeAlias = RoomMessage | RoomJoin | RoomLeave
"""An event of a room, as :meth:`Rooms.listen` gives it."""


@dataclass(frozen=True, slots=True)
class HistoryEvent:
    """One kept message: its position, its bytes, and the event id that the worker gave it, if it gave one."""

    event_id: str
    data: bytes
    own_event_id: str | None = None

    def json(self) -> Any:
        """The parsed message."""
        return json.loads(self.data)


@dataclass(frozen=True, slots=True)
class History:
    """A page of history, oldest first.

    ``complete`` tells that nothing is kept behind these messages; ``position`` is the ``after`` of the next call.
    ``lost`` tells why something may be missing before them: ``trimmed``, ``unknown``, ``expired``, ``emptied`` or
    ``ambiguous``; ``None`` means that nothing is.
    """

    events: tuple[HistoryEvent, ...]
    complete: bool
    position: str
    lost: str | None = None


def encode(message: object) -> bytes:
    """A message as the bytes that go out: text and bytes as they are, all else as compact JSON.

    Raises :class:`InvalidRequest` where JSON or UTF-8 cannot say it: NaN, infinity, half of a surrogate pair.
    """
    if isinstance(message, bytes):
        return message
    try:
        if isinstance(message, str):
            return message.encode()
        return json.dumps(message, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("The message holds half of a surrogate pair.") from error
    except ValueError as error:
        raise InvalidRequest(f"The message cannot be written as JSON: {error}") from error
