"""An application that reads files on its users' machines: it calls the tools of their agents through wsproxy."""

import asyncio
import json
import os
import pathlib
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, Field
from wsproxy import AgentOffline, Agents, Progress, Unavailable, WsproxyError

# Over HTTP a gateway and one of its API keys suffice; over Redis no request goes to a gateway.
if "REDIS_URL" in os.environ:
    agents = Agents.redis(os.environ["REDIS_URL"])
else:
    agents = Agents.http(os.environ.get("GATEWAY_URL", "http://127.0.0.1:8080"), os.environ["API_KEY"])
# The gateway's database, where it writes a row for each call. With PostgreSQL the table is the same.
DATABASE = os.environ.get("DATABASE", "wsproxy.db")
HERE = pathlib.Path(__file__).parent


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with agents:
        yield


app = FastAPI(lifespan=lifespan)


async def user() -> str:
    """The user who asks. Put your login here: all visitors are the user `demo` in this example."""
    return "demo"


User = Annotated[str, Depends(user)]


@app.get("/files")
async def files(asking: User) -> list[str]:
    """Names of the files that the user's agent offers."""
    try:
        return await agents.call(asking, "list_files", timeout=10, retry_for=1)
    except AgentOffline as error:
        raise HTTPException(503, "Your agent is not connected.") from error
    except Unavailable as error:
        raise HTTPException(503, "The gateway is away. This page tries again.") from error
    except WsproxyError as error:
        raise HTTPException(502, str(error)) from error


class Wanted(BaseModel):
    """The file that the page asks for."""

    path: str = Field(max_length=1000)


@app.post("/calls")
async def read(wanted: Wanted, asking: User) -> StreamingResponse:
    """Calls `read_file` on the user's agent, and tells the page how it goes: a JSON object on each line.

    A page that hangs up cancels the call, and the agent stops reading.
    """
    return StreamingResponse(follow(asking, wanted.path), media_type="application/x-ndjson")


async def follow(asking: str, path: str) -> AsyncIterator[str]:
    # The key names the call: it is its id in the audit log, and makes it safe to send the call again.
    call_id = uuid.uuid4().hex
    news: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def tell(progress: Progress) -> None:
        news.put_nowait({"progress": progress.progress, "total": progress.total, "message": progress.message})

    async def call() -> None:
        try:
            text = await agents.call(
                asking, "read_file", {"path": path}, timeout=60, retry_for=5, idempotency_key=call_id, on_progress=tell
            )
            news.put_nowait({"result": text})
        except WsproxyError as error:
            news.put_nowait({"error": type(error).__name__, "message": str(error)})

    yield json.dumps({"call": call_id}) + "\n"
    task = asyncio.create_task(call())
    try:
        while True:
            item = await news.get()
            yield json.dumps(item) + "\n"
            if "progress" not in item:
                return
    finally:
        # Where the page has hung up, this cancels the call.
        task.cancel()


@app.get("/calls/{call_id}/audit")
async def audit(call_id: str, asking: User) -> dict[str, Any]:
    """The row of a call in the audit log, which is written a moment after the call has ended."""
    end = time.monotonic() + 3
    while (row := await asyncio.to_thread(audit_row, asking, call_id)) is None:
        if time.monotonic() > end:
            raise HTTPException(404, "There is no such row: the call reached no gateway, or the log is behind.")
        await asyncio.sleep(0.1)
    return row


def audit_row(asking: str, call_id: str) -> dict[str, Any] | None:
    columns = "created_at, tool_name, params, outcome, success, error, execution_time_ms, details"
    with closing(sqlite3.connect(f"file:{DATABASE}?mode=ro", uri=True, timeout=5)) as database:
        database.row_factory = sqlite3.Row
        found = database.execute(
            f"SELECT {columns} FROM tool_execution_logs WHERE user_id = ? AND request_id = ? ORDER BY id DESC LIMIT 1",
            (asking, call_id),
        ).fetchone()
    return dict(found) if found is not None else None


@app.get("/")
async def page() -> FileResponse:
    """The page."""
    return FileResponse(HERE / "index.html")
