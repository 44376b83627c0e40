"""The client's loop, against a gateway that is made up here: what it says, and how it comes back."""

from __future__ import annotations

import asyncio
import http
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import pytest_asyncio
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from conftest import eventually, within
from wsproxy import ConnectionClosed, Refused, Unavailable
from wsproxy.client import Client, connect_events, connect_session

pytestmark = pytest.mark.asyncio
Script = Callable[["Peer"], Awaitable[None]]


class Peer:
    """One connection as the made-up gateway sees it."""

    def __init__(self, connection: ServerConnection) -> None:
        self.connection = connection
        request = connection.request
        assert request is not None
        self.token = request.headers["Authorization"].removeprefix("Bearer ")
        self.last_event_id = parse_qs(urlsplit(request.path).query, keep_blank_values=True)["last_event_id"][0]

    async def say(self, message: Any, event_id: str = "") -> None:
        head = f"{event_id}\n" if self.connection.subprotocol == "wsproxy.id.v1" else ""
        await self.connection.send(head + json.dumps(message))

    async def hear(self) -> Any:
        return json.loads(await within(self.connection.recv()))


class FakeGateway:
    """Plays a script for each connection; a number refuses it with that status."""

    def __init__(self) -> None:
        self.scripts: list[Script | int] = []
        self.tokens: list[str] = []
        self.positions: list[str] = []
        self.retry_after = ""
        self.has_history = True
        self.server: Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{next(iter(self.server.sockets)).getsockname()[1]}"

    def refuse(self, connection: ServerConnection, _request: Request) -> Response | None:
        if self.scripts and isinstance(self.scripts[0], int):
            status = http.HTTPStatus(self.scripts[0])
            self.scripts.pop(0)
            self.tokens.append("refused")
            error = {"code": "a_code", "message": "No.", "retryable": status >= 429}
            response = connection.respond(status, json.dumps({"error": error}))
            if self.retry_after:
                response.headers["Retry-After"] = self.retry_after
            return response
        return None

    async def serve(self, connection: ServerConnection) -> None:
        peer = Peer(connection)
        self.tokens.append(peer.token)
        self.positions.append(peer.last_event_id)
        script = self.scripts.pop(0) if self.scripts else wait
        assert not isinstance(script, int)
        await script(peer)


async def wait(peer: Peer) -> None:
    await peer.connection.wait_closed()


