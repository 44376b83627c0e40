"""Messages of rooms as plain values: protobuf of ``spec/rooms/v1/rooms.proto`` to its JSON form. Knows no transport."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

Fields: TypeAlias = dict[int, tuple[str, str]]
"""Fields of a message by their numbers: name in JSON, and type. ``*`` marks a list, ``@`` a map from strings."""

ENVELOPE: Fields = {
    1: ("messageId", "string"),
    2: ("timestamp", "int64"),
    3: ("type", "MessageType"),
    10: ("clientHello", "ClientHello"),
    11: ("serverHello", "ServerHello"),
    20: ("positionUpdate", "PositionUpdate"),
    30: ("entitySpawn", "EntitySpawn"),
    31: ("entityUpdate", "EntityUpdate"),
    32: ("entityDespawn", "EntityDespawn"),
    40: ("chatMessage", "ChatMessage"),
    50: ("presenceEvent", "PresenceEvent"),
    60: ("sender", "string"),
    61: ("reliable", "bool"),
    62: ("seq", "uint64"),
    64: ("to", "string"),
    100: ("ack", "Ack"),
    101: ("error", "Error"),
    102: ("positionBatch", "PositionBatch"),
    105: ("custom", "Custom"),
}
MESSAGES: dict[str, Fields] = {
    "Envelope": ENVELOPE,
    "Vector3": {1: ("x", "float"), 2: ("y", "float"), 3: ("z", "float")},
    "Quaternion": {1: ("x", "float"), 2: ("y", "float"), 3: ("z", "float"), 4: ("w", "float")},
    "ClientHello": {
        1: ("clientId", "string"),
        2: ("displayName", "string"),
        3: ("authToken", "string"),
        4: ("requestedRoom", "string"),
        60: ("version", "uint32"),
        61: ("features", "*string"),
        62: ("presence", "PresenceData"),
    },
    "ServerHello": {
        1: ("serverVersion", "string"),
        2: ("assignedClientId", "string"),
        3: ("roomId", "string"),
        4: ("initialState", "WorldState"),
        60: ("version", "uint32"),
        61: ("features", "*string"),
        62: ("connectionId", "string"),
        64: ("presenceVersion", "uint64"),
        65: ("limits", "Limits"),
        66: ("more", "bool"),
    },
    "Limits": {
        1: ("messagesPerSecond", "uint32"),
        2: ("messageBytesMax", "uint32"),
        3: ("entitiesMax", "uint32"),
        4: ("entityBytesMax", "uint32"),
        5: ("membersMax", "uint32"),
        6: ("tickMs", "uint32"),
    },
    "PositionUpdate": {
        1: ("entityId", "string"),
        2: ("position", "Vector3"),
        3: ("rotation", "Quaternion"),
        4: ("sequenceNumber", "uint32"),
    },
    "EntitySpawn": {
        1: ("entityId", "string"),
        2: ("templateId", "string"),
        3: ("ownerId", "string"),
        4: ("components", "@string"),
    },
    "EntityUpdate": {1: ("entityId", "string"), 2: ("components", "@bytes")},
    "EntityDespawn": {1: ("entityId", "string")},
    "ChatMessage": {
        1: ("fromClientId", "string"),
        2: ("message", "string"),
        3: ("timestamp", "int64"),
        4: ("type", "ChatMessage.Type"),
    },
    "PresenceEvent": {
        1: ("clientId", "string"),
        2: ("eventType", "PresenceEvent.Type"),
        3: ("data", "PresenceData"),
    },
    "PresenceData": {
        1: ("displayName", "string"),
        2: ("avatarUrl", "string"),
        3: ("position", "Vector3"),
        4: ("rotation", "Quaternion"),
        5: ("avatarConfig", "AvatarConfig"),
        6: ("hostClientId", "string"),
    },
    "AvatarConfig": {
        1: ("bodyType", "string"),
        2: ("primaryColor", "string"),
        3: ("secondaryColor", "string"),
        4: ("height", "float"),
        5: ("customModelUrl", "string"),
    },
    "WorldState": {
        1: ("entities", "*EntitySnapshot"),
        2: ("players", "*PlayerSnapshot"),
        3: ("lastUpdate", "int64"),
    },
    "EntitySnapshot": {
        1: ("id", "string"),
        2: ("templateId", "string"),
        3: ("position", "Vector3"),
        4: ("rotation", "Quaternion"),
        5: ("components", "@string"),
        60: ("ownerId", "string"),
        61: ("binaryComponents", "@bytes"),
    },
    "PlayerSnapshot": {
        1: ("clientId", "string"),
        2: ("displayName", "string"),
        3: ("avatarUrl", "string"),
        4: ("position", "Vector3"),
        5: ("rotation", "Quaternion"),
        6: ("avatarConfig", "AvatarConfig"),
    },
    "PositionBatch": {1: ("entries", "*PositionBatch.Entry"), 2: ("timestamp", "int64")},
    "PositionBatch.Entry": {1: ("sender", "string"), 2: ("update", "PositionUpdate")},
    "Ack": {1: ("seq", "uint64"), 2: ("more", "*uint64")},
    "Error": {
        1: ("code", "string"),
        2: ("message", "string"),
        3: ("retryAfterMs", "uint32"),
        4: ("messageId", "string"),
    },
    "Custom": {1: ("name", "string"), 2: ("data", "bytes")},
}
ENUMS: dict[str, dict[int, str]] = {
    "MessageType": {
        0: "UNKNOWN",
        1: "CLIENT_HELLO",
        2: "SERVER_HELLO",
        10: "POSITION_UPDATE",
        11: "VOICE_DATA",
        20: "ENTITY_SPAWN",
        21: "ENTITY_UPDATE",
        22: "ENTITY_DESPAWN",
        30: "CHAT_MESSAGE",
        40: "PRESENCE_JOIN",
        41: "PRESENCE_LEAVE",
        42: "PRESENCE_UPDATE",
    },
    "ChatMessage.Type": {0: "NORMAL", 1: "WHISPER", 2: "SHOUT"},
    "PresenceEvent.Type": {0: "JOIN", 1: "LEAVE", 2: "UPDATE"},
}


def _snake(name: str) -> str:
    return "".join(f"_{each.lower()}" if each.isupper() else each for each in name)


PAYLOADS: dict[str, str] = {
    name: _snake(name) for name, type_ in ENVELOPE.values() if type_ in MESSAGES and type_ != "Envelope"
}
"""Members of the envelope of which a message has one, with the names of their kinds."""

_PAYLOAD_FIELDS = frozenset(number for number, (name, _) in ENVELOPE.items() if name in PAYLOADS)
_SENDER = 60
_TO = b"\x82\x04"
Wire: TypeAlias = Literal[0, 1, 2, 5]
_ZERO: dict[str, Any] = {"string": "", "bytes": "", "bool": False, "float": 0.0}
# Numbers of which a list may be one field.
_PACKED = frozenset(["uint32", "uint64", "int64"])
_WIRES: dict[str, Wire] = {"string": 2, "bytes": 2, "float": 5}


class Malformed(ValueError):
    """The bytes are no envelope."""


def decode(data: bytes) -> dict[str, Any]:
    """Returns the JSON form of an envelope; raises :class:`Malformed` where there is none.

    Fields that are unknown are left out.
    """
    message = _message("Envelope", data)
    if kind_of(message) is None:
        raise Malformed("has no payload")
    return message


def peek(data: bytes) -> tuple[str, str] | None:
    """Returns kind and sender of an envelope in protobuf; ``None`` where there is none. Reads no payload."""
    payload, sender = 0, b""
    try:
        for number, wire, value in _fields(data):
            if number in _PAYLOAD_FIELDS and wire == 2:
                payload = number
            elif number == _SENDER and wire == 2:
                sender = value
    except Malformed:
        return None
    return (PAYLOADS[ENVELOPE[payload][0]], sender.decode(errors="replace")) if payload else None


def read(data: bytes) -> dict[str, Any] | None:
    """Returns the JSON form of an envelope in protobuf or JSON; ``None`` where there is none."""
    try:
        return decode(data)
    except Malformed:
        pass
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or kind_of(message) is None:
        return None
    names = {field: name for name, field in PAYLOADS.items()}
    return {names.get(str(member), str(member)): value for member, value in message.items()}


def kind_of(message: dict[str, Any]) -> str | None:
    """Returns the kind of a message in its JSON form, such as ``chat_message``; ``None`` where it has not one payload.

    JSON may name a member as the field is named, too.
    """
    kinds = [
        kind
        for name, kind in PAYLOADS.items()
        if message.get(name) is not None or (name != kind and message.get(kind) is not None)
    ]
    return kinds[0] if len(kinds) == 1 else None


def addressed(envelope: bytes, client: str) -> bytes:
    """Returns an envelope that is for one client: in every decoder the last value of a field counts."""
    to = client.encode()
    return envelope + _TO + _varint(len(to)) + to


def _varint(number: int) -> bytes:
    return bytes([number]) if number < 0x80 else bytes([number & 0x7F | 0x80]) + _varint(number >> 7)


def _message(name: str, data: bytes) -> dict[str, Any]:
    fields, found = MESSAGES[name], dict[str, Any]()
    for number, wire, value in _fields(data):
        if number not in fields:
            continue
        if name == "Envelope" and number in _PAYLOAD_FIELDS:
            # Of a oneof the last member counts.
            for other in PAYLOADS.keys() - {fields[number][0]}:
                found.pop(other, None)
        _take(found, *fields[number], wire, value)
    return found


def _take(found: dict[str, Any], name: str, type_: str, wire: int, value: Any) -> None:
    if type_[0] == "@":
        key, of_key = _map_entry(type_[1:], _expect(wire, 2, value))
        found.setdefault(name, {})[key] = of_key
    elif type_[0] == "*" and wire == 2 and type_[1:] in _PACKED:
        at = 0
        while at < len(value):
            number, at = _read_varint(value, at)
            found.setdefault(name, []).append(_scalar(type_[1:], 0, number))
    elif type_[0] == "*":
        found.setdefault(name, []).append(_value(type_[1:], wire, value))
    elif type_ in MESSAGES:
        _merge(found.setdefault(name, {}), _value(type_, wire, value))
    else:
        scalar = _scalar(type_, wire, value)
        # A field that has its zero is as one that is absent.
        if scalar == _zero(type_) and str(scalar) != "-0.0":
            found.pop(name, None)
        else:
            found[name] = scalar


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict) and name in into:
            _merge(into[name], value)
        elif isinstance(value, list) and name in into:
            into[name] += value
        else:
            into[name] = value


def _value(type_: str, wire: int, value: Any) -> Any:
    return _message(type_, _expect(wire, 2, value)) if type_ in MESSAGES else _scalar(type_, wire, value)


def _map_entry(type_: str, data: bytes) -> tuple[str, Any]:
    key, of_key = "", _zero(type_)
    for number, wire, value in _fields(data):
        if number == 1:
            key = _scalar("string", wire, value)
        elif number == 2:
            of_key = _scalar(type_, wire, value)
    return key, of_key


def _scalar(type_: str, wire: int, value: Any) -> Any:
    value = _expect(wire, _WIRES.get(type_, 0), value)
    match type_:
        case "string":
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise Malformed("has a text that is no UTF-8") from error
        case "bytes":
            return base64.b64encode(value).decode()
        case "bool":
            return value != 0
        case "float":
            return _shortest(struct.unpack("<f", value)[0])
        case "uint32":
            return value & 0xFFFFFFFF
        case "uint64":
            return str(value)
        case "int64":
            return str(value - (1 << 64) if value >> 63 else value)
    number = value & 0xFFFFFFFF
    number -= 1 << 32 if number >> 31 else 0
    return ENUMS[type_].get(number, number)


def _zero(type_: str) -> Any:
    if type_ in ENUMS:
        return ENUMS[type_][0]
    return _ZERO.get(type_, "0" if type_.endswith("64") else 0)


def _expect(wire: int, expected: int, value: Any) -> Any:
    if wire != expected:
        raise Malformed("has a field of another type")
    return value


def _shortest(number: float) -> float | str:
    """Returns the shortest number that is the same one in 32 bits, as encoders of JSON write it."""
    if number != number or number in (float("inf"), float("-inf")):
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(number)]
    packed = struct.pack("<f", number)
    for digits in range(6, 10):
        short = float(f"{number:.{digits}g}")
        try:
            if struct.pack("<f", short) == packed:
                return short
        except OverflowError:
            # Rounded up beyond the largest number.
            continue
    return number


def _fields(data: bytes) -> Iterator[tuple[int, int, Any]]:
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, wire = tag >> 3, tag & 7
        if number == 0 or tag >> 32:
            raise Malformed("has a field without a number")
        if wire == 0:
            value, at = _read_varint(data, at)
            yield number, wire, value
            continue
        if wire == 2:
            size, at = _read_varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise Malformed("has a group")
        if at + size > len(data):
            raise Malformed("is cut off")
        yield number, wire, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte, at = data[at], at + 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & 0xFFFFFFFFFFFFFFFF, at
    raise Malformed("is cut off")
