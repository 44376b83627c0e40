"""docs/reference/rooms.md: its tables are those of rooms.proto, and its messages are what a gateway takes and sends."""

import asyncio
import json
import re

import pytest
from conftest import ROOT
from websockets.asyncio.client import connect

PAGE = (ROOT / "docs/reference/rooms.md").read_text()
PROTO = (ROOT / "spec/rooms/v1/rooms.proto").read_text()


def rows(proto):
    """Rows of the tables of messages and enums, as a description has them."""
    messages, enums, inside = {}, {}, []
    for line in re.sub(r"//.*", "", proto).splitlines():
        name = ".".join(each for kind, each in inside if kind != "oneof")
        if found := re.match(r"\s*(message|enum|oneof) (\w+) \{", line):
            inside.append((found[1], found[2]))
        elif line.strip() == "}":
            inside.pop()
        elif inside and inside[-1][0] == "enum" and (found := re.match(r"\s*(\w+) = (\d+);", line)):
            enums.setdefault(name, []).append(f"`{found[2]} {found[1]}`")
        elif found := re.match(r"\s*(repeated |map<string, )?(\w+)>? (\w+) = (\d+);", line):
            first, *others = found[3].split("_")
            form = {"repeated ": "list of {}", "map<string, ": "map of text to {}"}.get(found[1], "{}")
            camel = first + "".join(map(str.capitalize, others))
            messages.setdefault(name, []).append(f"`{found[4]} {camel}` {form.format(found[2])}")
    return [f"| `{name}` | {', '.join(fields)} |" for name, fields in [*messages.items(), *enums.items()]]


def messages(heading):
    """JSON messages that a section of the page shows."""
    section = re.split(r"\n##+ ", PAGE.split(f"# {heading}\n", 1)[1], maxsplit=1)[0]
    return [json.loads(line) for block in re.findall(r"^```json\n(.*?)^```", section, re.S | re.M) for line in block.splitlines()]


def test_the_tables_are_those_of_the_description():
    table = PAGE.split("| message or enum | fields or values |\n|---|---|\n", 1)[1].splitlines()
    assert table == rows(PROTO)


class Member:
    """A member that reads JSON, and compares what comes with what the page shows."""

    def __init__(self, socket, client):
        self.socket, self.client = socket, client

    async def say(self, message):
        await self.socket.send(json.dumps(message))

    async def hear(self):
        while True:
            async with asyncio.timeout(20):
                message = json.loads(await self.socket.recv())
            # A batch has the member's own entries too.
            if any(each["sender"] != self.client for each in message.get("positionBatch", {}).get("entries", [{"sender": ""}])):
                return message


def shape(value, like):
    """A message without values that differ from run to run."""
    varying = {"timestamp", "seq", "lastUpdate", "connectionId", "presenceVersion", "serverVersion"}
    assert value.keys() == like.keys(), value
    for name in value:
        if isinstance(value[name], dict):
            shape(value[name], like[name])
        elif name not in varying:
            assert value[name] == like[name], (name, value)


@pytest.mark.asyncio
async def test_the_messages_are_those_of_a_gateway(start_gateway):
    settings = {"WSPROXY_ENDPOINTS__ROOMS": "true", "WSPROXY_ROOMS__DEVELOPMENT": "true", "WSPROXY_SERVER__BIND": "127.0.0.1"}
    gateway = start_gateway(**settings)
    url = f"ws://127.0.0.1:{gateway.port}/ws/lobby"
    own_hello, hello = messages("Hello")
    joined, updated, left = messages("Presence")
    async with connect(f"{url}?user_id=ann&client_id=ann-1&display_name=Ann") as socket:
        ann = Member(socket, "ann-1")
        await ann.say({"clientHello": {"features": ["batch", "acks"]}})
        shape(await ann.hear(), hello)
        async with connect(f"{url}?user_id=bob&client_id=bob-1&display_name=Bob") as other:
            bob = Member(other, "bob-1")
            # The page's own hello, in which the name is another one.
            await bob.say(own_hello | {"clientHello": own_hello["clientHello"] | {"features": []}})
            assert "serverHello" in await bob.hear()
            shape(await ann.hear(), joined)
            assert (await ann.hear())["type"] == "PRESENCE_UPDATE"
            await bob.say({"presenceEvent": {"eventType": "UPDATE", "data": {"avatarUrl": "https://example.com/b.glb"}}})
            shape(await ann.hear(), updated)
            for message in messages("Messages of clients")[:-1]:
                await ann.say(message)
                [payload] = message.keys() - {"messageId", "to"}
                heard = await bob.hear()
                assert (heard["sender"], payload in heard) == ("ann-1", True), heard
            await bob.say({"entitySpawn": {"entityId": "own"}})
            assert "entitySpawn" in await ann.hear()
            await bob.say({"positionUpdate": {"entityId": "own", "position": {"x": 1, "y": 2}}})
            batch = (await ann.hear())["positionBatch"]["entries"]
            [shown] = messages("Positions")
            assert batch == [shown["positionBatch"]["entries"][0] | {"update": batch[0]["update"]}]
            assert batch[0]["update"]["position"] == shown["positionBatch"]["entries"][0]["update"]["position"]
            await bob.say({"entityUpdate": {"entityId": "lamp"}, "messageId": "m-2"})
            [shown] = messages("Limits and errors")
            assert await bob.hear() == shown
            await ann.say({"custom": {"name": "x"}, "reliable": True})
            assert "seq" not in (await bob.hear())
            await ann.say(messages("Reliable delivery")[0])
        assert "entityDespawn" in await ann.hear()
        shape(await ann.hear(), left)
