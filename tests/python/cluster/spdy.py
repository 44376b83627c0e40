"""SPDY/3.1 as a Kubernetes API server speaks it: many streams over one connection. Knows neither sockets nor Kubernetes.

kubectl opens such connections for exec, attach, cp and port-forward: directly after `Upgrade: SPDY/3.1`, or inside the
messages of a WebSocket. Written after the draft of SPDY/3 (draft-mbelshe-httpbis-spdy-00).
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from dataclasses import dataclass, field

SYN_STREAM, SYN_REPLY, RST_STREAM, SETTINGS, PING, GOAWAY, HEADERS, WINDOW_UPDATE = 1, 2, 3, 4, 6, 7, 8, 9
FIN = 1

_NAMES = (
    "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow "
    "authorization cache-control connection content-base content-encoding content-language content-length "
    "content-location content-md5 content-range content-type date etag expect expires from host if-match "
    "if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma "
    "proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade "
    "user-agent vary via warning www-authenticate method get status"
).split() + ["200 OK", "version", "HTTP/1.1", "url", "public", "set-cookie", "keep-alive", "origin"]
_TEXT = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 "
    "Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 "
    "Not Found500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept "
    "Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,"
    "application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset="
    "utf-8charset=iso-8859-1,utf-,*,enq=0."
)
# Both ends compress headers with this dictionary, which must be exact (section 2.6.10.1 of the draft).
DICTIONARY = b"".join(struct.pack(">I", len(name)) + name.encode() for name in _NAMES) + _TEXT.encode()
assert zlib.adler32(DICTIONARY) == 0xE3C6A7C2, "the dictionary is not that of SPDY/3"


@dataclass
class Opened:
    """The client opened a stream."""

    stream: int
    headers: dict[str, str]


@dataclass
class Data:
    """Bytes of a stream; with `end` the client sends no more."""

    stream: int
    data: bytes
    end: bool


@dataclass
class Reset:
    """The client gave a stream up."""

    stream: int


@dataclass
class Connection:
    """The server's end of one connection. `receive` takes bytes, `output` holds bytes to send."""

    output: bytearray = field(default_factory=bytearray)
    _input: bytearray = field(default_factory=bytearray)
    _inflate: zlib._Decompress = field(default_factory=lambda: zlib.decompressobj(zdict=DICTIONARY))
    _deflate: zlib._Compress = field(default_factory=lambda: zlib.compressobj(zdict=DICTIONARY))

    def receive(self, data: bytes) -> list[Opened | Data | Reset]:
        """Returns the events that the bytes complete."""
        self._input += data
        events: deque[Opened | Data | Reset] = deque()
        while len(self._input) >= 8:
            first, second = struct.unpack_from(">II", self._input)
            flags, length = second >> 24, second & 0xFFFFFF
            if len(self._input) < 8 + length:
                break
            payload = bytes(self._input[8 : 8 + length])
            del self._input[: 8 + length]
            if first >> 31:
                self._control(first & 0xFFFF, flags, payload, events)
            else:
                events.append(Data(first, payload, bool(flags & FIN)))
        return list(events)

    def _control(self, kind: int, flags: int, payload: bytes, events: deque) -> None:
        if kind == SYN_STREAM:
            stream = struct.unpack_from(">I", payload)[0] & 0x7FFFFFFF
            events.append(Opened(stream, self._read_headers(payload[10:])))
            if flags & FIN:
                events.append(Data(stream, b"", True))
        elif kind == HEADERS:
            self._read_headers(payload[4:])
        elif kind == RST_STREAM:
            events.append(Reset(struct.unpack_from(">I", payload)[0] & 0x7FFFFFFF))
        elif kind == PING:
            self._put(PING, 0, payload)

    def _read_headers(self, block: bytes) -> dict[str, str]:
        plain = self._inflate.decompress(block)
        count, at, parts = struct.unpack_from(">I", plain)[0], 4, []
        for _ in range(2 * count):
            length = struct.unpack_from(">I", plain, at)[0]
            parts.append(plain[at + 4 : at + 4 + length].decode())
            at += 4 + length
        return {name.lower(): value for name, value in zip(parts[::2], parts[1::2], strict=True)}

    def accept(self, stream: int) -> None:
        """Answers a stream that the client opened."""
        block = self._deflate.compress(struct.pack(">I", 0)) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        self._put(SYN_REPLY, 0, struct.pack(">I", stream) + block)

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Sends bytes of a stream; with `end` no more will come."""
        self.output += struct.pack(">II", stream, (FIN if end else 0) << 24 | len(data)) + data

    def _put(self, kind: int, flags: int, payload: bytes) -> None:
        self.output += struct.pack(">HHI", 0x8003, kind, flags << 24 | len(payload)) + payload
