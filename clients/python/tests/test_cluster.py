"""The worker over a Redis Cluster: it finds the node of each key, and follows slots and roles that change."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import pathlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio
import redis as redis_py
from redis import exceptions

from cluster import Cluster, Node
from conftest import ROOT, RedisServer, eventually, free_port, within
from wsproxy import (
    AgentOffline,
    CallTimeout,
    Event,
    Failure,
    Gap,
    InvalidRequest,
    Limits,
    Outgoing,
    Receipt,
    RoomMember,
    Unauthorized,
    Unavailable,
    Worker,
)
from wsproxy._cluster import Cluster as Client
from wsproxy._cluster import is_passing, known
from wsproxy._pool import pool

LOG = "{session:s-1:down}:log"
CONNECTION = "0199f2c4-7d1a-7c3e-9a51-0b8d6f2e4c11"


@pytest.fixture
def cluster(tmp_path: pathlib.Path) -> Iterator[Cluster]:
    """A Cluster of the test's own, whose nodes it may end."""
    started = Cluster(tmp_path)
    yield started
    started.stop()


@pytest.fixture
def shared(shared_cluster: Cluster) -> Cluster:
    shared_cluster.empty()
    return shared_cluster


@pytest_asyncio.fixture
async def worker(shared: Cluster) -> AsyncIterator[Worker]:
    async with Worker.redis(shared.url) as made:
        yield made


def numbers(cluster: Cluster) -> list[int]:
    return [json.loads(text)["n"] for text in cluster.texts(LOG)]


def is_one_chain(cluster: Cluster) -> bool:
    """Returns true where each entry of the log names the one before it."""
    entries = cluster.client.xrange(LOG)
    metas = [fields["meta"].split() for _, fields in entries]
    positions = [f"{name}-{meta[0]}" for (name, _), meta in zip(entries, metas, strict=True)]
    return [meta[1] for meta in metas] == ["0-0", *positions[:-1]]


@contextlib.contextmanager
def subscriber(node: Node, *channels: str) -> Iterator[Any]:
    client: Any = redis_py.Redis(port=node.port)
    with contextlib.closing(client.pubsub()) as pubsub:
        pubsub.subscribe(*channels)
        for _ in channels:
            assert pubsub.get_message(timeout=5)
        yield pubsub


# ---- receivers ----


@pytest.mark.asyncio
async def test_receivers_are_counted_at_all_nodes(shared: Cluster, worker: Worker) -> None:
    channels = ["session:s-1:down", "session:s-1:control", "ws:broadcast", "ws:control", "room:lobby"]

    async def counts() -> list[int]:
        sent = await worker.batch([Outgoing("session:s-1", {}), Outgoing("broadcast", Event("x"))])
        receipts = [
            *sent,
            await worker.send("s-1", {}),
            await worker.send("s-1", {}, history=False),
            await worker.broadcast("x"),
            await worker.rooms.publish("lobby", {"chatMessage": {"message": "x"}}),
        ]
        return [
            *(each.receivers for each in receipts if isinstance(each, Receipt)),
            await worker.close_session("s-1"),
            await worker.disconnect(user="u-1"),
            await worker.disconnect(user="u-1", revoke=5),
        ]

    assert await counts() == [0] * 9
    for node in shared.nodes:
        with subscriber(node, *channels):
            assert await counts() == [1] * 9
    assert await counts() == [0] * 9


@pytest.mark.asyncio
async def test_a_repetition_counts_no_receivers(shared: Cluster, worker: Worker) -> None:
    with subscriber(shared.nodes[5], "session:s-1:down"):
        assert (await worker.send("s-1", {}, idempotency_key="k")).receivers == 1
        assert await worker.send("s-1", {}, idempotency_key="k") == Receipt(
            0, (await worker.history(session="s-1")).position, True
        )


