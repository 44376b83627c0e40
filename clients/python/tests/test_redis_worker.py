"""The worker over Redis, without a gateway: what it writes, and how it survives outages."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest

from conftest import RedisServer, eventually, over_both, within
from wsproxy import (
    Event,
    Failure,
    Gap,
    InvalidRequest,
    Limits,
    Outgoing,
    Receipt,
    StreamConflict,
    StreamEnded,
    StreamExists,
    Unavailable,
    Worker,
)

pytestmark = pytest.mark.asyncio

CONNECTION = "0199f2c4-7d1a-7c3e-9a51-0b8d6f2e4c11"


def log(redis: RedisServer, session: str = "s-1") -> list[Any]:
    return [json.loads(text) for text in redis.texts(f"{{session:{session}:down}}:log")]


@over_both
async def test_a_token_is_the_key_that_the_gateway_reads(redis: RedisServer, redis_worker: Worker) -> None:
    bound = await redis_worker.issue_token("demo", "s-1", ttl=30)
    assert redis.client.get("session:s-1:auth") == f"agent/demo {bound.token}"
    assert 28 < redis.client.ttl("session:s-1:auth") <= 30
    assert bound.path == "/demo/ws/s-1"
    assert bound.token not in repr(bound)
    unbound = await redis_worker.issue_token("demo", "s-1", bound=False)
    assert redis.client.get("session:s-1:auth") == unbound.token
    stream = await redis_worker.issue_token("demo", "s-1", event_stream=True)
    assert (stream.event_stream, unbound.event_stream) == (True, False)
    assert stream.token.startswith("sse.")
    assert redis.client.get("session:s-1:auth") == f"agent/demo {stream.token}"
    fresh = await redis_worker.issue_token("demo")
    assert fresh.session_id != (await redis_worker.issue_token("demo")).session_id


@pytest.mark.parametrize("bad", ["", "a:b", "a/b", "ä", "x" * 129])
async def test_ids_that_would_spell_other_keys_are_refused(redis_worker: Worker, bad: str) -> None:
    with pytest.raises(InvalidRequest):
        await redis_worker.issue_token("demo", bad)
    with pytest.raises(InvalidRequest):
        await redis_worker.send(bad, "x")
    with pytest.raises(InvalidRequest):
        await redis_worker.to_user(bad, "x")


@over_both
async def test_what_is_sent_is_published_and_kept(redis: RedisServer, redis_worker: Worker) -> None:
    with contextlib.closing(redis.client.pubsub()) as pubsub:
        pubsub.subscribe("session:s-1:down")
        assert pubsub.get_message(timeout=5)
    first = await redis_worker.send("s-1", {"text": "ä"})
    second = await redis_worker.send("s-1", {"n": 2}, event_id="my-2")
    assert first == Receipt(0, first.event_id, False)
    assert first.event_id
    assert second.event_id
    assert log(redis) == [{"text": "ä"}, {"event_id": "my-2", "n": 2}]
    page = await redis_worker.history(session="s-1")
    assert [each.event_id for each in page.events] == [first.event_id, second.event_id]
    assert (page.complete, page.position, page.events[0].json()) == (True, second.event_id, {"text": "ä"})
    rest = await redis_worker.history(session="s-1", after=first.event_id)
    assert [each.json()["n"] for each in rest.events] == [2]
    assert rest.lost is None
    plain = await redis_worker.send("s-1", b"\x00", history=False)
    assert plain.event_id is None
    assert len(log(redis)) == 2


@over_both
async def test_prefix_and_limits_are_those_of_the_worker(redis: RedisServer) -> None:
    async with Worker.redis(redis.url, prefix="eu", limits=Limits(entries_max=3, ttl=50)) as worker:
        receipts = [await worker.send("s-1", {"n": number}) for number in range(5)]
        assert redis.client.xlen("{eu:session:s-1:down}:log") == 3
        assert 40 < redis.client.ttl("{eu:session:s-1:down}:log") <= 60
        page = await worker.history(session="s-1", after=receipts[0].event_id or "")
        assert (page.lost, page.complete, len(page.events)) == ("trimmed", True, 3)
        page = await worker.history(session="s-1", limit=2, after=receipts[1].event_id or "")
        assert (page.lost, page.complete, page.position) == (None, False, receipts[3].event_id)
        assert (await worker.history(session="s-1", after="5-0-0123abcd")).lost == "trimmed"
        elsewhere = await worker.history(session="s-2", after=receipts[4].event_id or "")
        assert (elsewhere.events, elsewhere.lost) == ((), "emptied")
        await worker.broadcast("x", idempotency_key="k")
        await worker.to_user("u-1", "x")
    keys = {"{eu:ws}:clock", "{eu:ws}:broadcast:log", "{eu:ws}:broadcast:once:k", "{eu:ws}:user:u-1:log"}
    assert keys <= redis.keys()


@over_both
async def test_an_idempotency_key_sends_once(redis: RedisServer, redis_worker: Worker) -> None:
    first = await redis_worker.send("s-1", {"n": 1}, idempotency_key="k")
    again = await redis_worker.send("s-1", {"n": 1}, idempotency_key="k")
    assert not first.duplicate
    assert again == Receipt(0, first.event_id, True)
    assert len(log(redis)) == 1
    first = await redis_worker.broadcast("x", {"a": 1}, idempotency_key="other")
    assert (await redis_worker.broadcast("x", {"a": 1}, idempotency_key="other")).event_id == first.event_id


@over_both
async def test_events_are_complete_and_ordered_over_channels(redis: RedisServer, redis_worker: Worker) -> None:
    receipts = [
        await redis_worker.broadcast("a", {"n": 1}),
        await redis_worker.to_user("u-1", "b", [2], ack=True),
        await redis_worker.to_connection(CONNECTION, "c", None, event_id="mine"),
        *(await redis_worker.batch([Outgoing("user:u-1", Event("d")), Outgoing("session:s-1", {"e": 1})])),
    ]
    ids = [each.event_id for each in receipts if isinstance(each, Receipt)]
    order = [tuple(map(int, str(each).split("-")[:2])) for each in ids]
    assert order[:4] == sorted(set(order[:4]))
    kept = [each.json() for each in (await redis_worker.history(user="u-1")).events]
    assert [each.pop("timestamp")[-1] for each in kept] == ["Z", "Z"]
    assert kept == [{"type": "b", "ack": True, "data": [2]}, {"type": "d", "data": None}]
    [(_, fields)] = redis.client.xrange(f"{{ws}}:connection:{CONNECTION}:log")
    assert fields["meta"].split(" ")[4] == "mine"
    assert json.loads(fields["data"])["event_id"] == "mine"
    assert log(redis) == [{"e": 1}]


@over_both
async def test_a_batch_keeps_the_order_and_says_what_failed(redis: RedisServer, redis_worker: Worker) -> None:
    results = await redis_worker.batch([Outgoing("session:s-1", {"n": number}) for number in range(500)])
    assert [each["n"] for each in log(redis)] == list(range(500))
    assert all(isinstance(each, Receipt) for each in results)
    redis.client.set("{session:s-2:down}:log", "not a stream")
    mixed = await redis_worker.batch(
        [Outgoing("session:s-1", {}), Outgoing("session:s-2", {}), Outgoing("broadcast", {})]
    )
    assert [type(each) for each in mixed] == [Receipt, Failure, Receipt]
    with pytest.raises(InvalidRequest):
        await redis_worker.batch([Outgoing("room:x", {})])


@over_both
async def test_a_forgotten_script_is_loaded_again(redis: RedisServer, redis_worker: Worker) -> None:
    await redis_worker.send("s-1", {})
    redis.client.script_flush()
    await redis_worker.send("s-1", {})
    redis.client.script_flush()
    assert len(await redis_worker.batch([Outgoing("session:s-1", {})] * 3)) == 3
    assert len(log(redis)) == 5


@over_both
async def test_disconnecting_and_revoking_write_what_the_gateway_reads(
    redis: RedisServer, redis_worker: Worker
) -> None:
    pubsub = redis.client.pubsub()
    pubsub.subscribe("ws:control", "session:s-1:control")
    for _ in range(2):
        assert pubsub.get_message(timeout=5)
    assert await redis_worker.disconnect(user="u-1", code=4401, reason="out", revoke=90) == 1
    command = json.loads(pubsub.get_message(timeout=5)["data"])
    assert command == {"op": "disconnect", "user_id": "u-1", "code": 4401, "reason": "out"}
    revocation = "{ws}:revoked:user:u-1"
    assert int(redis.client.get(revocation)) > 1_700_000_000
    assert 80 < redis.client.ttl(revocation) <= 90
    # A shorter one does not cut it short.
    redis.client.set(revocation, 1, ex=900)
    assert await redis_worker.disconnect(user="u-1", revoke=0.5) == 1
    assert redis.client.ttl(revocation) > 800
    assert int(redis.client.get(revocation)) > 1_700_000_000
    assert json.loads(pubsub.get_message(timeout=5)["data"])["code"] == 4401
    await redis_worker.disconnect(jti="j-1", revoke=5)
    assert redis.client.exists("{ws}:revoked:jti:j-1")
    await redis_worker.close_session("s-1", reason="bye")
    seen = [json.loads(pubsub.get_message(timeout=5)["data"]) for _ in range(2)]
    assert seen == [{"op": "disconnect", "jti": "j-1", "code": 4401}, {"op": "close", "reason": "bye"}]
    pubsub.close()
    for wrong in (
        {},
        {"user": "u", "jti": "j"},
        {"connection": CONNECTION, "revoke": 3.0},
        {"user": "u", "reason": "x" * 124},
    ):
        with pytest.raises(InvalidRequest):
            await redis_worker.disconnect(**wrong)


@over_both
async def test_presence_leaves_out_instances_that_died(redis: RedisServer, redis_worker: Worker) -> None:
    redis.client.set("ws:server:gw-1", "{}", px=60_000)
    for name, server in (("c-1", "gw-1"), ("c-2", "gw-dead")):
        entry = {"server_id": server, "connected_at": "2026-11-21T12:00:00Z", "transport": "websocket"}
        redis.client.hset("ws:user:u-1:connections", name, json.dumps(entry))
    assert [each.connection_id for each in await redis_worker.presence("u-1")] == ["c-1"]
    assert await redis_worker.presence("u-2") == []


# ---- token streams ----


@over_both
async def test_a_stream_ends_as_its_block_ends(redis: RedisServer, redis_worker: Worker) -> None:
    async with redis_worker.stream("s-1", "t-1", meta={"model": "m"}, flush_interval=0) as stream:
        await stream.append("Hel")
        await stream.append("")
        await stream.append("lo")
        assert (stream.text, stream.seq) == ("Hello", 2)
    assert log(redis) == [
        {"type": "stream_open", "stream": "t-1", "meta": {"model": "m"}},
        {"type": "stream_append", "stream": "t-1", "seq": 1, "text": "Hel"},
        {"type": "stream_append", "stream": "t-1", "seq": 2, "text": "lo"},
        {"type": "stream_end", "stream": "t-1", "outcome": "finish", "seq": 2},
    ]
    assert redis.client.zcard("streams:leases") == 0
    with pytest.raises(RuntimeError, match="model"):
        async with redis_worker.stream("s-1", "t-2"):
            raise RuntimeError("model")
    last = log(redis)[-1]
    # Clients do not get to see what failed inside.
    assert (last["outcome"], last["error"]["code"]) == ("error", "worker_error")
    assert "model" not in last["error"]["message"]
    async with redis_worker.stream("s-1", "t-3") as stream:
        await stream.error("overloaded", "Try again later.")
        with pytest.raises(StreamEnded):
            await stream.append("x")
    assert log(redis)[-1]["error"] == {"code": "overloaded", "message": "Try again later."}
    with pytest.raises(StreamExists):
        async with redis_worker.stream("s-1", "t-1"):
            pass


async def test_a_cancelled_worker_says_so(redis: RedisServer, redis_worker: Worker) -> None:
    started = asyncio.Event()

    async def work() -> None:
        async with redis_worker.stream("s-1", "t-1") as stream:
            await stream.append("a")
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await within(started.wait())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log(redis)[-1]["outcome"] == "cancelled"


@over_both
@pytest.mark.parametrize("interrupt", [False, True])
async def test_a_client_stops_a_stream(redis: RedisServer, redis_worker: Worker, interrupt: bool) -> None:
    async def stop() -> None:
        await eventually("a worker follows", lambda: redis.heard("session:s-1:up"))
        for message in ("no json stream_stop", '{"type":"stream_stop","stream":"other"}', '["stream_stop"]'):
            redis.client.publish("session:s-1:up", message)
        redis.client.publish("session:s-1:up", '{"type":"stream_stop","stream":"t-1"}')

    stopper = asyncio.create_task(stop())
    async with redis_worker.stream("s-1", "t-1", cancel_on_stop=interrupt) as stream:
        await within(stream.stopped.wait() if not interrupt else asyncio.Event().wait())
    assert stream.stopped.is_set()
    assert stream.outcome == "cancelled"
    await stopper
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await eventually("no worker follows any more", lambda: not redis.heard("session:s-1:up"))


async def test_appends_are_collected(redis: RedisServer, redis_worker: Worker) -> None:
    async with redis_worker.stream("s-1", "t-1", flush_interval=30) as stream:
        for _ in range(100):
            await stream.append("word ")
        # The first is sent at once, so that a client need not wait for the beginning of an answer.
        assert stream.seq == 1
        await stream.append("x" * 200_000)
        assert stream.seq >= 3
    appends = [each["text"] for each in log(redis) if each["type"] == "stream_append"]
    assert "".join(appends) == "word " * 100 + "x" * 200_000
    assert max(map(len, appends)) <= 64 * 1024
    async with redis_worker.stream("s-1", "t-2", flush_interval=0.5) as stream:
        await stream.append("a")
        await stream.append("b")
        await stream.append("c")
        assert stream.seq == 1
        await eventually(
            "the collected text is sent", lambda: redis.client.get("{session:s-1:down}:stream:t-2:text") == "abc"
        )
        assert stream.seq == 2
        await asyncio.sleep(0.5)
        await stream.append("d")
        assert stream.seq == 3, "text after a pause is sent at once"


async def test_a_fast_stream_sends_at_most_twenty_messages_a_second(redis: RedisServer, redis_worker: Worker) -> None:
    async with redis_worker.stream("s-1", "t-1") as stream:
        began = asyncio.get_running_loop().time()
        for _ in range(200):
            await stream.append("word ")
            await asyncio.sleep(0.002)
        passed = asyncio.get_running_loop().time() - began
    appends = [each["text"] for each in log(redis) if each["type"] == "stream_append"]
    assert "".join(appends) == "word " * 200
    # The first, one per interval, and what is left at the end.
    assert len(appends) <= passed / 0.05 + 2


@over_both
async def test_the_lease_is_renewed(redis: RedisServer, redis_worker: Worker) -> None:
    def ends() -> int:
        return int(redis.client.hget("{session:s-1:down}:stream:t-1", "ends") or 0)

    async with redis_worker.stream("s-1", "t-1", lease=1):
        first = ends()
        await eventually("the lease is renewed", lambda: ends() > first + 500)


async def test_an_open_stream_is_in_the_leases_and_no_later_than_its_own(
    redis: RedisServer, redis_worker: Worker
) -> None:
    def lease() -> float | None:
        score: float | None = redis.client.zscore("streams:leases", "s-1/t-1")
        return score

    async with redis_worker.stream("s-1", "t-1", lease=20, watch_stop=False) as stream:
        await stream.append("a")
        ends = int(redis.client.hget("{session:s-1:down}:stream:t-1", "ends"))
        seconds, _ = redis.client.time()
        first = lease()
        assert first is not None
        assert (seconds + 15) * 1000 < first <= ends
        # Another one of this name must not put off the moment at which the gateway looks.
        with pytest.raises(StreamExists):
            async with redis_worker.stream("s-1", "t-1", lease=3600, watch_stop=False):
                pass
        second = lease()
        assert second is not None
        assert second <= ends
    assert lease() is None


async def test_the_end_of_a_block_tells_of_collected_text_that_came_too_late(
    redis: RedisServer, redis_worker: Worker
) -> None:
    async with Worker.redis(redis.url) as second:

        async def answer() -> None:
            async with redis_worker.stream("s-1", "t-1", flush_interval=0.3) as mine:
                await mine.append("Hel")
                await mine.append("XX")
                async with second.stream("s-1", "t-1", adopt=True) as theirs:
                    await theirs.append("lo")
                    theirs.leave()
                await asyncio.sleep(0.5)

        with pytest.raises(StreamConflict):
            await answer()
        assert redis.client.hget("{session:s-1:down}:stream:t-1", "state") == "open"
        assert "".join(each.get("text", "") for each in log(redis)) == "Hello"


@over_both
async def test_another_worker_goes_on_with_a_stream(redis: RedisServer, redis_worker: Worker) -> None:
    async with Worker.redis(redis.url) as second:
        async with redis_worker.stream("s-1", "t-1", watch_stop=False, flush_interval=0) as mine:
            await mine.append("Hel")
            async with second.stream("s-1", "t-1", adopt=True) as theirs:
                assert (theirs.text, theirs.seq) == ("Hel", 1)
                await theirs.append("lo")
                with pytest.raises(StreamConflict):
                    await mine.append("XX")
                mine.leave()
        assert theirs.outcome == "finish"
        texts = [each.get("text", "") for each in log(redis)]
        assert "".join(texts) == "Hello"
        with pytest.raises(StreamEnded):
            async with second.stream("s-1", "t-1", adopt=True):
                pass
        async with second.stream("s-1", "t-2", adopt=True) as fresh:
            assert (fresh.text, fresh.seq) == ("", 0)


async def test_a_worker_that_is_shut_down_leaves_the_stream_open(redis: RedisServer, redis_worker: Worker) -> None:
    started = asyncio.Event()

    async def work() -> None:
        async with redis_worker.stream("s-1", "t-1", on_cancel="leave", flush_interval=60) as stream:
            await stream.append("a")
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await within(started.wait())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [each["type"] for each in log(redis)] == ["stream_open", "stream_append"]
    assert redis.client.hget("{session:s-1:down}:stream:t-1", "state") == "open"


async def test_a_stream_goes_on_when_redis_comes_back_empty(redis: RedisServer, redis_worker: Worker) -> None:
    async with redis_worker.stream("s-1", "t-1", meta={"m": 1}) as stream:
        await stream.append("Hel")
        redis.kill()
        append = asyncio.create_task(stream.append("lo"))
        await asyncio.to_thread(redis.start)
        await within(append)
    merged = "".join(each.get("text", "") for each in log(redis))
    assert merged == "Hello"
    assert log(redis)[0] == {"type": "stream_open", "stream": "t-1", "meta": {"m": 1}}
    assert log(redis)[-1]["outcome"] == "finish"


# ---- following ----


@over_both
async def test_upstream_begins_with_what_was_kept_and_goes_on(redis: RedisServer, redis_worker: Worker) -> None:
    # Under the name of the version before, which comes first, and under today's.
    for number, log in enumerate(["session:s-1:up:log", "{session:s-1:up}:log", "{session:s-1:up}:log"]):
        redis.client.xadd(log, {"data": json.dumps(number)})
    async with redis_worker.upstream("s-1") as messages:
        redis.client.publish("session:s-1:up", "3")
        assert [(await within(anext(messages))).json() for _ in range(4)] == [0, 1, 2, 3]
        assert not redis.client.exists("session:s-1:up:log", "{session:s-1:up}:log")
        async with redis_worker.upstream("s-1") as second:
            redis.client.publish("session:s-1:up", '"both"')
            assert (await within(anext(second))).text == '"both"'
            assert (await within(anext(messages))).text == '"both"'
    await eventually("no worker listens", lambda: not redis.heard("session:s-1:up"))


@over_both
async def test_a_channel_may_be_taken_again_at_any_moment(redis: RedisServer, redis_worker: Worker) -> None:
    for number in range(60):
        async with redis_worker.upstream("s-1") as messages:
            redis.client.publish("session:s-1:up", str(number))
            assert (await within(anext(messages))).json() == number
        # At once, while it is being given up, and after that.
        for _ in range(number % 6):
            await asyncio.sleep(0)
        if number % 10 == 9:
            await eventually("no worker listens", lambda: not redis.heard("session:s-1:up"))


async def test_an_iterator_that_is_let_go_of_unsubscribes(redis: RedisServer, redis_worker: Worker) -> None:
    async def first() -> Any:
        async for message in redis_worker.upstream("s-1"):
            return message.json()
        raise AssertionError("it ended")

    task = asyncio.create_task(first())
    await eventually("it listens", lambda: redis.heard("session:s-1:up"))
    redis.client.publish("session:s-1:up", "1")
    assert await within(task) == 1
    await eventually("no worker listens", lambda: not redis.heard("session:s-1:up"))


async def test_following_survives_a_long_outage_and_names_the_gap(redis: RedisServer, redis_worker: Worker) -> None:
    gaps: list[Gap] = []
    async with redis_worker.upstream("s-1", on_gap=gaps.append) as messages:
        following = asyncio.ensure_future(anext(messages))
        redis.kill()
        # Longer than redis-py's own retries last.
        await asyncio.sleep(5.5)
        await asyncio.to_thread(redis.start)
        await eventually("it listens again", lambda: redis.heard("session:s-1:up"))
        redis.client.publish("session:s-1:up", "1")
        assert (await within(following)).json() == 1
    assert len(gaps) == 1
    assert gaps[0].reason == "connection"
    assert gaps[0].seconds > 5


async def test_a_connection_that_was_killed_is_replaced(redis: RedisServer, redis_worker: Worker) -> None:
    async with redis_worker.upstream("s-1") as messages:
        for number in range(3):
            redis.client.client_kill_filter(_type="pubsub")
            await eventually("it listens again", lambda: redis.heard("session:s-1:up"))
            redis.client.publish("session:s-1:up", str(number))
            assert (await within(anext(messages))).json() == number


@over_both
async def test_session_events_are_parsed_and_others_ignored(redis: RedisServer, redis_worker: Worker) -> None:
    async with redis_worker.session_events("demo") as events:
        redis.client.publish("agent:demo:sessions", "not json")
        closed = {
            "event": "closed",
            "agent_id": "demo",
            "session_id": "s-1",
            "connection_id": "c",
            "server_id": "gw",
            "timestamp": "2026-11-21T09:21:40.002Z",
            "reason": "normal",
            "code": 1000,
            "duration_ms": 5,
            "messages_in": 1,
        }
        redis.client.publish("agent:demo:sessions", json.dumps(closed))
        event = await within(anext(events))
        assert (event.event, event.session_id, event.code, event.raw["messages_in"]) == ("closed", "s-1", 1000, 1)


async def test_a_reader_that_is_too_slow_is_told(redis: RedisServer, redis_worker: Worker) -> None:
    gaps: list[Gap] = []
    async with redis_worker.upstream("s-1", on_gap=gaps.append) as messages:
        pipeline = redis.client.pipeline(transaction=False)
        for number in range(10_050):
            pipeline.publish("session:s-1:up", str(number))
        await asyncio.to_thread(pipeline.execute)
        redis.client.publish("session:s-1:up", '"last"')
        seen = [(await within(anext(messages))).json()]
        while seen[-1] != "last":
            seen.append((await within(anext(messages))).json())
    assert [gap.reason for gap in gaps] == ["overflow"]
    # Messages after the gap are complete and in order.
    assert seen[:-1] == list(range(10_050 - len(seen) + 1, 10_050))


# ---- outages of calls ----


async def test_a_call_waits_for_redis_and_is_done_once(redis: RedisServer, redis_worker: Worker) -> None:
    await redis_worker.send("s-1", {"n": 0})
    redis.kill()
    call = asyncio.create_task(redis_worker.send("s-1", {"n": 1}))
    await asyncio.to_thread(redis.start)
    receipt = await within(call)
    assert not receipt.duplicate
    assert log(redis) == [{"n": 1}]


async def test_dead_pooled_connections_are_replaced_before_calls(redis: RedisServer, redis_worker: Worker) -> None:
    # Without history a call is not repeated: one that went into a dead connection would raise, in doubt.
    await asyncio.gather(*(redis_worker.send("s-1", {}, history=False) for _ in range(8)))
    redis.kill()
    await asyncio.to_thread(redis.start)
    receipts = await asyncio.gather(*(redis_worker.send("s-1", {}, history=False) for _ in range(8)))
    assert receipts == [Receipt(0, None)] * 8


async def test_a_redis_that_stays_away_is_an_error(redis: RedisServer) -> None:
    async with Worker.redis(redis.url, retry_for=0.3) as worker:
        redis.kill()
        with pytest.raises(Unavailable):
            await within(worker.send("s-1", {}))
        with pytest.raises(Unavailable) as raised:
            await within(worker.send("s-1", {}, history=False))
        assert raised.value.in_doubt
