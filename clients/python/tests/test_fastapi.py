"""Tokens as a dependency of FastAPI, which the package itself does not import."""

import subprocess
import sys
from typing import Annotated

import httpx
import pytest
from fastapi import Depends, FastAPI, Header, HTTPException

from conftest import RedisServer
from wsproxy import SessionToken, Worker


async def signed_in(x_user: Annotated[str, Header()]) -> str:
    return x_user


async def own_session(user: Annotated[str, Depends(signed_in)], session_id: str | None = None) -> str | None:
    if session_id is not None and not session_id.startswith(user):
        raise HTTPException(403)
    return session_id


@pytest.mark.asyncio
async def test_a_token_is_a_dependency(redis: RedisServer, redis_worker: Worker) -> None:
    app = FastAPI()
    dependency = redis_worker.token_dependency("demo", own_session, ttl=5)

    @app.post("/sessions", status_code=201)
    async def create(token: Annotated[SessionToken, Depends(dependency)]) -> dict[str, str | float]:
        return token.as_dict()

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://app", headers={"x-user": "ann"}) as http:
        mine = await http.post("/sessions", params={"session_id": "ann-1"})
        assert mine.status_code == 201
        assert mine.json()["path"] == "/demo/ws/ann-1"
        assert redis.client.get("session:ann-1:auth") == f"agent/demo {mine.json()['token']}"
        assert (await http.post("/sessions")).json()["session_id"]
        assert (await http.post("/sessions", params={"session_id": "bob-1"})).status_code == 403
        assert (await http.post("/sessions", headers={"x-user": ""}, params={"session_id": "x"})).status_code != 500
    parameters = app.openapi()["paths"]["/sessions"]["post"]["parameters"]
    assert {each["name"] for each in parameters} == {"session_id", "x-user"}


def test_the_package_imports_neither_fastapi_nor_websockets() -> None:
    code = "import sys, wsproxy, wsproxy.client; sys.exit(any(m in sys.modules for m in ('fastapi', 'websockets')))"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