@pytest.mark.asyncio
async def test_many_messages_ask_for_receivers_together(shared: Cluster, worker: Worker) -> None:
    await worker.send("s-1", {})

    def asked() -> int:
        return sum(
            node.client.info("commandstats").get("cmdstat_pubsub|numsub", {"calls": 0})["calls"]
            for node in shared.nodes
        )

    before = asked()
    receipts = await asyncio.gather(*(worker.send(f"s-{n}", {}, history=False) for n in range(200)))
    assert {each.receivers for each in receipts} == {0}
    # Not 200 times at each of six nodes.
    assert asked() - before < 300


@pytest.mark.asyncio
async def test_an_agent_at_any_node_is_called(shared: Cluster, worker: Worker) -> None:
    async def agent(node: Node) -> None:
        with subscriber(node, "agent:u1:commands") as pubsub:
            call: dict[str, Any] = {}
            # The call of the node before may come late.
            while call.get("params") != {"port": node.port}:
                message = await asyncio.to_thread(pubsub.get_message, timeout=10)
                call = json.loads(message["data"])
            answer = {"type": "tool_response", "userId": "u1", "requestId": call["requestId"]}
            node.client.publish(call["replyTo"], json.dumps(answer | {"success": True, "result": call["params"]}))

    for node in shared.nodes:
        task = asyncio.create_task(agent(node))
        await eventually("the agent listens", functools.partial(node.heard, "agent:u1:commands"))
        assert await within(worker.agents.call("u1", "echo", {"port": node.port})) == {"port": node.port}
        await task
    with pytest.raises(AgentOffline):
        await worker.agents.call("u1", "echo", retry_for=0)


@pytest.mark.asyncio
async def test_calls_go_to_the_node_that_tells_of_new_agents(shared: Cluster, worker: Worker) -> None:
    def published() -> list[int]:
        stats = [node.client.info("commandstats") for node in shared.nodes]
        return [each.get("cmdstat_publish", {"calls": 0})["calls"] for each in stats]

    with contextlib.suppress(AgentOffline):
        # From now on answers are heard.
        await worker.agents.call("u0", "echo", retry_for=0)
    for user in ("u1", "u3"):
        with subscriber(shared.nodes[4], f"agent:{user}:commands"):
            before = published()
            with pytest.raises(CallTimeout):
                await worker.agents.call(user, "echo", timeout=0.2)
            more = [now - then for now, then in zip(published(), before, strict=True)]
        owner = shared.owner(f"agent:{user}:server")
        assert {shared.nodes[place] for place, count in enumerate(more) if count} == {owner}


@pytest.mark.asyncio
async def test_sessions_with_clients_at_any_node_are_known(shared: Cluster, worker: Worker) -> None:
    backend = worker._backend
    with subscriber(shared.nodes[3], "session:s-2:down"):
        assert await backend.has_clients(["s-1", "s-2"]) == [False, True]
    sessions = [f"s-{number}" for number in range(20)]
    assert await backend.claim(sessions, "me", 5) == [True] * 20
    assert await backend.claim(sessions, "you", 5) == [False] * 20
    assert await backend.held(sessions, "you") == [True] * 20
    await backend.release("s-3", "me")
    assert [await backend.held(["s-3", "s-4"], "you")] == [[False, True]]


@pytest.mark.asyncio
async def test_members_of_a_room_are_kicked(shared: Cluster, worker: Worker) -> None:
    record = json.dumps({"server": "gw", "name": "", "since": 1})
    shared.client.hset("{room:lobby}:members", "phone", f"k1 alice {record}")
    with subscriber(shared.nodes[4], "room:lobby") as pubsub:
        [member] = await worker.rooms.members("lobby")
        assert isinstance(member, RoomMember)
        assert await worker.rooms.kick("lobby", client="phone") == 1
        assert pubsub.get_message(timeout=5)
    assert await worker.rooms.members("lobby") == []


# ---- order, batches, slots ----


