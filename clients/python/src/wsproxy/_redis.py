"""A worker's way over Redis: the scripts that the gateway uses too, and its channels and keys."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import math
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any, TypeVar, cast

from redis import exceptions
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError
from redis.backoff import NoBackoff

from ._backend import (
    Disconnection,
    Publication,
    StreamCall,
    StreamReply,
    StreamState,
    Target,
    TokenRequest,
    retrying,
)
from ._backoff import Backoff
from ._calls_redis import RedisCalls
from ._cluster import Cluster, ClusterSource, is_cluster, is_passing
from ._feeds import Consumer, Kept, Subscription
from ._kept import HOLD, RELEASE, KeptMessages
from ._listener import Listener
from ._pool import pool
from ._positions import START, lost_behind, parse
from ._rooms_redis import RedisRooms
from ._server import Command, PoolSource, Server, Source
from .errors import (
    InvalidRequest,
    StreamConflict,
    StreamEnded,
    StreamExists,
    StreamNotFound,
    TooLarge,
    Unauthorized,
    Unavailable,
    WsproxyError,
)
from .types import (
    Failure,
    Gap,
    GapCallback,
    History,
    HistoryEvent,
    Limits,
    Presence,
    Receipt,
    SessionToken,
    UpstreamMessage,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

T = TypeVar("T")

# Enters a token stream into the leases, by the clock of Redis. It is a script of its own, since the leases have a slot
# of their own. Key: the leases. Arguments: milliseconds, member.
_LEASE = """
local time = redis.call('TIME')
local ends = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[1]
return redis.call('ZADD', KEYS[1], string.format('%.0f', ends), ARGV[2])
"""
# Number, state and text of a token stream as they belong together. Keys: state, text.
_STATE = "return {redis.call('HMGET', KEYS[1], 'seq', 'state'), redis.call('GET', KEYS[2])}"
# Most bytes of a page of a history.
_PAGE_BYTES = 64 * 1024 * 1024
# The head of a log is kept for an eighth longer than this, or than the log.
_HEAD_SECONDS_MIN = 3600.0
# As long as the gateway remembers the keys of its HTTP API.
_IDEMPOTENCY_MS = 10 * 60 * 1000
# Entries of a log that are read at a time.
_PAGE = 200
# Close code of a connection whose token was revoked.
_REVOKED = 4401
# Prefix of tokens that open event streams until they expire.
_EVENT_STREAM_PREFIX = "sse."
# Stamps a key with Redis' clock, which all workers and gateways share, and tells the gateways; a longer life that the
# key had is not cut short. Key: the revocation. Arguments: milliseconds, channel, message.
_REVOKE = """
local left = redis.call('PTTL', KEYS[1])
local now = redis.call('TIME')[1]
if left == -1 then redis.call('SET', KEYS[1], now)
else redis.call('SET', KEYS[1], now, 'PX', string.format('%.0f', math.max(tonumber(ARGV[1]), left))) end
return redis.call('PUBLISH', ARGV[2], ARGV[3])
"""
# Errors that Redis answers before it does anything; redis-py takes the code of these from their texts.
_NOT_DONE = (
    exceptions.BusyLoadingError,
    exceptions.MaxConnectionsError,
    exceptions.NoScriptError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    # No connection was made.
    MasterNotFoundError,
)
# First words of the other refusals. All of them pass.
_NOT_DONE_CODES = frozenset(
    ["BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MISCONF", "NOREPLICAS", "NOSCRIPT", "OOM", "READONLY", "TRYAGAIN"]
)
# Redis before 7 puts this before an error that stopped a script.
_IN_SCRIPT = re.compile(r"(?:ERR )?Error running script.*@user_script:\s*\d+:\s*-?", re.DOTALL)


def script(name: str) -> str:
    """The text of a script, byte for byte that of the gateway's ``spec/scripts``."""
    return resources.files("wsproxy").joinpath("scripts", name).read_text(encoding="utf-8")


@contextmanager
def _errors() -> Iterator[None]:
    """Errors of redis-py as errors of this package."""
    try:
        yield
    except (exceptions.RedisError, OSError, TimeoutError) as error:
        raise _error(error) from error


