"""Messages of rooms, byte for byte, and the description of them, as this package reads both."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from conftest import ROOT
from wsproxy import RoomEvent, RoomLeave, RoomMessage
from wsproxy._envelope import ENUMS, MESSAGES, Malformed, addressed, decode, kind_of
from wsproxy._room_wire import event
from wsproxy.types import UpstreamMessage

VECTORS = ROOT / "spec/rooms"
CASES = json.loads((VECTORS / "messages.json").read_text())["cases"]
TEXTS = json.loads((VECTORS / "texts.json").read_text())["cases"]
REFUSED = json.loads((VECTORS / "refused.json").read_text())["cases"]


def named(cases: list[Any], *members: str) -> list[Any]:
    return [pytest.param(each, id=each["name"]) for each in cases if all(member in each for member in members)]


def without_type(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "type"}


@pytest.mark.parametrize("case", named(CASES))
def test_each_message_has_its_kind(case: Any) -> None:
    message = decode(bytes.fromhex(case["binary"]))
    assert kind_of(message) == case["kind"]
    assert message.get("messageId", "") == case.get("message_id", "")


@pytest.mark.parametrize("case", named(CASES, "text"))
def test_each_message_is_its_json(case: Any) -> None:
    assert decode(bytes.fromhex(case["binary"])) == case["text"]


@pytest.mark.parametrize("case", named(CASES, "stamped", "stamped_text"))
def test_each_stamped_message_is_its_json(case: Any) -> None:
    assert decode(bytes.fromhex(case["stamped"])) == case["stamped_text"]


@pytest.mark.parametrize("case", named(CASES, "stamped"))
def test_the_stamp_names_the_sender(case: Any) -> None:
    assert decode(bytes.fromhex(case["stamped"]))["sender"] == "alice-1"


@pytest.mark.parametrize("case", named(CASES, "stamped"))
def test_a_message_of_an_instance_is_read_in_part_and_as_a_whole(case: Any) -> None:
    found = event(UpstreamMessage(b"\xffR\x01M" + bytes(17) + bytes.fromhex(case["stamped"])))
    assert isinstance(found, RoomMessage)
    assert (found.sender, found.kind) == ("alice-1", case["kind"])
    assert found.message == decode(found.raw)
    (name,) = [name for name in decode(found.raw) if isinstance(found.message[name], dict)]
    assert found.body == found.message[name]


@pytest.mark.parametrize("case", named(TEXTS))
def test_a_worker_may_write_json_as_it_likes(case: Any) -> None:
    found = event(UpstreamMessage(case["text"].encode()))
    assert isinstance(found, RoomMessage)
    assert (found.sender, found.kind) == ("", kind_of(decode(bytes.fromhex(case["binary"]))))
    assert found.body is not None


@pytest.mark.parametrize("case", named(TEXTS))
def test_each_text_has_the_kind_of_its_bytes(case: Any) -> None:
    assert kind_of(json.loads(case["text"])) == kind_of(decode(bytes.fromhex(case["binary"])))


@pytest.mark.parametrize("case", [each for each in named(REFUSED, "binary") if each.values[0].get("envelope") is False])
def test_what_is_no_envelope_is_none_here(case: Any) -> None:
    with pytest.raises(Malformed):
        decode(bytes.fromhex(case["binary"]))


def test_any_bytes_are_decoded_or_refused() -> None:
    for case in CASES:
        whole = bytes.fromhex(case["binary"])
        for at in range(len(whole)):
            for changed in (whole[:at], whole[:at] + b"\xff" + whole[at + 1 :], whole[:at] + whole[at + 1 :]):
                try:
                    json.dumps(decode(changed))
                except Malformed:
                    continue


@pytest.mark.parametrize("client", ["bob-1", "b" * 128])
def test_an_added_receiver_overrules_another(client: str) -> None:
    envelope = bytes.fromhex(CASES[0]["binary"])
    twice = addressed(addressed(envelope, "alice-1"), client)
    assert decode(twice) == decode(envelope) | {"to": client}


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b"", RoomMessage("", "opaque", b"")),
        (b"\xff", None),
        (b"\xffR\x02M" + bytes(18), None),
        (b"\xffR\x01M" + bytes(16), None),
        (b"\xffR\x01Z" + bytes(17), None),
        (b"\xffR\x01M" + bytes(16) + b"\x02hello", RoomMessage("", "opaque", b"hello")),
        (b"\xffR\x01M" + bytes(17) + b"junk", RoomMessage("", "opaque", b"junk")),
        (b"\xffR\x01J" + bytes(17) + b"7 a nothing", None),
        (b"\xffR\x01L" + bytes(17) + b"7 a", RoomLeave("a")),
        (b"\xffR\x01X" + bytes(17) + b"k a k2 ann {}", None),
        (b"\xffR\x01K" + bytes(17) + b"a rude", None),
        (b'{"chat_message":{"message":"x"}}', RoomMessage("", "chat_message", b"")),
        (b"[" * 100_000, RoomMessage("", "opaque", b"")),
    ],
)
def test_a_payload_of_the_channel_is_an_event_or_none(payload: bytes, expected: RoomEvent | None) -> None:
    found = event(UpstreamMessage(payload))
    if isinstance(expected, RoomMessage) and isinstance(found, RoomMessage) and not expected.raw:
        expected = RoomMessage(expected.sender, expected.kind, found.raw)
    assert found == expected


def test_the_tables_are_those_of_the_description() -> None:
    messages, enums = described((VECTORS / "v1/rooms.proto").read_text())
    assert {name: fields for name, fields in messages.items() if fields} == MESSAGES
    assert enums == ENUMS


def described(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the messages and enums of a description."""
    messages: dict[str, Any] = {}
    enums: dict[str, Any] = {}
    inside: list[tuple[str, str]] = []
    for line in re.sub(r"//.*", "", text).splitlines():
        name = ".".join(name for kind, name in inside if kind != "oneof")
        kind = inside[-1][0] if inside else ""
        if found := re.match(r"\s*(message|enum|oneof) (\w+) \{(\})?", line):
            if not found[3]:
                inside.append((found[1], found[2]))
        elif line.strip() == "}":
            inside.pop()
        elif kind == "enum" and (found := re.match(r"\s*(\w+) = (\d+);", line)):
            enums.setdefault(name, {})[int(found[2])] = found[1]
        elif found := re.match(r"\s*(repeated |map<string, )?(\w+)>? (\w+) = (\d+);", line):
            mark = {"repeated ": "*", "map<string, ": "@"}.get(found[1] or "", "")
            messages.setdefault(name, {})[int(found[4])] = (camel(found[3]), mark, found[2])
    for name, fields in messages.items():
        for number, (member, mark, type_) in fields.items():
            # A type that is declared in the message itself.
            own = f"{name}.{type_}"
            fields[number] = (member, mark + (own if own in messages or own in enums else type_))
    return messages, enums


def camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))
