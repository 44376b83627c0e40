"""The worker side: one interface over Redis or over the gateway's HTTP API."""

from __future__ import annotations

import inspect
import json
import re
import typing
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from ._backend import Backend, Disconnection, Publication, Target, TokenRequest
from ._feeds import Subscription
from ._http import HttpBackend
from ._ids import check_id
from ._positions import START, is_event_id, is_plain, is_reserved
from ._redis import RedisBackend
from .agents import Agents
from .errors import InvalidRequest
from .rooms import Rooms, check_reason
from .serve import Handler, ServeOptions, Serving
from .stream import StreamOptions, TokenStream
from .types import (
    Event,
    Failure,
    GapCallback,
    History,
    Limits,
    Outgoing,
    Payload,
    Presence,
    Receipt,
    SessionEvent,
    SessionToken,
    UpstreamMessage,
    encode,
)

_KEY = re.compile(r"[^\s\x00-\x1f\x7f]{1,128}")
_TOKEN_TTL_MAX = 24 * 3600.0


class Worker:
    """A backend process as the gateway knows it. Make one per process, with :meth:`redis` or :meth:`http`.

    The same calls work over both; what is different is said at the call. All calls are safe from many tasks of one
    event loop. Use it with ``async with``, or call :meth:`aclose` at the end::

        async with Worker.redis("redis://127.0.0.1:6379") as worker:
            token = await worker.issue_token("demo", "s-1")
            await worker.send("s-1", {"type": "hello"})

    **Outages.** A call waits for Redis or the gateway for up to ``retry_for`` seconds (default 30), then raises
    :class:`~wsproxy.Unavailable`. A call is repeated only if that cannot do it twice: with history, :meth:`send` and
    its siblings carry an idempotency key for that. Iterators wait for ever.
    """

    def __init__(self, backend: Backend, retry_for: float = 30.0) -> None:
        """Not for direct use: :meth:`redis` and :meth:`http` make workers."""
        self._backend = backend
        self._retry_for = retry_for
        self._agents: Agents | None = None
        self._rooms: Rooms | None = None

    @classmethod
    def redis(
        cls, url: str, *, prefix: str = "", limits: Limits | None = None, retry_for: float = 30.0, **options: Any
    ) -> Worker:
        """A worker over Redis, which needs no gateway to be up.

        ``url`` is that of the gateway: one server; a Redis Cluster, as in ``redis+cluster://n1:6379,n2:6379``; or
        sentinels, as in ``redis+sentinel://:password@s1:26379,s2:26379/mymaster``, with
        ``sentinel_kwargs={"password": …}`` where they have a login. ``prefix`` and ``limits`` are the gateway's
        ``[redis] channel_prefix`` and ``[history]``. ``options`` go to redis-py (such as ``ssl_ca_certs``). Nothing is
        connected before the first call.
        """
        backend = RedisBackend(url, prefix, limits or Limits(), retry_for, options)
        return cls(backend, retry_for)

    @classmethod
    def http(cls, base_url: str, api_key: str, *, retry_for: float = 30.0, **options: Any) -> Worker:
        """A worker over the gateway's HTTP API, which needs one of its ``[api] keys``.

        ``base_url`` is that of the gateway, such as ``http://127.0.0.1:8080``. ``options`` go to
        :class:`httpx.AsyncClient` (such as ``verify``). Bounds of the history are the gateway's own.
        """
        return cls(HttpBackend(base_url, api_key, retry_for, options), retry_for)

    async def __aenter__(self) -> Worker:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def agents(self) -> Agents:
        """Users' agents, over the worker's own connections."""
        if self._agents is None:
            self._agents = Agents(self._backend.calls(owned=False))
        return self._agents

    @property
    def rooms(self) -> Rooms:
        """Rooms, over the worker's own connections."""
        if self._rooms is None:
            self._rooms = Rooms(self._backend.rooms())
        return self._rooms

    async def aclose(self) -> None:
        """Closes all connections. Open iterators end with errors or wait for ever: close them before."""
        if self._agents is not None:
            await self._agents.aclose()
        await self._backend.aclose()

    # ---- sessions ----

    async def issue_token(
        self,
        agent: str,
        session: str | None = None,
        *,
        ttl: float = 60.0,
        event_stream: bool = False,
        bound: bool = True,
    ) -> SessionToken:
        """A token that opens one connection or event stream of a session, once, within ``ttl`` seconds (at most a day).

        With ``event_stream`` it opens any number of event streams until it expires, and no WebSocket: for an
        ``EventSource``, which comes back with the URL that it has. Choose a ``ttl`` as long as a page stays open.

        The token opens the session under this ``agent`` only; with ``bound=False`` under any agent id, so that the
        client chooses which workers are told of its connection.

        Without ``session`` a fresh one is named. A session has one token at a time: a further call replaces the one
        before. A client with the token reads the session: check who asks.
        """
        check_id("agent", agent)
        session = session if session is not None else str(uuid.uuid4())
        check_id("session", session)
        if not 0 < ttl <= _TOKEN_TTL_MAX:
            raise InvalidRequest(f"ttl must be above 0 and at most {_TOKEN_TTL_MAX:.0f} seconds.")
        return await self._backend.issue_token(TokenRequest(agent, session, ttl, event_stream, bound))

    def token_dependency(
        self,
        agent: str,
        session: Callable[..., Awaitable[str | None] | str | None],
        *,
        ttl: float = 60.0,
        event_stream: bool = False,
        bound: bool = True,
    ) -> Callable[..., Awaitable[SessionToken]]:
        """A dependency for FastAPI (or anything that calls by signature) that issues a session's token.

        ``session`` decides who may open what: it is a dependency itself, its parameters are resolved as usual, and it
        answers the session's id (``None`` for a fresh one) or raises, for example ``HTTPException(403)``. All else is
        as for :meth:`issue_token`::

            async def own_session(user: Annotated[User, Depends(signed_in)], session_id: str | None = None):
                if session_id is not None and not await owns(user, session_id):
                    raise HTTPException(403)
                return session_id

            session_token = worker.token_dependency("demo", own_session)

            @app.post("/sessions", status_code=201)
            async def create(token: Annotated[SessionToken, Depends(session_token)]):
                return token.as_dict()
        """

        async def dependency(**arguments: Any) -> SessionToken:
            answer = session(**arguments)
            named = await answer if inspect.isawaitable(answer) else answer
            return await self.issue_token(agent, named, ttl=ttl, event_stream=event_stream, bound=bound)

        # The caller's parameters, with annotations that do not depend on the module they were written in.
        signature, hints = inspect.signature(session), typing.get_type_hints(session, include_extras=True)
        parameters = [
            each.replace(annotation=hints.get(name, each.annotation), kind=inspect.Parameter.KEYWORD_ONLY)
            for name, each in signature.parameters.items()
        ]
        dependency.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=parameters, return_annotation=SessionToken
        )
        return dependency

    async def send(
        self,
        session: str,
        message: Payload,
        *,
        history: bool = True,
        event_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> Receipt:
        """Sends a message to all clients of a session: ``bytes`` and ``str`` verbatim, all else as JSON.

        With ``history`` (the gateway's ``[sessions] history`` must be on) a client that is away gets it when it comes
        back. ``event_id`` is an id of your own from which clients may resume: give each message another one, of at most
        128 bytes without spaces, that does not look like a position (``0``, ``7-1``, ``7-1-0a``). A message that is a
        mapping gets it as a member, unless it has one. A message whose ``idempotency_key`` (at most 128 characters)
        was used within ten minutes is not sent again, and its receipt says ``duplicate``.

        Without history the message is gone for clients that are away, and an outage raises
        :class:`~wsproxy.Unavailable` with ``in_doubt`` instead of repeating. Bytes that begin with ``FF``, ``H`` and a
        digit are refused then: the gateway would take them for a message with history.
        """
        target = Target("session", check_id("session", session))
        return await self._publish(target, message, history, event_id, idempotency_key)

    def stream(
        self,
        session: str,
        stream_id: str | None = None,
        *,
        meta: Mapping[str, Any] | None = None,
        lease: float = 15.0,
        flush_interval: float = 0.05,
        watch_stop: bool = True,
        cancel_on_stop: bool = False,
        on_cancel: Literal["cancelled", "leave"] = "cancelled",
        adopt: bool = False,
    ) -> TokenStream:
        """A token stream, for ``async with``: the output of a language model, as one text for the client.

        The end of the block ends the stream: ``finish``; ``error`` after an exception; ``cancelled`` after a
        cancellation, or when ``stopped`` was set::

            async with worker.stream(session, meta={"model": "m-1"}) as stream:
                async for token in model(prompt):
                    if stream.stopped.is_set():
                        break
                    await stream.append(token)

        - ``meta``: a JSON object, given to the clients with the stream.
        - ``lease``: seconds after which a worker that died is noticed; renewed three times in that time.
        - ``flush_interval``: the fewest seconds between two messages. The first text after a pause is sent at once;
          what follows sooner is sent together, and lost if the worker is killed before. 0 sends each text.
        - ``watch_stop``: follow the session for a client's ``stream_stop``. As long as it runs, the gateway takes
          what clients send as heard: also run :meth:`upstream` somewhere, or switch this off and set ``stopped``
          yourself.
        - ``cancel_on_stop``: a stop cancels what the block awaits, which then ends as ``cancelled`` without an error.
        - ``on_cancel="leave"``: a block that is cancelled from outside (a worker that shuts down) leaves the stream
          open, so that another worker can go on with it within the lease.
        - ``adopt``: where the stream is open already, go on with it: ``text`` and ``seq`` say where it stands. One
          that has ended raises :class:`~wsproxy.StreamEnded`. Over HTTP its text must still be in the history.
        """
        check_id("session", session)
        if stream_id is not None:
            check_id("stream", stream_id)
        elif adopt:
            raise InvalidRequest("A stream to adopt needs its id.")
        if not 1 <= lease <= 3600 or flush_interval < 0:
            raise InvalidRequest("lease must be 1 to 3600, and flush_interval not below 0 seconds.")
        if meta is not None:
            encode(meta)
        options = StreamOptions(
            meta, lease, flush_interval, watch_stop, cancel_on_stop, on_cancel, adopt, self._retry_for
        )
        return TokenStream(self._backend, session, stream_id, options)

    def upstream(
        self, session: str, *, kept: bool = True, on_gap: GapCallback | None = None
    ) -> Subscription[UpstreamMessage]:
        """Messages from the clients of a session, in order, for ever: an asynchronous iterator, or ``async with`` it.

        It survives any outage; where messages may be missing, ``on_gap`` is called. With ``kept`` it begins with what
        was kept while no worker listened (the gateway's ``no_receiver = "queue"``).

        Over Redis a kept message is deleted when the loop comes back for the next one, or leaves ``async with``
        without an exception: at least once, also when a worker dies. Of several workers one hands them out at
        a time; another goes on where it stopped, 15 seconds after its death. Over HTTP they stay, and the next worker
        that follows gets them again (``event_id`` tells it). A message that comes while workers listen reaches each of
        these workers, once.
        """
        check_id("session", session)
        return Subscription(
            lambda: self._backend.follow_upstream(session, kept),
            lambda message: message,
            on_gap,
            self._backend.kept_messages(session) if kept else None,
        )

    def session_events(
        self, agent: str, *, after: str | None = None, on_gap: GapCallback | None = None
    ) -> Subscription[SessionEvent]:
        """Connections of an agent's sessions that open and close, for ever; see :meth:`upstream` for outages.

        Every worker that follows gets all of them. Without ``after`` those that come from now on.

        With the gateway's ``[sessions] events_log`` on they are kept, also the ends of sessions whose gateway
        instance was killed. ``after="0"`` begins with all that are kept; ``after`` an ``event_id`` goes on behind it.
        No outage makes a gap then; ``on_gap`` is called with ``history_lost`` only where the log no longer has the
        entry. Announcements come at least once: of one ``connection_id``, an ``event`` that repeats the one before it
        is a duplicate. One that was closed as ``server_lost`` may open again, if its instance was only frozen.
        """
        check_id("agent", agent)
        if after is None:
            return Subscription(lambda: self._backend.follow_sessions(agent), _session_event, on_gap)
        if not re.fullmatch(r"0|\d{1,20}-\d{1,20}", after):
            raise InvalidRequest("after must be 0 or the event_id of a session event.")
        return self._backend.read_sessions(agent, "" if after in ("0", "0-0") else after, _session_event, on_gap)

    def serve(
        self,
        agent: str,
        handler: Handler,
        *,
        lease: float = 15.0,
        linger: float = 10.0,
        grace: float = 10.0,
        sessions_max: int = 10_000,
        on_gap: GapCallback | None = None,
    ) -> Serving:
        """Serves all sessions of an agent while an ``async with`` block runs, such as the lifespan of an application.

        ``handler`` is called once for a session that opens, and iterates over what its clients send::

            async def chat(session: ServedSession) -> None:
                async for message in session:
                    await session.send({"type": "echo", "text": message.text})

            @asynccontextmanager
            async def lifespan(_: FastAPI) -> AsyncIterator[None]:
                async with worker, worker.serve("demo", chat):
                    yield

        Over Redis any number of workers may serve one agent: each session has one of them at a time. When it dies,
        another one takes the session after ``lease`` seconds, at once if it ended in order. Over HTTP let one process
        serve; what was kept comes again after its restart.

        Switch the gateway's ``[sessions] events_log`` on, so that workers that start know the sessions that are open,
        and ``no_receiver = "queue"``, so that what comes while no worker listens is kept. Over HTTP, a worker that
        starts knows only the openings that this log still has (``events_log_entries_max``, ``events_log_ttl``): make it
        hold all that opens and closes while a session is open. Over Redis it also finds the others.

        - ``linger``: seconds after the last client has gone until the iteration ends. An answer in progress goes on.
        - ``grace``: how long the end of the block waits for handlers, before it cancels them.
        - ``sessions_max``: sessions beyond it wait for another worker, or until one has ended.
        - ``on_gap``: as for :meth:`upstream`.

        A handler that raises is started again for the messages that follow; its exception is logged. One that returns
        is called again when another client of the session connects.
        """
        check_id("agent", agent)
        if not 1 <= lease <= 3600 or linger < 0 or grace < 0 or sessions_max < 1:
            raise InvalidRequest("lease must be 1 to 3600, linger and grace not below 0, sessions_max at least 1.")
        return Serving(self, self._backend, agent, handler, ServeOptions(lease, linger, grace, sessions_max, on_gap))

    async def close_session(
        self, session: str, *, code: int | None = None, reason: str | None = None, connection: str | None = None
    ) -> int:
        """Ends all connections of a session, or one of them; what was sent before still arrives.

        ``code`` is the close code (default 4004), ``reason`` at most 123 bytes. Answers the number of gateway
        instances that were told.
        """
        check_id("session", session)
        check_reason(reason)
        return await self._backend.close_session(session, code, reason, connection)

    # ---- events ----

    async def broadcast(
        self,
        type: str,
        data: Any = None,
        *,
        event_id: str | None = None,
        ack: bool = False,
        history: bool = True,
        idempotency_key: str | None = None,
    ) -> Receipt:
        """Sends an event to every client of the event endpoint.

        ``data`` is any JSON. With ``ack`` each client must acknowledge; the gateway sends it again until then and
        reports on ``ws:acks``. The other parameters are those of :meth:`send`.
        """
        event = Event(type, data, event_id, ack)
        return await self._send_event(Target("broadcast"), event, history, idempotency_key)

    async def to_user(
        self,
        user: str,
        type: str,
        data: Any = None,
        *,
        event_id: str | None = None,
        ack: bool = False,
        history: bool = True,
        idempotency_key: str | None = None,
    ) -> Receipt:
        """Sends an event to all connections of a user (the token's ``sub``); see :meth:`broadcast`."""
        target = Target("user", check_id("user", user))
        return await self._send_event(target, Event(type, data, event_id, ack), history, idempotency_key)

    async def to_connection(
        self,
        connection: str,
        type: str,
        data: Any = None,
        *,
        event_id: str | None = None,
        ack: bool = False,
        history: bool = True,
        idempotency_key: str | None = None,
    ) -> Receipt:
        """Sends an event to one connection; see :meth:`broadcast`."""
        target = Target("connection", _connection_id(connection))
        return await self._send_event(target, Event(type, data, event_id, ack), history, idempotency_key)

    async def batch(
        self, messages: Iterable[Outgoing], *, idempotency_key: str | None = None
    ) -> list[Receipt | Failure]:
        """Sends many messages with history, in order, and answers a result for each.

        Not atomic: some may fail (:class:`~wsproxy.Failure`) while others are sent. With ``idempotency_key`` the batch
        may be repeated as a whole.
        """
        publications = []
        key = idempotency_key if idempotency_key is not None else uuid.uuid4().hex
        for number, each in enumerate(messages):
            target = _target(each.to)
            message = _event_body(each.message) if isinstance(each.message, Event) else each.message
            own = None
            if target.kind != "session":
                own, message = _own_id(message), _complete(message)
            elif isinstance(each.message, Event):
                # It stays a member of the message, which means nothing to the gateway.
                _check_event_id(each.message.event_id)
            publications.append(Publication(target, encode(message), True, own, _check_key(f"{key}-{number}")))
        return await self._backend.batch(publications) if publications else []

    async def disconnect(
        self,
        *,
        user: str | None = None,
        connection: str | None = None,
        jti: str | None = None,
        code: int | None = None,
        reason: str | None = None,
        revoke: float | None = None,
    ) -> int:
        """Ends connections to the event endpoint: of a user, of one token (``jti``), or one connection.

        With ``revoke`` the user's tokens issued until now, or the token, are refused for so many seconds: choose at
        least as long as tokens live. Tokens that are issued within the gateway's ``[jwt] leeway`` (5 s) after that are
        refused too. A time that is longer than the gateway's ``[events] revocation_ttl`` raises
        :class:`~wsproxy.InvalidRequest` over HTTP, and is kept as it is over Redis.

        ``code`` is 4004, with ``revoke`` 4401, where it is not given. Answers the number of gateway instances that were
        told.
        """
        if sum(each is not None for each in (user, connection, jti)) != 1:
            raise InvalidRequest("Exactly one of user, connection and jti is needed.")
        if revoke is not None and (connection is not None or revoke <= 0):
            raise InvalidRequest("revoke is for a user or a jti, and above 0 seconds.")
        if user is not None:
            check_id("user", user)
        if jti is not None and not _is_utf8(jti):
            raise InvalidRequest("A jti holds no half of a surrogate pair.")
        connection = _connection_id(connection) if connection is not None else None
        check_reason(reason)
        return await self._backend.disconnect(Disconnection(user, connection, jti, code, reason, revoke))

    async def presence(self, user: str) -> list[Presence]:
        """The live connections of a user to the event endpoint, over all instances."""
        return await self._backend.presence(check_id("user", user))

    async def history(
        self, *, session: str | None = None, user: str | None = None, after: str = "0-0", limit: int = 100
    ) -> History:
        """Kept messages of a session, a user, or (without either) of the broadcast, oldest first.

        ``after`` is a position (a receipt's ``event_id``), an event id of your own, or ``0-0`` for all that is kept;
        ``limit`` is the most messages of this page.
        """
        if session is not None and user is not None:
            raise InvalidRequest("Either session or user, not both.")
        if limit < 1:
            raise InvalidRequest("limit must be at least 1.")
        if session is not None:
            target = Target("session", check_id("session", session))
        else:
            target = Target("broadcast") if user is None else Target("user", check_id("user", user))
        if not is_plain(after):
            raise InvalidRequest("after must be a position such as 1732190000000-0-5d2c0f6a, or an event id.")
        return await self._backend.history(target, START if after == "0" else after, limit)

    # ---- what both kinds of messages share ----

    async def _send_event(self, target: Target, event: Event, history: bool, key: str | None) -> Receipt:
        return await self._publish(target, _complete(_event_body(event)), history, event.event_id, key)

    async def _publish(
        self, target: Target, message: Payload, history: bool, event_id: str | None, key: str | None
    ) -> Receipt:
        _check_event_id(event_id)
        if not history and (key is not None or event_id is not None):
            raise InvalidRequest("event_id and idempotency_key need history.")
        if event_id is not None and isinstance(message, Mapping) and "event_id" not in message:
            message = {"event_id": event_id, **message}
        if history:
            # One's own key makes a repetition after a lost answer harmless.
            key = _check_key(key) if key is not None else uuid.uuid4().hex
        payload = encode(message)
        if not history and is_reserved(payload):
            raise InvalidRequest("A message without history must not begin with the bytes FF, H and a digit.")
        return await self._backend.publish(Publication(target, payload, history, event_id, key))


def _connection_id(text: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError as error:
        raise InvalidRequest("A connection id is a UUID.") from error


def _check_event_id(event_id: str | None) -> str | None:
    if event_id is not None and not is_event_id(event_id):
        raise InvalidRequest(
            "An event_id has 1 to 128 bytes without spaces and control characters, and does not look like a position."
        )
    return event_id


def _own_id(event: Mapping[str, Any]) -> str | None:
    event_id = event.get("event_id")
    if event_id is None and "event_id" not in event:
        return None
    if not isinstance(event_id, str):
        raise InvalidRequest("An event_id is a string.")
    return _check_event_id(event_id)


def _check_key(key: str) -> str:
    if not _KEY.fullmatch(key) or not _is_utf8(key):
        raise InvalidRequest("An idempotency key has 1 to 128 characters without spaces and control characters.")
    return key


def _is_utf8(text: str) -> bool:
    # Half of a surrogate pair cannot be sent.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _target(to: str) -> Target:
    kind, _, name = to.partition(":")
    match kind:
        case "broadcast" if not name:
            return Target("broadcast")
        case "user" | "connection" | "session":
            return Target(kind, _connection_id(name) if kind == "connection" else check_id(kind, name))
    raise InvalidRequest(f"{to!r} is none of broadcast, user:U, connection:C and session:S.")


def _event_body(event: Event) -> dict[str, Any]:
    body: dict[str, Any] = {"type": event.type}
    if event.event_id is not None:
        body["event_id"] = event.event_id
    if event.timestamp is not None:
        body["timestamp"] = event.timestamp
    if event.ack:
        body["ack"] = True
    body["data"] = event.data
    return body


def _complete(body: Mapping[str, Any]) -> Mapping[str, Any]:
    if "timestamp" in body:
        return body
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {**body, "timestamp": now}


def _session_event(message: UpstreamMessage) -> SessionEvent | None:
    try:
        raw = json.loads(message.data)
        return SessionEvent(
            event=raw["event"],
            agent_id=raw["agent_id"],
            session_id=raw["session_id"],
            connection_id=raw["connection_id"],
            server_id=raw["server_id"],
            timestamp=raw["timestamp"],
            reason=raw.get("reason"),
            code=raw.get("code"),
            duration_ms=raw.get("duration_ms"),
            event_id=message.event_id,
            raw=raw,
        )
    except (ValueError, KeyError, TypeError):
        # Another publisher's message on the channel is none of ours.
        return None