def _error(error: Exception) -> WsproxyError:
    match error:
        case _ if isinstance(error, _NOT_DONE) or is_passing(error) or _is_demoted(error):
            return Unavailable(f"Not done: {error}")
        case exceptions.AuthenticationError() | exceptions.NoPermissionError():
            return Unauthorized(f"Redis refused the worker: {error}")
        case exceptions.ResponseError():
            return _script_error(str(error))
        case exceptions.ConnectionError() | exceptions.TimeoutError() | OSError():
            return Unavailable(f"Redis cannot be reached: {error}", in_doubt=True)
    return InvalidRequest(f"Redis refused: {error}")


def _is_demoted(error: Exception) -> bool:
    """Returns true for ``READONLY`` of a server that was the master: redis-py makes a lost connection of it."""
    return isinstance(error, exceptions.ConnectionError) and str(error) == "The previous master is now a slave"


def _script_error(text: str) -> WsproxyError:
    # Scripts' own errors may come behind a generic `ERR`, which older versions of Redis put before them.
    text = _IN_SCRIPT.sub("", text, count=1)
    words = text.removeprefix("ERR ").split()
    match words:
        case ["NOSTREAM", *_]:
            return StreamNotFound("There is no such stream.")
        case ["EXISTS", *_]:
            return StreamExists("A stream of this id was opened before.")
        case ["ENDED", *outcome]:
            return StreamEnded("The stream has ended already.", outcome[0].strip(".,:") if outcome else "finish")
        case ["SEQ", *_]:
            return StreamConflict("The stream was continued by another worker.")
        case ["TOOLARGE", *_]:
            return TooLarge("The text of the stream is too large.")
        case ["WRONGTYPE", *_]:
            return InvalidRequest(f"Not done: {text}")
        case [code, *_] if code in _NOT_DONE_CODES:
            return Unavailable(f"Not done: {text}")
    return InvalidRequest(f"Redis refused: {text}")


