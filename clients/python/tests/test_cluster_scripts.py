"""The scripts on a slot that is on the move: what a script refuses there was not done, and no key is at two nodes."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import redis as redis_py
from redis import exceptions

from cluster import Cluster, Node
from conftest import ROOT

CHANNEL = "session:s-1:down"
SESSION = "{session:s-1:down}:"
EVENTS = "{ws}:"
CONNECTION = "connection:0199f2c4-7d1a-7c3e-9a51-0b8d6f2e4c11"
ROOM = [f"{{room:lobby}}:{name}" for name in ("members", "meta", "entities", "positions")]
AGENT = ["{agent:u1:server}:owner", "agent:u1:server"]
# Keys of a call of which each is looked at.
_SOME = 10
ORIGIN = "sssssssscccccccc\x00"


class Call(NamedTuple):
    script: str
    keys: Sequence[str]
    args: Sequence[Any]

    def words(self) -> list[Any]:
        text = (ROOT / "spec/scripts" / f"{self.script}.lua").read_text()
        return ["EVAL", text, len(self.keys), *self.keys, *self.args]


def publish(*keys: str, event_id: str = "", once_ms: int = 0, unique: str = "", entries_max: int = 100) -> Call:
    return Call("publish", keys, [CHANNEL, '{"ack":true}', entries_max, 1 << 20, 3_600_000, event_id, once_ms, unique])


def stream(op: str, *args: Any, name: str = "t-1", lease: int = 60_000) -> Call:
    state = f"{SESSION}stream:{name}"
    keys = [f"{SESSION}log", state, f"{state}:text", f"{SESSION}streams"]
    return Call("stream", keys, [op, CHANNEL, name, 100, 1 << 20, 3_600_000, lease, *args])


def read(*keys: str, logs: int = 1, after: str = "0-0", event_id: str = "", head_ms: Any = 60_000) -> Call:
    return Call("read", keys, [logs, after, event_id, 100, 1 << 20, head_ms, 1 << 20])


def join(client: str, connection: str, *entities: str) -> Call:
    return Call("room_join", ROOM, [client, connection, "u1", "{}", 0, CHANNEL, ORIGIN, 60_000, "", *entities])


def leave(*pairs: str, fields: Sequence[str] = ("*",)) -> Call:
    return Call("room_leave", ROOM, [CHANNEL, ORIGIN, 60_000, len(pairs) // 2, *pairs, *fields])


def state(*op: str) -> Call:
    return Call("room_state", ROOM, ["phone", "k1", CHANNEL, "message", 60_000, *op])


def claim(connection: str) -> Call:
    return Call("agent_claim", AGENT, [connection, "gw", "", 60_000, CHANNEL, "1", 6])


LOG, CLOCK, ONCE = f"{SESSION}log", f"{EVENTS}clock", f"{SESSION}once:k"
OPEN = [stream("open", "")]
MEMBERS = [join("phone", "k1", "car", "snapshot"), join("tab", "k2")]
POSITIONS = Call("room_positions", ROOM, [60_000, "phone", "k1", "car", "here"])
LANE = Call("tunnel_register", ["tunnel:c1"], ["a1", "boot", 1, "", '{"number":1,"boot_id":"boot","server_id":"gw"',
                                               "{", 60_000, 4, CHANNEL])  # fmt: skip

# The calls before it, and the call itself.
CASES: dict[str, tuple[list[Call], Call]] = {
    "publish: the first message": ([], publish(LOG)),
    "publish: a further message": ([publish(LOG)], publish(LOG)),
    "publish: with a key": ([publish(LOG)], publish(LOG, LOG, ONCE, once_ms=1000)),
    "publish: with an event id": ([publish(LOG, event_id="a")], publish(LOG, event_id="b")),
    "publish: with the first event id": ([publish(LOG)], publish(LOG, event_id="b")),
    "publish: an event id again": ([publish(LOG, event_id="a")], publish(LOG, event_id="a")),
    "publish: a unique event id": ([publish(LOG, event_id="a")], publish(LOG, event_id="b", unique="1")),
    "publish: a full index": (
        [publish(LOG, event_id="a", entries_max=1)],
        publish(LOG, event_id="b", entries_max=1),
    ),
    "publish: a full index again": (
        [publish(LOG, event_id="a", entries_max=1), publish(LOG, event_id="b", entries_max=1)],
        publish(LOG, event_id="c", entries_max=1),
    ),
    "publish: an event": (
        [publish(f"{EVENTS}user:u:log", CLOCK)],
        publish(f"{EVENTS}user:u:log", CLOCK),
    ),
    "publish: an event with acknowledgement": (
        [publish(f"{EVENTS}{CONNECTION}:log", CLOCK)],
        publish(f"{EVENTS}{CONNECTION}:log", CLOCK),
    ),
    "stream: open": ([publish(LOG)], OPEN[0]),
    "stream: append": (OPEN, stream("append", "a", 1)),
    "stream: renew": (OPEN, stream("renew")),
    "stream: end": (OPEN, stream("end", "finish", "")),
    "stream: lost": ([stream("open", "", lease=1)], stream("lost", lease=1)),
    "stream: one too many": ([stream("open", "", name=f"t-{n}") for n in range(16)], stream("open", "", name="t-16")),
    "read": ([publish(LOG, event_id="a"), *OPEN], read(LOG)),
    "read: by event id": ([publish(LOG, event_id="a")], read(LOG, event_id="a")),
    "read: without a head": ([], read(LOG)),
    "read: events": (
        [publish(f"{EVENTS}broadcast:log", CLOCK), publish(f"{EVENTS}{CONNECTION}:log", CLOCK)],
        read(f"{EVENTS}broadcast:log", f"{EVENTS}user:u:log", CLOCK, logs=2),
    ),
    "room_join: the first member": ([], MEMBERS[0]),
    "room_join: a further member": (MEMBERS[:1], MEMBERS[1]),
    "room_join: another connection": (MEMBERS, join("phone", "k3", "car", "snapshot")),
    "room_leave: one of several": ([*MEMBERS, POSITIONS], leave("phone", "k1")),
    "room_leave: the last ones": ([*MEMBERS, POSITIONS], leave("phone", "k1", "tab", "k2")),
    "room_leave: the last ones and one more": (
        [*MEMBERS, POSITIONS],
        leave("phone", "k1", "tab", "k2", "gone", "", "away", "k4"),
    ),
    "room_leave: the last fields": ([*MEMBERS, POSITIONS], leave("phone", "k1", fields=["phone car", "phone bus"])),
    "room_leave: many fields": (
        [*MEMBERS, POSITIONS],
        leave("phone", "k1", fields=["phone car", *(f"phone {n}" for n in range(1500))]),
    ),
    "room_positions": ([*MEMBERS, POSITIONS], POSITIONS),
    "room_state: spawn": ([*MEMBERS, POSITIONS], state("spawn", "bus", "snapshot")),
    "room_state: despawn": ([*MEMBERS, POSITIONS], state("despawn", "car")),
    "room_state: presence": ([*MEMBERS, POSITIONS], state("presence", "{}")),
    "agent_claim: the first": ([], claim("k1")),
    "agent_claim: another": ([claim("k1")], claim("k2")),
    "agent_release": ([claim("k1")], Call("agent_release", AGENT, ["k1", 60_000, CHANNEL])),
    "tunnel_register": ([], LANE),
    "tunnel_register: again": ([LANE], LANE),
    "tunnel_release": ([LANE], Call("tunnel_release", ["tunnel:c1"], ["a1", "gw", "", "", "{", CHANNEL])),
}


class Slot:
    """The slot of a call, whose keys are at two nodes."""

    def __init__(self, cluster: Cluster, key: str) -> None:
        self.key, self.cluster = key, cluster
        self.source, self.target = cluster.owner(key), cluster.others(key)[0]

    def open(self, before: Sequence[Call], moved: set[str]) -> None:
        """Does what comes before, and moves some keys."""
        for each in before:
            self.source.client.execute_command(*each.words())
        self.cluster.begin(self.key, self.target)
        for key in moved:
            assert self.source.client.migrate("127.0.0.1", self.target.port, key, 0, 5000)

    def close(self) -> None:
        slot = self.source.cluster("KEYSLOT", self.key)
        for node in (self.source, self.target):
            node.cluster("SETSLOT", slot, "STABLE")
        for node in (self.source, self.target):
            node.client.flushall()

    def run(self, node: Node, call: Call) -> Any:
        """Runs a call as clients do: at the target behind ``ASKING``."""
        with node.client.pipeline(transaction=False) as pipeline:
            if node is self.target:
                pipeline.execute_command("ASKING")
            pipeline.execute_command(*call.words())
            return pipeline.execute(raise_on_error=False)[-1]

    def keys(self, node: Node) -> set[str]:
        return set(node.client.keys("*"))

    def contents(self) -> dict[tuple[int, str], str]:
        """All keys of both nodes. Only a client in ASKING may read what is not the target's yet."""
        found = {}
        for node in (self.source, self.target):
            for key in self.keys(node):
                with node.client.pipeline(transaction=False) as pipeline:
                    pipeline.execute_command("ASKING")
                    pipeline.execute_command("OBJECT", "ENCODING", key)
                    pipeline.execute_command("ASKING")
                    pipeline.execute_command("DEBUG", "DIGEST-VALUE", key)
                    found[node.port, key] = str(pipeline.execute(raise_on_error=False)[3])
        return found


