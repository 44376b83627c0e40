"""Commands to the nodes of a Redis Cluster: each goes to the node of its key, and subscriptions to any node.

redis-py's own ``RedisCluster`` is not used: on one ``CLUSTERDOWN`` it closes the connections of all other calls, after
``ASK`` it may send ``ASKING`` through another connection than the command, and it repeats commands whose answer was
lost. Here a command that a node has not begun goes on to the right node, and all others raise what happened.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import urlsplit

from redis import exceptions
from redis.asyncio import Connection, ConnectionPool, SSLConnection
from redis.asyncio.connection import AbstractConnection
from redis.crc import key_slot

from ._backoff import Backoff
from ._pool import login_of, place_of
from ._server import Command, Heard, Server

Place: TypeAlias = tuple[str, int]
"""Host and port of a node."""

_PORT = 6379
_SLOTS = 16384
# Nodes answer about the Cluster from memory: one that has not answered after this many seconds is not waited for.
_ASK_SECONDS = 1.0
# Most nodes that are asked about the Cluster at a time.
_ASKED_MAX = 5
# Redirections of one command. A slot that has moved takes one, one that is on the move two.
_REDIRECTIONS_MAX = 16
# A command waits so long for a slot on the move, in seconds, and then says that it was not done.
_PATIENCE = 2.0
# Pause between two attempts in that time.
_PAUSE = 0.03
# A view of the Cluster that is older, in seconds, is renewed before a node is said to be missing in it.
_FRESH = 1.0
# A subscription looks this often, in seconds, whether its node still belongs to the Cluster.
_LOOK_EVERY = 3.0
# Nodes at which a message without history is tried, if no connection can be made.
_TELL_MAX = 3
# Texts of errors of a script whose first command met a key of a slot on the move, or a Cluster that is down.
_ELSEWHERE, _DOWN = "a non local key in a cluster node", "while the cluster is down"

# Errors of redis-py by the codes of Redis.
_CLASSES: dict[str, type[exceptions.ResponseError]] = {
    "ASK": exceptions.AskError,
    "CLUSTERDOWN": exceptions.ClusterDownError,
    "MASTERDOWN": exceptions.MasterDownError,
    "MOVED": exceptions.MovedError,
    "TRYAGAIN": exceptions.TryAgainError,
}
_REFUSALS = (exceptions.AuthenticationError, exceptions.ResponseError)


class NotConnectedError(exceptions.ConnectionError):
    """No connection to a node was made, so nothing was done."""


class NotServedError(exceptions.ConnectionError):
    """No node serves a slot, so nothing was done."""


def is_passing(error: object) -> bool:
    """Returns true for what a node answers before it does anything, while slots or roles change."""
    if isinstance(error, exceptions.TryAgainError | exceptions.ClusterDownError | NotConnectedError | NotServedError):
        return True
    if isinstance(error, exceptions.BusyLoadingError):
        return True
    return _is_on_the_move(error) or (isinstance(error, exceptions.ResponseError) and _DOWN in str(error))


def _is_on_the_move(error: object) -> bool:
    is_elsewhere = isinstance(error, exceptions.ResponseError) and _ELSEWHERE in str(error)
    return isinstance(error, exceptions.TryAgainError) or is_elsewhere


class _View(NamedTuple):
    """The Cluster as one of its nodes sees it."""

    is_up: bool
    epoch: int
    owners: list[Place | None]
    nodes: frozenset[Place]
    """All nodes that are not known to have failed, those without slots too."""


class Cluster(Server):
    """All nodes of a Redis Cluster as one client; see :class:`Server`."""

    counts_its_own_alone = True

    def __init__(self, url: str, options: dict[str, Any], patience: float = _PATIENCE) -> None:
        """``patience``: seconds for which a command waits for a slot that is on the move."""
        scheme, _, rest = url.partition("+cluster://")
        if scheme not in ("redis", "rediss", "valkey", "valkeys"):
            raise ValueError("the scheme must be redis+cluster or rediss+cluster")
        parts = urlsplit(f"redis://{rest}")
        hosts = parts.netloc.rpartition("@")[2]
        self._seeds = [place_of(each, _PORT, "node") for each in hosts.split(",")]
        self._scheme, self._query = scheme, f"?{parts.query}" if parts.query else ""
        self._options = dict(options) | login_of(parts.netloc)
        self._patience = min(patience, _PATIENCE)
        pool = self._pool(self._seeds[0], self._options)
        database = parts.path.strip("/") or pool.connection_kwargs.get("db") or 0
        if str(database) != "0":
            raise ValueError("a Redis Cluster has database 0 only")
        super().__init__(pool)
        self._clients: dict[Place, Server] = {}
        self._owners: list[Place | None] = [None] * _SLOTS
        self._nodes: frozenset[Place] = frozenset()
        self._is_up = False
        # When the view was taken; None: before the next command another one is needed.
        self._seen: float | None = None
        self._looking: asyncio.Task[None] | None = None
        self._counting: tuple[set[str], asyncio.Task[dict[str, tuple[int, bool]]]] | None = None

    # ---- commands ----

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Runs a command at the node of its key."""
        place, is_asking = await self._owner(_slot(_key_of(args))), False
        redirections, end = 0, time.monotonic() + self._patience
        while redirections < _REDIRECTIONS_MAX:
            redirections += 1
            client = self._client(place)
            try:
                if is_asking:
                    return await _after_asking(client, args, options)
                return await client.run(*args, **options)
            except exceptions.RedisError as raised:
                error = known(raised)
                if isinstance(error, exceptions.NoScriptError):
                    args = self.in_full(args)
                elif isinstance(error, exceptions.MovedError):
                    place, is_asking = self._moved(place, error), False
                elif isinstance(error, exceptions.AskError):
                    place, is_asking = (error.host or place[0], error.port), True
                elif _is_on_the_move(error) and time.monotonic() < end:
                    # The keys of the slot are at both nodes, or the command needs one that is at none.
                    await asyncio.sleep(random.uniform(_PAUSE / 2, _PAUSE))
                    place, is_asking, redirections = await self._owner(_slot(_key_of(args))), False, 0
                else:
                    if isinstance(error, exceptions.ConnectionError | exceptions.TimeoutError) or is_passing(error):
                        self._seen = None
                    raise error from None
        self._seen = None
        raise exceptions.TryAgainError("The nodes send each other the command.")

    async def tell(self, key: str, channel: str, payload: bytes) -> int:
        """Publishes at the node of ``key``, or at another one where no connection to that can be made."""
        try:
            first = await self._owner(_slot(key))
        except NotServedError:
            first = None
        # All nodes publish alike. Those behind the first are the same ones for each message, to keep their order.
        others = sorted(self._nodes - {first})
        last: Exception = NotServedError("No node of the Cluster is known.")
        for place in [*([first] if first else []), *others][:_TELL_MAX]:
            try:
                counted = await self._client(place).run("PUBLISH", channel, payload)
                return int(counted)
            except (NotConnectedError, exceptions.BusyLoadingError) as error:
                self._seen, last = None, error
            except (exceptions.ConnectionError, exceptions.TimeoutError):
                self._seen = None
                raise
        raise last

    async def receivers(self, channel: str, counted: int) -> Heard:
        """Subscribers of a channel. A node counts its own alone, so that all are asked where it counted none."""
        return Heard([counted], True) if counted > 0 else await self.heard([channel])

    async def present(self, channel: str) -> Heard:
        return await self.heard([channel])

    async def many(self, commands: Sequence[Command], patience: float = 0.0) -> list[Any]:
        answers: list[Any] = [None] * len(commands)
        end = time.monotonic() + patience
        by_place: dict[Place, list[int]] = {}
        for index, each in enumerate(commands):
            try:
                by_place.setdefault(await self._owner(_slot(each.key)), []).append(index)
            except NotServedError as error:
                answers[index] = error
        results = await asyncio.gather(
            *(self._at_once(place, [commands[n] for n in group]) for place, group in by_place.items()),
            return_exceptions=True,
        )
        lost: BaseException | None = None
        for group, result in zip(by_place.values(), results, strict=True):
            if isinstance(result, BaseException) and not is_passing(result):
                lost = lost or result
            for number, index in enumerate(group):
                answers[index] = result if isinstance(result, BaseException) else result[number]
        if lost is not None:
            self._seen = None
            raise lost
        # Slots are settled beside each other, the commands of one key in their order.
        by_key: dict[str, list[int]] = {}
        for index, each in enumerate(commands):
            by_key.setdefault(each.key, []).append(index)
        settled = (self._settle(commands, answers, group, end) for group in by_key.values())
        for ended in await asyncio.gather(*settled, return_exceptions=True):
            if isinstance(ended, BaseException):
                raise ended
        return answers

    async def _at_once(self, place: Place, commands: Sequence[Command]) -> list[Any]:
        async with self._client(place).pipeline(transaction=False) as pipeline:
            for each in commands:
                pipeline.execute_command(*each.words)
            answers = await pipeline.execute(raise_on_error=False)
        return [known(each) if isinstance(each, Exception) else each for each in answers]

    async def _settle(self, commands: Sequence[Command], answers: list[Any], group: list[int], end: float) -> None:
        """Runs the commands of one key again that their node has refused, unless a later one was done already."""
        last_done = max((n for n in group if not isinstance(answers[n], BaseException)), default=-1)
        for index in group:
            if not _is_refused(answers[index]) or index < last_done:
                continue
            key, words = commands[index]
            backoff = Backoff(base=0.02, cap=0.5)
            while True:
                try:
                    again = self.tell(key, *words[1:]) if words[0] == "PUBLISH" else self.run(*words)
                    answers[index] = await again
                except exceptions.RedisError as error:
                    pause = backoff.next()
                    if is_passing(error) and time.monotonic() + pause < end:
                        await asyncio.sleep(pause)
                        continue
                    if not isinstance(error, exceptions.ResponseError) and not is_passing(error):
                        raise
                    answers[index] = error
                break

    # ---- subscribers ----

    async def heard(self, channels: Sequence[str]) -> Heard:
        """Subscribers of channels, over all nodes. Calls that come while nodes are asked are asked for together."""
        if self._counting is None:
            names: set[str] = set()
            self._counting = names, asyncio.ensure_future(self._count(names))
        names, task = self._counting
        names.update(channels)
        counts = await asyncio.shield(task)
        return Heard([counts[each][0] for each in channels], all(counts[each][1] for each in channels))

    async def _count(self, names: set[str]) -> dict[str, tuple[int, bool]]:
        # Other tasks that run now add their channels.
        await asyncio.sleep(0)
        channels = sorted(names)
        self._counting = None
        began = time.monotonic()
        counts: Counter[str] = Counter()
        asked: set[Place] = set()
        is_whole = True
        while True:
            places = self._nodes - asked
            answers = await asyncio.gather(*(self._numsub(place, channels) for place in places), return_exceptions=True)
            asked |= places
            for answer in answers:
                if isinstance(answer, BaseException):
                    if not isinstance(answer, exceptions.RedisError | OSError | TimeoutError):
                        raise answer
                    is_whole, self._seen = False, None
                else:
                    counts.update(answer)
            if all(counts[each] for each in channels) or (self._seen or 0.0) >= began - _FRESH:
                break
            # A node that was added since then may have subscribers.
            try:
                await self._look()
            except exceptions.RedisError:
                is_whole = False
            if not self._nodes - asked:
                break
        return {each: (counts[each], is_whole) for each in channels}

    async def _numsub(self, place: Place, channels: list[str]) -> dict[str, int]:
        async with asyncio.timeout(_ASK_SECONDS):
            found = await self._client(place).run("PUBSUB", "NUMSUB", *channels)
        # Name, number, name, number, …
        return dict(zip(channels, map(int, found[1::2]), strict=True))

    # ---- nodes ----

    async def _owner(self, slot: int) -> Place:
        if self._seen is None or self._owners[slot] is None:
            await self._look()
        owner = self._owners[slot]
        if owner is None:
            raise NotServedError(f"No node serves the slot {slot}.")
        return owner

    def _moved(self, place: Place, moved: exceptions.MovedError) -> Place:
        owner = (moved.host or place[0], moved.port)
        self._owners[moved.slot_id] = owner
        self._nodes |= {owner}
        # Others may have moved with this slot; the command need not wait for the answer.
        self._look_later()
        return owner

    def _look_later(self) -> asyncio.Task[None]:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._take_view(), name="wsproxy-cluster")
            # An error is for those who wait; there may be none.
            self._looking.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._looking

    async def _look(self) -> None:
        """Takes another view of the Cluster; calls that come meanwhile share it."""
        await asyncio.shield(self._look_later())

    async def _take_view(self) -> None:
        began = time.monotonic()
        views: list[_View] = []
        answers: list[_View | BaseException] = []
        for known in (sorted(self._nodes), self._seeds):
            some = random.sample(known, min(len(known), _ASKED_MAX))
            answers = await asyncio.gather(*(self._ask(place) for place in some), return_exceptions=True)
            views = [each for each in answers if isinstance(each, _View)]
            if views:
                break
        else:
            self._seen = None
            refused = [each for each in answers if isinstance(each, _REFUSALS)]
            # A login, a permission, or a server that belongs to no Cluster: trying again does not help.
            if refused and len(refused) == len(answers):
                raise refused[0]
            raise NotConnectedError(f"No node of the Cluster can be reached: {answers}")
        # A node that was cut off, or removed and not stopped, sees a Cluster of the past.
        votes = Counter(each.nodes for each in views)
        best = max(views, key=lambda each: (each.is_up, each.epoch, votes[each.nodes]))
        self._owners, self._nodes, self._is_up, self._seen = list(best.owners), best.nodes, best.is_up, began
        for place in [each for each in self._clients if each not in self._nodes]:
            # Commands that wait for an answer of the node get none.
            await self._clients.pop(place).connection_pool.disconnect()

    async def _ask(self, place: Place) -> _View:
        async with asyncio.timeout(_ASK_SECONDS), self._client(place).pipeline(transaction=False) as pipeline:
            # In two words redis-py has no reading of its own for them.
            for what in ("INFO", "SLOTS", "SHARDS"):
                pipeline.execute_command("CLUSTER", what)
            info, slots, shards = await pipeline.execute(raise_on_error=False)
        for answer in (info, slots):
            if isinstance(answer, BaseException):
                raise answer
        return _view(place, info, slots, [] if isinstance(shards, BaseException) else shards, self._is_tls)

    @property
    def _is_tls(self) -> bool:
        return self._scheme in ("rediss", "valkeys")

    def _client(self, place: Place) -> Server:
        client = self._clients.get(place)
        if client is None:
            client = self._clients[place] = Server(self._pool(place, self._options))
        return client

    def _pool(self, place: Place, options: dict[str, Any]) -> ConnectionPool:
        host = f"[{place[0]}]" if ":" in place[0] else place[0]
        made = ConnectionPool.from_url(f"{self._scheme}://{host}:{place[1]}{self._query}", **options)
        made.connection_class = _TlsConnection if self._is_tls else _PlainConnection
        return made

    async def end(self) -> None:
        tasks = [each for each in (self._looking, self._counting and self._counting[1]) if each is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(each.end() for each in self._clients.values()), return_exceptions=True)
        self._clients.clear()
        await super().end()

    # ---- for subscriptions ----

    async def a_node(self, but: Place | None) -> Place:
        """Any node, another one than ``but`` where there is one."""
        if self._seen is None or time.monotonic() - self._seen > _FRESH:
            await self._look()
        return random.choice(sorted(self._nodes - {but}) or sorted(self._nodes))

    async def is_lost(self, place: Place) -> bool:
        """Returns true for a node that does not answer, or that has no part in the Cluster of the others any more."""
        own, *_ = answers = await asyncio.gather(self._ask(place), self._look(), return_exceptions=True)
        if not isinstance(own, _View):
            # A machine may be busy for a moment.
            own = (await asyncio.gather(self._ask(place), return_exceptions=True))[0]
        if not isinstance(own, _View):
            return True
        if answers[1] is not None:
            return False
        return place not in self._nodes or (self._is_up and not own.is_up)

    def connection_to(self, place: Place, options: dict[str, Any]) -> AbstractConnection:
        """A connection with options of its own."""
        pool = self._pool(place, self._options | options)
        connection: AbstractConnection = pool.make_connection()  # type: ignore[no-untyped-call]
        return connection