class RedisBackend:
    """All methods of :class:`wsproxy._backend.Backend`, over one connection pool and one subscriber connection."""

    is_kept_on = False

    def __init__(self, url: str, prefix: str, limits: Limits, retry_for: float, options: Mapping[str, Any]) -> None:
        # Repeating is decided here, call by call: redis-py cannot know which of them may be done twice.
        defaults: dict[str, Any] = {"socket_keepalive": True, "socket_connect_timeout": 5.0, "socket_timeout": 10.0}
        # With RESP 3 redis-py 8 awaits notices of maintenance, and then its pool hands out connections that have died.
        defaults["protocol"] = 2
        options = defaults | dict(options) | {"decode_responses": False, "retry": Retry(NoBackoff(), 0)}
        self._redis, source = _connections(url, options, retry_for)
        self._listener = Listener(source)
        self._prefix = f"{prefix}:" if prefix else ""
        self._limits = limits
        self._retry_for = retry_for
        self._publish = self._redis.script(script("publish.lua"))
        self._stream = self._redis.script(script("stream.lua"))
        self._read = self._redis.script(script("read.lua"))
        self._lease = self._redis.script(_LEASE)
        self._state = self._redis.script(_STATE)

    def _key(self, *parts: str) -> str:
        return self._prefix + ":".join(parts)

    def _channel(self, target: Target) -> str:
        match target.kind:
            case "broadcast":
                return self._key("ws", "broadcast")
            case "session":
                return self._key("session", target.id, "down")
            case kind:
                return self._key("ws", kind, target.id)

    def _log(self, target: Target) -> str:
        """The key of a log. All keys of events share the hash tag ``{ws}``, those of a session's channel its name."""
        match target.kind:
            case "session":
                return f"{{{self._channel(target)}}}:log"
            case "broadcast":
                return f"{{{self._key('ws')}}}:broadcast:log"
            case kind:
                return f"{{{self._key('ws')}}}:{kind}:{target.id}:log"

    def _clock(self) -> str:
        return f"{{{self._key('ws')}}}:clock"

    async def _once(self, call: Callable[[], Awaitable[Any]]) -> Any:
        with _errors():
            return await call()

    async def _do(self, call: Callable[[], Awaitable[T]], *, repeatable: bool) -> T:
        async def attempt(_: int) -> T:
            with _errors():
                return await call()

        return await retrying(attempt, self._retry_for, in_doubt_too=repeatable)

    async def issue_token(self, request: TokenRequest) -> SessionToken:
        token = (_EVENT_STREAM_PREFIX if request.event_stream else "") + secrets.token_urlsafe(32)
        value = f"agent/{request.agent} {token}" if request.bound else token
        key = self._key("session", request.session, "auth")
        await self._do(lambda: self._redis.set(key, value, px=round(request.ttl * 1000)), repeatable=True)
        return SessionToken(request.agent, request.session, token, request.ttl, request.event_stream)

    async def publish(self, publication: Publication) -> Receipt:
        channel = self._channel(publication.target)
        if not publication.history:
            if publication.idempotency_key is not None:
                raise InvalidRequest("An idempotency key needs history.")
            key = self._log(publication.target)
            tell = functools.partial(self._redis.tell, key, channel, publication.payload)
            return Receipt(await self._receivers(channel, await self._do(tell, repeatable=False)), None)
        keys, args = self._publish_call(publication)
        # With a key a repetition is recognised by the script, so that a lost answer costs nothing.
        answer = await self._do(
            lambda: cast("Awaitable[list[Any]]", self._publish(keys=keys, args=args)),
            repeatable=publication.idempotency_key is not None,
        )
        return await self._counted(channel, _receipt(answer))

    async def _counted(self, channel: str, receipt: Receipt) -> Receipt:
        if receipt.duplicate:
            return receipt
        return dataclasses.replace(receipt, receivers=await self._receivers(channel, receipt.receivers))

    async def _receivers(self, channel: str, counted: int) -> int:
        """Receivers of a message on which its node counted ``counted``, over all nodes of a Cluster."""
        return (await self._redis.receivers(channel, counted)).counts[0]

    def _publish_call(self, publication: Publication) -> tuple[list[str], list[Any]]:
        channel, limits = self._channel(publication.target), self._limits
        log = self._log(publication.target)
        keys = [log]
        session = publication.target.kind == "session"
        if not session:
            keys.append(self._clock())
        dedup_ms = 0
        if publication.idempotency_key is not None:
            keys += [log] if session else []
            # Under the name that the gateway gives it, so that a key counts over both ways.
            keys.append(_beside(log, f"once:{publication.idempotency_key}"))
            dedup_ms = _IDEMPOTENCY_MS
        args: list[Any] = [channel, publication.payload, limits.entries_max, limits.bytes_max]
        return keys, [*args, round(limits.ttl * 1000), publication.event_id or "", dedup_ms]

    async def batch(self, publications: Sequence[Publication]) -> list[Receipt | Failure]:
        results = await asyncio.gather(*(self.publish(each) for each in publications[:1]), return_exceptions=True)
        # The first one loads the script; the others follow in order, through one connection to each node.
        results += await self._pipeline(publications[1:]) if len(publications) > 1 else []
        return [_result(each) for each in results]

    async def _pipeline(self, publications: Sequence[Publication]) -> list[Receipt | BaseException]:
        channels = [self._channel(each.target) for each in publications]
        commands = []
        for channel, each in zip(channels, publications, strict=True):
            words: tuple[Any, ...] = ("PUBLISH", channel, each.payload)
            if each.history:
                keys, args = self._publish_call(each)
                words = ("EVALSHA", self._publish.sha, len(keys), *keys, *args)
            commands.append(Command(self._log(each.target), words))

        async def run() -> list[Any]:
            try:
                return await self._redis.many(commands, self._retry_for)
            except exceptions.ConnectionError as error:
                if _is_demoted(error):
                    # Messages before the one that was refused may have been published.
                    raise Unavailable(f"Redis cannot be reached: {error}", in_doubt=True) from error
                raise

        repeatable = all(each.idempotency_key is not None for each in publications)
        answers = await self._do(run, repeatable=repeatable)
        results = [_receipt(each) if not isinstance(each, BaseException) else each for each in answers]
        counted = [
            self._counted(channel, each)
            for channel, each in zip(channels, results, strict=True)
            if isinstance(each, Receipt)
        ]
        receipts = iter(await asyncio.gather(*counted))
        return [next(receipts) if isinstance(each, Receipt) else each for each in results]

    async def stream(self, call: StreamCall) -> StreamReply:
        target = Target("session", call.session)
        log = self._log(target)
        state = _beside(log, f"stream:{call.stream}")
        keys = [log, state, f"{state}:text", _beside(log, "streams")]
        limits = self._limits
        args: list[Any] = [call.op, self._channel(target), call.stream, limits.entries_max, limits.bytes_max]
        args += [round(limits.ttl * 1000), round(call.lease * 1000)]
        match call.op:
            case "open":
                args.append(encode(call.meta if call.meta is not None else {}))
            case "append":
                args += [call.text.encode(), "" if call.seq is None else call.seq]
            case "end":
                args += [call.outcome, encode(call.error) if call.error else ""]
        async with self._leased(call):
            with _errors():
                answer = await cast("Awaitable[list[Any]]", self._stream(keys=keys, args=args))
        return StreamReply(int(answer[0]), _text(answer[1]) or None)

    @contextlib.asynccontextmanager
    async def _leased(self, call: StreamCall) -> AsyncIterator[None]:
        """Keeps the leases, in which the gateway looks for streams whose worker died.

        A stream must never be open without a lease, so it is entered before ``open`` and removed after ``end``.
        """
        leases, member = self._key("streams", "leases"), f"{call.session}/{call.stream}"
        if call.op == "open":
            with _errors():
                await self._lease(keys=[leases], args=[round(call.lease * 1000), member])
        try:
            yield
        except StreamExists:
            # The lease of the stream that is there ends earlier, perhaps: the gateway looks now.
            with contextlib.suppress(exceptions.RedisError, OSError):
                await self._redis.zadd(leases, {member: 0}, lt=True)
            raise
        if call.op == "end":
            # If this fails, the gateway removes the lease when it finds that the stream has ended.
            with contextlib.suppress(exceptions.RedisError, OSError):
                await self._redis.zrem(leases, member)

    async def stream_state(self, session: str, stream: str) -> StreamState | None:
        key = _beside(self._log(Target("session", session)), f"stream:{stream}")

        async def read() -> list[Any]:
            return await cast("Awaitable[list[Any]]", self._state(keys=[key, f"{key}:text"]))

        (seq, state), text = await self._do(read, repeatable=True)
        if state is None:
            return None
        return StreamState(int(seq or 0), _text(text), _text(state))

    async def close_session(self, session: str, code: int | None, reason: str | None, connection: str | None) -> int:
        command = {"op": "close", "code": code, "reason": reason, "connection_id": connection}
        return await self._command(self._key("session", session, "control"), command)

    async def disconnect(self, request: Disconnection) -> int:
        command = {
            "op": "disconnect",
            "user_id": request.user,
            "connection_id": request.connection,
            "jti": request.jti,
            "code": request.code if request.code is not None or request.revoke is None else _REVOKED,
            "reason": request.reason,
        }
        channel = self._key("ws", "control")
        if request.revoke is None:
            return await self._command(channel, command)
        kind, name = ("user", request.user) if request.user is not None else ("jti", request.jti)
        key, milliseconds = f"{{{self._key('ws')}}}:revoked:{kind}:{name}", math.ceil(request.revoke * 1000)
        text = _command_text(command)

        async def revoke() -> Any:
            return await self._redis.eval(_REVOKE, 1, key, str(milliseconds), channel, text)

        # A revocation may be repeated, and so may the end of its connections.
        return await self._told(channel, revoke)

    async def _command(self, channel: str, command: Mapping[str, Any]) -> int:
        text = _command_text(command)
        # Ending what has ended changes nothing, so this may be said twice.
        return await self._told(channel, functools.partial(self._redis.tell, channel, channel, text))

    async def _told(self, channel: str, tell: Callable[[], Awaitable[Any]]) -> int:
        """Publishes a command, and returns the number of its receivers, who may be gone when it has reached them."""
        before = await self._redis.present(channel)
        counted = int(await self._do(tell, repeatable=True))
        return max(before.counts[0], await self._receivers(channel, counted))

    async def presence(self, user: str) -> list[Presence]:
        key = self._key("ws", "user", user, "connections")
        held = await self._do(lambda: cast("Awaitable[dict[Any, Any]]", self._redis.hgetall(key)), repeatable=True)
        entries = {_text(connection): json.loads(value) for connection, value in held.items()}
        servers = sorted({str(entry.get("server_id", "")) for entry in entries.values()})
        alive = set()
        for server in servers:
            lease = self._key("ws", "server", server)
            if await self._do(lambda lease=lease: self._redis.exists(lease), repeatable=True):  # type: ignore[misc]
                alive.add(server)
        # Entries of an instance that died stay until another instance removes them.
        return [_presence(name, entry) for name, entry in entries.items() if entry.get("server_id") in alive]

    async def history(self, target: Target, after: str, limit: int) -> History:
        keys = [self._log(target)]
        if target.kind != "session":
            keys.append(self._clock())
        is_position = after == START or parse(after) is not None
        position, event_id = (after, "") if is_position else ("", after)
        args: list[Any] = [1, position, event_id, limit, _PAGE_BYTES, "", ""]

        async def read() -> list[Any]:
            return await cast("Awaitable[list[Any]]", self._read(keys=keys, args=args))

        now, _, resolved, known, logs, _ = await self._do(read, repeatable=True)
        head, _, is_whole, _, complete, fields = logs[0]
        entries = [fields[n : n + 4] for n in range(0, len(fields), 4)]
        events = tuple(HistoryEvent(_text(name), data, _text(own) or None) for name, _, own, data in entries)
        lost = lost_behind(
            _text(resolved),
            head=_text(head),
            previous=_text(entries[0][1]) if entries else _text(head),
            is_whole=bool(is_whole),
            is_known=bool(known),
            age_ms=int(now) - _milliseconds(resolved),
            head_ms=round(max(self._limits.ttl, _HEAD_SECONDS_MIN) * 1125),
        )
        last = events[-1].event_id if events else _text(head) or START
        return History(events, bool(complete), last, lost)

    def _owner(self, session: str) -> str:
        return f"{{{self._key('session', session, 'up')}}}:owner"

    async def claim(self, sessions: Sequence[str], owner: str, lease: float) -> list[bool]:
        milliseconds = str(round(lease * 1000))
        keys = [self._owner(each) for each in sessions]
        lefts = await self._each([Command(key, ("EVAL", HOLD, 1, key, owner, milliseconds)) for key in keys])
        return [int(left) == 0 for left in lefts]

    async def held(self, sessions: Sequence[str], owner: str) -> list[bool]:
        keys = [self._owner(each) for each in sessions]
        owners = await self._each([Command(key, ("GET", key)) for key in keys])
        return [each is not None and _text(each) != owner for each in owners]

    async def _each(self, commands: Sequence[Command]) -> list[Any]:
        """Answers of all commands, or the first error."""
        with _errors():
            answers = await self._redis.many(commands)
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer
        return answers

    async def release(self, session: str, owner: str) -> None:
        key = self._owner(session)
        await self._once(lambda: self._redis.eval(RELEASE, 1, key, owner))

    async def has_clients(self, sessions: Sequence[str]) -> list[bool]:
        # An instance with a client of a session listens to the session's channel.
        channels = [self._key("session", session, "down") for session in sessions]
        heard = await self._once(lambda: self._redis.heard(channels))
        return [count > 0 for count in heard.counts]

    async def open_sessions(self, agent: str) -> AsyncIterator[tuple[str, str]]:
        for server in await self._once(lambda: self._redis.zrange(self._key("ws", "servers"), 0, -1)):
            key, cursor = self._key("ws", "server", _text(server), "sessions"), 0
            while True:
                scan = functools.partial(self._redis.hscan, key, cursor, count=_PAGE)
                cursor, found = await self._once(scan)
                for connection, value in found.items():
                    if (session := _announced(value, agent)) is not None:
                        yield session, _text(connection)
                if int(cursor) == 0:
                    break

    def kept_messages(self, session: str) -> Kept | None:
        up = self._key("session", session, "up")
        # A gateway of the version before writes under the first name; what it kept is the older.
        logs = [f"{up}:log", f"{{{up}}}:log"]
        return KeptMessages(self._redis, logs, f"{{{up}}}:reader", self._once)

    def follow_upstream(self, session: str, kept: bool) -> Consumer:
        return self._listener.open(self._key("session", session, "up"))

    def follow_sessions(self, agent: str) -> Consumer:
        return self._listener.open(self._key("agent", agent, "sessions"))

    def read_sessions(
        self, agent: str, after: str, parse: Callable[[UpstreamMessage], T | None], on_gap: GapCallback | None
    ) -> Subscription[T]:
        log = _Log("{" + self._key("agent", agent, "sessions") + "}:log", after)
        # For ever: a reader waits for Redis to come back.
        return Subscription(lambda: self.follow_sessions(agent), parse, on_gap, log=lambda: self._read_for_ever(log))

    async def _read_for_ever(self, log: _Log) -> list[UpstreamMessage | Gap] | None:
        backoff = Backoff(base=0.1, cap=5.0)
        while True:
            try:
                with _errors():
                    return await log.read(self._redis)
            except Unavailable:
                await asyncio.sleep(backoff.next(0.0))

    def calls(self, owned: bool) -> RedisCalls:
        """Calls of users' agents over the same connections, which they close at their end if ``owned``."""
        close = self.aclose if owned else None
        return RedisCalls(self._redis, self._listener, self._prefix, self._once, close)

    def rooms(self) -> RedisRooms:
        """Rooms over the same connections."""
        return RedisRooms(self._redis, self._listener, self._prefix, self._do, script("room_leave.lua"))

    async def aclose(self) -> None:
        await self._listener.aclose()
        await self._redis.end()


