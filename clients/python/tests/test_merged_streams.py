"""Token streams put together from messages."""

from __future__ import annotations

from typing import Any

from wsproxy.client import MergedStreams


def opened(meta: Any = None) -> dict[str, Any]:
    return {"type": "stream_open", "stream": "t", "meta": meta}


def append(seq: int, text: str) -> dict[str, Any]:
    return {"type": "stream_append", "stream": "t", "seq": seq, "text": text}


def ended(outcome: str, seq: int) -> dict[str, Any]:
    return {"type": "stream_end", "stream": "t", "outcome": outcome, "seq": seq}


def test_appends_are_one_text() -> None:
    streams = MergedStreams()
    for message in [opened({"model": "m"}), append(1, "Hel"), append(2, "lo"), ended("finish", 2)]:
        assert streams.feed(message) is streams["t"]
    stream = streams["t"]
    assert (stream.text, stream.state, stream.meta, stream.complete, stream.ended) == (
        "Hello",
        "finish",
        {"model": "m"},
        True,
        True,
    )


def test_a_snapshot_replaces_and_what_it_had_is_not_taken_twice() -> None:
    streams = MergedStreams()
    streams.feed(append(7, "lost before"))
    assert not streams["t"].complete
    streams.feed({"type": "stream_snapshot", "stream": "t", "state": "open", "seq": 9, "text": "all of it"})
    for message in [append(8, "x"), append(9, "y"), append(10, "!")]:
        streams.feed(message)
    assert streams["t"].text == "all of it!"
    assert streams["t"].complete


def test_a_gap_is_seen() -> None:
    streams = MergedStreams()
    for message in [opened(), append(1, "a"), append(3, "c")]:
        streams.feed(message)
    assert streams["t"].text == "ac"
    assert not streams["t"].complete
    streams.feed(opened())
    for message in [append(1, "a"), ended("finish", 2)]:
        streams.feed(message)
    assert not streams["t"].complete


def test_other_messages_are_none_of_it_and_streams_are_bounded() -> None:
    streams = MergedStreams()
    assert streams.feed({"type": "token", "stream": "t"}) is None
    assert streams.feed({"type": "stream_other", "stream": "t"}) is None
    for number in range(100):
        streams.feed({"type": "stream_open", "stream": f"s-{number}"})
    assert len(streams) == 64
    assert "s-99" in streams
