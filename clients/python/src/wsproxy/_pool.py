"""Connection pools of redis-py for one server or for sentinels. Knows no Redis Cluster."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

_SENTINEL_PORT = 26379
# Sentinels answer from memory: one that has not answered after this many seconds is taken for dead.
_SENTINEL_SECONDS = 1.0


def pool(url: str, options: dict[str, Any]) -> ConnectionPool:
    """A pool for ``url``: ``redis+sentinel://[user:password@]s1[:26379],s2,…/master[/database]``, or redis-py's forms.

    ``rediss+sentinel`` means TLS, to the sentinels too. ``options`` go to the connections; of them
    ``sentinel_kwargs``, such as ``{"password": "…"}``, go to those of the sentinels.
    """
    options = dict(options)
    of_sentinels = options.pop("sentinel_kwargs", None)
    scheme, found, _ = url.partition("+sentinel://")
    if not found:
        if of_sentinels is not None:
            raise ValueError("sentinel_kwargs needs a URL that begins with redis+sentinel:// or rediss+sentinel://")
        return ConnectionPool.from_url(url, **options)
    if scheme not in ("redis", "rediss", "valkey", "valkeys"):
        raise ValueError("the scheme must be redis+sentinel or rediss+sentinel")
    is_tls = scheme in ("rediss", "valkeys")
    parts = urlsplit(url)
    hosts = parts.netloc.rpartition("@")[2]
    master, _, database = parts.path.lstrip("/").partition("/")
    if not master:
        raise ValueError("the name of the master is missing: redis+sentinel://host:26379/mymaster")
    options["db"] = int(database or dict(parse_qsl(parts.query)).get("db", "0"))
    options |= login_of(parts.netloc)
    # Options of sockets and TLS hold for the sentinels too; logins and databases are their own.
    shared = {name: value for name, value in options.items() if name.startswith(("socket_", "ssl_"))}
    if is_tls:
        shared["ssl"] = options["ssl"] = True
    brief = {"socket_connect_timeout": _SENTINEL_SECONDS, "socket_timeout": _SENTINEL_SECONDS}
    # RESP 2 needs the fewest rights at a sentinel. A sentinel that is away is asked again for the next connection.
    fixed: dict[str, Any] = {"protocol": 2, "decode_responses": True, "retry": Retry(NoBackoff(), 0)}
    sentinels = [place_of(each, _SENTINEL_PORT, "sentinel") for each in hosts.split(",")]
    manager = _Sentinels(sentinels, sentinel_kwargs=shared | brief | dict(of_sentinels or {}) | fixed)  # type: ignore[no-untyped-call]
    return SentinelConnectionPool(unquote(master), manager, **options)  # type: ignore[no-untyped-call]


async def close(connections: ConnectionPool) -> None:
    """Ends the connections of a pool, and those to its sentinels."""
    await connections.disconnect()
    if isinstance(connections, SentinelConnectionPool):
        clients = connections.sentinel_manager.sentinels
        await asyncio.gather(*(each.aclose() for each in clients), return_exceptions=True)


class _Sentinels(Sentinel):
    """The sentinels of a master, which are all asked at once.

    redis-py asks them in order and takes the first answer. A sentinel that is frozen would hold up every connection,
    and one that was cut off names a master of the past.
    """

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """The address of the master that the newest failover made; of those before it sentinels may still tell."""
        asked = (_master(each, service_name) for each in self.sentinels)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        known = [each for each in answers if not isinstance(each, BaseException)]
        if not known:
            raise MasterNotFoundError(f"No sentinel names the master {service_name!r}: {answers}")
        return max(known, key=lambda each: each[0])[1]


async def _master(sentinel: Any, name: str) -> tuple[int, tuple[str, int]]:
    """Number of the newest failover that a sentinel knows, and the address of the master that it made."""
    state = await sentinel.sentinel_master(name)
    # While a failover lasts, the state has its number already, but still the address of the master before.
    address = await sentinel.sentinel_get_master_addr_by_name(name)
    if address is None:
        raise MasterNotFoundError("the name is not known")
    return state["config-epoch"], address


def login_of(netloc: str) -> dict[str, str]:
    """User and password of a URL, as options of redis-py."""
    user, has_password, password = netloc.rpartition("@")[0].partition(":")
    if not has_password:
        return {}
    return ({"username": unquote(user)} if user else {}) | {"password": unquote(password)}


def place_of(text: str, port: int, what: str) -> tuple[str, int]:
    """Reads ``host[:port]``; an IPv6 address is in brackets."""
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(f"the host of a {what} is missing")
    return parts.hostname, parts.port or port
