"""Token streams over Redis whose calls fail in the middle: what was appended is there once, or the worker is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from conftest import RedisServer, eventually
from wsproxy import StreamEnded, StreamNotFound, TooLarge, Unavailable, Worker
from wsproxy._backend import StreamCall

pytestmark = pytest.mark.asyncio

STATE = "{session:s-1:down}:stream:t-1"
LIMIT = 4 * 1024 * 1024


def log(redis: RedisServer) -> list[Any]:
    return [json.loads(text) for text in redis.texts("{session:s-1:down}:log")]


def text(redis: RedisServer) -> str:
    """The text as clients put it together."""
    return "".join(each.get("text", "") for each in log(redis))


class Faults:
    """Lets calls of a worker's streams fail."""

    def __init__(self, worker: Worker) -> None:
        self._stream = worker._backend.stream
        self.is_answer_lost: Callable[[StreamCall], bool] = lambda call: False
        self.is_refused: Callable[[StreamCall], bool] = lambda call: False
        self.lost = 0
        worker._backend.stream = self._call  # type: ignore[method-assign]

    async def _call(self, call: StreamCall) -> Any:
        if self.is_refused(call):
            raise Unavailable("Not done: by the test")
        reply = await self._stream(call)
        if self.is_answer_lost(call):
            self.lost += 1
            raise Unavailable("Redis cannot be reached: by the test", in_doubt=True)
        return reply


async def test_text_behind_a_lost_answer_is_there_once(redis: RedisServer) -> None:
    async with Worker.redis(redis.url, retry_for=0) as worker:
        faults = Faults(worker)
        async with worker.stream("s-1", "t-1", watch_stop=False, flush_interval=0) as stream:
            await stream.append("a")
            faults.is_answer_lost = lambda call: call.op == "append"
            with pytest.raises(Unavailable):
                await stream.append("b")
            faults.is_answer_lost = lambda call: False
            await stream.append("c")
            assert stream.text == "abc"
    assert text(redis) == "abc"
    assert log(redis)[-1]["outcome"] == "finish"


async def test_collected_text_behind_a_lost_answer_is_there_once(redis: RedisServer) -> None:
    async with Worker.redis(redis.url, retry_for=0) as worker:
        faults = Faults(worker)
        async with worker.stream("s-1", "t-1", watch_stop=False) as stream:
            await stream.append("a")
            faults.is_answer_lost = lambda call: call.text == "b"
            await stream.append("b")
            await eventually("the answer is lost", lambda: faults.lost)
            await stream.append("c")
            faults.is_answer_lost = lambda call: False
    assert text(redis) == "abc"


async def test_text_behind_a_cancelled_append_is_there_once(redis: RedisServer) -> None:
    async with Worker.redis(redis.url) as worker:
        faults = Faults(worker)
        async with worker.stream("s-1", "t-1", watch_stop=False, flush_interval=0) as stream:
            faults.is_answer_lost = lambda call: call.op == "append"
            append = asyncio.create_task(stream.append("a"))
            await eventually("the answer is lost", lambda: faults.lost)
            append.cancel()
            faults.is_answer_lost = lambda call: False
            await stream.append("b")
    assert text(redis) == "ab"


async def test_reopening_that_breaks_off_loses_no_text(redis: RedisServer) -> None:
    async with Worker.redis(redis.url, retry_for=0) as worker:
        faults = Faults(worker)
        async with worker.stream("s-1", "t-1", watch_stop=False, flush_interval=0) as stream:
            await stream.append("A beginning. ")
            redis.client.flushall()
            # The stream is opened, and its text does not get in.
            faults.is_refused = lambda call: call.op == "append" and call.text.startswith("A beginning")
            with pytest.raises(Unavailable):
                await stream.append("More. ")
            faults.is_refused = lambda call: False
            await stream.append("The end.")
            assert stream.text == "A beginning. More. The end."
    assert text(redis) == "A beginning. More. The end."
    assert log(redis)[-1]["outcome"] == "finish"


