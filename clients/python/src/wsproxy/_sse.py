"""A parser of server-sent events, which knows the format and nothing of its use."""

from __future__ import annotations

import codecs
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """A block of the stream. ``data`` is ``None`` where the block had none: it then only moves the last id.

    ``own_id`` tells whether the id came with this block or with one before it.
    """

    event: str
    data: str | None
    last_event_id: str
    own_id: bool = False
    retry: int | None = None


class Parser:
    """Takes chunks as they come from the network, and gives whole events.

    An event or line that grows beyond ``bytes_max`` raises :class:`ValueError`: no server may make a client hold more.
    """

    def __init__(self, last_event_id: str = "", bytes_max: int = 64 * 1024 * 1024) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""
        self._skip_newline = False
        self._event = ""
        self._data: list[str] = []
        self._retry: int | None = None
        self._id_seen = False
        self._last_event_id = last_event_id
        self._held = 0
        self._bytes_max = bytes_max

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """The events that are complete now."""
        text = self._decoder.decode(chunk)
        # A CR at the end of a chunk ended a line; the LF behind it in the next chunk is the same line break.
        if self._skip_newline and text:
            text = text.removeprefix("\n")
            self._skip_newline = False
        self._skip_newline = self._skip_newline or text.endswith("\r")
        if not text:
            return []
        # Only the new text is searched for line breaks, so that a long line costs no more than its length.
        if "\r" not in text and "\n" not in text:
            self._rest += text
            self._bound(len(self._rest))
            return []
        lines = (self._rest + text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self._rest = lines.pop()
        self._bound(len(self._rest))
        return [event for line in lines if (event := self._line(line)) is not None]

    def _line(self, line: str) -> ServerSentEvent | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
            self._held += len(value)
            self._bound(self._held)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._last_event_id, self._id_seen = value, True
        elif name == "retry" and value.isascii() and value.isdigit():
            self._retry = int(value)
        return None

    def _dispatch(self) -> ServerSentEvent | None:
        if not (self._data or self._id_seen or self._retry is not None):
            self._event = ""
            return None
        data = "\n".join(self._data) if self._data else None
        event = ServerSentEvent(self._event or "message", data, self._last_event_id, self._id_seen, self._retry)
        self._event, self._data, self._retry, self._id_seen, self._held = "", [], None, False, 0
        return event

    def _bound(self, held: int) -> None:
        if held > self._bytes_max:
            raise ValueError(f"an event is larger than {self._bytes_max} bytes")