@pytest.mark.asyncio
async def test_messages_of_a_channel_keep_their_order(shared: Cluster, worker: Worker) -> None:
    seen = []
    with subscriber(shared.nodes[4], "ws:user:u-1") as pubsub:
        for number in range(100):
            await worker.to_user("u-1", "x", number, history=number % 3 > 0)
        for _ in range(100):
            text = pubsub.get_message(timeout=5)["data"]
            seen.append(json.loads(text.rpartition(b"\n")[2])["data"])
    assert seen == list(range(100))


@pytest.mark.asyncio
async def test_a_batch_goes_to_all_nodes(shared: Cluster, worker: Worker) -> None:
    messages = [Outgoing(f"session:s-{number % 10}", {"n": number}) for number in range(500)]
    results = await worker.batch([*messages, Outgoing(f"connection:{CONNECTION}", Event("x"))])
    assert all(isinstance(each, Receipt) for each in results)
    for session in range(10):
        texts = shared.texts(f"{{session:s-{session}:down}}:log")
        assert [json.loads(text)["n"] for text in texts] == list(range(session, 500, 10))


@pytest.mark.asyncio
async def test_scripts_that_all_nodes_forgot_are_sent_again(shared: Cluster, worker: Worker) -> None:
    messages = [Outgoing(f"session:s-{number}", {}) for number in range(20)]
    for _ in range(2):
        for node in shared.nodes:
            node.client.script_flush()
        assert all(isinstance(each, Receipt) for each in await worker.batch(messages))


@pytest.mark.asyncio
async def test_history_goes_on_while_its_slot_moves_forth_and_back(shared: Cluster) -> None:
    # Other keys of the slot, so that the move takes a while.
    shared.client.mset({f"{{session:s-1:down}}:other:{number}": "" for number in range(50)})
    first = shared.owner(LOG)
    moving = True

    async def move() -> None:
        nonlocal moving
        for to in (shared.others(LOG)[0], first) * 2:
            await asyncio.to_thread(shared.migrate, LOG, to, pause=0.005)
            await asyncio.sleep(0.3)
        moving = False

    task = asyncio.create_task(move())
    sent, rounds = 0, 0
    # Room for all that a fast machine sends meanwhile.
    limits = Limits(entries_max=1_000_000, bytes_max=1 << 30)
    async with (
        Worker.redis(shared.url, limits=limits) as worker,
        worker.stream("s-2", "t-1", flush_interval=0) as stream,
    ):
        while moving:
            await worker.send("s-1", {"n": sent})
            sent += 1
            batch = [Outgoing("session:s-1", {"n": sent + number}) for number in range(5)]
            results = await worker.batch(batch)
            # Never later ones without one before them.
            kept = [isinstance(each, Receipt) for each in results]
            assert kept == sorted(kept, reverse=True), results
            assert all(each.retryable for each in results if isinstance(each, Failure))
            sent, rounds = sent + sum(kept), rounds + 1
            await stream.append(f"{rounds} ")
    await task
    assert numbers(shared) == list(range(sent))
    assert is_one_chain(shared)
    assert rounds > 0


@pytest.mark.asyncio
async def test_a_token_stream_goes_on_while_its_slot_moves(shared: Cluster, worker: Worker) -> None:
    shared.client.mset({f"{{session:s-1:down}}:other:{number}": "" for number in range(50)})
    target = shared.others(LOG)[0]
    async with worker.stream("s-1", "t-1", flush_interval=0) as stream:
        task = asyncio.create_task(asyncio.to_thread(shared.migrate, LOG, target, pause=0.01))
        count = 0
        while not task.done():
            await stream.append(f"{count} ")
            count += 1
    await task
    texts = [json.loads(text).get("text", "") for text in shared.texts(LOG)]
    assert "".join(texts) == "".join(f"{number} " for number in range(count))
    assert is_one_chain(shared)
    # The slot has stayed there for the tests behind this one, which ask for its owner.
    assert shared.owner(LOG) is target


