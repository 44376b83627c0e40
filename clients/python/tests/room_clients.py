"""Parts for tests of rooms: a gateway that serves them, and a member."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from conftest import Gateway, StartGateway, within


def start(start_gateway: StartGateway, **settings: str) -> Gateway:
    """Starts an instance that serves rooms and believes clients their names."""
    return start_gateway(
        WSPROXY_ENDPOINTS__ROOMS="true",
        WSPROXY_ROOMS__DEVELOPMENT="true",
        WSPROXY_SERVER__BIND="127.0.0.1",
        **settings,
    )


class Member:
    """A member that reads JSON."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def say(self, **message: Any) -> None:
        await self.socket.send(json.dumps(message))

    async def hear(self, name: str) -> Any:
        """Waits for a message with this member, and gives the whole message."""

        async def heard() -> Any:
            while True:
                message = json.loads(await self.socket.recv())
                if name in message:
                    return message

        return await within(heard())

    async def closed(self) -> tuple[int | None, str | None]:
        await within(self.socket.wait_closed())
        return self.socket.close_code, self.socket.close_reason


@asynccontextmanager
async def member(gateway: Gateway, client: str, user: str = "ann", room: str = "lobby") -> AsyncIterator[Member]:
    """A member that has the state of the room."""
    url = f"ws://127.0.0.1:{gateway.port}/ws/{room}?user_id={user}&client_id={client}&display_name={client.title()}"
    async with connect(url) as socket:
        made = Member(socket)
        await made.say(clientHello={})
        await made.hear("serverHello")
        yield made