def _connections(url: str, options: dict[str, Any], patience: float) -> tuple[Server, Source]:
    """Commands and subscriptions of the Redis at a URL."""
    commands, subscriptions = options | {"health_check_interval": 15}, options | {"health_check_interval": 0}
    if not is_cluster(url):
        return Server(pool(url, commands)), PoolSource(pool(url, subscriptions | {"protocol": 2}))
    if options.get("sentinel_kwargs") is not None:
        raise ValueError("sentinel_kwargs needs a URL that begins with redis+sentinel:// or rediss+sentinel://")
    # The answers of RESP 2 are read.
    cluster = Cluster(url, commands | {"protocol": 2}, patience)
    return cluster, ClusterSource(cluster, subscriptions | {"protocol": 2})


class _Log:
    """A log of announcements, read from an entry on. Tells where that entry is no longer there."""

    def __init__(self, key: str, after: str) -> None:
        self._key = key
        # The last entry that was read; empty: none.
        self._after = after
        self._has_read = False
        # True where that entry should still be there: if it is not, later ones may have been removed too.
        self._is_held = True

    async def read(self, redis: Server) -> list[UpstreamMessage | Gap] | None:
        """Returns the entries that follow; ``None`` where there is no log."""
        is_there = True
        found: list[UpstreamMessage | Gap] = []
        entries = cast("list[Any]", await redis.xrange(self._key, self._after or "-", "+", count=_PAGE + 1))
        if self._after and entries and _text(entries[0][0]) == self._after:
            entries = entries[1:]
            self._is_held = True
        elif self._after and entries:
            if self._is_held:
                found.append(Gap(0.0, "history_lost"))
        elif self._after:
            end = await redis.xrevrange(self._key, count=1)
            if end:
                # The log is newer than what was read of it: Redis was emptied and its clock set back.
                found.append(Gap(0.0, "history_lost"))
                entries = cast("list[Any]", await redis.xrange(self._key, count=_PAGE))
            elif not self._has_read:
                found.append(Gap(0.0, "history_lost"))
            self._is_held = False
            is_there = bool(end)
        else:
            is_there = bool(entries)
        self._has_read = True
        if entries:
            self._after, self._is_held = _text(entries[-1][0]), True
        found += [UpstreamMessage(fields.get(b"data", b""), _text(name)) for name, fields in entries]
        return found if found or is_there else None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else "" if value is None else str(value)


