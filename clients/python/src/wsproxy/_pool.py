"""Connection pools of redis-py for the forms of URL that the gateway takes: one server, or sentinels."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio import ConnectionPool
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool

_SENTINEL_PORT = 26379


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
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, has_password, password = credentials.partition(":")
    master, _, database = parts.path.lstrip("/").partition("/")
    if not master:
        raise ValueError("the name of the master is missing: redis+sentinel://host:26379/mymaster")
    options["db"] = int(database or dict(parse_qsl(parts.query)).get("db", "0"))
    if has_password:
        options["password"] = unquote(password)
        if user:
            options["username"] = unquote(user)
    # What concerns sockets and TLS holds for the sentinels too; logins and databases are their own.
    shared = {name: value for name, value in options.items() if name.startswith(("socket_", "ssl_"))}
    if is_tls:
        shared["ssl"] = options["ssl"] = True
    sentinels = [_place(each) for each in hosts.split(",")]
    manager = Sentinel(sentinels, sentinel_kwargs=shared | dict(of_sentinels or {}))  # type: ignore[no-untyped-call]
    return SentinelConnectionPool(unquote(master), manager, **options)  # type: ignore[no-untyped-call]


def _place(text: str) -> tuple[str, int]:
    """Reads ``host[:port]``; an IPv6 address is in brackets."""
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("the host of a sentinel is missing")
    return parts.hostname, parts.port or _SENTINEL_PORT
