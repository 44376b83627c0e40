"""Commands to one Redis, or to the master that sentinels name; those of a Redis Cluster have the same interface."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, NamedTuple, Protocol, cast

from redis import exceptions
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.commands.core import AsyncScript

from ._pool import close


class Command(NamedTuple):
    """A command, and the key that decides where it goes: for a message that of its log, where it may have one."""

    key: str
    words: tuple[Any, ...]


class Heard(NamedTuple):
    """Subscribers of channels."""

    counts: list[int]
    is_whole: bool
    """False where a node could not be asked; its subscribers hear nothing while it is away."""


class Source(Protocol):
    """Connections for subscriptions, not connected yet."""

    async def make(self) -> AbstractConnection: ...
    async def leave(self, connection: AbstractConnection) -> None:
        """Returns when the connection should be replaced although it stands."""

    async def aclose(self) -> None: ...


class Server(Redis):
    """redis-py's client, and what a worker asks beyond single commands."""

    counts_its_own_alone = False
    """True where a publish does not count the subscribers of other nodes."""

    def __init__(self, pool: ConnectionPool) -> None:
        super().__init__(connection_pool=pool)
        # Texts of scripts by their hashes.
        self._texts: dict[str, str] = {}

    def script(self, text: str) -> AsyncScript:
        """A script, which the server is made to know when it is run."""
        registered = self.register_script(text)
        self._texts[registered.sha] = text
        return registered

    async def run(self, *words: Any, **options: Any) -> Any:
        """Runs one command."""
        return await self.execute_command(*words, **options)  # type: ignore[no-untyped-call]

    async def tell(self, key: str, channel: str, payload: bytes) -> int:
        """Publishes a message without history; messages with one ``key`` keep their order."""
        return int(await cast("Awaitable[Any]", self.publish(channel, payload)))

    async def receivers(self, channel: str, counted: int) -> Heard:
        """Subscribers of a channel on which a publish counted ``counted``."""
        return Heard([counted], True)

    async def present(self, channel: str) -> Heard:
        """Subscribers of a channel before a publish on it, where the publish itself does not count them all."""
        return Heard([0], False)

    async def many(self, commands: Sequence[Command], patience: float = 0.0) -> list[Any]:
        """Runs commands, those with one key in order; what Redis refused is among the answers as an exception.

        Commands that a Cluster refuses for the moment are tried again for ``patience`` seconds.
        """
        async with self.pipeline(transaction=False) as pipeline:
            for each in commands:
                pipeline.execute_command(*each.words)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
        for index, answer in enumerate(answers):
            # A Redis that was restarted in this moment has forgotten the script, and did not do this one.
            if isinstance(answer, exceptions.NoScriptError):
                try:
                    answers[index] = await self.run(*self.in_full(commands[index].words))
                except exceptions.ResponseError as error:
                    # Of this command alone: the others keep their answers.
                    answers[index] = error
        return answers

    def in_full(self, words: tuple[Any, ...]) -> tuple[Any, ...]:
        """An ``EVALSHA`` as an ``EVAL``, which makes the server know the script."""
        return ("EVAL", self._texts[words[1]], *words[2:])

    async def heard(self, channels: Sequence[str]) -> Heard:
        """Subscribers of channels, over all nodes."""
        counts = await cast("Awaitable[Any]", self.pubsub_numsub(*channels))
        return Heard([int(count) for _, count in counts], True)

    async def end(self) -> None:
        """Ends all connections."""
        await self.aclose()
        await close(self.connection_pool)


class PoolSource:
    """Connections to the one server of a pool."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool

    async def make(self) -> AbstractConnection:
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        return connection

    async def leave(self, connection: AbstractConnection) -> None:
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        await close(self._pool)
