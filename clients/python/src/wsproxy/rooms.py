"""Rooms as a worker sees them: one interface over Redis or over the gateway's HTTP API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ._backend import RoomCalls
from ._envelope import Malformed, addressed, decode, kind_of
from ._feeds import Subscription
from ._ids import check_id
from ._room_wire import is_reserved
from .errors import InvalidRequest
from .types import GapCallback, Receipt, RoomEvent, RoomMember, encode

# Ids that no room has, since paths have these names.
_NO_ROOMS = frozenset(["stats", "health"])
_REASON_BYTES_MAX = 123


class Rooms:
    """Rooms of the gateway (``/ws/{room_id}``). A worker has one: ``worker.rooms``.

    A worker is no member of a room: it speaks into the room with an empty sender, and may listen::

        await worker.rooms.publish("lobby", {"chatMessage": {"message": "The game starts."}})
        async for event in worker.rooms.listen("lobby"):
            match event:
                case RoomMessage(kind="chat_message", sender=sender):
                    print(sender, event.body["message"])
                case RoomJoin(member=member):
                    print(member.client_id, "is here")
    """

    def __init__(self, calls: RoomCalls) -> None:
        """Not for direct use: ``worker.rooms`` makes one."""
        self._calls = calls

    async def publish(self, room: str, message: Mapping[str, Any] | str | bytes, *, to: str | None = None) -> Receipt:
        """Sends a message to all members of a room, or to the member ``to`` (a client id) alone.

        ``message`` is an envelope (``spec/rooms/v1/rooms.proto``): a mapping or a text in its JSON form, ``bytes`` in
        protobuf. It has no sender, changes no entity and no position, and is not kept: members that are away do not
        get it. An outage raises :class:`~wsproxy.Unavailable` with ``in_doubt`` instead of repeating. The receipt
        counts the gateway instances, and over Redis the workers that listen; 0: no member got it.

        Bytes that begin with ``FF`` raise :class:`~wsproxy.InvalidRequest`: gateways would take them for a message of
        another gateway. So does a mapping without exactly one payload, such as ``chatMessage``.
        """
        _check_room(room)
        is_json = not isinstance(message, bytes)
        if to is not None:
            message = _addressed(message, check_id("client", to))
        elif isinstance(message, Mapping):
            message = _checked(message)
        payload = encode(message)
        if is_reserved(payload):
            raise InvalidRequest("A message to a room must not begin with the byte FF.")
        return await self._calls.publish(room, payload, is_json=is_json)

    async def kick(
        self, room: str, *, client: str | None = None, user: str | None = None, reason: str | None = None
    ) -> int:
        """Ends the membership of one client, or of all clients of a user, and their connections with 4004.

        Answers the number of members that were there. Nothing keeps a client from coming back but its token: issue no
        further one. ``reason`` has at most 123 bytes.
        """
        _check_room(room)
        if (client is None) == (user is None):
            raise InvalidRequest("Exactly one of client and user is needed.")
        if client is not None:
            check_id("client", client)
        if user is not None:
            check_id("user", user)
        check_reason(reason)
        return await self._calls.kick(room, client, user, reason)

    async def close(self, room: str, *, reason: str | None = None) -> int:
        """Ends the membership of all clients in a room, and their connections with 4004. Their entities go too.

        Answers the number of members that were there. A client that comes back makes the room anew.
        """
        _check_room(room)
        check_reason(reason)
        return await self._calls.close(room, reason)

    async def members(self, room: str) -> list[RoomMember]:
        """The members of a room over all instances, by their client ids; over HTTP the first 10,000."""
        return sorted(await self._calls.members(_check_room(room)), key=lambda member: member.client_id)

    def listen(self, room: str, *, on_gap: GapCallback | None = None) -> Subscription[RoomEvent]:
        """Events of a room from now on, for ever: an asynchronous iterator, or ``async with`` it.

        Gives a :class:`~wsproxy.RoomMessage` for each message of a member or worker, a :class:`~wsproxy.RoomJoin` and
        a :class:`~wsproxy.RoomLeave`. It survives any outage; where events may be missing, ``on_gap`` is called: then
        :meth:`members` tells who is there.

        Positions come as ``position_batch``, one for each instance and tick (``[rooms] tick``). A room whose members
        are all at one instance publishes its positions once a second while no worker listens, and each tick from the
        first batch on that a listening worker gets.

        Only over Redis: over HTTP it raises :class:`~wsproxy.NotSupported`.
        """
        return self._calls.listen(_check_room(room), on_gap)


def check_reason(reason: str | None) -> None:
    """Raises :class:`InvalidRequest` for a text that cannot be the reason in a close frame."""
    if reason is not None:
        try:
            is_good = len(reason.encode()) <= _REASON_BYTES_MAX
        except UnicodeEncodeError:
            # Half of a surrogate pair.
            is_good = False
        if not is_good:
            raise InvalidRequest(f"A close reason has at most {_REASON_BYTES_MAX} bytes, of UTF-8.")


def _check_room(room: str) -> str:
    if room in _NO_ROOMS:
        raise InvalidRequest(f"{room} is the name of a path, and of no room.")
    return check_id("room", room)


def _checked(message: Mapping[str, Any]) -> dict[str, Any]:
    envelope = dict(message)
    if kind_of(envelope) is None:
        raise InvalidRequest("A message to a room has exactly one payload, such as chatMessage or custom.")
    return envelope


def _addressed(message: Mapping[str, Any] | str | bytes, to: str) -> dict[str, Any] | bytes:
    """Returns the message with its receiver. What is no envelope would go to all members, so it is refused."""
    if isinstance(message, bytes):
        try:
            decode(message)
        except Malformed as error:
            raise InvalidRequest(f"A message to one client is an envelope; this one {error}.") from error
        return addressed(message, to)
    if isinstance(message, str):
        try:
            message = json.loads(message)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"A message to one client is an envelope: {error}.") from error
        if not isinstance(message, dict):
            raise InvalidRequest("A message to one client is an envelope, a JSON object.")
    return _checked(message) | {"to": to}
