"""Workers that publish by every documented way, for as long as a round lasts."""

import asyncio
import contextlib
import itertools
import random
import time

import httpx
from redis.exceptions import RedisError
from wsproxy import WsproxyError

import names
from parts import until

# A worker gives up on one message after this long; it may or may not be there then.
GIVE_UP_SECONDS = 12.0
# Answers of the HTTP API after which the same request may be sent again.
AGAIN = {408, 429, 503, 504}


class Publishers:
    """All publishers of a world."""

    def __init__(self, world, sessions, users, capture):
        self.world, self.sessions, self.users, self.capture = world, sessions, users, capture
        self.random = random.Random(world.random.random())
        self.goes_on = True
        self._numbers = itertools.count()
        self._left = []

    def start(self):
        """Starts them; each is a task."""
        ways = [self._script, self._script, self._api, self._package_redis, self._package_http, self._burst]
        ways += [self._plain, self._script_stream, self._package_stream]
        return [asyncio.create_task(self._on(way)) for way in ways]

    def stop(self):
        """They end with what they have begun."""
        self.goes_on = False

    async def _on(self, way):
        arguments = await way(None)
        while self.goes_on:
            await way(arguments)
            await asyncio.sleep(self.random.expovariate(1 / 0.06))

    # ---- what is sent where ----

    def _label(self, kind):
        return f"{kind}.{next(self._numbers)}"

    def _channel(self):
        connections = [client.connection_id for client in self.world.clients if client.connection_id and client.is_open]
        choice = self.random.random()
        if choice < 0.5:
            return names.session(self.random.choice(self.sessions))
        if choice < 0.7:
            return names.BROADCAST
        if choice < 0.9 or not connections:
            return names.user(self.random.choice(self.users))
        return names.connection(self.random.choice(connections))

    def _own_id(self, label):
        if self.random.random() > 0.3:
            return ""
        if not self.world.expectations.lossless and self.random.random() < 0.2:
            # Used again and again: clients may be told that it is ambiguous.
            return f"job-{self.random.randint(1, 5)}"
        return f"own-{label}"

    async def _repeat(self, attempt):
        """As documented: what has no answer is sent again with the same key."""
        end = time.monotonic() + GIVE_UP_SECONDS
        while time.monotonic() < end:
            if await attempt():
                return
            await asyncio.sleep(0.1)

    # ---- the scripts ----

    async def _script(self, started):
        if started is None:
            return True
        label, channel = self._label("lua"), self._channel()
        own_id, has_key = self._own_id(label), self.random.random() < 0.5
        limits = self.world.limits
        if not self.world.expectations.lossless and self.random.random() < 0.1:
            # A worker whose bounds are smaller than the gateway's.
            limits = names.Limits(entries_max=20, ttl_ms=1500)

        async def attempt():
            with contextlib.suppress(OSError, RedisError):
                await self.world.publish(label, channel, own_id, label if has_key else "", limits=limits)
                return True
            # Without a key it may be there already.
            return not has_key

        await self._repeat(attempt)

    async def _burst(self, started):
        if started is None:
            return True
        channel, count = self._channel(), self.random.randint(2, 15)
        with contextlib.suppress(OSError, RedisError):
            for _ in range(count):
                await self.world.publish(self._label("burst"), channel)
        await asyncio.sleep(self.random.uniform(0, 0.6))

    async def _script_stream(self, started):
        if started is None:
            return True
        session, stream = self.random.choice(self.sessions), self._label("st").replace(".", "-")
        self._left.append((session, stream))
        dies = self.random.random() < 0.3
        pieces = self.random.randint(1, 12)
        steps = [("open", "{}")] + [("append", f"word{n} ", n) for n in range(1, pieces + 1)]
        for op, *more in steps + ([] if dies else [("end", "finish", "")]):

            async def attempt(op=op, more=more):
                try:
                    await self.world.stream(op, session, stream, *more, lease_ms=1500)
                except RedisError as error:
                    # The stream was ended meanwhile, or Redis has forgotten it.
                    return any(word in str(error) for word in ("ENDED", "NOSTREAM", "SEQ", "EXISTS"))
                except OSError:
                    return False
                return True

            await self._repeat(attempt)
            await asyncio.sleep(self.random.uniform(0, 0.1))
        return None

    # ---- over HTTP ----

    async def _api(self, started):
        if started is None:
            return True
        label, channel = self._label("api"), self._channel()
        own_id = self._own_id(label)
        self.world.truth.sending(label, channel)
        path = self._path(channel, own_id)
        body = self.world.payload(label, channel, own_id)

        async def attempt():
            gateway = self.random.choice([each for each in self.world.gateways if each.is_up])
            try:
                answer = await self.world.api(gateway, "POST", path, body, **{"Idempotency-Key": label})
            except (OSError, httpx.HTTPError):
                return False
            if answer.status_code == 200:
                self.world.truth.answered(label, answer.json()["event_id"])
            elif answer.status_code not in AGAIN:
                self.world.expect(False, f"the API refused {label} with {answer.status_code}: {answer.text[:200]}")
            return answer.status_code not in AGAIN

        await self._repeat(attempt)

    def _path(self, channel, own_id):
        if names.is_session(channel):
            return f"sessions/{names.session_of(channel)}/messages?history=true" + (
                f"&event_id={own_id}" if own_id else ""
            )
        kind, _, name = channel.removeprefix("ws:").partition(":")
        return f"events/{kind}s/{name}" if name else f"events/{kind}"

    # ---- the Python package ----

    async def _package_redis(self, package):
        if package is None:
            return self.world.package()
        return await self._package(package, "py")

    async def _package_http(self, package):
        if package is None:
            return self.world.package(self.random.choice(self.world.gateways))
        return await self._package(package, "pyhttp")

    async def _package(self, package, kind):
        label, channel = self._label(kind), self._channel()
        key = label if self.random.random() < 0.3 else None
        self.world.truth.sending(label, channel)
        kind, _, name = channel.removeprefix("ws:").partition(":")
        data = {"n": names.mark(label)}
        with contextlib.suppress(WsproxyError):
            if names.is_session(channel):
                receipt = await package.send(names.session_of(channel), data, idempotency_key=key)
            elif kind == "broadcast":
                receipt = await package.broadcast("chaos", data, idempotency_key=key)
            elif kind == "user":
                receipt = await package.to_user(name, "chaos", data, idempotency_key=key)
            else:
                receipt = await package.to_connection(name, "chaos", data, idempotency_key=key)
            self.world.truth.answered(label, receipt.event_id)

    async def _package_stream(self, package):
        if package is None:
            return self.world.package()
        session, stream_id = self.random.choice(self.sessions), self._label("pst").replace(".", "-")
        self._left.append((session, stream_id))
        with contextlib.suppress(WsproxyError):
            async with package.stream(session, stream_id, lease=2.0, watch_stop=False) as stream:
                for n in range(self.random.randint(1, 10)):
                    await stream.append(f"token{n} ")
                    await asyncio.sleep(self.random.uniform(0, 0.1))
        return None

    # ---- plain, and captured where the instances capture ----

    async def _plain(self, started):
        if started is None:
            return True
        channel = names.session(self.random.choice(self.sessions))
        label = self._label("plain")
        with contextlib.suppress(OSError, RedisError):
            await self.world.plain(label, channel, captured=self.capture)

    # ---- the end ----

    async def end(self, world):
        """Every token stream that Redis still knows has an end; those whose workers died, within their lease."""
        if world.clock:
            # A lease ends by the clock of Redis, at an unknown time.
            return

        async def open_streams():
            still = []
            for session, stream in self._left:
                text = world.truth.texts.get(stream)
                if text and text.outcome is None and await names.is_open(world.master.client, session, stream):
                    still.append(stream)
            return still

        with contextlib.suppress(TimeoutError):
            await until("all token streams have ended", lambda: none(open_streams()), 12)
        world.expect(not (still := await open_streams()), f"token streams of dead workers have no end: {still}")


async def none(things):
    """Whether there is nothing."""
    return not await things
