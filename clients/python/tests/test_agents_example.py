"""The example with a user's agent: what it reads and refuses, and what the page is told."""

from __future__ import annotations

import json
import pathlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from agents import issue, start
from conftest import API_KEY, ROOT, Gateway, Process, RedisServer, StartGateway, free_port, until

EXAMPLE = ROOT / "examples/fastapi-agents"
TEXT = "Straße ä 水 😀\n" * 2000


class Example:
    """The application and the agent of its user."""

    def __init__(self, folder: pathlib.Path, gateway: Gateway, redis_url: str | None) -> None:
        self.folder, self.gateway, self.is_over_redis = folder, gateway, redis_url is not None
        self.files = folder / "files"
        self.files.mkdir()
        (self.files / "notes.txt").write_text(TEXT)
        (self.files / "sub").mkdir()
        (self.files / "sub/b.txt").write_text("b")
        (self.files / ".hidden").write_text("hidden")
        (self.files / "link.txt").symlink_to(folder / "secret.txt")
        (folder / "secret.txt").write_text("not for callers")
        self.url = f"http://127.0.0.1:{free_port()}"
        self.env = {
            "GATEWAY_URL": gateway.url,
            "DATABASE": str(folder / "agents.db"),
            "PYTHONPATH": str(ROOT / "clients/python/src"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        own = {"REDIS_URL": redis_url} if redis_url else {"API_KEY": API_KEY}
        command = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(EXAMPLE)]
        command += ["--port", self.url.rpartition(":")[2], "--log-level", "warning"]
        self.app = Process("app", command, folder, self.env | own)
        self.app.ready("the application", lambda: httpx.get(self.url).status_code == 200)
        self.secret = issue(gateway, "demo")
        self.agent = self.start_agent()

    def start_agent(self, pause: str = "0.02") -> Process:
        own = {"AGENT_SECRET": self.secret, "AGENT_FOLDER": str(self.files), "AGENT_PAUSE": pause}
        agent = Process("agent", [sys.executable, str(EXAMPLE / "agent.py")], self.folder, self.env | own)
        until("the agent is connected", lambda: httpx.get(f"{self.url}/files").status_code == 200)
        return agent

    def read(self, path: str) -> list[dict[str, Any]]:
        """Messages to the page, from the call's id to its end."""
        answer = httpx.post(f"{self.url}/calls", json={"path": path}, timeout=30)
        assert answer.status_code == 200
        return [json.loads(line) for line in answer.text.splitlines()]

    def audit(self, call: str) -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/calls/{call}/audit")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


@pytest.fixture(params=["http", "redis"])
def example(
    request: pytest.FixtureRequest, tmp_path: pathlib.Path, start_gateway: StartGateway, redis: RedisServer
) -> Iterator[Example]:
    made = Example(tmp_path, start(start_gateway), redis.url if request.param == "redis" else None)
    yield made
    made.agent.stop()
    made.app.stop()


def test_a_file_is_read_with_progress_and_written_down(example: Example) -> None:
    assert httpx.get(f"{example.url}/files").json() == ["notes.txt", "sub/b.txt"]
    first, *steps, last = example.read("notes.txt")
    assert last == {"result": TEXT}
    done = [each["progress"] for each in steps]
    assert done == sorted(done)
    assert {(each["total"], each["message"]) for each in steps} == {(len(TEXT.encode()), "notes.txt")}
    # The result may overtake the last step.
    assert len(done) > 1
    assert done[-1] > len(TEXT.encode()) / 2
    row = example.audit(first["call"])
    assert (row["tool_name"], json.loads(row["params"])) == ("read_file", {"path": "notes.txt"})
    assert (row["outcome"], row["success"], row["error"]) == ("response", 1, None)
    assert row["execution_time_ms"] > 100


def test_nothing_outside_of_the_folder_is_read(example: Example) -> None:
    for path in ["../secret.txt", "/etc/passwd", "link.txt", "a\x00b", "no such", "sub", "x" * 900, ""]:
        [first, last] = example.read(path)
        assert last["error"] == "ToolError", path
        assert last["message"] in ("The path leads out of the agent's folder.", "There is no such file."), path
        assert example.audit(first["call"])["success"] == 0


def test_a_page_that_hangs_up_cancels_the_call(example: Example) -> None:
    example.agent.stop()
    example.agent = example.start_agent(pause="1")
    with httpx.stream("POST", f"{example.url}/calls", json={"path": "notes.txt"}) as answer:
        lines = answer.iter_lines()
        call = json.loads(next(lines))["call"]
        assert "progress" in json.loads(next(lines))
    until("the row is written", lambda: httpx.get(f"{example.url}/calls/{call}/audit").status_code == 200)
    assert example.audit(call)["outcome"] == "cancelled"


def test_an_agent_that_dies_is_told_after_some_patience(example: Example) -> None:
    example.agent.stop()
    example.agent = example.start_agent(pause="1")
    with httpx.stream("POST", f"{example.url}/calls", json={"path": "notes.txt"}, timeout=30) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert "progress" in json.loads(next(lines))
        example.agent.stop(signal.SIGKILL)
        begun = time.monotonic()
        [*_, last] = [json.loads(line) for line in lines]
    assert last["error"] == "AgentOffline"
    assert time.monotonic() - begun < 15
    assert httpx.get(f"{example.url}/files", timeout=30).status_code == 503


def test_no_other_user_sees_the_row(example: Example) -> None:
    first, *_ = example.read("sub/b.txt")
    assert example.audit(first["call"])["outcome"] == "response"
    assert httpx.get(f"{example.url}/calls/another/audit", timeout=30).status_code == 404


def test_a_wrong_secret_ends_the_agent_with_a_reason(example: Example) -> None:
    env = example.env | {"AGENT_SECRET": "wsa_" + "x" * 43}
    wrong = Process("wrong", [sys.executable, str(EXAMPLE / "agent.py")], example.folder, env)
    assert wrong.child.wait(20) == 1
    assert "refused the agent" in wrong.output()
    assert "Is the secret the newest one?" in wrong.output()


def test_the_page_is_told_that_the_gateway_is_away(example: Example, redis: RedisServer) -> None:
    if example.is_over_redis:
        redis.kill()
    else:
        example.gateway.kill()
    answer = httpx.get(f"{example.url}/files", timeout=20)
    assert (answer.status_code, answer.json()) == (503, {"detail": "The gateway is away. This page tries again."})