@pytest.mark.asyncio
async def test_what_a_slot_on_the_move_refuses_was_not_done(shared: Cluster) -> None:
    async with Worker.redis(shared.url, retry_for=0.3) as worker:
        await worker.send("s-1", {"n": 0})
        source, target = shared.owner(LOG), shared.others(LOG)[0]
        shared.begin(LOG, target)
        try:
            # The key of an idempotent message is new, and the log is still there.
            with pytest.raises(Unavailable, match="Not done") as raised:
                await within(worker.send("s-1", {"n": 1}))
            assert not raised.value.in_doubt
            results = await within(worker.batch([Outgoing("session:s-1", {"n": 1}), Outgoing("session:s-2", {})]))
            assert [type(each) for each in results] == [Unavailable, Receipt] or isinstance(results[0], Failure)
            # A plain message belongs to no slot.
            assert (await worker.send("s-1", {}, history=False)).event_id is None
            # A single key is found where it is.
            await within(worker.issue_token("demo", "s-1"))
        finally:
            for node in (source, target):
                node.cluster("SETSLOT", node.cluster("KEYSLOT", LOG), "STABLE")
        await worker.send("s-1", {"n": 1})
    assert numbers(shared) == [0, 1]


@pytest.mark.asyncio
async def test_a_key_on_the_move_is_found_at_both_nodes(shared: Cluster, worker: Worker) -> None:
    key = "session:s-1:auth"
    source, target = shared.owner(key), shared.others(key)[0]
    shared.begin(key, target)
    # The key is not there, so it goes to the node that gets the slot.
    tokens = await asyncio.gather(*(worker.issue_token("demo", "s-1") for _ in range(20)))
    assert (source.client.dbsize(), target.client.dbsize()) == (0, 1)
    shared.finish(key, target)
    assert shared.client.get(key) in [f"agent/demo {each.token}" for each in tokens]


# ---- nodes that go and come ----


async def sending(worker: Worker, work: Callable[[], Awaitable[None]], pause: float = 0.0) -> int:
    """Sends numbers to a session while something happens; returns how many were sent."""
    task, sent = asyncio.ensure_future(work()), 0
    while not task.done():
        await worker.send("s-1", {"n": sent})
        sent += 1
        await asyncio.sleep(pause)
    await task
    return sent


@pytest.mark.asyncio
async def test_history_goes_on_over_a_failover_in_order(shared: Cluster, worker: Worker) -> None:
    async def fail_over() -> None:
        await asyncio.sleep(0.2)
        for _ in range(2):
            await asyncio.to_thread(shared.fail_over, shared.replica(shared.owner(LOG)))
            await asyncio.to_thread(shared.settled)

    sent = await sending(worker, fail_over, 0.001)
    assert numbers(shared) == list(range(sent))
    assert is_one_chain(shared)


@pytest.mark.asyncio
async def test_a_worker_goes_on_when_a_master_is_killed(cluster: Cluster) -> None:
    gaps: list[Gap] = []
    async with Worker.redis(cluster.url) as worker:
        async with worker.upstream("s-1", on_gap=gaps.append) as messages:
            for number in range(10):
                await worker.send("s-1", {"n": number})
            master = cluster.owner(LOG)
            replica = cluster.replica(master)
            # Replication is asynchronous, and a killed master may take the last message with it.
            await eventually("the replica has it", lambda: master.client.wait(1, 100) == 1)
            await asyncio.to_thread(master.kill)
            # No connection can be made: another node publishes.
            await within(worker.send("s-1", {}, history=False), 2)
            await within(worker.send("s-1", {"n": 10}))
            assert replica.is_master
            assert numbers(cluster) == list(range(11))
            assert is_one_chain(cluster)
            await eventually("the subscription stands", lambda: cluster.heard("session:s-1:up"))
            replica.client.publish("session:s-1:up", "1")
            assert (await within(anext(messages))).json() == 1
        assert [gap.reason for gap in gaps] in ([], ["connection"])


def any_hears(nodes: list[Node]) -> bool:
    return any(node.heard("session:s-1:up") for node in nodes)


