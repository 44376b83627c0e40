"""A worker's way over HTTP: the gateway's worker API under ``/api/v1``."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

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
from ._calls_http import HttpCalls
from ._feeds import Consumer, Kept, Subscription
from ._follower import Follower
from ._positions import START
from ._rooms_http import HttpRooms
from .client._advice import refusal
from .client.streams import MergedStreams
from .errors import (
    InvalidRequest,
    NotFound,
    NotSupported,
    StreamConflict,
    StreamEnded,
    StreamExists,
    StreamNotFound,
    TooLarge,
    Unauthorized,
    Unavailable,
    WsproxyError,
)
from .types import Failure, GapCallback, History, HistoryEvent, Presence, Receipt, SessionToken, UpstreamMessage

T = TypeVar("T")

_CONNECTIONS_MAX = 1000
# Bounds of one call.
_BATCH_MAX = 1000
_BATCH_BYTES = 512 * 1024
# Codes of refusals before anything was done.
_NOT_DONE = ("not_done", "full", "draining", "rate_limited", "request_timeout")
# The request was not sent, so it may be sent again.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


def error_of(response: httpx.Response) -> WsproxyError:
    """The error of a refused call, by status and the gateway's code."""
    answer = refusal(response.status_code, response.content)
    code, message = answer.code, answer.message
    if not code and response.status_code != 413:
        # A proxy's answer, as while the gateway is deployed: it passes, and says nothing of the call.
        return Unavailable(f"The gateway cannot be reached: {message}", in_doubt=response.status_code >= 500)
    text = f"{message} ({response.status_code} {code})".replace(" )", ")")
    if code == "not_done" and response.status_code == 409:
        return InvalidRequest(text)
    match response.status_code:
        case 401 | 403:
            return Unauthorized(text)
        case 413:
            return TooLarge(text)
        case 429 | 500 | 502 | 503 | 504 | 408:
            retry_after = response.headers.get("retry-after", "")
            # A call that was refused for its rate or before it was read was not done.
            in_doubt = response.status_code not in (429, 408) and code not in _NOT_DONE
            pause = float(retry_after) if retry_after.isdigit() else None
            return Unavailable(text, in_doubt=in_doubt, retry_after=pause)
        case 404 | 409 | 410:
            return _stream_error(code, text) or NotFound(text)
    return InvalidRequest(text)


def failure_of(error: httpx.HTTPError) -> WsproxyError:
    """The error of a call that got no answer."""
    match error:
        case _ if isinstance(error, _NOT_SENT):
            return Unavailable(f"The gateway cannot be reached: {error!r}")
        case httpx.TransportError():
            return Unavailable(f"The gateway cannot be reached: {error!r}", in_doubt=True)
        case httpx.DecodingError():
            return Unavailable(f"The answer is damaged: {error!r}", in_doubt=True)
    return InvalidRequest(str(error))


def _stream_error(code: str, text: str) -> WsproxyError | None:
    # The gateway has `not_found` and `conflict` for several errors, and tells them apart in words.
    said = f"{code} {text}".lower()
    if "stream" not in said:
        return None
    if code == "not_found":
        return StreamNotFound(text)
    if "ended" in said:
        return StreamEnded(text, next((each for each in ("finish", "cancelled", "error") if each in said), "unknown"))
    if "already" in said or "exists" in said:
        return StreamExists(text)
    return StreamConflict(text)


