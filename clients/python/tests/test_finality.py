"""When a client gives up: every row of spec/finality.json, and what the rule means for a running client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from conftest import API_KEY, ROOT, SECRET, Gateway, RedisServer, eventually, within
from wsproxy import GiveUp, InvalidRequest, Refused, Unavailable, Worker
from wsproxy.client import Client, connect_events, connect_session
from wsproxy.client._advice import ADVICE_OF_POLICY, POLICY, RETRY_AFTER_MAX, after_close, after_refusal
from wsproxy.client._transport import not_opened

RULE: dict[str, Any] = json.loads((ROOT / "spec/finality.json").read_text())
Row = dict[str, Any]


def named(section: str) -> list[Any]:
    return [pytest.param(row, id=row["name"]) for row in RULE[section]]


@pytest.mark.parametrize("row", named("handshakes"))
def test_an_answer_that_opens_nothing_is_read_as_the_table_says(row: Row) -> None:
    error = not_opened(row["status"], row["body"].encode(), None)
    assert after_refusal(error.status, error.code, error.retryable) == row["advice"]


@pytest.mark.parametrize("row", named("closes"))
def test_a_close_is_read_as_the_table_says(row: Row) -> None:
    assert after_close(row["code"], row["reason"]) == row["advice"]


@pytest.mark.parametrize("row", named("other_codes"))
def test_a_close_code_of_no_row_is_read_as_its_range_says(row: Row) -> None:
    others = set(range(row["from"], row["to"] + 1)) - {close["code"] for close in RULE["closes"]}
    assert {after_close(code, "") for code in others} == {row["advice"]}


def test_reasons_that_mean_something_are_the_gateways() -> None:
    rows = [row for row in RULE["closes"] if row["code"] == POLICY and row["by"] == "gateway"]
    assert {row["reason"]: row["advice"] for row in rows if row["advice"] != "final"} == ADVICE_OF_POLICY


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("7", 7),
        (" 7 ", 7),
        ("-7", 0),
        ("soon", 0),
        ("Sat, 28 Nov 2026 17:00:00 GMT", 0),
        ("9" * 30, 300),
    ],
)
def test_the_time_that_an_answer_asks_for_is_bounded(header: str | None, seconds: float) -> None:
    assert RULE["retry_after_seconds_max"] == RETRY_AFTER_MAX
    assert not_opened(503, b"", header).retry_after == seconds


class Answers:
    """A server that answers every request with a row of the table."""

    def __init__(self, row: Row, content_type: str = "") -> None:
        self._row = row
        self._content_type = content_type or row.get("content_type", "application/json")
        self.asked = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        self.asked += 1
        body = self._row["body"].encode()
        head = f"HTTP/1.1 {self._row['status']} x\r\nContent-Type: {self._content_type}\r\nConnection: close\r\n"
        writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()


def session(url: str, **options: Any) -> Client:
    # Without certificates, which take long to load.
    more = {"verify": False} if options.get("transport") == "sse" else {"proxy": None}
    return connect_session(url, "demo", "s-1", **{"token": lambda: "t", **more, **options})


async def gives_up(row: Row, transport: str) -> str:
    """Returns the deviation of a client from a row; empty where there is none."""
    answers = Answers(row)
    async with answers.running() as url, session(url, transport=transport, give_up_after=2.0) as client:
        error = await raised(client)
    if row["advice"] == "final":
        is_right = isinstance(error, Refused) and error.status == row["status"] and error.code and answers.asked == 1
    else:
        # One that is refused as `slow` pauses for some seconds.
        is_right = isinstance(error, Unavailable) and answers.asked >= (1 if row["advice"] == "slow" else 2)
    return "" if is_right else f"{row['name']}: {error!r} after {answers.asked} tries"


@pytest.mark.parametrize("transport", ["websocket", "sse"])
@pytest.mark.asyncio
async def test_a_client_gives_up_only_where_the_table_says_so(transport: str) -> None:
    rows = [row for row in RULE["handshakes"] if row["status"] >= 200]
    wrong = await asyncio.gather(*(gives_up(row, transport) for row in rows))
    assert list(filter(None, wrong)) == []


async def raised(client: Client) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        await within(anext(client))
    return caught.value


INVALID = next(row for row in RULE["handshakes"] if row["name"] == "invalid_token")


@pytest.mark.asyncio
async def test_a_refused_token_is_final_only_where_it_is_fixed() -> None:
    answers = Answers(INVALID)
    async with answers.running() as url:
        async with session(url, token="fixed") as client:
            error = await raised(client)
            assert isinstance(error, Refused)
            assert (error.status, error.code, answers.asked) == (403, "invalid_token", 1)
        async with session(url) as client:
            await eventually("it tried more than three times", lambda: answers.asked > 5)
            assert client.state != "closed"


class OtherLibrary(Exception):
    pass


def html() -> str:
    return str(json.loads("<html><h1>502 Bad Gateway</h1></html>")["token"])


def problem() -> str:
    return str(json.loads('{"detail":"try later"}')["token"])


def other() -> str:
    raise OtherLibrary("503")


def cancelled() -> str:
    raise asyncio.CancelledError


def nothing() -> Any:
    return None


@pytest.mark.parametrize("stumble", [html, problem, other, cancelled, nothing, lambda: "", lambda: {"token": "t"}])
@pytest.mark.asyncio
async def test_a_token_function_that_stumbles_is_asked_again(
    stumble: Callable[[], Any], redis_worker: Worker, gateway: Gateway
) -> None:
    answers: Iterator[Callable[[], Any]] = iter([stumble, stumble])

    async def token() -> Any:
        fails = next(answers, None)
        return fails() if fails is not None else await redis_worker.issue_token("demo", "s-1")

    async with session(gateway.url, token=token) as client:
        await eventually("it is open", lambda: client.state == "open")


@pytest.mark.asyncio
async def test_a_token_function_may_say_that_there_will_be_no_token() -> None:
    asked = 0

    def signed_out() -> str:
        nonlocal asked
        asked += 1
        raise GiveUp("signed out")

    async with session("http://127.0.0.1:1", token=signed_out) as client:
        assert isinstance(await raised(client), GiveUp)
        assert isinstance(await raised(client), GiveUp)
        with pytest.raises(GiveUp):
            await client.send({})
    assert asked == 1


@pytest.mark.asyncio
async def test_a_token_function_that_never_answers_does_not_hold_the_time_to_give_up() -> None:
    async def silent() -> str:
        await asyncio.Event().wait()
        return ""

    begun = time.monotonic()
    async with session("http://127.0.0.1:1", token=silent, give_up_after=0.5) as client:
        assert isinstance(await raised(client), Unavailable)
    assert time.monotonic() - begun < 5


@pytest.mark.asyncio
async def test_a_time_that_is_asked_for_does_not_hold_the_time_to_give_up() -> None:
    answers, begun = Answers(next(row for row in RULE["handshakes"] if row["name"] == "full")), time.monotonic()
    async with answers.running() as url, session(url, give_up_after=0.5) as client:
        assert isinstance(await raised(client), Unavailable)
    assert (answers.asked, time.monotonic() - begun < 4) == (1, True)


@pytest.mark.parametrize("token", [None, "", 7, b"t"])
def test_a_fixed_token_that_is_none_is_said_at_once(token: Any) -> None:
    with pytest.raises(InvalidRequest):
        connect_session("http://127.0.0.1:1", "demo", "s-1", token=token, transport="sse")


@pytest.mark.asyncio
async def test_several_clients_of_a_session_come_back_although_their_tokens_replace_each_other(
    redis: RedisServer, redis_worker: Worker, gateway: Gateway
) -> None:
    async def token() -> str:
        issued = await redis_worker.issue_token("demo", "s-1")
        # The answer travels to the browser.
        await asyncio.sleep(0.1)
        return issued.token

    clients = [session(gateway.url, token=token) for _ in range(4)]
    try:
        for client in clients:
            await client.__aenter__()
        await eventually("all are open", lambda: all(each.state == "open" for each in clients))
        gateway.kill()
        await asyncio.to_thread(gateway.start)
        await eventually("none is", lambda: not any(each.state == "closed" for each in clients))
        await eventually("all are back", lambda: all(each.state == "open" for each in clients), 30)
    finally:
        for client in clients:
            await client.aclose()


# ---- tokens that are about to end ----


def jwt(lives: float) -> str:
    import jwt as pyjwt

    return pyjwt.encode({"sub": "u-1", "exp": int(time.time() + lives)}, SECRET, algorithm="HS256")


@pytest.mark.parametrize(
    ("lives", "is_cached", "ahead_of_time"),
    [(12, True, 0.0), (12, False, 0.0), (300, False, 600.0), (300, False, -600.0)],
    ids=["cached", "short", "clock ahead", "clock behind"],
)
@pytest.mark.asyncio
async def test_a_token_is_not_asked_for_in_a_loop(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, lives: float, is_cached: bool, ahead_of_time: float
) -> None:
    real, cached, asked = time.time, jwt(lives), 0

    def token() -> str:
        nonlocal asked
        asked += 1
        with monkeypatch.context() as true_time:
            true_time.setattr(time, "time", real)
            return cached if is_cached else jwt(lives)

    monkeypatch.setattr(time, "time", lambda: real() + ahead_of_time)
    async with connect_events(gateway.url, token=token, proxy=None) as client:
        await eventually("it is open", lambda: client.state == "open")
        await asyncio.sleep(3)
        assert client.state == "open"
    assert asked <= 2


# ---- the worker over HTTP goes by the same form ----


@pytest.mark.parametrize("status", [400, 401, 403, 404, 426, 502, 522])
@pytest.mark.asyncio
async def test_an_answer_that_is_not_the_gateways_ends_no_worker(status: int) -> None:
    answers = Answers({"status": status, "body": "<html>a page</html>"}, "text/html")
    async with answers.running() as url, Worker.http(url, API_KEY, retry_for=0.3) as worker:
        with pytest.raises(Unavailable, match=str(status)) as caught:
            await worker.send("s-1", {})
        assert caught.value.in_doubt == (status >= 500)
        following = asyncio.ensure_future(anext(worker.upstream("s-1")))
        before = answers.asked
        await eventually("it is followed again and again", lambda: answers.asked > before + 2)
        assert not following.done()
        following.cancel()
