"""Rooms over Redis: their channels, the hash of members, and the script that gateways remove members with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar, cast

from . import _room_wire as wire
from ._feeds import Subscription
from ._listener import Listener
from ._server import Command, Server
from .types import GapCallback, Receipt, RoomEvent, RoomMember

T = TypeVar("T")

# As many as gateways remove at a time.
_REMOVED_AT_ONCE = 500
# Milliseconds for which the keys of a room without members stay, as with the gateway's default `[rooms] empty_ttl`.
_EMPTY_TTL = 60_000


class _Do(Protocol):
    async def __call__(self, call: Callable[[], Awaitable[T]], *, repeatable: bool) -> T: ...


class RedisRooms:
    """All methods of :class:`wsproxy._backend.RoomCalls`, over the connections of a worker's backend.

    ``do`` runs a call until it succeeds, with the backend's errors; ``leave`` is the script ``room_leave.lua``.
    """

    def __init__(self, redis: Server, listener: Listener, prefix: str, do: _Do, leave: str) -> None:
        self._redis = redis
        self._listener = listener
        self._prefix = prefix
        self._do = do
        self._leave = redis.script(leave)

    def _channel(self, room: str) -> str:
        return f"{self._prefix}room:{room}"

    def _keys(self, room: str) -> list[str]:
        return [f"{{{self._channel(room)}}}:{name}" for name in ("members", "meta", "entities", "positions")]

    async def publish(self, room: str, payload: bytes, *, is_json: bool) -> Receipt:
        channel = self._channel(room)
        counted = await self._do(lambda: self._redis.tell(channel, channel, payload), repeatable=False)
        return Receipt((await self._redis.receivers(channel, counted)).counts[0], None)

    async def kick(self, room: str, client: str | None, user: str | None, reason: str | None) -> int:
        def is_meant(member: RoomMember) -> bool:
            return member.client_id == client if client is not None else member.user_id == user

        found = [(member, connection) for member, connection in await self._read(room) if is_meant(member)]
        frames = [wire.kick(member.client_id, reason or "") for member, _ in found]
        await self._end(room, found, frames)
        return len(found)

    async def close(self, room: str, reason: str | None) -> int:
        found = await self._read(room)
        # Told even where no member is found: a client may be about to join.
        await self._end(room, found, [wire.close(reason or "")])
        return len(found)

    async def _end(self, room: str, found: list[tuple[RoomMember, bytes]], frames: list[bytes]) -> None:
        """Tells the gateways to close the connections, then removes the members.

        So a member is gone at once, even one whose connection has ended already, or whose gateway was lost.
        """
        channel, keys = self._channel(room), self._keys(room)

        async def tell() -> None:
            for answer in await self._redis.many([Command(channel, ("PUBLISH", channel, each)) for each in frames]):
                if isinstance(answer, BaseException):
                    raise answer

        if frames:
            await self._do(tell, repeatable=True)
        for start in range(0, len(found), _REMOVED_AT_ONCE):
            some = found[start : start + _REMOVED_AT_ONCE]
            args: list[Any] = [channel, wire.ORIGIN, _EMPTY_TTL, len(some)]
            for member, connection in some:
                args += [member.client_id, connection]
            # All fields of these members' entities and positions.
            args.append("*")
            remove = self._remover(keys, args)
            await self._do(remove, repeatable=True)

    def _remover(self, keys: list[str], args: list[Any]) -> Callable[[], Awaitable[Any]]:
        return lambda: cast("Awaitable[Any]", self._leave(keys=keys, args=args))

    async def members(self, room: str) -> list[RoomMember]:
        return [member for member, _ in await self._read(room)]

    async def _read(self, room: str) -> list[tuple[RoomMember, bytes]]:
        key = self._keys(room)[0]

        async def read() -> dict[bytes, bytes]:
            return cast("dict[bytes, bytes]", await cast("Awaitable[Any]", self._redis.hgetall(key)))

        found = []
        for client, record in (await self._do(read, repeatable=True)).items():
            if (member := wire.member(client, record)) is not None:
                found.append((member, wire.connection_of(record)))
        return found

    def listen(self, room: str, on_gap: GapCallback | None) -> Subscription[RoomEvent]:
        channel = self._channel(room)
        return Subscription(lambda: self._listener.open(channel), wire.event, on_gap)