class HttpBackend:
    """All methods of :class:`wsproxy._backend.Backend`, over one HTTP client."""

    is_kept_on = True

    def __init__(self, base_url: str, api_key: str, retry_for: float, options: Mapping[str, Any]) -> None:
        # Followed streams and calls of agents hold a connection each, for long.
        limits = httpx.Limits(max_connections=_CONNECTIONS_MAX, max_keepalive_connections=20)
        defaults: dict[str, Any] = {"timeout": httpx.Timeout(10.0, connect=5.0), "limits": limits}
        self._client = httpx.AsyncClient(
            base_url=f"{base_url.rstrip('/')}/api/v1/",
            headers={"authorization": f"Bearer {api_key}"},
            **(defaults | dict(options)),
        )
        self._retry_for = retry_for
        self._followers: dict[str, Follower] = {}
        # Followers with one reader each.
        self._own: set[Follower] = set()

    async def _once(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            response = await self._client.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise failure_of(error) from error
        if not response.is_success:
            raise error_of(response)
        try:
            return response.json()
        except ValueError as error:
            # For example, the page of a proxy that says 200 while the gateway is deployed.
            raise Unavailable("The answer is no JSON, so it is not the gateway's.", in_doubt=True) from error

    async def _call(self, method: str, path: str, *, repeatable: bool, **arguments: Any) -> Any:
        async def attempt(_: int) -> Any:
            return await self._once(method, path, **arguments)

        return await retrying(attempt, self._retry_for, in_doubt_too=repeatable)

    async def issue_token(self, request: TokenRequest) -> SessionToken:
        body = {
            "ttl_seconds": max(1, round(request.ttl)),
            "event_stream": request.event_stream or None,
            "agent_id": request.agent if request.bound else None,
        }
        path = f"sessions/{_path(request.session)}/token"
        answer = await self._call("POST", path, repeatable=True, json=_without_none(body))
        expires_in = float(answer["expires_in"])
        return SessionToken(request.agent, request.session, answer["token"], expires_in, request.event_stream)

    async def publish(self, publication: Publication) -> Receipt:
        target = publication.target
        match target.kind:
            case "session":
                path = f"sessions/{_path(target.id)}/messages"
            case "broadcast":
                path = "events/broadcast"
            case kind:
                path = f"events/{kind}s/{_path(target.id)}"
        parameters = {"history": "true" if publication.history else "false"}
        if publication.event_id is not None and target.kind == "session":
            parameters["event_id"] = publication.event_id
        headers = {"content-type": "application/json"}
        if publication.idempotency_key is not None:
            headers["idempotency-key"] = publication.idempotency_key
        answer = await self._call(
            "POST",
            path,
            repeatable=publication.idempotency_key is not None,
            params=parameters,
            headers=headers,
            content=publication.payload,
        )
        return _receipt(answer)

    async def batch(self, publications: Sequence[Publication]) -> list[Receipt | Failure]:
        results: list[Receipt | Failure] = []
        for part in _parts([_batch_message(each) for each in publications]):
            body = f'{{"messages":[{",".join(part)}]}}'.encode()
            # Each message has its own key, so the whole may be sent again.
            answer = await self._call(
                "POST",
                "events/batch",
                repeatable=True,
                content=body,
                headers={"content-type": "application/json"},
            )
            results += [_result(each) for each in answer["results"]]
        return results

    async def stream(self, call: StreamCall) -> StreamReply:
        body: dict[str, Any] = {"op": call.op}
        if call.op != "end":
            body["lease_ms"] = round(call.lease * 1000)
        match call.op:
            case "open":
                body["meta"] = call.meta if call.meta is not None else {}
            case "append":
                body["text"] = call.text
                if call.seq is not None:
                    body["seq"] = call.seq
            case "end":
                body["outcome"] = call.outcome
                if call.error is not None:
                    body["error"] = call.error
        path = f"sessions/{_path(call.session)}/streams/{_path(call.stream)}"
        answer = await self._once("POST", path, json=body)
        return StreamReply(int(answer["seq"]), answer.get("event_id") or None)

    async def stream_state(self, session: str, stream: str) -> StreamState | None:
        # The gateway does not show streams to workers, but what it sent to the clients.
        streams, position, lost = MergedStreams(), "0-0", False
        while True:
            page = await self.history(Target("session", session), position, _BATCH_MAX)
            for event in page.events:
                if (message := _stream_message(event.data)) is not None:
                    streams.feed(message)
            position, lost = page.position, lost or page.lost is not None
            if page.complete or not page.events:
                break
        merged = streams.get(stream)
        if merged is not None and merged.complete:
            return StreamState(merged.seq, merged.text, merged.state)
        if merged is None and not lost:
            return None
        raise NotSupported("The beginning of the stream is no longer in the history: only Worker.redis can adopt it.")

    async def close_session(self, session: str, code: int | None, reason: str | None, connection: str | None) -> int:
        body = _without_none({"code": code, "reason": reason, "connection_id": connection})
        answer = await self._call("POST", f"sessions/{_path(session)}/close", repeatable=True, json=body)
        return int(answer["receivers"])

    async def disconnect(self, request: Disconnection) -> int:
        body = _without_none(
            {
                "user_id": request.user,
                "connection_id": request.connection,
                "jti": request.jti,
                "code": request.code,
                "reason": request.reason,
                "revoke_seconds": None if request.revoke is None else math.ceil(request.revoke),
            }
        )
        answer = await self._call("POST", "events/disconnect", repeatable=True, json=body)
        return int(answer["instances"])

    async def presence(self, user: str) -> list[Presence]:
        answer = await self._call("GET", f"events/users/{_path(user)}/presence", repeatable=True)
        return [
            Presence(each["connection_id"], each["server_id"], str(each["connected_at"]), each.get("transport"))
            for each in answer["connections"]
        ]

    async def history(self, target: Target, after: str, limit: int) -> History:
        parameters: dict[str, str | int] = {"after": "0" if after == START else after, "limit": limit}
        if target.kind == "session":
            path = f"sessions/{_path(target.id)}/history"
        else:
            path = "events/history"
            parameters["channel"] = str(target)
        answer = await self._call("GET", path, repeatable=True, params=parameters)
        events = tuple(
            HistoryEvent(each["event_id"], _data(each), each.get("own_event_id")) for each in answer["events"]
        )
        complete, position = bool(answer["complete"]), str(answer["position"])
        # The gateway tells the end of the log, of which an incomplete page is not the last.
        if events and not complete:
            position = events[-1].event_id
        return History(events, complete, position, answer.get("history_lost"))

    async def claim(self, sessions: Sequence[str], owner: str, lease: float) -> list[bool]:
        # The API knows no owners: `Worker.serve` says that there must be one worker.
        return [True] * len(sessions)

    async def held(self, sessions: Sequence[str], owner: str) -> list[bool]:
        return [False] * len(sessions)

    async def release(self, session: str, owner: str) -> None:
        pass

    async def has_clients(self, sessions: Sequence[str]) -> list[bool]:
        # Unknown here, so that only announcements end a session.
        return [True] * len(sessions)

    async def open_sessions(self, agent: str) -> AsyncIterator[tuple[str, str]]:
        # The API tells announcements only: `Worker.serve` says how far back they go.
        known: tuple[tuple[str, str], ...] = ()
        for each in known:
            yield each

    def kept_messages(self, session: str) -> Kept | None:
        # The gateway sends kept messages at the start of the stream.
        return None

    def follow_upstream(self, session: str, kept: bool) -> Consumer:
        path = f"sessions/{_path(session)}/upstream"
        if kept:
            # A follower of its own: one that joined a running stream would not get the kept messages.
            follower = Follower(self._client, f"{path}?log=true", error_of, lambda: self._own.discard(follower))
            self._own.add(follower)
            return follower.open()
        return self._shared(path)

    def follow_sessions(self, agent: str) -> Consumer:
        return self._shared(f"sessions/events?agent={_path(agent)}", resumes=True)

    def read_sessions(
        self, agent: str, after: str, parse: Callable[[UpstreamMessage], T | None], on_gap: GapCallback | None
    ) -> Subscription[T]:
        path = f"sessions/events?agent={_path(agent)}&after={after or '0'}"

        def open_own() -> Consumer:
            # A follower of its own: one that joined a running stream would not begin at its position.
            forget: Callable[[], object] = lambda: self._own.discard(follower)  # noqa: E731
            follower = Follower(self._client, path, error_of, forget, resumes=True, paced=True)
            self._own.add(follower)
            return follower.open()

        return Subscription(open_own, parse, on_gap)

    def _shared(self, path: str, *, resumes: bool = False) -> Consumer:
        follower = self._followers.get(path)
        if follower is None or follower.over:
            forget: Callable[[], object] = lambda: self._followers.pop(path, None)  # noqa: E731
            follower = Follower(self._client, path, error_of, forget, resumes=resumes)
            self._followers[path] = follower
        return follower.open()

    def calls(self, owned: bool) -> HttpCalls:
        """Calls of users' agents over the same client, which they close at their end if ``owned``."""
        return HttpCalls(self._client, error_of, failure_of, self.aclose if owned else None)

    def rooms(self) -> HttpRooms:
        """Rooms over the same client."""
        return HttpRooms(self._call)

    async def aclose(self) -> None:
        for follower in [*self._followers.values(), *self._own]:
            await follower.aclose()
        await self._client.aclose()


def _batch_message(publication: Publication) -> str:
    to, key = json.dumps(str(publication.target)), json.dumps(publication.idempotency_key)
    message = publication.payload.decode()
    return f'{{"to":{to},"message":{message},"history":true,"idempotency_key":{key}}}'


def _parts(messages: list[str]) -> Iterator[list[str]]:
    """Batches that the gateway takes: bounded in number, and as one body also in bytes."""
    part: list[str] = []
    held = 0
    for each in messages:
        if part and (len(part) == _BATCH_MAX or held + len(each.encode()) > _BATCH_BYTES):
            yield part
            part, held = [], 0
        part.append(each)
        held += len(each.encode()) + 1
    if part:
        yield part


def _path(name: str) -> str:
    return quote(name, safe="")


def _without_none(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def _stream_message(data: bytes) -> dict[str, Any] | None:
    if b'"stream_' not in data:
        return None
    try:
        message = json.loads(data)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _data(event: Mapping[str, Any]) -> bytes:
    if "data_base64" in event:
        return base64.b64decode(event["data_base64"])
    return str(event["data"]).encode()


def _receipt(answer: Mapping[str, Any]) -> Receipt:
    return Receipt(int(answer["receivers"]), answer.get("event_id") or None, bool(answer.get("duplicate", False)))


def _result(answer: Mapping[str, Any]) -> Receipt | Failure:
    error = answer.get("error")
    if error is None:
        return _receipt(answer)
    return Failure(str(error.get("code", "")), str(error.get("message", "")), bool(error.get("retryable", False)))
