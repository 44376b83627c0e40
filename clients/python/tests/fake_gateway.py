"""A gateway for agents that misbehaves, as the real one does not: silent, of another version, or a proxy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import TracebackType
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol


class FakeGateway:
    """Takes every agent. ``refusals`` are the answers to the next handshakes; ``sockets`` the connections so far."""

    def __init__(self, *, v2: bool = True, acknowledges: bool = True, interval: float = 30.0) -> None:
        self._v2 = v2
        self._acknowledges = acknowledges
        self._interval = interval
        self.refusals: list[tuple[int, str]] = []
        self.attempts = 0
        self.requests: list[Request] = []
        self.sockets: list[ServerConnection] = []
        self.heard: list[dict[str, Any]] = []

    async def __aenter__(self) -> FakeGateway:
        self._server: Server = await serve(
            self._serve,
            "127.0.0.1",
            0,
            process_request=self._process,
            select_subprotocol=self._select,
            ping_interval=None,
        )
        self.url = f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        await self._server.wait_closed()

    def _process(self, _: ServerConnection, request: Request) -> Response | None:
        self.attempts += 1
        self.requests.append(request)
        if not self.refusals:
            return None
        status, body = self.refusals.pop(0)
        headers = Headers({"Content-Length": str(len(body)), "Connection": "close"})
        return Response(status, "refused", headers, body.encode())

    def _select(self, _: ServerConnection, offered: Any) -> Subprotocol:
        return Subprotocol("wsproxy.agent.v2") if self._v2 else Subprotocol(offered[-1])

    async def _serve(self, socket: ServerConnection) -> None:
        self.sockets.append(socket)
        connected: dict[str, Any] = {"type": "connected", "userId": "u1", "timestamp": 1, "serverId": "fake"}
        if self._v2:
            connected["heartbeat"] = {"interval": self._interval * 1000, "timeout": 3000 * self._interval}
        await socket.send(json.dumps(connected))
        async for text in socket:
            message = json.loads(text)
            if message["type"] == "heartbeat" and self._acknowledges:
                await socket.send(json.dumps({"type": "heartbeat_ack", "timestamp": 1}))
            self.heard.append(message)

    async def send(self, message: dict[str, Any] | str | bytes) -> None:
        """Sends a message over the newest connection."""
        await self.sockets[-1].send(json.dumps(message) if isinstance(message, dict) else message)

    async def call(self, request_id: str, tool: str, params: Any = None, **members: Any) -> None:
        call = {"type": "tool_call", "requestId": request_id, "tool": tool, "params": params or {}, **members}
        await self.send(call)

    async def hears(self, what: Callable[[dict[str, Any]], bool], seconds: float = 10.0) -> dict[str, Any]:
        """The first message for which ``what`` is true."""
        async with asyncio.timeout(seconds):
            while not (found := [each for each in self.heard if what(each)]):
                await asyncio.sleep(0.01)
        return found[0]

    async def answer(self, request_id: str) -> dict[str, Any]:
        return await self.hears(lambda each: each["type"] == "tool_response" and each["requestId"] == request_id)

    async def connections(self, count: int, seconds: float = 15.0) -> None:
        async with asyncio.timeout(seconds):
            while len(self.sockets) < count:
                await asyncio.sleep(0.01)


def refusal(code: str) -> str:
    """A refusal in the gateway's own form."""
    return json.dumps({"error": {"code": code, "message": "Refused.", "retryable": False}})
