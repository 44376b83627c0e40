"""A Redis Cluster of real servers for tests, whose nodes can be killed, frozen, promoted, moved, added and removed."""

from __future__ import annotations

import functools
import pathlib
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import redis as redis_py
from redis.crc import key_slot

from conftest import REDIS_BINARY, Process, free_port, until

MASTERS = 3
NODE_TIMEOUT_MS = 2000


def slot_of(key: str) -> int:
    return int(key_slot(key.encode()))


class Node:
    """One server of a Cluster."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.port, self.bus_port = folder, free_port(), free_port()
        self.client: Any = redis_py.Redis(port=self.port, decode_responses=True, socket_timeout=5)
        self.start()

    def start(self) -> None:
        options = {
            "port": self.port,
            "cluster-port": self.bus_port,
            "bind": "127.0.0.1",
            "cluster-enabled": "yes",
            "cluster-config-file": f"nodes-{self.port}.conf",
            "cluster-node-timeout": NODE_TIMEOUT_MS,
            # A promoted replica stays at its own slots, and one third that is down leaves the others alone.
            "cluster-allow-replica-migration": "no",
            "cluster-require-full-coverage": "no",
            "repl-diskless-sync-delay": 0,
            "save": "",
            "enable-debug-command": "yes",
        }
        words = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        self.process = Process(f"node-{self.port}", [REDIS_BINARY, *words], self.folder)

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def id(self) -> str:
        return str(self.cluster("MYID"))

    def cluster(self, *words: Any) -> Any:
        # In two words redis-py has no reading of its own for the answers.
        return self.client.execute_command("CLUSTER", *words)

    def table(self) -> list[list[str]]:
        """Rows of the nodes that this one knows: id, place, flags, master, …, state of the link, slots."""
        return [line.split() for line in self.cluster("NODES").splitlines()]

    def heard(self, channel: str) -> int:
        return int(self.client.pubsub_numsub(channel)[0][1])

    @property
    def is_master(self) -> bool:
        return bool(self.client.info("replication")["role"] == "master")

    def kill(self) -> None:
        self.process.stop(signal.SIGKILL)

    def freeze(self) -> None:
        self.process.child.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.child.send_signal(signal.SIGCONT)


class Cluster:
    """Three masters and a replica of each. ``nodes`` holds the masters first."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.nodes: list[Node] = []
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        for _ in range(2 * MASTERS):
            self.nodes.append(Node(self.folder))
        for number, node in enumerate(self.nodes):
            node.process.ready("a node", node.client.ping)
            node.cluster("SET-CONFIG-EPOCH", number + 1)
        for number, node in enumerate(self.nodes[:MASTERS]):
            first, last = 16384 * number // MASTERS, 16384 * (number + 1) // MASTERS - 1
            node.cluster("ADDSLOTSRANGE", first, last)
        # All meet all, which takes less time than to hear of each other.
        for number, node in enumerate(self.nodes):
            for other in self.nodes[number + 1 :]:
                node.cluster("MEET", "127.0.0.1", other.port, other.bus_port)
        # Masters wait two seconds before they say that all is well.
        self.settled(is_up=False)
        for number, replica in enumerate(self.nodes[MASTERS:]):
            replica.cluster("REPLICATE", self.nodes[number].id)
        self.settled()

    def settled(self, *, is_up: bool = True) -> None:
        """Waits until all running nodes know each other, their roles and who serves all slots."""
        running = [node for node in self.nodes if node.process.child.poll() is None]

        def view(node: Node) -> frozenset[Any]:
            unsure = {"fail", "fail?", "handshake", "noaddr"}
            rows = [row for row in node.table() if not unsure & set(row[2].split(","))]
            return frozenset((row[0], row[3], tuple(row[8:])) for row in rows)

        def agree() -> bool:
            views = {view(node) for node in running}
            replicas = [node for node in running if not node.is_master]
            return (
                len(views) == 1
                and len(next(iter(views))) == len(running)
                and all(node.client.info("replication")["master_link_status"] == "up" for node in replicas)
                and all("cluster_state:ok" in node.cluster("INFO") for node in running if is_up)
            )

        until("the nodes agree", agree)

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(node.place for node in self.nodes[:MASTERS])}"

    @functools.cached_property
    def client(self) -> Any:
        """A client of the whole Cluster."""
        return redis_py.RedisCluster(host="127.0.0.1", port=self._any().port, decode_responses=True)

    def _any(self) -> Node:
        return next(node for node in self.nodes if node.process.child.poll() is None)

    def texts(self, log: str) -> list[str]:
        """Returns the entries of a log, oldest first."""
        return [fields["data"] for _, fields in self.client.xrange(log)]

    def heard(self, channel: str) -> int:
        return sum(node.heard(channel) for node in self.nodes if node.process.child.poll() is None)

    def keys(self) -> set[str]:
        return {key for node in self.nodes for key in node.client.keys("*")}

    def listener(self, channel: str) -> Node:
        """The node at which a channel is subscribed."""
        found: Node = until(f"{channel} is heard", lambda: [node for node in self.nodes if node.heard(channel)])[0]
        return found

    def owner(self, key: str) -> Node:
        """The master of a key."""
        slot, asked = slot_of(key), self._any()
        for first, last, found, *_ in asked.cluster("SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == found[1])
        raise LookupError(key)

    def others(self, key: str) -> list[Node]:
        """The masters of other keys."""
        owner = self.owner(key)
        return [node for node in self.nodes if node is not owner and node.is_master]

    def replica(self, master: Node) -> Node:
        """The replica of a master."""
        own = master.id
        return next(node for node in self.nodes if any("myself" in row[2] and row[3] == own for row in node.table()))

    # ---- a slot on the move ----

    def begin(self, key: str, to: Node) -> None:
        """Opens the move of the slot of a key."""
        slot, source = slot_of(key), self.owner(key)
        to.cluster("SETSLOT", slot, "IMPORTING", source.id)
        source.cluster("SETSLOT", slot, "MIGRATING", to.id)

    def move(self, key: str, to: Node, *, count: int = 100, pause: float = 0.0) -> None:
        """Moves the keys that a slot has."""
        slot, source = slot_of(key), self.owner(key)
        while keys := source.cluster("GETKEYSINSLOT", slot, count):
            source.client.migrate("127.0.0.1", to.port, keys, 0, 5000)
            time.sleep(pause)

    def finish(self, key: str, to: Node) -> None:
        """Closes the move of a slot."""
        slot, owner = slot_of(key), to.id
        source = self.owner(key)
        others = [node for node in self.nodes if node not in (source, to) and node.process.child.poll() is None]
        masters = [node for node in others if node.is_master]
        for node in [to, source, *masters]:
            node.cluster("SETSLOT", slot, "NODE", owner)

    def migrate(self, key: str, to: Node, *, pause: float = 0.0) -> None:
        """Moves the slot of a key to another master, some keys at a time."""
        self.begin(key, to)
        self.move(key, to, count=5, pause=pause)
        self.finish(key, to)

    # ---- nodes ----

    def fail_over(self, replica: Node) -> None:
        """Promotes a replica in order."""
        replica.cluster("FAILOVER")
        until("the replica is promoted", lambda: replica.is_master)

    def add(self) -> Node:
        """Starts a further master, without slots."""
        node = Node(self.folder)
        self.nodes.append(node)
        node.process.ready("a node", node.client.ping)
        for other in self.nodes[:-1]:
            node.cluster("MEET", "127.0.0.1", other.port, other.bus_port)
        self.settled()
        return node

    def forget(self, node: Node) -> None:
        """Removes a node without slots and replicas from the Cluster; its server runs on."""
        name = node.id
        self.nodes.remove(node)
        for other in self.nodes:
            other.cluster("FORGET", name)

    def empty(self) -> None:
        """Removes all keys and scripts."""
        for node in self.nodes:
            if node.is_master:
                node.client.flushall()
            node.client.script_flush()

    def stop(self) -> None:
        with ThreadPoolExecutor() as pool:
            for node in self.nodes:
                pool.submit(node.process.stop, signal.SIGKILL)
