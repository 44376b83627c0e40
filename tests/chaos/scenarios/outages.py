"""Outages in which Redis loses no data, and no client may miss a message: killed, frozen, full, cut off, emptied."""

import asyncio
import contextlib
import json
import time

from redis.exceptions import RedisError

import names
from clients import Refused
from parts import until
from scenarios import scenario
from scenarios.identity import SESSION, spread_clients


class Traffic:
    """A worker that publishes on and on, with an idempotency key, and repeats what was not acknowledged."""

    def __init__(self, world, channel=SESSION, pause=0.02, mark="t"):
        self.world, self.channel, self.pause, self.mark, self.count = world, channel, pause, mark, 0

    async def __aenter__(self):
        self.task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, kind, error, trace):
        # A call that has begun is repeated until it is done.
        self.channel = None
        if kind is None:
            async with asyncio.timeout(20):
                await self.task
        else:
            self.task.cancel()

    async def _run(self):
        while channel := self.channel:
            label = f"{self.mark}.{self.count}"
            while True:
                with contextlib.suppress(RedisError, OSError):
                    await self.world.publish(label, channel, once=label)
                    break
                await asyncio.sleep(0.05)
            self.count += 1
            await asyncio.sleep(self.pause)


@scenario(calm=True)
async def calm(world):
    """Nothing goes wrong: every message comes once, in order, live or after coming back; no counter of losses moves."""
    *_, away = await spread_clients(world, gateways=3)
    users = [await world.opened("user:u", form, world.gateways[n % 3]) for n, form in enumerate(("ws", "id", "sse"))]
    for channel in (SESSION, names.user("u"), names.BROADCAST):
        await world.reader(channel)
    for n in range(60):
        await world.publish(f"s.{n}", SESSION, f"own-{n}" if n % 5 == 0 else "", f"key-{n}" if n % 3 == 0 else "")
        await world.publish(f"u.{n}", (names.BROADCAST, names.user("u"))[n % 2])
        await world.plain(f"p.{n}", names.session("plain"))
        if n % 12 == 4:
            await away.leave(politely=n % 24 == 4)
            await users[n % 3].leave()
        if n % 12 == 8:
            await away.come(world.gateways[n % 3], in_frame=n % 24 == 8)
            for user in users:
                if not user.is_open:
                    await user.come(world.gateways[n % 3])
    for form in ("ws", "id", "sse"):
        late = world.client("s", form)
        await late.come(world.gateways[0], "0")


@scenario(calm=True)
async def plain_only(world):
    """Plain messages to a session and an event channel that have a history: each comes once, among the others."""
    await spread_clients(world)
    await world.opened("user:u")
    for n in range(40):
        await world.plain(f"p.{n}", SESSION)
        await world.publish(f"h.{n}", SESSION)
        await world.plain(f"q.{n}", names.BROADCAST)


@scenario(lossless=True)
async def redis_killed(world):
    """Redis is killed twice and comes back with what it acknowledged; a client is away meanwhile."""
    *_, away = await spread_clients(world)
    async with Traffic(world):
        for away_for in (0.2, 1.5):
            await asyncio.sleep(0.5)
            await away.leave()
            await world.restart_redis(away_for)
            await world.ready()
            await away.come(world.gateways[0])
        await asyncio.sleep(0.5)


@scenario(lossless=True)
async def redis_frozen(world):
    """Redis answers nothing for some seconds, and then goes on."""
    *_, away = await spread_clients(world)
    async with Traffic(world):
        await asyncio.sleep(0.5)
        world.master.freeze()
        await asyncio.sleep(4.5)
        world.master.thaw()
        await world.ready()
        await away.leave()
        await asyncio.sleep(0.2)
        await away.come(world.gateways[1])


@scenario(lossless=True)
async def links_cut(world):
    """Redis cuts off subscribers, all other connections, and all, again and again."""
    *_, away = await spread_clients(world)
    async with Traffic(world, pause=0.01):
        for n, kind in enumerate(("pubsub", "normal", "all", "pubsub", "pubsub", "normal", "all")):
            await asyncio.sleep(0.3)
            await world.master.cut(kind)
            await away.leave()
            with contextlib.suppress(Refused):
                await away.come(world.gateways[n % 2])


@scenario(lossless=True)
async def one_instance_cut_off(world):
    """The network between one instance and Redis is gone for a while; the other instance goes on."""
    await spread_clients(world)
    async with Traffic(world):
        for _ in range(2):
            world.gateways[0].address.lead_to(None)
            world.gateways[0].address.cut()
            await asyncio.sleep(1.5)
            world.gateways[0].address.lead_to(world.master)
            await world.ready()
        await asyncio.sleep(0.3)


@scenario(lossless=True)
async def network_stalls(world):
    """Nothing passes between one instance and Redis for a while, and neither end is told."""
    await spread_clients(world)
    async with Traffic(world):
        for pause in (0.5, 5.0):
            world.gateways[0].address.stall()
            await asyncio.sleep(pause)
            world.gateways[0].address.flow()
            await world.ready()
        await asyncio.sleep(0.3)


