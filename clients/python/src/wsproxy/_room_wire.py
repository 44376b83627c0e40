"""Messages on the channel of a room as gateways publish them, and the records of members. Knows no transport."""

from __future__ import annotations

import json

from ._envelope import kind_of, peek, read
from .types import RoomEvent, RoomJoin, RoomLeave, RoomMember, RoomMessage, UpstreamMessage

_MAGIC = b"\xffR\x01"
# Behind the kind: server and connection of 8 bytes each, and the flags.
_HEAD_BYTES = len(_MAGIC) + 1 + 17
# Of no instance and no connection.
ORIGIN = bytes(17)


def is_reserved(payload: bytes) -> bool:
    """Returns true for what gateways would take for a message of another gateway."""
    return payload[:1] == _MAGIC[:1]


def kick(client: str, reason: str) -> bytes:
    """The message that ends a member's connection, wherever it is."""
    return _MAGIC + b"K" + ORIGIN + f"{client} {reason}".encode()


def close(reason: str) -> bytes:
    """The message that ends the connections of all members."""
    return _MAGIC + b"C" + ORIGIN + reason.encode()


def connection_of(record: bytes) -> bytes:
    """The connection in a member's record, as it is written there."""
    return record.partition(b" ")[0]


def member(client: bytes, record: bytes) -> RoomMember | None:
    """The member of a record ``<connection> <user> <json>``; ``None`` where no gateway wrote it."""
    try:
        connection, user, text = record.decode().split(" ", 2)
        words = json.loads(text)
        if not (connection and user):
            return None
        return RoomMember(client.decode(), user, words.get("name"), str(words["server"]), str(words["since"]))
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def event(message: UpstreamMessage) -> RoomEvent | None:
    """The event in a message of a room's channel; ``None`` for what is between gateways only."""
    payload = message.data
    if not is_reserved(payload):
        return _of_worker(payload)
    if payload[: len(_MAGIC)] != _MAGIC or len(payload) < _HEAD_BYTES:
        return None
    kind, flags, body = payload[3:4], payload[_HEAD_BYTES - 1], payload[_HEAD_BYTES:]
    match kind:
        case b"M" | b"B":
            return RoomMessage("", "opaque", body) if flags else _of_instance(body)
        case b"J":
            _, _, rest = body.partition(b" ")
            client, _, record = rest.partition(b" ")
            joined = member(client, record)
            return RoomJoin(joined) if joined is not None else None
        case b"L":
            return RoomLeave(body.partition(b" ")[2].decode(errors="replace"))
    return None


def _of_instance(envelope: bytes) -> RoomMessage:
    kind, sender = peek(envelope) or ("opaque", "")
    return RoomMessage(sender, kind, envelope)


def _of_worker(payload: bytes) -> RoomMessage:
    found = peek(payload)
    message = read(payload) if found is None else None
    kind = found[0] if found is not None else kind_of(message or {})
    return RoomMessage("", kind or "opaque", payload)
