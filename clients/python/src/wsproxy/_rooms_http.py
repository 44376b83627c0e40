"""Rooms over HTTP: the gateway's calls below ``/api/v1/rooms``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

from ._feeds import Subscription
from .errors import NotSupported
from .types import GapCallback, Receipt, RoomEvent, RoomMember

_MEMBERS_MAX = 10_000


class HttpRooms:
    """All methods of :class:`wsproxy._backend.RoomCalls`, over the calls of a worker's backend."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        """``call`` makes a request and gives its JSON: method, path, ``repeatable`` and what httpx takes."""
        self._call = call

    async def publish(self, room: str, payload: bytes, *, is_json: bool) -> Receipt:
        headers = {"content-type": "application/json" if is_json else "application/octet-stream"}
        path = f"{_path(room)}/messages"
        answer = await self._call("POST", path, repeatable=False, headers=headers, content=payload)
        return Receipt(int(answer["receivers"]), None)

    async def kick(self, room: str, client: str | None, user: str | None, reason: str | None) -> int:
        body = {"client_id": client, "user_id": user, "reason": reason}
        return await self._end(f"{_path(room)}/kick", body)

    async def close(self, room: str, reason: str | None) -> int:
        return await self._end(f"{_path(room)}/close", {"reason": reason})

    async def _end(self, path: str, body: dict[str, str | None]) -> int:
        given = {name: value for name, value in body.items() if value is not None}
        answer = await self._call("POST", path, repeatable=True, json=given)
        return int(answer["members"])

    async def members(self, room: str) -> list[RoomMember]:
        path = f"{_path(room)}/members"
        answer = await self._call("GET", path, repeatable=True, params={"limit": _MEMBERS_MAX})
        return [
            RoomMember(each["client_id"], each["user_id"], each.get("name"), each["server_id"], each["since"])
            for each in answer["members"]
        ]

    def listen(self, room: str, on_gap: GapCallback | None) -> Subscription[RoomEvent]:
        raise NotSupported("The HTTP API does not tell what happens in a room: only Worker.redis can listen.")


def _path(room: str) -> str:
    return f"rooms/{quote(room, safe='')}"
