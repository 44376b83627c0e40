"""The documented publish with redis-py alone, over each form of Redis."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

from cluster import Cluster
from conftest import ROOT, RedisServer
from test_sentinel import Sentinels

LOG = "{session:s-1:down}:log"


@pytest.fixture(params=["One server", "Redis Sentinel", "Redis Cluster"])
def form(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[tuple[str, str, Any]]:
    """A form, what its line makes of the example's address, and the Redis."""
    match request.param:
        case "One server":
            server = RedisServer(tmp_path)
            yield request.param, f'Redis.from_url("{server.url}")', server.client
            server.kill()
        case "Redis Sentinel":
            sentinels = Sentinels(tmp_path)
            login = 'sentinel_kwargs={"password": "secret"}'
            made = f'Sentinel([("127.0.0.1", {sentinels.places[0]})], {login}).master_for("mymaster")'
            yield request.param, made, sentinels.client(0)
            sentinels.stop()
        case _:
            cluster: Cluster = request.getfixturevalue("shared_cluster")
            cluster.empty()
            yield request.param, f'RedisCluster.from_url("redis://{cluster.nodes[0].place}")', cluster.client


@pytest.mark.asyncio
async def test_the_documented_publish_works(form: tuple[str, str, Any]) -> None:
    name, address, client = form
    page = (ROOT / "docs/guides/history.md").read_text()
    block = page.split("With redis-py alone", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    lines = block.splitlines()
    own = [line for line in lines if line.endswith(f"# {name}.")]
    assert len(own) == 1
    # The line of this form, with the address of the test's own Redis.
    others = [line for line in lines if not line.startswith("redis = ")]
    first = next(number for number, line in enumerate(others) if "redis.publish" in line)
    others.insert(first, re.sub(r"^redis = .*", lambda _: f"redis = {address}", own[0]))
    assert re.sub(r"\(.*", "", own[0]) == re.sub(r"\(.*", "", f"redis = {address}")
    code = "\n".join(others).replace('"publish.lua"', repr(str(ROOT / "spec/scripts/publish.lua")))
    body = "\n".join(f"    {line}" for line in code.splitlines())
    scope: dict[str, Any] = {}
    exec(f"async def run():\n{body}\n    return redis", scope)
    redis = await scope["run"]()
    assert [fields["data"] for _, fields in client.xrange(LOG)] == ['{"type":"token","text":"Hel"}']
    await redis.aclose()