async def moves(cluster: Cluster, lose: Callable[[Node], None]) -> None:
    """Loses the node of a subscription, and hears a message of another one."""
    gaps: list[Gap] = []
    async with Worker.redis(cluster.url) as worker, worker.upstream("s-1", on_gap=gaps.append) as messages:
        lost = cluster.listener("session:s-1:up")
        await asyncio.to_thread(lose, lost)
        others = [node for node in cluster.nodes if node is not lost]
        await eventually("it moves", functools.partial(any_hears, others), 15)
        others[0].client.publish("session:s-1:up", "1")
        assert (await within(anext(messages))).json() == 1
        assert [gap.reason for gap in gaps] == ["connection"]


@pytest.mark.asyncio
async def test_a_subscription_leaves_a_node_that_was_killed(cluster: Cluster) -> None:
    await moves(cluster, Node.kill)


@pytest.mark.asyncio
async def test_a_subscription_leaves_a_node_that_is_frozen(shared: Cluster) -> None:
    try:
        await moves(shared, Node.freeze)
    finally:
        for node in shared.nodes:
            node.thaw()
        await asyncio.to_thread(shared.settled)


@pytest.mark.asyncio
async def test_a_node_that_is_added_and_removed_is_followed(
    shared: Cluster, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await worker.send("s-1", {"n": 0})).receivers == 0
    owner, added = shared.owner(LOG), await asyncio.to_thread(shared.add)
    with subscriber(added, "session:s-1:down"):
        # A view of the Cluster that is younger than a second need not be renewed.
        await asyncio.sleep(1)
        assert (await worker.send("s-1", {}, history=False)).receivers == 1
    await asyncio.to_thread(shared.migrate, LOG, added)
    await worker.send("s-1", {"n": 1})
    assert shared.owner(LOG) is added
    await asyncio.to_thread(shared.migrate, LOG, owner)
    await worker.send("s-1", {"n": 2})
    assert numbers(shared) == [0, 1, 2]
    any_node = Client.a_node

    async def there_first(client: Client, but: tuple[str, int] | None) -> tuple[str, int]:
        return await any_node(client, but) if but else ("127.0.0.1", added.port)

    monkeypatch.setattr(Client, "a_node", there_first)
    # It runs on, and hears nothing more.
    await moves(shared, shared.forget)
    added.process.stop()


@pytest.mark.asyncio
async def test_slots_without_a_node_refuse_and_others_go_on(cluster: Cluster) -> None:
    async with Worker.redis(cluster.url, retry_for=0.3) as worker:
        await worker.send("s-1", {})
        master = cluster.owner(LOG)
        cluster.replica(master).kill()
        master.kill()
        other = next(n for n in range(100) if cluster.owner(f"{{session:s-{n}:down}}:log") is not master)
        with pytest.raises(Unavailable):
            await within(worker.send("s-1", {}))
        await eventually("the others know", lambda: any("fail" in row[2].split(",") for row in cluster._any().table()))
        with pytest.raises(Unavailable, match="Not done") as raised:
            await within(worker.send("s-1", {}))
        assert not raised.value.in_doubt
        assert (await within(worker.send("s-1", {}, history=False))).receivers == 0
        await within(worker.send(f"s-{other}", {}))


# ---- configuration ----


