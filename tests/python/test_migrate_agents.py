"""docs/guides/migrate-agents.md, step by step: existing tables with clear secrets, an existing agent and an existing caller."""

import asyncio
import getpass
import glob
import hashlib
import json
import os
import shutil
import signal
import subprocess

import httpx
import pytest
import redis.asyncio as async_redis
from conftest import ROOT, Process, free_port, until
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

USER, SECRET = "user_2abcdefghijklmnopqrst", hashlib.sha256(b"one").hexdigest()
SHORT, SHORT_SECRET = "user_short", "hunter2"
KEY = {"Authorization": "Bearer a-key-of-this-test"}
TABLES = f"""
CREATE TABLE agent_credentials (
  user_id TEXT PRIMARY KEY, shared_secret TEXT NOT NULL UNIQUE,
  platform TEXT NOT NULL CHECK (platform IN ('win32', 'linux', 'darwin')),
  status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'connected', 'disconnected')),
  created_at TIMESTAMP NOT NULL DEFAULT now(), last_seen TIMESTAMP, metadata JSONB);
CREATE TABLE tool_execution_logs (
  id BIGSERIAL PRIMARY KEY, user_id TEXT NOT NULL, request_id TEXT NOT NULL, tool_name TEXT NOT NULL,
  params JSONB, result JSONB, success BOOLEAN, error TEXT, execution_time_ms INT, created_at TIMESTAMP NOT NULL DEFAULT now());
CREATE TABLE user_sessions (id BIGSERIAL PRIMARY KEY, user_id TEXT);
INSERT INTO agent_credentials (user_id, shared_secret, platform)
  VALUES ('{USER}', '{SECRET}', 'linux'), ('{SHORT}', '{SHORT_SECRET}', 'win32');
INSERT INTO tool_execution_logs (user_id, request_id, tool_name, params, success, created_at)
  SELECT '{USER}', 'old-' || n, 'unknown', '{{}}', true, timestamp '2020-01-01' + n * interval '1 minute' FROM generate_series(1, 1000) n;
"""