def _announced(value: bytes, agent: str) -> str | None:
    """The session of an entry of what an instance has open, if it is this agent's and its opening was announced.

    What was not announced yet is in the log when this is read behind the entry.
    """
    try:
        entry = json.loads(value)
        is_announced = entry["announced"] is True and entry["agent_id"] == agent
        return str(entry["session_id"]) if is_announced else None
    except (ValueError, KeyError, TypeError):
        return None


def _beside(log: str, what: str) -> str:
    """A key that belongs to the same channel as a log, and has its slot."""
    return log.removesuffix("log") + what


def _milliseconds(position: Any) -> int:
    parsed = parse(_text(position))
    return parsed[0] if parsed is not None else 0


def _command_text(command: Mapping[str, Any]) -> bytes:
    return encode({name: value for name, value in command.items() if value is not None})


def _receipt(answer: Any) -> Receipt:
    if isinstance(answer, int):
        return Receipt(answer, None)
    return Receipt(int(answer[0]), _text(answer[1]), bool(int(answer[2])))


def _result(outcome: Receipt | BaseException) -> Receipt | Failure:
    if isinstance(outcome, Receipt):
        return outcome
    if isinstance(outcome, exceptions.RedisError):
        outcome = _error(outcome)
    if isinstance(outcome, WsproxyError):
        return Failure(type(outcome).__name__, str(outcome), isinstance(outcome, Unavailable))
    raise outcome


def _presence(connection: str, entry: Mapping[str, Any]) -> Presence:
    return Presence(
        connection, str(entry.get("server_id", "")), str(entry.get("connected_at", "")), entry.get("transport")
    )