def test_urls_of_clusters_are_read() -> None:
    made = Client("rediss+cluster://me:p%40ss@n1,[::1]:7?socket_timeout=3", {"ssl_ca_certs": "ca.pem"})
    assert made._seeds == [("n1", 6379), ("::1", 7)]
    options = made._pool(("10.0.0.1", 8), made._options).connection_kwargs
    assert (options["host"], options["port"], options["socket_timeout"]) == ("10.0.0.1", 8, 3)
    assert (options["username"], options["password"], options["ssl_ca_certs"]) == ("me", "p@ss", "ca.pem")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis+cluster://n1/1", "database 0"),
        ("redis+cluster://n1?db=1", "database 0"),
        ("unix+cluster://n1", "scheme"),
        ("redis+cluster://n1,,n2", "host of a node"),
    ],
)
def test_wrong_urls_of_clusters_are_refused(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Worker.redis(url)


@pytest.mark.parametrize("text", ["MOVED 7 n1:6379", "ASK 7 n1:6379", "TRYAGAIN Multiple keys", "CLUSTERDOWN is down"])
def test_errors_that_older_versions_of_redis_py_do_not_know_are_known(text: str) -> None:
    error = known(exceptions.ResponseError(text))
    assert is_passing(error) or isinstance(error, exceptions.AskError)
    assert known(error) is error
    other = exceptions.ResponseError("WRONGTYPE it is no stream")
    assert known(other) is other
    assert not is_passing(other)


def test_logins_of_sentinels_are_not_for_a_cluster() -> None:
    with pytest.raises(ValueError, match="sentinel_kwargs"):
        Worker.redis("redis+cluster://n1", sentinel_kwargs={})
    with pytest.raises(ValueError, match="scheme"):
        pool("redis+cluster://n1", {})


@pytest.mark.asyncio
async def test_a_cluster_that_is_away_is_told() -> None:
    async with Worker.redis(f"redis+cluster://127.0.0.1:{free_port()}", retry_for=0.2) as worker:
        for history in (True, False):
            with pytest.raises(Unavailable, match="Not done: No node of the Cluster can be reached") as raised:
                await within(worker.send("s-1", {}, history=history))
            assert not raised.value.in_doubt


@pytest.mark.asyncio
async def test_the_documented_rights_suffice(shared: Cluster) -> None:
    page = (ROOT / "clients/python/README.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("- **The user** needs"))
    rights = re.findall(r"`(\+[^`]+)`", row)
    assert len(rights) == 6
    own = ["reset", "on", ">pw", "~*", "&*", "+@read", "+@write", "+@scripting", "+time"]
    own += ["+publish", "+subscribe", "+unsubscribe"]
    # Of these the row names all that are needed.
    own += ["-ping", "-asking", "-pubsub", "-cluster"]
    for node in shared.nodes:
        node.client.execute_command("ACL", "SETUSER", "app", *own, *rights)
    url = shared.url.replace("://", "://app:pw@")
    async with Worker.redis(url, retry_for=0.5) as worker:
        await worker.send("s-1", {"n": 0})
        await worker.issue_token("demo", "s-1")
        async with worker.upstream("s-1") as messages:
            shared.client.publish("session:s-1:up", "1")
            assert (await within(anext(messages))).json() == 1
        with subscriber(shared.nodes[4], "session:s-1:down"):
            assert (await worker.send("s-1", {}, history=False)).receivers == 1
        source, target = shared.owner(LOG), shared.others(LOG)[0]
        shared.begin(LOG, target)
        try:
            shared.move(LOG, target)
            # The log is at the other node, and the head too.
            assert (await worker.history(session="s-1")).events
        finally:
            shared.finish(LOG, target)
        assert source is not target


@pytest.mark.asyncio
async def test_a_single_server_is_no_cluster(redis: RedisServer) -> None:
    async with Worker.redis(f"redis+cluster://127.0.0.1:{redis.port}", retry_for=5) as worker:
        with pytest.raises(InvalidRequest, match="cluster support disabled"):
            await within(worker.send("s-1", {}), 2)


@pytest.mark.asyncio
async def test_a_wrong_login_is_told(shared: Cluster) -> None:
    async with Worker.redis(shared.url.replace("://", "://me:wrong@"), retry_for=5) as worker:
        with pytest.raises(Unauthorized):
            await within(worker.send("s-1", {}), 2)


@pytest.mark.asyncio
async def test_a_closed_worker_has_no_connection(shared: Cluster) -> None:
    def connections() -> int:
        return sum(len(node.client.client_list(_type="normal")) for node in shared.nodes)

    before = connections()
    async with Worker.redis(shared.url) as worker:
        await asyncio.gather(*(worker.send(f"s-{n}", {}) for n in range(20)))
        await within(worker.upstream("s-1").confirmed())
        assert connections() > before
    await eventually("the connections end", lambda: connections() <= before, 5)