class Ear:
    """A subscriber of the channel that all calls publish on."""

    def __init__(self, slot: Slot, cluster: Cluster) -> None:
        # Messages of an earlier case may still be on their way from any of them.
        self.nodes = cluster.nodes
        client: Any = redis_py.Redis(port=slot.source.port)
        # A client that is let go of ends the connection of its subscriber.
        self.client, self.pubsub = client, client.pubsub()
        self.pubsub.subscribe(CHANNEL)
        assert self.pubsub.get_message(timeout=5)

    def heard(self) -> list[bytes]:
        """All messages until now: nodes deliver their messages in order, so a last one of each tells the end."""
        found: list[bytes] = []
        mark = f"mark:{secrets.token_hex(8)}:"
        ends = {f"{mark}{node.port}".encode() for node in self.nodes}
        for node in self.nodes:
            node.client.publish(CHANNEL, f"{mark}{node.port}")
        while ends:
            message = self.pubsub.get_message(timeout=5)
            assert message is not None
            found.append(message["data"])
            ends.discard(message["data"])
        return [each for each in found if not each.startswith(b"mark:")]

    def close(self) -> None:
        self.pubsub.close()


def subsets(keys: set[str]) -> list[set[str]]:
    """None, each of some alone, all but each of them, and all."""
    some = sorted(keys)[:_SOME]
    ways = [set(), *({key} for key in some), *(keys - {key} for key in some), keys]
    return [way for number, way in enumerate(ways) if way not in ways[:number]]


@pytest.mark.parametrize("name", CASES)
def test_a_script_that_is_refused_has_done_nothing(shared_cluster: Cluster, name: str) -> None:
    before, call = CASES[name]
    shared_cluster.empty()
    slot = Slot(shared_cluster, call.keys[0])
    for each in before:
        slot.source.client.execute_command(*each.words())
    keys = slot.keys(slot.source)
    slot.source.client.flushall()
    with contextlib.closing(Ear(slot, shared_cluster)) as ear:
        for moved in subsets(keys):
            slot.open(before, moved)
            try:
                ear.heard()
                held = slot.contents()
                answer = slot.run(slot.source, call)
                if isinstance(answer, exceptions.AskError):
                    answer = slot.run(slot.target, call)
                where = f"{sorted(moved)} moved: {answer!r}"
                if isinstance(answer, exceptions.ResponseError):
                    assert slot.contents() == held, where
                    assert ear.heard() == [], where
                assert not slot.keys(slot.source) & slot.keys(slot.target), where
            finally:
                slot.close()