class ClusterSource:
    """Connections for subscriptions: each to another node than the one before, since that was lost."""

    def __init__(self, cluster: Cluster, options: dict[str, Any]) -> None:
        self._cluster = cluster
        self._options = options
        self._place: Place | None = None

    async def make(self) -> AbstractConnection:
        self._place = await self._cluster.a_node(self._place)
        return self._cluster.connection_to(self._place, self._options)

    async def leave(self, connection: AbstractConnection) -> None:
        # A node that has left the Cluster stays connected, and hears nothing more.
        place = self._place
        while place is not None:
            await asyncio.sleep(_LOOK_EVERY * random.uniform(0.5, 1))
            if await self._cluster.is_lost(place):
                return

    async def aclose(self) -> None:
        """Nothing is left: the listener closes each connection itself."""


async def _connected(connect: Callable[[], Awaitable[None]]) -> None:
    try:
        await connect()
    except exceptions.AuthenticationError:
        raise
    except (exceptions.ConnectionError, exceptions.TimeoutError, OSError, TimeoutError) as error:
        raise NotConnectedError(str(error)) from error


class _PlainConnection(Connection):
    async def connect(self) -> None:
        await _connected(super().connect)


class _TlsConnection(SSLConnection):
    async def connect(self) -> None:
        await _connected(super().connect)