class Postgres:
    """A PostgreSQL of the test's own, with the tables of an existing deployment."""

    def __init__(self, folder):
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
        self.bin = found[-1] if found else os.path.dirname(shutil.which("initdb") or "/initdb")
        self.port, data = free_port(), folder / "postgres"
        self.data = data
        data.mkdir()
        # PostgreSQL refuses to run as root.
        self.user = ["runuser", "-u", "postgres", "--"] if getpass.getuser() == "root" else []
        if self.user:
            for path in [*folder.parents, folder]:
                if str(path).startswith("/tmp/") and path.stat().st_uid == os.getuid():
                    path.chmod(path.stat().st_mode | 0o011)
            shutil.chown(data, "postgres")
        initdb = [*self.user, f"{self.bin}/initdb", "-D", str(data), "-A", "trust", "-U", "postgres"]
        made = subprocess.run(initdb, capture_output=True, text=True, cwd="/")
        assert made.returncode == 0, made
        command = [*self.user, f"{self.bin}/postgres", "-D", str(data), "-p", str(self.port), "-h", "127.0.0.1", "-k", str(data)]
        self.process = Process("postgres", [*command, "-c", "fsync=off"], folder)
        self.url = f"postgres://postgres@127.0.0.1:{self.port}/postgres"
        ping = [f"{self.bin}/pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        self.process.ready("postgres", lambda: subprocess.run(ping).returncode == 0)
        self.query(TABLES)

    def stop(self):
        # The child may be runuser, which passes no SIGINT on; and a plain SIGTERM waits for all clients.
        postmaster = int((self.data / "postmaster.pid").read_text().splitlines()[0])
        os.kill(postmaster, signal.SIGINT)
        self.process.child.wait(20)

    def query(self, sql):
        command = ["psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "-qAt", "-v", "ON_ERROR_STOP=1", "-c", sql]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def old_rows(self):
        columns = "id, user_id, request_id, tool_name, params, result, success, error, execution_time_ms, created_at"
        rows = f"SELECT {columns} FROM tool_execution_logs WHERE id <= 1000"
        return self.query(f"SELECT count(*), md5(string_agg(old::text, ',' ORDER BY id)) FROM ({rows}) old")

    def columns(self):
        columns = "SELECT string_agg(column_name, ',' ORDER BY ordinal_position) FROM information_schema.columns"
        return self.query(f"{columns} WHERE table_name = 'tool_execution_logs'")


@pytest.fixture
def postgres(tmp_path):
    server = Postgres(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def variables(postgres, redis):
    """Those of the existing deployment, and what switches the family on."""
    key = KEY["Authorization"].removeprefix("Bearer ")
    return {"DATABASE_URL": postgres.url, "REDIS_URL": redis.url, "WSPROXY_ENDPOINTS__AGENTS": "true", "WSPROXY_API__KEYS": key}


def start(start_gateway, **variables):
    """Starts an instance, and waits for its database, which is opened in the background."""
    gateway = start_gateway(**variables)
    url = f"http://127.0.0.1:{variables['METRICS_PORT']}" if "METRICS_PORT" in variables else gateway.http
    until("the database", lambda: "wsproxy_database_up 1" in httpx.get(f"{url}/metrics").text)
    return gateway


def wsproxy(variables, *arguments):
    """Runs a command of the gateway's binary."""
    binary = os.environ.get("WSPROXY_BIN", str(ROOT / "target/debug/wsproxy"))
    done = subprocess.run([binary, *arguments], env=variables | {"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode == 0, done
    return done.stdout


async def existing_agent(url):
    """Connects as existing agents do: everything in the URL, and a heartbeat at once."""
    socket = await connect(url)
    assert json.loads(await socket.recv())["type"] == "connected"
    await socket.send('{"type":"heartbeat","timestamp":1}')

    async def serve():
        try:
            async for text in socket:
                message = json.loads(text)
                if message["type"] == "tool_call":
                    answer = {"success": True, "result": {"got": message["params"]}}
                    await socket.send(json.dumps({"type": "tool_response", "requestId": message["requestId"]} | answer))
        except ConnectionClosed:
            pass
        return socket.close_code

    return asyncio.create_task(serve())


async def existing_call(redis, user, request, params):
    """Calls a tool as existing callers do: the answer on the channel of the request, which has no request id in it."""
    client = async_redis.from_url(redis.url, decode_responses=True)
    async with client, client.pubsub() as answers:
        assert await client.exists(f"agent:{user}:server") == 1
        await answers.subscribe(f"response:{request}")
        assert (await answers.get_message(timeout=5))["type"] == "subscribe"
        call = {"type": "tool_call", "requestId": request, "tool": "read_file", "params": params}
        await client.publish(f"agent:{user}:commands", json.dumps(call))
        return json.loads((await answers.get_message(timeout=10))["data"])


async def refused(url):
    with pytest.raises(InvalidStatus) as error:
        await connect(url)
    return error.value.response.status_code


def url_of(gateway, user, secret):
    return f"{gateway.ws}/?userId={user}&secret={secret}"


@pytest.mark.asyncio
async def test_an_existing_deployment_moves_step_by_step(start_gateway, variables, postgres, redis):
    rows, columns = postgres.old_rows(), postgres.columns()
    gateway = start(start_gateway, **variables)

    # 1 and 2: a look, and an instance beside the old server.
    assert "ADD COLUMN outcome" in wsproxy(variables, "migrate", "--dry-run")
    agent = await existing_agent(url_of(gateway, USER, SECRET))
    answer = await existing_call(redis, USER, "V1StGXR8_Z5jdHi6B-myT", {"path": "/x", "password": "p"})
    assert answer == {"userId": USER, "success": True, "result": {"got": {"path": "/x", "password": "p"}}}
    until("the row", lambda: postgres.query("SELECT count(*) FROM tool_execution_logs WHERE id > 1000") == "1")
    stored = postgres.query("SELECT tool_name, params->>'password', success, error IS NULL FROM tool_execution_logs WHERE id > 1000")
    assert stored == "read_file|[redacted]|t|t"
    assert postgres.columns() == columns, "a start changes no table of an application"
    until("the status", lambda: postgres.query(f"SELECT status FROM agent_credentials WHERE user_id = '{USER}'") == "connected")

    # The application changes a secret: the old one opens nothing from then on.
    changed = hashlib.sha256(b"two").hexdigest()
    postgres.query(f"UPDATE agent_credentials SET shared_secret = '{changed}' WHERE user_id = '{USER}'")
    assert await refused(url_of(gateway, USER, SECRET)) == 403

    # 3: the columns.
    assert "column outcome" in wsproxy(variables, "migrate")
    assert wsproxy(variables, "migrate", "--dry-run").startswith("Nothing to do")

    # 4: an agent that comes back replaces its older connection; calls over HTTP find it.
    again = await existing_agent(url_of(gateway, USER, changed))
    assert await agent == 4001
    async with httpx.AsyncClient(base_url=gateway.http, headers=KEY) as client:
        call = await client.post(f"/api/v1/agents/{USER}/calls", json={"tool": "ls"})
    assert (call.status_code, call.json()["result"]) == (200, {"got": {}})

    # 5: hashes. Agents keep their secrets; what is too short stays as it is.
    dry = json.loads(wsproxy(variables, "agents", "adopt", "--dry-run", "--json"))
    assert (dry["adopted"], dry["too_short"]) == ([USER], [SHORT])
    assert postgres.query(f"SELECT shared_secret FROM agent_credentials WHERE user_id = '{USER}'") == changed
    wsproxy(variables, "agents", "adopt")
    assert postgres.query(f"SELECT left(shared_secret, 7) FROM agent_credentials WHERE user_id = '{USER}'") == "sha256$"
    newest = await existing_agent(url_of(gateway, USER, changed))
    assert await again == 4001
    stored = postgres.query(f"SELECT shared_secret FROM agent_credentials WHERE user_id = '{USER}'")
    assert await refused(url_of(gateway, USER, stored)) == 403, "a stored hash is no secret"
    assert (await existing_call(redis, USER, "r-2", {}))["success"]

    assert postgres.old_rows() == rows, "no row of the old log has changed"
    gateway.process.stop()
    assert await newest == 1012
    assert redis.client.exists(f"agent:{USER}:server") == 0
    assert postgres.query(f"SELECT status FROM agent_credentials WHERE user_id = '{USER}'") == "disconnected"


def test_metrics_move_to_their_port(start_gateway, variables):
    port = free_port()
    gateway = start(start_gateway, **variables, METRICS_PORT=str(port))
    assert httpx.get(f"{gateway.http}/metrics").status_code == 404
    assert httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 200
    for address in [gateway.http, f"http://127.0.0.1:{port}"]:
        assert httpx.get(f"{address}/health").json()["status"] == "healthy"