@scenario(lossless=True)
async def instances_come_and_go(world):
    """Instances are killed, frozen, thawed, drained and started; clients come back on whatever instance there is."""
    clients = await spread_clients(world, gateways=3)
    for transport in ("websocket", "sse"):
        await world.packaged(transport, transport)
    one, two, three = world.gateways
    channels = [names.session(name) for name in ("websocket", "sse")]
    async with Traffic(world), Traffic(world, channels[0], mark="u"), Traffic(world, channels[1], mark="v"):
        one.kill()
        two.freeze()
        for client in clients:
            if not client.is_open:
                await client.come(three)
        await asyncio.sleep(1.5)
        two.thaw()
        await one.start()
        await three.drain()
        await three.start()
        for n, client in enumerate(clients):
            if not client.is_open:
                await client.come(world.gateways[n % 3])
        await asyncio.sleep(0.3)


@scenario(lossless=True, settings={"WSPROXY_SESSIONS__EVENTS_LOG": "true"})
async def announcements_kept(world):
    """Sessions open and close while Redis is killed and an instance dies for good: every one that a client has seen
    open is announced as opened and, by the instance that notices, as closed."""
    clients = await spread_clients(world)
    opened = len(clients)
    for n, client in enumerate(clients):
        if n % 2:
            await client.leave()
            await client.come(world.gateways[1])
            opened += 1
    await world.restart_redis()
    world.gateways[0].kill()
    await world.ready()
    for client in clients:
        await client.leave()

    async def told():
        entries = await world.master.client.xrange(names.announcements("demo"))
        said = [json.loads(fields[b"data"]) for _, fields in entries]
        return [{each["connection_id"] for each in said if each["event"] == event} for event in ("opened", "closed")]

    async def is_whole():
        begun, ended = await told()
        return len(begun) == opened and begun == ended

    with contextlib.suppress(TimeoutError):
        # An instance that is dead is noticed after its lease.
        await until("all ends are announced", is_whole, 30)
    begun, ended = await told()
    world.notes.append(f"{opened} connections, {len(begun)} opened and {len(ended)} closed are announced")
    world.expect(len(begun) == opened, f"{opened} connections were opened, and {len(begun)} announced")
    world.expect(begun == ended, f"{len(begun - ended)} connections have no end, {len(ended - begun)} no beginning")
    await world.gateways[0].start()


@scenario(lossless=True)
async def scripts_forgotten(world):
    """Redis has forgotten all scripts: nothing was done, so that everything is done again, unnoticed."""
    *_, away = await spread_clients(world)
    answers = []
    for n in range(4):
        await world.master.client.script_flush()
        label = f"api.{n}"
        world.truth.sending(label, SESSION)
        answer = await world.api(
            world.gateways[n % 2], "POST", "sessions/s/messages?history=true", world.payload(label, SESSION)
        )
        answers.append(answer.status_code)
        world.truth.answered(label, answer.json().get("event_id"))
        await world.master.client.script_flush()
        answer = await world.api(world.gateways[n % 2], "POST", f"sessions/s/streams/a{n}", {"op": "open"})
        answers.append(answer.status_code)
        await world.master.client.script_flush()
        answer = await world.api(
            world.gateways[n % 2], "POST", f"sessions/s/streams/a{n}", {"op": "end", "outcome": "finish"}
        )
        answers.append(answer.status_code)
        await away.leave()
        await world.publish(f"script.{n}", SESSION)
        await world.master.client.script_flush()
        await away.come(world.gateways[n % 2])
        await away.until(f"script.{n}", 5)
    world.expect(set(answers) == {200}, f"the API answered {answers} while scripts were forgotten")


@scenario(lossless=True)
async def redis_full(world):
    """Redis is at maxmemory for some seconds: what is refused was not done, and every answer says so."""
    await refusing(world, "maxmemory", 1)


@scenario(lossless=True)
async def too_few_replicas(world):
    """As redis_full, while Redis has fewer replicas than min-replicas-to-write."""
    await refusing(world, "min-replicas-to-write", 1)


async def refusing(world, setting, value):
    """Redis refuses writes: the API and the package say that nothing was done; `/ready` knows; later all is well."""
    await spread_clients(world)
    await world.run("before", SESSION, 3)
    package = world.package(retry_for=15)
    started = time.monotonic()
    await world.master.client.config_set(setting, value)
    body = world.payload("refused", SESSION)
    answer = await world.api(world.gateways[0], "POST", "sessions/s/messages?history=true", body)
    error = answer.json().get("error", {})
    world.notes.append(f"the API: {answer.status_code} {error.get('code')}, {time.monotonic() - started:.1f} s")
    world.expect(
        answer.status_code == 503 and error.get("retryable"), f"refused for a moment, and the API: {answer.text}"
    )
    world.expect("lost" not in answer.text, f"nothing was lost, but the API says: {answer.text}")
    with contextlib.suppress(TimeoutError):
        await until("readiness is gone", lambda: not_ready(world), 5)
    world.expect(await not_ready(world), "Redis has refused all writes for 5 s, and /ready says 200")
    sent = asyncio.create_task(world.send(package, "by.package", "s"))
    await asyncio.sleep(1.5)
    await world.master.client.config_set(setting, 0)
    try:
        await sent
    except Exception as failure:
        world.expect(False, f"the package did not repeat what was not done: {type(failure).__name__} {failure}")
    await world.run("after", SESSION, 3)


async def not_ready(world):
    """Whether an instance says that it takes no clients."""
    return not await world.gateways[0].is_ready()
