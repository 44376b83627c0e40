"""Token streams as one text each, put together from messages. It knows no transport."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Streams that are remembered; the oldest that have ended make room.
_STREAMS_MAX = 64


class MergedStream:
    """One token stream as it stands: ``state`` is ``open``, ``finish``, ``error`` or ``cancelled``.

    ``complete`` is false where text before the end is missing, because history was lost.
    """

    def __init__(self, stream_id: str) -> None:
        """An open stream without text."""
        self.id = stream_id
        self.seq = 0
        self.state = "open"
        self.meta: Any = None
        self.error: Mapping[str, Any] | None = None
        self.complete = True
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All text so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    @property
    def ended(self) -> bool:
        """True where no more text will be added."""
        return self.state != "open"

    def _append(self, seq: int, text: str) -> None:
        # Text of a snapshot comes once more, live.
        if seq <= self.seq:
            return
        self.complete = self.complete and seq == self.seq + 1
        self.seq = seq
        self._parts.append(text)

    def _replace(self, message: Mapping[str, Any]) -> None:
        self.seq, self.state = int(message.get("seq", 0)), str(message.get("state", "open"))
        self._parts = [str(message.get("text", ""))]
        self.meta, self.error, self.complete = message.get("meta"), message.get("error"), True


class MergedStreams(Mapping[str, MergedStream]):
    """The streams of a session by id, oldest first. Feed it every message, in order."""

    def __init__(self) -> None:
        """No streams."""
        self._streams: dict[str, MergedStream] = {}

    def feed(self, message: Mapping[str, Any]) -> MergedStream | None:
        """Takes a message; answers the stream that it changed, ``None`` where it is about none."""
        kind, stream_id = message.get("type"), message.get("stream")
        if kind == "error" and message.get("code") == "history_lost":
            # Until a snapshot, or the stream from its beginning, says otherwise.
            for each in self._streams.values():
                each.complete = each.complete and each.ended
        if not isinstance(kind, str) or not kind.startswith("stream_") or not isinstance(stream_id, str):
            return None
        match kind:
            case "stream_open":
                # Opened again under its id: all of its text comes again, too.
                self._streams.pop(stream_id, None)
                stream = self._stream(stream_id)
                stream.meta = message.get("meta")
            case "stream_append":
                stream = self._stream(stream_id)
                stream._append(int(message.get("seq", 0)), str(message.get("text", "")))
            case "stream_end":
                stream = self._stream(stream_id)
                stream.complete = stream.complete and stream.seq == int(message.get("seq", stream.seq))
                stream.state, stream.error = str(message.get("outcome", "finish")), message.get("error")
            case "stream_snapshot":
                stream = self._stream(stream_id)
                stream._replace(message)
            case _:
                return None
        return stream

    def _stream(self, stream_id: str) -> MergedStream:
        if stream_id not in self._streams:
            if len(self._streams) >= _STREAMS_MAX:
                ended = (each.id for each in self._streams.values() if each.ended)
                self._streams.pop(next(ended, next(iter(self._streams))))
            self._streams[stream_id] = MergedStream(stream_id)
        return self._streams[stream_id]

    def __getitem__(self, stream_id: str) -> MergedStream:
        return self._streams[stream_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._streams)

    def __len__(self) -> int:
        return len(self._streams)
