"""A world of one scenario: redis-servers, gateways, workers and clients; how they start, settle, and are judged."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import pathlib
import random
import shutil
import tempfile
import time

import httpx
from packaged import PackageClient
from readers import Reader
from redis.exceptions import RedisError

import names
import oracle
from clients import Client, Refused
from parts import API_KEY, SECRET, Address, Clock, Gateway, Server, connect, until
from truth import Truth
from wsproxy import Limits, Worker

# Every client has to have every message this long after the faults have ended.
SETTLE_SECONDS = 15.0
# Counters that stay 0 where there is no fault.
LOSSES = [
    "wsproxy_bus_links_lost_total",
    "wsproxy_bus_publishes_lost_total",
    "wsproxy_bus_loss_notices_total",
    "wsproxy_bus_probe_failures_total",
    "wsproxy_bus_subscribe_errors_total",
    "wsproxy_history_lost_total",
    "wsproxy_histories_healed_total",
    "wsproxy_history_duplicates_total",
    "wsproxy_messages_unframeable_total",
    "wsproxy_uncaptured_messages_total",
    "wsproxy_log_lines_dropped_total",
]


class AnyInstance:
    """A target of an address: one of the instances that are up, another one for each connection."""

    def __init__(self, world):
        self._world = world

    @property
    def port(self):
        """Where the next connection goes."""
        up = [gateway for gateway in self._world.gateways if gateway.is_up]
        return self._world.random.choice(up or self._world.gateways).port


class World:
    """Use it with `async with`; every part that is added ends with it."""

    def __init__(self, seed=0, limits=None, settings=None, expectations=None, moves_clock=False):
        self.random = random.Random(seed)
        self.limits = limits or names.Limits()
        self.expectations = expectations or oracle.Expectations()
        self.truth = Truth()
        self.clients, self.gateways, self.servers, self.addresses = [], [], [], []
        self.violations, self.notes = [], []
        self.started = time.monotonic()
        self._settings = {
            "WSPROXY_HISTORY__ENTRIES_MAX": str(self.limits.entries_max),
            "WSPROXY_HISTORY__BYTES_MAX": str(self.limits.bytes_max),
            "WSPROXY_HISTORY__TTL": f"{self.limits.ttl_ms}ms",
            **(settings or {}),
        }
        self._moves_clock = moves_clock
        self._locks = {}
        self._packages = []
        self.front = None

    async def __aenter__(self):
        # In memory where there is such a place: every acknowledged write waits for the disk.
        memory = pathlib.Path("/dev/shm")
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="wsproxy-chaos-", dir=memory if memory.is_dir() else None))
        self.clock = Clock(self.folder) if self._moves_clock else None
        self.master = await self.server()
        self._workers_address = await self.address()
        self.workers = connect(self._workers_address.port)
        self.publish_script = self.workers.register_script(names.script("publish.lua"))
        self.stream_script = self.workers.register_script(names.script("stream.lua"))
        return self

    async def __aexit__(self, kind, error, trace):
        for client in self.clients:
            with contextlib.suppress(Exception):
                await client.leave()
        for part in [*self.gateways, *self.addresses, *filter(None, [self.front]), *self.servers]:
            with contextlib.suppress(OSError, RedisError, RuntimeError):
                await part.stop()
        for one in (self.workers, *self._packages):
            with contextlib.suppress(OSError, RedisError):
                await one.aclose()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- parts ----

    async def server(self, observe=True):
        """A further redis-server."""
        server = Server(f"redis-{'ABCDEF'[len(self.servers)]}", self.folder, self.truth, self.clock)
        self.servers.append(server)
        await server.start(observe)
        return server

    async def replica(self):
        """A redis-server that has everything the master has."""
        replica = await self.server(observe=False)
        await replica.follow(self.master)
        return replica

    async def address(self):
        """A further address that leads to the master."""
        address = Address(self.master)
        await address.start()
        self.addresses.append(address)
        return address

    async def gateway(self, count=1, **settings):
        """Starts further instances; answers the last."""
        fresh = []
        for _ in range(count):
            address = await self.address()
            gateway = Gateway(f"gateway-{len(self.gateways)}", self.folder, address, self._settings | settings)
            self.gateways.append(gateway)
            fresh.append(gateway)
        await asyncio.gather(*(gateway.start() for gateway in fresh))
        return fresh[-1]

    def client(self, target, form="ws", name=None):
        """A client of a session, or of events where the target is `user:NAME`; it is not connected yet."""
        kind, _, user = target.partition(":")
        if kind == "user":
            client = Client(self, name or f"c{len(self.clients)}", [names.BROADCAST, names.user(user)], form, user=user)
        else:
            client = Client(self, name or f"c{len(self.clients)}", [names.session(target)], form)
        self.clients.append(client)
        return client

    async def reader(self, channel):
        """A reader of a history over HTTP."""
        reader = Reader(self, f"c{len(self.clients)}", channel)
        self.clients.append(reader)
        await reader.come(self.gateways[0])
        return reader

    async def packaged(self, session, transport):
        """A client of the Python package."""
        if self.front is None:
            self.front = Address(AnyInstance(self))
            await self.front.start()
        client = PackageClient(self, f"c{len(self.clients)}", session, transport)
        self.clients.append(client)
        await client.come()
        return client

    async def opened(self, target, form="ws", gateway=None, asked=""):
        """A client that is connected, and has been told where it stands."""
        client = self.client(target, form)
        await client.come(gateway or self.gateways[0], asked)
        await until(
            "a client is told where it is", lambda: client.view.count("opened") + client.view.count("connected")
        )
        return client

    def session_lock(self, name):
        """A session has one token at a time, so that its clients come one after the other."""
        return self._locks.setdefault(name, asyncio.Lock())

    def jwt(self, user):
        """A token of a user."""

        def encode(data):
            return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

        claims = {"sub": user, "exp": int(time.time()) + 3600, "iat": int(time.time()) - 1}
        text = ".".join(encode(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
        return f"{text}.{encode(hmac.new(SECRET.encode(), text.encode(), hashlib.sha256).digest())}"

    # ---- publishing, one message at a time ----

    def payload(self, label, channel, own_id="", **more):
        """A message that says which one it is."""
        said = {"event_id": own_id} if own_id else {}
        if names.is_session(channel):
            return json.dumps({**said, "n": names.mark(label), **more})
        return json.dumps({"type": "chaos", **said, "data": {"n": names.mark(label)}, **more})

    def call(self, label, channel, own_id="", once="", limits=None, **more):
        """Keys and arguments with which publish.lua publishes a message."""
        payload = self.payload(label, channel, own_id, **more)
        return names.publish_call(channel, payload, limits or self.limits, own_id, once)

    async def publish(self, label, channel, own_id="", once="", *, server=None, limits=None, **more):
        """Publishes with history by the documented script, through the address or straight to a server."""
        keys, arguments = self.call(label, channel, own_id, once, limits, **more)
        self.truth.sending(label, channel)
        client = server.client if server else self.workers
        answer = await self.publish_script(keys=keys, args=arguments, client=client)
        self.truth.answered(label, answer[1].decode())
        return answer[1].decode()

    async def run(self, label, channel, count, **more):
        """Publishes several messages: label.0, label.1, …"""
        for n in range(count):
            await self.publish(f"{label}.{n}", channel, **more)

    async def pipeline(self, server, commands):
        """Sends calls of publish.lua and other commands to a server in one piece, so that they fall into one moment."""
        async with server.client.pipeline(transaction=True) as pipe:
            for command in commands:
                if isinstance(command, tuple):
                    pipe.execute_command(*command)
                    continue
                label, channel = command["label"], command["channel"]
                self.truth.sending(label, channel)
                keys, arguments = self.call(**command)
                pipe.eval(names.script("publish.lua"), len(keys), *keys, *arguments)
            answers = await pipe.execute()
        for command, answer in zip(commands, answers, strict=True):
            if isinstance(command, dict):
                self.truth.answered(command["label"], answer[1].decode())
        return answers

    async def plain(self, label, channel, *, captured=False, **more):
        """Publishes without history; with `captured` the gateways are to take it into the history."""
        own_id = label if captured else ""
        self.truth.sending(label, channel, "captured" if captured else "plain")
        return await self.master.client.publish(channel, self.payload(label, channel, own_id, **more))

    async def forge(self, channel, message, server=None):
        """Publishes a plain message that looks like one with history."""
        self.truth.forged.add(message)
        await (server or self.master).client.publish(channel, message)

    async def stream(self, op, session, stream, *more, lease_ms=15_000):
        """Calls stream.lua."""
        if op == "append":
            self.truth.sending(names.stream_label(stream, op, more[1]), names.session(session))
        keys, arguments = names.stream_call(op, session, stream, self.limits, lease_ms, *more)
        if op in ("open", "renew"):
            await names.note_lease(self.master.client, session, stream, lease_ms)
        return await self.stream_script(keys=keys, args=arguments)

    async def api(self, gateway, method, path, body=None, **headers):
        """A call of the HTTP API."""
        content = body if isinstance(body, bytes | str) or body is None else json.dumps(body)
        return await gateway.client.request(method, f"/api/v1/{path}", content=content, headers=headers)

    def package(self, gateway=None, retry_for=5.0):
        """A worker of the Python package: over Redis, or over the HTTP API of an instance."""
        if gateway is not None:
            worker = Worker.http(gateway.http, API_KEY, retry_for=retry_for, trust_env=False)
        else:
            bounds = Limits(self.limits.entries_max, self.limits.bytes_max, self.limits.ttl_ms / 1000)
            url = f"redis://127.0.0.1:{self._workers_address.port}"
            worker = Worker.redis(url, limits=bounds, retry_for=retry_for)
        self._packages.append(worker)
        return worker

    async def send(self, package, label, session, **more):
        """Publishes to a session with the Python package."""
        channel = names.session(session)
        self.truth.sending(label, channel)
        receipt = await package.send(session, json.loads(self.payload(label, channel)), **more)
        self.truth.answered(label, receipt.event_id)

    # ---- faults that concern the whole world ----

    def lead_all_to(self, server):
        """All addresses lead to this server from now on, for new connections; without one they lead nowhere."""
        for address in self.addresses:
            address.lead_to(server)
        if server is not None:
            self.master = server

    async def restart_redis(self, away=0.3):
        """Kills the master and starts it again with what was on its disk."""
        self.lead_all_to(None)
        self.master.kill()
        await asyncio.sleep(away)
        await self.master.start()
        self.lead_all_to(self.master)

    async def fail_over(self, server, *, kill=True):
        """The master is dead, or alive for those who are connected; the addresses lead to another server."""
        old = self.master
        self.lead_all_to(server)
        # Workers notice; what instances do is what is to be seen.
        self._workers_address.cut()
        await self.workers.connection_pool.disconnect()
        if kill:
            old.kill()

    # ---- the end ----

    async def settle(self):
        """Faults are over: every client has to get a last message on each of its channels within a bounded time."""
        await self.ready()
        end = time.monotonic() + SETTLE_SECONDS
        await asyncio.gather(*(self._finish(client, end) for client in self.clients))
        await asyncio.sleep(0.1)

    async def _finish(self, client, end):
        """A client comes back where it was cut off, and gets its last messages."""
        marks, state, why = {}, None, "it is refused"
        while time.monotonic() < end:
            if not client.is_open:
                try:
                    await client.come(self.random.choice([each for each in self.gateways if each.is_up]))
                except Refused as refused:
                    why = f"it is refused: {refused}"
                    await asyncio.sleep(0.2)
                continue
            # A client that begins anew gets what is published from then on.
            now = tuple(client.view.count(kind) for kind in ("connect", "lost", "gap"))
            marks, state = (marks if state == now else {}), now
            connection = [names.connection(client.connection_id)] if client.connection_id else []
            for channel in [*client.view.channels, *connection]:
                if channel not in marks:
                    await self._last_message(marks, channel)
            missing = [channel for channel, label in marks.items() if label not in client.view.labels]
            if not missing and bool(client.user) == bool(connection):
                return
            why = f"it never got the last message of {' and '.join(missing)}, and is still connected"
            await asyncio.sleep(0.03)
        self._violate(client, f"waits for ever: {SETTLE_SECONDS:.0f} s after the faults {why}")

    async def _last_message(self, marks, channel):
        label = f"end.{len(self.truth.sent)}"
        with contextlib.suppress(OSError, RedisError):
            await self.publish(label, channel)
            marks[channel] = label

    async def ready(self):
        """Waits until every instance that is up takes clients; an instance that takes none for long is a violation."""
        for gateway in self.gateways:
            if gateway.is_up:
                try:
                    await until(f"{gateway.name} is ready", gateway.is_ready, SETTLE_SECONDS)
                except TimeoutError:
                    self._violate(None, f"{gateway.name} is not ready {SETTLE_SECONDS:.0f} s after the faults")

    def _violate(self, client, what):
        view = client.view if client else None
        self.violations.append(oracle.Violation(view, what, len(view.items) - 1 if view else 0))

    def expect(self, condition, what):
        """A promise that only this scenario checks."""
        if not condition:
            self._violate(None, what)

    async def judge(self):
        """Everything that was broken."""
        self.violations += oracle.judge_channels(self.truth, self.expectations)
        for client in self.clients:
            self.violations += oracle.Judge(client.view, self.truth, self.expectations).run()
        if self.expectations.calm:
            await self._judge_calm()
        return self.violations

    async def _judge_calm(self):
        for client in self.clients:
            for label in self.truth.plain:
                if self.truth.channels[label] in client.view.channels and label not in client.view.labels:
                    self._violate(client, f"never got the plain message {label}, although there was no fault")
        for gateway in self.gateways:
            with contextlib.suppress(httpx.HTTPError):
                counted = await gateway.metrics()
                for name in LOSSES:
                    self.expect(
                        not counted.get(name), f"{gateway.name} counts {counted.get(name)} {name} without a fault"
                    )

    def keep(self, folder, name):
        """Copies what the processes have logged."""
        target = pathlib.Path(folder) / name.replace(" ", "-")
        target.mkdir(parents=True, exist_ok=True)
        for log in self.folder.rglob("*.log"):
            shutil.copy(log, target / log.name)
