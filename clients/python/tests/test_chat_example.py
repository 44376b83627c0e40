"""The chat example: its workers die, and the answer is whole."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from conftest import ROOT, Process, RedisServer, free_port, until
from wsproxy.client import MergedStreams

EXAMPLE = ROOT / "examples/fastapi-chat"


class Chat:
    """The example's server, with two workers, and what it said to one session."""

    def __init__(self, folder: pathlib.Path, redis: RedisServer) -> None:
        self.redis, self.port = redis, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(EXAMPLE), "--workers", "2"]
        self.command = [*command, "--port", str(self.port), "--log-level", "warning"]
        self.env = {
            "REDIS_URL": redis.url,
            "PYTHONPATH": str(ROOT / "clients/python/src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CHAT_SECRET": "a-secret-of-the-tests",
            "CHAT_TOKENS": "60",
            "CHAT_TOKENS_PER_SECOND": "20",
            "CHAT_CLAIM_SECONDS": "1",
            "CHAT_LEASE_SECONDS": "4",
        }
        self.folder = folder
        self.start()
        self.user = httpx.Client(base_url=self.url)
        self.session = self.user.post("/sessions").json()["session_id"]

    def start(self) -> None:
        self.process = Process("uvicorn", self.command, self.folder, self.env)
        self.process.ready("the example", lambda: httpx.get(f"{self.url}/").status_code == 200)

    def ask(self, prompt: str) -> str:
        """Sends a prompt as the gateway passes it on, until it is answered; gives its id."""
        answer = str(uuid.uuid4())
        message = json.dumps({"type": "prompt", "id": answer, "text": prompt})
        up = f"session:{self.session}:up"
        until("the prompt is heard", lambda: self.redis.client.publish(up, message))
        until("the answer begins", lambda: len(self.text(answer)) > 30)
        return answer

    def streams(self) -> MergedStreams:
        streams = MergedStreams()
        for text in self.redis.texts(f"{{session:{self.session}:down}}:log"):
            streams.feed(json.loads(text))
        return streams

    def last(self, answer: str) -> Any:
        """The last attempt at an answer."""
        attempts = [each for each in self.streams().values() if each.meta and each.meta["answer"] == answer]
        return attempts[-1] if attempts else None

    def text(self, answer: str) -> str:
        stream = self.last(answer)
        return stream.text if stream else ""

    def whole(self, prompt: str) -> str:
        return httpx.get(f"{self.url}/answer", params={"prompt": prompt}).text

    def owner(self) -> str:
        return str(self.redis.client.get(f"chat:{self.session}:owner") or "")

    def finished(self, answer: str) -> Any:
        def ended() -> Any:
            stream = self.last(answer)
            return stream if stream and stream.state in ("finish", "cancelled") else None

        return until("the answer ends", ended)


@pytest.fixture
def chat(tmp_path: pathlib.Path, redis: RedisServer) -> Iterator[Chat]:
    made = Chat(tmp_path, redis)
    yield made
    made.user.close()
    made.process.stop()


def test_a_user_gets_tokens_for_own_sessions_only(chat: Chat) -> None:
    own = {"session_id": chat.session}
    prompt = {"id": "a", "text": "mine"}
    assert chat.user.post("/sessions", params=own).json()["session_id"] == chat.session
    assert chat.user.post("/event-sources", params=own).status_code == 201
    assert chat.user.post("/prompts", params=own, json=prompt).status_code == 202
    token = chat.redis.client.get(f"session:{chat.session}:auth")
    name, mark = chat.session.split(".")
    with httpx.Client(base_url=chat.url) as other:
        theirs = other.post("/sessions").json()["session_id"]
        their_name, their_mark = theirs.split(".")
        foreign = [chat.session, f"{name}.{their_mark}", f"{their_name}.{mark}", name, f"{name}.", "", "a" * 16, "ä.ö"]
        for session_id in foreign:
            for path, body in [("/sessions", None), ("/event-sources", None), ("/prompts", prompt)]:
                answer = other.post(path, params={"session_id": session_id}, json=body)
                assert answer.status_code == 403, (path, session_id)
        # Nor does a cookie that this application did not make name a user.
        user = chat.user.cookies["chat_user"].split(".")[0]
        for cookie in [f"{user}.", f"{user}.{mark}", user]:
            answer = httpx.post(f"{chat.url}/sessions", params=own, cookies={"chat_user": cookie})
            assert answer.status_code == 403, cookie
        assert other.post("/sessions", params={"session_id": theirs}).status_code == 201
    assert chat.redis.client.get(f"session:{chat.session}:auth") == token, "no other call replaced the token"


def test_a_prompt_is_answered_once_though_it_is_sent_again(chat: Chat) -> None:
    answer = chat.ask("hello ä")
    again = json.dumps({"type": "prompt", "id": answer, "text": "hello ä"})
    chat.redis.client.publish(f"session:{chat.session}:up", again)
    stream = chat.finished(answer)
    assert stream.text == chat.whole("hello ä")
    assert len(chat.streams()) == 1
    until("nothing is left to do", lambda: not chat.redis.client.exists(f"chat:{chat.session}:jobs"))


def test_a_page_stops_an_answer(chat: Chat) -> None:
    answer = chat.ask("stop me")
    chat.redis.client.publish(f"session:{chat.session}:up", json.dumps({"type": "stream_stop", "stream": answer}))
    stream = chat.finished(answer)
    assert stream.state == "cancelled"
    assert chat.whole("stop me").startswith(stream.text)


@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGTERM])
def test_the_other_worker_goes_on_when_one_dies(chat: Chat, with_signal: signal.Signals) -> None:
    answer = chat.ask("who dies")
    owner = chat.owner()
    os.kill(int(owner.split("-")[0]), with_signal)
    stream = chat.finished(answer)
    until("the other one owns the session", lambda: chat.owner() not in ("", owner))
    assert (stream.id, stream.text, stream.complete) == (answer, chat.whole("who dies"), True)