def known(error: Exception) -> Exception:
    """The error of a node by its class, which redis-py before 7 finds in its own client of a Cluster alone."""
    code, _, text = str(error).partition(" ")
    if type(error) is exceptions.ResponseError and code in _CLASSES:
        return _CLASSES[code](text)
    return error


async def _after_asking(client: Server, words: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Runs a command at the node that a slot is on the way to: both go through one connection."""
    async with client.pipeline(transaction=False) as pipeline:
        pipeline.execute_command("ASKING")
        pipeline.execute_command(*words, **options)
        answer = (await pipeline.execute(raise_on_error=False))[1]
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _is_refused(answer: object) -> bool:
    """Returns true for an answer with which a node says that it has not begun the command."""
    redirected = exceptions.MovedError | exceptions.AskError | exceptions.NoScriptError
    return isinstance(answer, redirected) or is_passing(answer)


def _key_of(words: Sequence[Any]) -> str:
    return str(words[3] if words[0] in ("EVAL", "EVALSHA") else words[1])


def _slot(key: str) -> int:
    return int(key_slot(key.encode()))


def _view(place: Place, info: bytes, slots: list[Any], shards: Iterable[list[Any]], is_tls: bool) -> _View:
    """Reads what a node answers to ``CLUSTER INFO``, ``SLOTS`` and ``SHARDS``."""
    state = dict(line.split(":", 1) for line in info.decode().split("\r\n") if ":" in line)
    owners: list[Place | None] = [None] * _SLOTS
    nodes = set()
    for first, last, *found in slots:
        places = [(_host(each[0], place), int(each[1])) for each in found]
        owners[first : last + 1] = [places[0]] * (last + 1 - first)
        nodes.update(places)
    # Masters without slots are here alone.
    for shard in shards:
        for each in _pairs(shard)[b"nodes"]:
            node = _pairs(each)
            port = node.get(b"tls-port" if is_tls else b"port")
            if port and not node.get(b"health", b"").startswith(b"fail"):
                nodes.add((_host(node.get(b"endpoint"), place), int(port)))
    return _View(state["cluster_state"] == "ok", int(state["cluster_current_epoch"]), owners, frozenset(nodes))


def _host(text: bytes | None, place: Place) -> str:
    # A node that does not know its own address is where it was asked.
    return text.decode() if text and text != b"?" else place[0]


def _pairs(flat: list[Any]) -> dict[bytes, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def is_cluster(url: str) -> bool:
    """Returns true for the URL of a Redis Cluster."""
    return "+cluster://" in url
