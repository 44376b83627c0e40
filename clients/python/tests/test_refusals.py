"""Refusals of Redis: the package waits, does the call once, or says why it is not done."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from conftest import RedisServer, within
from wsproxy import Failure, InvalidRequest, Outgoing, Unavailable, Worker
from wsproxy._http import error_of
from wsproxy._redis import _script_error


def log(redis: RedisServer) -> list[Any]:
    entries: list[Any] = redis.client.xrange("{session:s-1:down}:log")
    return [json.loads(fields["data"]) for _, fields in entries]


STATES = [("maxmemory", 1000, 0), ("min-replicas-to-write", 1, 0)]


@pytest.mark.parametrize(("setting", "refused", "taken"), STATES)
@pytest.mark.asyncio
async def test_a_refusal_is_waited_for_and_the_call_is_done_once(
    redis: RedisServer, redis_worker: Worker, setting: str, refused: int, taken: int
) -> None:
    await redis_worker.send("s-1", {"n": 0})
    redis.client.config_set(setting, refused)
    calls = [
        asyncio.create_task(call)
        for call in (
            redis_worker.send("s-1", {"n": 1}),
            redis_worker.issue_token("demo", "s-1"),
        )
    ]
    await asyncio.sleep(0.2)
    assert not any(call.done() for call in calls)
    redis.client.config_set(setting, taken)
    for call in calls:
        await within(call)
    assert log(redis) == [{"n": 0}, {"n": 1}]


@pytest.mark.parametrize(("setting", "refused", "taken"), STATES)
@pytest.mark.asyncio
async def test_a_lasting_refusal_says_that_nothing_was_done(
    redis: RedisServer, setting: str, refused: int, taken: int
) -> None:
    async with Worker.redis(redis.url, retry_for=0.2) as worker:
        redis.client.config_set(setting, refused)
        for call in (worker.send("s-1", {}), worker.issue_token("demo", "s-1")):
            with pytest.raises(Unavailable, match="Not done") as raised:
                await within(call)
            assert not raised.value.in_doubt
        results = await within(worker.batch([Outgoing("session:s-1", {}), Outgoing("session:s-1", {})]))
        assert [(each.code, each.retryable) for each in results if isinstance(each, Failure)] == [
            ("Unavailable", True),
            ("Unavailable", True),
        ]
        redis.client.config_set(setting, taken)
        assert log(redis) == []


@pytest.mark.asyncio
async def test_a_key_of_another_kind_is_said_and_not_waited_for(redis: RedisServer, redis_worker: Worker) -> None:
    redis.client.set("{session:s-1:down}:log", "x")
    with pytest.raises(InvalidRequest, match="Not done: WRONGTYPE"):
        await within(redis_worker.send("s-1", {}))


@pytest.mark.asyncio
async def test_forgotten_scripts_are_sent_again(redis: RedisServer, redis_worker: Worker) -> None:
    for n in range(3):
        redis.client.script_flush()
        assert not (await within(redis_worker.send("s-1", {"n": n}))).duplicate
    redis.client.script_flush()
    async with redis_worker.stream("s-1") as stream:
        redis.client.script_flush()
        await stream.append("x")
        redis.client.script_flush()


@pytest.mark.parametrize("code", ["OOM", "MISCONF", "READONLY", "LOADING", "NOREPLICAS", "NOSCRIPT"])
def test_a_script_that_was_stopped_in_its_middle_says_why(code: str) -> None:
    for text in (
        f"Error running script (call to f_1): @user_script:4: {code} of Redis before 7",
        f"ERR Error running script (call to f_1): @user_script: 4: -{code} of Redis before 7",
        f"{code} of Redis 7 script: 1, on @user_script:4.",
    ):
        error = _script_error(text)
        assert isinstance(error, Unavailable), text
        assert not error.in_doubt, text
        assert str(error).startswith(f"Not done: {code}"), error
    stopped = _script_error("Error running script (call to f_1): @user_script:4: WRONGTYPE Operation against")
    assert isinstance(stopped, InvalidRequest)
    assert str(stopped).startswith("Not done: WRONGTYPE")


@pytest.mark.parametrize(
    ("status", "code", "in_doubt"),
    [
        (503, "not_done", False),
        (500, "not_done", False),
        (503, "full", False),
        (503, "bus_unavailable", True),
        (504, "deadline", True),
    ],
)
def test_the_api_says_what_was_certainly_not_done(status: int, code: str, in_doubt: bool) -> None:
    error = error_of(httpx.Response(status, json={"error": {"code": code, "message": "Why.", "retryable": True}}))
    assert isinstance(error, Unavailable)
    assert error.in_doubt == in_doubt
    other = error_of(
        httpx.Response(409, json={"error": {"code": "not_done", "message": "A stream.", "retryable": True}})
    )
    assert isinstance(other, InvalidRequest)