@pytest_asyncio.fixture
async def fake() -> AsyncIterator[FakeGateway]:
    fake = FakeGateway()
    protocols = [Subprotocol("wsproxy.id.v1"), Subprotocol("wsproxy.v1")]

    def select(_: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol:
        return next(each for each in protocols if each in offered and (fake.has_history or each == "wsproxy.v1"))

    async with serve(
        fake.serve, "127.0.0.1", 0, subprotocols=protocols, select_subprotocol=select, process_request=fake.refuse
    ) as server:
        fake.server = server
        yield fake


def session(fake: FakeGateway, **options: Any) -> Client:
    return connect_session(
        fake.url, "demo", "s-1", **{"token": lambda: f"t-{len(fake.tokens)}", "proxy": None, **options}
    )


def events(fake: FakeGateway, **options: Any) -> Client:
    return connect_events(fake.url, **{"token": lambda: f"t-{len(fake.tokens)}", "proxy": None, **options})


async def data(client: Client, count: int) -> list[Any]:
    return [(await within(anext(client))).json() for _ in range(count)]


async def test_each_connection_has_a_fresh_token_and_the_last_position(fake: FakeGateway) -> None:
    async def first(peer: Peer) -> None:
        await peer.say({"type": "opened", "connection_id": "c", "event_id": "5-0-000000aa"})
        await peer.say({"n": 1}, "6-0-000000aa")
        await peer.say({"n": 2}, "6-1-000000aa")
        await peer.connection.close(1012, "restart")

    async def second(peer: Peer) -> None:
        await peer.say({"type": "resumed", "count": 2, "last_event_id": "6-1-000000aa"})
        # One that was seen already, as after a loss of the bus.
        await peer.say({"n": 2}, "6-1-000000aa")
        await peer.say({"n": 3}, "7-0-000000aa")
        await wait(peer)

    fake.scripts = [first, second]
    async with session(fake) as client:
        assert await data(client, 3) == [{"n": 1}, {"n": 2}, {"n": 3}]
        assert client.last_event_id == "7-0-000000aa"
    assert fake.tokens == ["t-0", "t-1"]
    assert fake.positions == ["", "6-1-000000aa"]
    assert client.closed == (1000, "")


async def test_messages_that_share_a_member_event_id_are_all_delivered(fake: FakeGateway) -> None:
    async def first(peer: Peer) -> None:
        await peer.say({"event_id": "evt_9", "n": 0}, "6-0-000000aa")
        # Published plain: it has no position.
        await peer.say({"event_id": "evt_9", "n": 1})
        await peer.say({"event_id": "1732190000000000-7", "n": 2}, "6-1-000000aa")
        # Another life of the log has used this id again.
        await peer.say({"event_id": "evt_9", "n": 3}, "6-1-000000bb")
        await peer.say({"event_id": "evt_9", "n": 4}, "6-2-000000aa")
        await peer.say({"event_id": "evt_9", "n": 4}, "6-2-000000aa")
        await peer.say({"event_id": "other", "n": 5})
        await peer.connection.close(1012, "restart")

    fake.scripts = [first, wait]
    async with session(fake) as client:
        assert [each["n"] for each in await data(client, 6)] == list(range(6))
        assert client.last_event_id == "6-2-000000aa"
        await eventually("it is back", lambda: len(fake.positions) == 2)
    assert fake.positions == ["", "6-2-000000aa"]


async def test_the_position_goes_on_in_another_life_of_the_log(fake: FakeGateway) -> None:
    async def first(peer: Peer) -> None:
        await peer.say({"n": 0}, "9-0-000000aa")
        # A log that begins anew may have lower ids.
        await peer.say({"n": 1}, "3-0-000000bb")
        await peer.say({"n": 2}, "4-0-000000bb")
        await peer.say({"n": 1}, "3-0-000000bb")
        await peer.connection.close(1012, "restart")

    fake.scripts = [first, wait]
    async with session(fake) as client:
        assert [each["n"] for each in await data(client, 3)] == [0, 1, 2]
        await eventually("it is back", lambda: len(fake.positions) == 2)
    assert fake.positions == ["", "4-0-000000bb"]


async def test_without_positions_beside_messages_only_positions_in_them_count(fake: FakeGateway) -> None:
    fake.has_history = False

    async def first(peer: Peer) -> None:
        for number, event_id in enumerate(["6-0-000000aa", "evt_9", "evt_9", "9-9", "6-0-000000aa", 7, None, "0"]):
            await peer.say({"event_id": event_id, "n": number})
        await peer.connection.close(1012, "restart")

    fake.scripts = [first, wait]
    async with session(fake) as client:
        assert [each["n"] for each in await data(client, 7)] == [0, 1, 2, 3, 5, 6, 7]
        assert client.last_event_id == "6-0-000000aa"
        await eventually("it is back", lambda: len(fake.positions) == 2)
    assert fake.positions == ["", "6-0-000000aa"]


async def test_a_position_told_at_the_start_counts_only_where_nothing_is_to_come(fake: FakeGateway) -> None:
    async def lost_at_once(peer: Peer) -> None:
        await peer.say({"type": "connected", "connection_id": "c", "event_id": "9-0-000000aa", "expires_at": None})
        await peer.connection.close(1012)

    fake.scripts = [lost_at_once, wait]
    async with events(fake, last_event_id="3-0-000000aa"):
        await eventually("it is back", lambda: len(fake.positions) == 2)
    async with events(fake):
        fake.scripts = [lost_at_once, wait]
        await eventually("it is back", lambda: len(fake.positions) == 4)
    assert fake.positions == ["3-0-000000aa", "3-0-000000aa", "", "9-0-000000aa"]


async def test_lost_history_is_said_and_the_stream_goes_on_from_there(fake: FakeGateway) -> None:
    async def first(peer: Peer) -> None:
        await peer.say({"type": "error", "code": "history_lost", "reason": "trimmed", "event_id": "8-0-000000aa"})
        await peer.connection.close(1012)

    fake.scripts = [first, wait]
    async with session(fake, last_event_id="3-0-000000aa") as client:
        message = await within(anext(client))
        assert message.is_history_lost
        assert client.last_event_id == "8-0-000000aa"
        await eventually("it is back", lambda: len(fake.positions) == 2)
    assert fake.positions == ["3-0-000000aa", "8-0-000000aa"]


async def test_a_stream_whose_beginning_was_lost_is_read_again(fake: FakeGateway) -> None:
    async def first(peer: Peer) -> None:
        await peer.say({"n": 1}, "6-0-000000aa")
        await peer.say({"type": "error", "code": "history_lost", "reason": "emptied", "event_id": "9-0-000000aa"})
        await peer.say({"type": "stream_append", "stream": "t", "seq": 2, "text": "lo"}, "9-1-000000aa")
        await wait(peer)

    async def second(peer: Peer) -> None:
        await peer.say({"type": "stream_open", "stream": "t", "meta": {}}, "8-0-000000aa")
        await peer.say({"type": "stream_append", "stream": "t", "seq": 1, "text": "Hel"}, "9-0-000000aa")
        await peer.say({"type": "stream_append", "stream": "t", "seq": 2, "text": "lo"}, "9-1-000000aa")
        await wait(peer)

    fake.scripts = [first, second]
    async with session(fake) as client:
        await data(client, 5)
        assert (client.streams["t"].text, client.streams["t"].complete) == ("Hello", True)
    assert fake.positions == ["", "0"]


async def test_refusals_that_pass_are_tried_again_after_the_time_asked_for(fake: FakeGateway) -> None:
    fake.scripts, fake.retry_after = [503, 429, wait], "1"
    begun = time.monotonic()
    async with session(fake) as client:
        await eventually("it is open", lambda: client.state == "open")
    assert 2 <= time.monotonic() - begun < 10


@pytest.mark.parametrize("status", [400, 404, 426, 403])
async def test_refusals_that_stay_are_errors(fake: FakeGateway, status: int) -> None:
    fake.scripts = [status] * 5
    async with session(fake) as client:
        for _ in range(2):
            with pytest.raises(Refused) as raised:
                await within(anext(client))
            assert (raised.value.status, raised.value.code) == (status, "a_code")
        with pytest.raises(Refused):
            await client.send({})
    assert len(fake.tokens) == 1


@pytest.mark.parametrize("code", [1007, 1008, 1009, 4001])
async def test_closes_that_stay_are_errors_behind_all_messages(fake: FakeGateway, code: int) -> None:
    async def first(peer: Peer) -> None:
        for number in range(1500):
            await peer.say({"n": number})
        await peer.connection.close(code, "why")

    fake.scripts = [first]
    async with session(fake) as client:
        assert [each["n"] for each in await data(client, 1500)] == list(range(1500))
        with pytest.raises(ConnectionClosed) as raised:
            await within(anext(client))
        assert (raised.value.code, raised.value.reason) == (code, "why")


@pytest.mark.parametrize("code", [3000, 4003, 4004, 4100])
async def test_a_worker_ends_the_iteration_with_a_code_of_its_own(fake: FakeGateway, code: int) -> None:
    async def first(peer: Peer) -> None:
        await peer.connection.close(code, "bye")

    fake.scripts = [first]
    async with session(fake) as client:
        assert [message async for message in client] == []
        assert client.closed == (code, "bye")


async def test_a_client_gives_up_when_it_was_told_to() -> None:
    states: list[str] = []
    unreachable = connect_session(
        "http://127.0.0.1:1", "demo", "s-1", token="t", give_up_after=0.5, on_state=states.append, proxy=None
    )
    async with unreachable as client:
        with pytest.raises(Unavailable):
            await client.send({}, timeout=0.1)
        with pytest.raises(Unavailable):
            await within(anext(client))
    assert states[-1] == "closed"
    assert "waiting" in states


async def test_pings_are_answered_and_silence_is_noticed(fake: FakeGateway) -> None:
    heard: list[Any] = []

    async def first(peer: Peer) -> None:
        hello = {
            "type": "connected",
            "connection_id": "c-1",
            "event_id": "1-0-000000aa",
            "heartbeat": {"interval": 0.2, "timeout": 0.3},
        }
        await peer.say(hello | {"expires_at": None})
        await peer.say({"type": "ping", "timestamp": "now"})
        heard.append(await peer.hear())
        await wait(peer)

    fake.scripts = [first, wait]
    async with events(fake) as client:
        await eventually("it came back after the silence", lambda: len(fake.positions) == 2)
        assert client.connection_id == "c-1"
    assert heard == [{"type": "pong"}]


async def test_a_message_is_acknowledged_when_it_is_done(fake: FakeGateway) -> None:
    heard: list[Any] = []
    done = asyncio.Event()

    async def first(peer: Peer) -> None:
        await peer.say({"type": "a", "ack": True}, "2-0-000000aa")
        # Again, since no acknowledgement came: the loop is not done with it.
        await peer.say({"type": "a", "ack": True}, "2-0-000000aa")
        await peer.say({"type": "b", "event_id": "own", "ack": True}, "3-0-000000aa")
        heard.append(await peer.hear())
        await peer.say({"type": "a", "ack": True}, "2-0-000000aa")
        heard.extend([await peer.hear(), await peer.hear()])
        done.set()
        await wait(peer)

    fake.scripts = [first]
    async with events(fake) as client:
        assert (await within(anext(client))).type == "a"
        assert heard == []
        assert (await within(anext(client))).type == "b"
        await eventually("the first is acknowledged", lambda: heard)
        following = asyncio.ensure_future(anext(client))
        await within(done.wait())
        following.cancel()
    assert heard[0] == {"type": "ack", "event_id": "2-0-000000aa"}
    assert sorted(each["event_id"] for each in heard[1:]) == ["2-0-000000aa", "own"]


async def test_a_token_is_renewed_before_it_ends(fake: FakeGateway) -> None:
    heard: list[Any] = []

    async def first(peer: Peer) -> None:
        hello = {"type": "connected", "connection_id": "c-1", "event_id": "1-0-000000aa"}
        await peer.say(hello | {"expires_at": time.time() + 2.5})
        heard.append(await peer.hear())
        await peer.say({"type": "refreshed", "expires_at": time.time() + 2.5})
        heard.append(await peer.hear())
        await peer.say({"type": "done"})
        await peer.connection.close(4401, "expired")

    fake.scripts = [first, wait]
    tokens = iter(range(10))
    async with events(fake, token=lambda: f"token-{next(tokens)}", refresh_ahead=0.8) as client:
        assert (await within(anext(client))).type == "done"
        await eventually("it is back with a new token", lambda: len(fake.tokens) == 2)
    assert heard == [{"type": "refresh", "token": "token-1"}, {"type": "refresh", "token": "token-2"}]
    assert fake.tokens == ["token-0", "token-3"]


async def test_what_is_sent_waits_for_the_connection(fake: FakeGateway) -> None:
    heard: list[Any] = []

    async def first(peer: Peer) -> None:
        heard.append(await peer.hear())
        await wait(peer)

    fake.scripts = [503, first]
    async with session(fake) as client:
        await client.send({"type": "prompt"})
        await eventually("it is heard", lambda: heard)
    assert heard == [{"type": "prompt"}]
    with pytest.raises(Unavailable):
        await client.send({})


@pytest.mark.parametrize("connect", [session, events])
@pytest.mark.parametrize("has_history", [True, False], ids=["with positions", "without"])
async def test_workers_may_use_the_gateways_words(
    fake: FakeGateway, has_history: bool, connect: Callable[..., Client]
) -> None:
    fake.has_history = has_history
    is_events = connect is events
    first_words = {"type": "connected", "connection_id": "c-1", "expires_at": None}
    if not is_events:
        first_words = {"type": "opened", "connection_id": "c-1", "event_id": "1-0-000000aa"}
    mine = [
        {"type": "opened", "n": 1},
        {"type": "opened", "connection_id": "x", "event_id": "mine"},
        {"type": "connected", "connection_id": "x", "peer": "y"},
        {"type": "resumed", "count": 7},
        {"type": "resumed", "count": 7, "last_event_id": "mine"},
        {"type": "refreshed", "expires_at": 7},
        {"type": "pong", "n": 1},
        {"type": "ping", "n": 1},
        *([] if is_events else [{"type": "ping"}, {"type": "pong"}, {"type": "pong", "timestamp": "t"}]),
        {"type": "ack"},
        {"type": "close"},
    ]

    async def first(peer: Peer) -> None:
        await peer.say(first_words)
        for history in (True, False):
            for number, each in enumerate(mine):
                await peer.say(each, f"5-{number}-000000aa" if history else "")
        await wait(peer)

    fake.scripts = [first]
    async with connect(fake) as client:
        assert await data(client, 2 * len(mine)) == mine + mine
        assert client.connection_id == "c-1"


async def test_a_worker_may_say_what_the_gateway_says_of_a_loss(fake: FakeGateway) -> None:
    mine = {"type": "error", "code": "history_lost", "event_id": "evt_9"}
    theirs = {"type": "error", "code": "history_lost", "reason": "trimmed", "event_id": "8-0-000000aa"}

    async def first(peer: Peer) -> None:
        await peer.say(mine, "7-0-000000aa")
        await peer.connection.close(1012)

    async def second(peer: Peer) -> None:
        await peer.say(theirs, "8-0-000000aa")
        await peer.connection.close(1012)

    fake.scripts = [first, second, wait]
    async with session(fake) as client:
        assert await data(client, 2) == [mine, theirs]
        assert client.last_event_id == "8-0-000000aa"
        await eventually("it is back", lambda: len(fake.positions) == 3)
    assert fake.positions == ["", "7-0-000000aa", "8-0-000000aa"]
