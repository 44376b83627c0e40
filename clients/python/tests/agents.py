"""Parts for tests of users' agents: a gateway that takes them, and an agent with tools."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from typing import Any

import httpx

from conftest import API_KEY, Gateway, StartGateway, until, within
from wsproxy import Agents, CallError, ToolError, Unavailable
from wsproxy.agent import Agent, Context

AUTHORIZED = {"authorization": f"Bearer {API_KEY}"}


def start(start_gateway: StartGateway, **settings: str) -> Gateway:
    """Starts an instance that takes agents. All instances of a test have one database."""
    return start_gateway(
        WSPROXY_ENDPOINTS__AGENTS="true",
        WSPROXY_DATABASE__PATH="agents.db",
        WSPROXY_LOG__LEVEL="debug",
        **settings,
    )


def issue(gateway: Gateway, user: str = "u1") -> str:
    """A secret of a user's agent."""
    url = f"{gateway.url}/api/v1/agents/{user}/secrets"

    def issued() -> str | None:
        answer = httpx.post(url, headers=AUTHORIZED, json={})
        # A gateway is ready before it has made its tables.
        assert answer.is_success or answer.status_code == 503, answer.text
        return str(answer.json()["secret"]) if answer.is_success else None

    return str(until("the database is ready", issued))


async def answers(agents: Agents, a: int = 1) -> None:
    """A call is answered, however often it must be tried."""

    async def tried() -> None:
        while True:
            try:
                assert await agents.call("u1", "add", {"a": a}, timeout=5) == a + 1
                return
            except (CallError, Unavailable):
                await asyncio.sleep(0.1)

    await within(tried())


class Tools:
    """An agent with tools for tests, and what they saw."""

    def __init__(self, gateway: Gateway | str, secret: str, user: str = "u1", **options: Any) -> None:
        url = gateway if isinstance(gateway, str) else gateway.url
        self.agent = Agent(url, user, secret, **options)
        self.ran: list[str] = []
        self.cancelled: list[str] = []
        self.release = asyncio.Event()
        for function in (
            self.echo,
            self.add,
            self.where,
            self.about,
            self.fails,
            self.hold,
            self.hold_in_a_thread,
            self.count,
        ):
            self.agent.tool(function)
        self.agent.tool(name="big")(lambda size: "x" * size)
        self.agent.tool(name="odd")(lambda kind: _ODD[kind]())

    async def __aenter__(self) -> Tools:
        await self.agent.__aenter__()
        await within(self.agent.ready())
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.agent.__aexit__(*error)

    async def echo(self, value: Any = None) -> Any:
        self.ran.append("echo")
        return value

    def add(self, a: int, b: int = 1) -> int:
        return a + b

    def where(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "is_main": threading.current_thread() is threading.main_thread()}

    def about(self, ctx: Context) -> dict[str, Any]:
        return {
            "request_id": ctx.request_id,
            "tool": ctx.tool,
            "traceparent": ctx.traceparent,
            "remaining": ctx.remaining,
            "cancelled": ctx.cancelled,
        }

    def fails(self, how: str) -> None:
        if how == "plainly":
            raise ToolError("There is no such file.")
        raise KeyError(how)

    async def hold(self, ctx: Context, name: str = "hold") -> str:
        """Waits until the test lets it go on."""
        self.ran.append(name)
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        return name

    def hold_in_a_thread(self, ctx: Context, name: str = "thread") -> str:
        self.ran.append(name)
        while not ctx.cancelled:
            if self.release.is_set():
                return name
            time.sleep(0.01)
        self.cancelled.append(name)
        return name

    async def count(self, ctx: Context, steps: int, pause: float) -> str:
        """Reports progress."""
        self.ran.append("count")
        try:
            for step in range(1, steps + 1):
                ctx.progress(step, steps, f"step {step} ä")
                await asyncio.sleep(pause)
        except asyncio.CancelledError:
            self.cancelled.append("count")
            raise
        return "counted"


def _circle() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


def _deep() -> list[Any]:
    made: list[Any] = []
    for _ in range(5000):
        made = [made]
    return made


async def _cancelled() -> None:
    raise asyncio.CancelledError


_ODD: dict[str, Any] = {
    "inner cancel": _cancelled,
    "exit": lambda: sys.exit(3),
    "stop iteration": lambda: next(iter([])),
    "nan": lambda: float("nan"),
    "bytes": lambda: b"x",
    "half": lambda: "\ud800",
    "nul": lambda: "a\x00b",
    "circle": _circle,
    "deep": _deep,
    "digits": lambda: 10**4299,
    "more digits": lambda: 10**5000,
}