async def test_reopening_with_a_lost_answer_loses_no_text(redis: RedisServer) -> None:
    async with Worker.redis(redis.url, retry_for=0) as worker:
        faults = Faults(worker)
        async with worker.stream("s-1", "t-1", watch_stop=False, flush_interval=0) as stream:
            await stream.append("Hel")
            redis.client.flushall()
            faults.is_answer_lost = lambda call: call.op == "open"
            with pytest.raises(Unavailable):
                await stream.append("l")
            faults.is_answer_lost = lambda call: False
            await stream.append("o")
    assert text(redis) == "Hello"


async def test_a_stream_that_is_gone_at_its_end_is_told_whole(redis: RedisServer, redis_worker: Worker) -> None:
    async with redis_worker.stream("s-1", "t-1", watch_stop=False) as stream:
        await stream.append("Hello")
        redis.client.flushall()
    assert text(redis) == "Hello"
    assert log(redis)[-1]["outcome"] == "finish"


async def test_a_stream_whose_text_is_too_large_ends_as_failed(redis: RedisServer, redis_worker: Worker) -> None:
    async with redis_worker.stream("s-1", "t-1", watch_stop=False, flush_interval=0) as stream:
        await stream.append("x" * (LIMIT - 10))
        with pytest.raises(TooLarge):
            await stream.append("y" * 11)
        with pytest.raises(TooLarge):
            await stream.append("z")
        assert len(stream.text) == LIMIT - 10
        await stream.error("too_long", "The answer is too long.")
    assert stream.outcome == "error"
    assert log(redis)[-1]["error"]["code"] == "too_long"


@pytest.mark.parametrize("interval", [0, 60])
async def test_a_stream_that_lacks_text_is_not_finished(
    redis: RedisServer, redis_worker: Worker, interval: float
) -> None:
    async def answer() -> None:
        async with redis_worker.stream("s-1", "t-1", watch_stop=False, flush_interval=interval) as stream:
            await stream.append("x" * (LIMIT - 10))
            # Refused at once, or with the end of the block.
            with contextlib.suppress(TooLarge):
                await stream.append("y" * 11)

    with pytest.raises(TooLarge):
        await answer()
    assert redis.client.hget(STATE, "state") == "error"
    assert log(redis)[-1]["error"] == {"code": "worker_error", "message": "The text is incomplete."}


async def test_text_behind_the_end_of_another_worker_is_told_as_lost(redis: RedisServer, redis_worker: Worker) -> None:
    async def answer() -> None:
        async with redis_worker.stream("s-1", "t-1", watch_stop=False, flush_interval=0.2) as mine:
            await mine.append("a")
            await mine.append("b")
            async with redis_worker.stream("s-1", "t-1", watch_stop=False, adopt=True):
                pass
            await asyncio.sleep(0.5)

    with pytest.raises(StreamEnded):
        await answer()


async def test_a_stream_that_does_not_stay_is_given_up(redis: RedisServer, redis_worker: Worker) -> None:
    faults = Faults(redis_worker)
    async with redis_worker.stream("s-1", "t-1", watch_stop=False, flush_interval=0) as stream:
        await stream.append("a")

        def forget(call: StreamCall) -> bool:
            if call.op != "open":
                redis.client.flushall()
            return False

        faults.is_refused = forget
        with pytest.raises(StreamNotFound):
            async with asyncio.timeout(10):
                await stream.append("b")
        faults.is_refused = lambda call: False
    assert text(redis) == "ab"


async def test_a_flush_of_nothing_delays_no_text(redis: RedisServer, redis_worker: Worker) -> None:
    async with redis_worker.stream("s-1", "t-1", watch_stop=False, flush_interval=60) as stream:
        await stream.flush()
        await stream.append("a")
        assert text(redis) == "a"
