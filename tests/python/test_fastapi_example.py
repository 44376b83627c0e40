"""The FastAPI example, end to end: uvicorn and the gateway know each other only through Redis."""

import asyncio
import json
import sys
import time

import httpx
import pytest
from conftest import ROOT, Process, free_port, until
from websockets.asyncio.client import connect

EXAMPLE = ROOT / "examples/fastapi-session"
WORKER_CHANNEL = "agent:demo:sessions"


@pytest.fixture
def backend(tmp_path, redis):
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port), "--log-level", "warning"]
    process = Process("uvicorn", command, tmp_path, {"REDIS_URL": redis.url, "PYTHONDONTWRITEBYTECODE": "1"}, cwd=EXAMPLE)
    process.ready("backend", lambda: httpx.get(f"http://127.0.0.1:{port}/openapi.json").status_code == 200)
    until("the worker listens", lambda: heard(redis, WORKER_CHANNEL))
    yield f"http://127.0.0.1:{port}"
    process.stop()


def heard(redis, channel):
    return redis.client.pubsub_numsub(channel)[0][1]


def issue(backend, known=None):
    own = {name: known[name] for name in ("session_id", "proof")} if known else {}
    answer = httpx.post(f"{backend}/sessions", params=own)
    assert answer.status_code == 201
    return answer.json()


def open_session(gateway, issued):
    # Unlike a browser, a program sets the header.
    headers = {"Authorization": f"Bearer {issued['token']}"}
    return connect(gateway.ws + issued["path"], additional_headers=headers, proxy=None)


async def ask(client, text):
    await client.send(json.dumps({"type": "prompt", "text": text}))


async def answer(client):
    """The streamed answer up to `done`; the gateway's own notices are not part of it."""
    text = ""
    async with asyncio.timeout(20):
        async for data in client:
            message = json.loads(data)
            if message["type"] == "token":
                text += message["text"]
            elif message["type"] == "done":
                return text
            else:
                assert message["type"] == "bus_recovered", message
    raise AssertionError("closed before the answer ended")


def test_the_example_is_as_short_as_it_claims():
    assert len((EXAMPLE / "app.py").read_text().splitlines()) < 65


def test_a_session_id_alone_gets_no_token(backend, redis):
    own, other = issue(backend), issue(backend)
    for proof in ["", other["proof"], own["proof"][:-1], "ä"]:
        answer = httpx.post(f"{backend}/sessions", params={"session_id": own["session_id"], "proof": proof})
        assert answer.status_code == 403, proof
    stored = redis.client.get(f"session:{own['session_id']}:auth")
    assert stored == f"agent/demo {own['token']}", "no other call replaced the token"
    assert issue(backend, own)["session_id"] == own["session_id"]


@pytest.mark.asyncio
async def test_a_session_streams_its_answers(gateway, backend):
    async with open_session(gateway, issue(backend)) as client:
        await ask(client, "to be or not to be")
        assert await answer(client) == "to be or not to be "
        await ask(client, "that is the question")
        assert await answer(client) == "that is the question "


@pytest.mark.asyncio
async def test_prompts_sent_at_once_are_answered_in_order(gateway, backend):
    async with open_session(gateway, issue(backend)) as client:
        for number in range(8):
            await ask(client, f"number {number}")
        assert [await answer(client) for _ in range(8)] == [f"number {number} " for number in range(8)]


@pytest.mark.asyncio
async def test_the_answer_goes_on_while_the_client_is_away_and_a_fresh_token_brings_it_back(gateway, backend):
    first = issue(backend)
    words = [f"w{number}" for number in range(90)]
    client = await open_session(gateway, first)
    await ask(client, " ".join(words))
    before = json.loads(await client.recv())["text"].strip()
    client.transport.abort()
    async with open_session(gateway, issue(backend, first)) as client:
        after = (await answer(client)).split()
    assert before == words[0]
    # Nothing is kept for a client that is away, but what arrives is in order and up to the end.
    assert 0 < len(after) < len(words) and after == words[-len(after):]


@pytest.mark.asyncio
async def test_two_workers_answer_once(gateway, backend, tmp_path, redis):
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(free_port()), "--log-level", "warning"]
    second = Process("uvicorn-2", command, tmp_path, {"REDIS_URL": redis.url}, cwd=EXAMPLE)
    try:
        second.ready("second worker", lambda: heard(redis, WORKER_CHANNEL) == 2)
        async with open_session(gateway, issue(backend)) as client:
            await ask(client, "once")
            assert await answer(client) == "once "
            await ask(client, "again")
            assert await answer(client) == "again "
    finally:
        second.stop()


@pytest.mark.asyncio
async def test_the_worker_lets_go_of_a_session_that_ended(gateway, backend, redis):
    issued = issue(backend)
    up = f"session:{issued['session_id']}:up"
    async with open_session(gateway, issued) as client:
        await ask(client, "hello")
        await answer(client)
        assert heard(redis, up) == 1
    until("the worker unsubscribes", lambda: heard(redis, up) == 0)
    until("the session has no owner", lambda: not redis.client.exists(f"session:{issued['session_id']}:owner"))


@pytest.mark.asyncio
async def test_an_outage_of_redis_is_survived_by_worker_and_client(gateway, backend, redis):
    async with open_session(gateway, issue(backend)) as client:
        await ask(client, "before")
        assert await answer(client) == "before "
        redis.kill()
        # Longer than redis-py's own retries last: the outage that its defaults do not survive.
        down_until = time.monotonic() + 6
        while time.monotonic() < down_until:
            await asyncio.sleep(0.1)
        redis.start()
        until("the worker listens again", lambda: heard(redis, WORKER_CHANNEL))
        until("the gateway is back", lambda: httpx.get(f"{gateway.http}/ready").status_code == 200)
        await ask(client, "after")
        assert await answer(client) == "after "
    async with open_session(gateway, issue(backend)) as client:
        await ask(client, "anew")
        assert await answer(client) == "anew "
