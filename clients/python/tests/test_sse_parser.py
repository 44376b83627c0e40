"""The parser of server-sent events."""

from __future__ import annotations

import random

import httpx
import pytest

from wsproxy._sse import Parser
from wsproxy.client._sse import SseTransport
from wsproxy.client._transport import Frame

STREAM = (
    b"id: 1-0\n\n:\n\nretry: 50\r\n\r\nid: 2-0\ndata: a\ndata:b\r\ndata\n\nevent: close\r"
    b'data: {"code":1012}\r\rdata: \xc3\xa4\xf0\x9f\x98\x80\n\ndata: unfinished'
)


def test_events_are_the_same_however_the_network_cuts_them() -> None:
    whole = Parser().feed(STREAM)
    assert [(each.event, each.data, each.last_event_id, each.own_id) for each in whole] == [
        ("message", None, "1-0", True),
        ("message", None, "1-0", False),
        ("message", "a\nb\n", "2-0", True),
        ("close", '{"code":1012}', "2-0", False),
        ("message", "ä😀", "2-0", False),
    ]
    assert whole[1].retry == 50
    dice = random.Random(3)
    for _ in range(300):
        parser, rest, events = Parser(), STREAM, []
        while rest:
            size = dice.randint(1, 9)
            events += parser.feed(rest[:size])
            rest = rest[size:]
        assert events == whole


def test_an_event_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="larger"):
        Parser(bytes_max=100).feed(b"data: " + b"x" * 200)
    parser = Parser(bytes_max=100)
    for _ in range(20):
        parser.feed(b"data: 12345\n")
    with pytest.raises(ValueError, match="larger"):
        parser.feed(b"data: 12345\n")


@pytest.mark.asyncio
@pytest.mark.parametrize("rest", ['event: position\ndata: {"type":"position","event_id":"7-0-aa"}\n\n', "\n"])
async def test_a_position_without_a_message_is_no_message(rest: str) -> None:
    # The second form is that of earlier gateways.
    block = f"id: 7-0-aa\n{rest}"
    stream = f"retry: 900\n{block}:\nid: 8-0-aa\ndata: 1\n\n:\ndata: 2\n\n"
    headers = {"Content-Type": "text/event-stream"}
    answer = httpx.MockTransport(lambda _: httpx.Response(200, content=stream, headers=headers))
    transport = SseTransport("http://gateway.test", "/demo/ws/s-1", {"transport": answer})
    connection = await transport.open("token", "")
    frames = [await connection.receive() for _ in range(3)]
    assert frames == [Frame(None, "7-0-aa"), Frame("1", "8-0-aa"), Frame("2", "")]
    await transport.aclose()