def test_the_answer_is_whole_after_all_workers_were_away_for_longer_than_the_lease(chat: Chat) -> None:
    chat.process.stop()
    # So slow that it cannot be done before its worker is gone.
    chat.env["CHAT_TOKENS_PER_SECOND"] = "2"
    chat.start()
    answer = chat.ask("all die")
    chat.process.stop()
    chat.env["CHAT_TOKENS_PER_SECOND"] = "100"
    # As the gateway does when the lease has run out.
    lost = ROOT / "clients/python/src/wsproxy/scripts/stream.lua"
    name = f"session:{chat.session}:down"
    state = f"{{{name}}}:stream:{answer}"
    keys = [f"{{{name}}}:log", state, f"{state}:text", f"{{{name}}}:streams"]
    args = ["lost", name, answer, 1000, 1 << 20, 3_600_000, 0]
    chat.redis.client.hset(state, "ends", 1)
    chat.redis.client.eval(lost.read_text(), len(keys), *keys, *args)
    assert chat.last(answer).error["code"] == "worker_lost"
    chat.start()
    stream = chat.finished(answer)
    assert (stream.id, stream.text) == (f"{answer}.2", chat.whole("all die"))


def test_the_answer_is_whole_after_redis_came_back_empty(chat: Chat) -> None:
    answer = chat.ask("redis dies")
    chat.redis.kill()
    chat.redis.start()
    stream = chat.finished(answer)
    assert stream.text == chat.whole("redis dies")
    # And the session goes on.
    assert chat.finished(chat.ask("again")).text == chat.whole("again")


def test_requests_are_refused_while_redis_is_away_and_taken_afterwards(chat: Chat) -> None:
    own, cookies = {"session_id": chat.session}, dict(chat.user.cookies)

    def post(path: str) -> int:
        prompt = {"id": str(uuid.uuid4()), "text": "hello"}
        # A connection of its own, so that both workers are asked.
        return httpx.post(chat.url + path, params=own, cookies=cookies, json=prompt, timeout=20).status_code

    with ThreadPoolExecutor(16) as pool:

        def statuses(path: str) -> set[int]:
            return set(pool.map(post, [path] * 16))

        assert statuses("/prompts") == {202}
        chat.redis.kill()
        for path in ["/prompts", "/sessions", "/event-sources"]:
            assert statuses(path) == {503}, path
        chat.redis.start()
        # Also of the connections that were open when Redis was killed.
        assert statuses("/prompts") == {202}
        assert statuses("/sessions") == {201}
