"""Logs that expire or are trimmed, instances that stand still, and what is captured."""

import asyncio

import names
from parts import until
from scenarios import scenario
from scenarios.identity import SESSION, spread_clients

CAPTURE = {"WSPROXY_SESSIONS__CAPTURE": "true"}
SHORT = names.Limits(ttl_ms=2000)


@scenario()
async def small_ttl(world):
    """A worker's ttl is smaller than the gateway's: a log has come and gone while the client was away."""
    clients = await spread_clients(world)
    for client in clients:
        await client.leave()
    short = names.Limits(ttl_ms=1000)
    await world.publish("missed", SESSION, limits=short)
    await until("the log has expired", lambda: gone(world, SESSION))
    await world.publish("new", SESSION, limits=short)
    for n, client in enumerate(clients):
        await client.come(world.gateways[n % 2])


async def gone(world, channel):
    """Whether a channel's log has expired."""
    return not await world.master.client.exists(names.log(channel))


@scenario()
async def small_ttl_events(world):
    """As small_ttl, for events: the client's position is that of a broadcast which is still held."""
    await world.gateway(2)
    clients = [await world.opened("user:u", form) for form in ("ws", "id", "sse")]
    await world.publish("all.1", names.BROADCAST)
    await asyncio.gather(*(client.until("all.1") for client in clients))
    for client in clients:
        await client.leave()
    await world.publish("missed", names.user("u"), limits=names.Limits(ttl_ms=1000))
    await until("the log has expired", lambda: gone(world, names.user("u")))
    for n, client in enumerate(clients):
        await client.come(world.gateways[n % 2])
    await world.publish("all.2", names.BROADCAST)


@scenario(limits=SHORT)
async def small_log_expires(world):
    """Logs expire again and again, under clients that stay and clients that come back; no client misses anything
    silently."""
    *_, away = await spread_clients(world)
    for n in range(3):
        await world.run(f"early.{n}", SESSION, 3)
        await away.until(f"early.{n}.2")
        await away.leave()
        await world.publish(f"missed.{n}", SESSION)
        if n % 2:
            await until("the log has expired", lambda: gone(world, SESSION))
            await world.publish(f"late.{n}", SESSION)
        await away.come(world.gateways[n % 2])


@scenario(limits=names.Limits(entries_max=10))
async def small_log_trimmed(world):
    """More is published than the log may hold, while clients are away and while they are connected."""
    *_, away = await spread_clients(world)
    for n, count in enumerate((5, 10, 11, 30)):
        await away.leave()
        await world.run(f"missed.{n}", SESSION, count)
        await away.come(world.gateways[n % 2])
        await world.run(f"live.{n}", SESSION, 3)
        await away.until(f"live.{n}.2")
    await away.leave()
    await away.come(world.gateways[0], "0")


@scenario(limits=names.Limits(bytes_max=4096))
async def small_log_of_bytes(world):
    """As small_log_trimmed, by bytes."""
    *_, away = await spread_clients(world)
    for n, count in enumerate((5, 20)):
        await away.leave()
        for k in range(count):
            await world.publish(f"missed.{n}.{k}", SESSION, fill="x" * 400)
        await away.come(world.gateways[n % 2])
        await world.run(f"live.{n}", SESSION, 3)
        await away.until(f"live.{n}.2")


@scenario(limits=SHORT)
async def frozen_longer_than_ttl(world):
    """An instance stands still for longer than the ttl, and Redis drops it meanwhile. What lies in its socket must not
    make it believe that it heard from Redis just now."""
    await world.gateway(2)
    clients = [await world.opened("s", form) for form in ("ws", "id", "sse")]
    await world.publish("before", SESSION)
    await asyncio.gather(*(client.until("before") for client in clients))
    frozen = world.gateways[0]
    frozen.freeze()
    await world.publish("in.its.socket", SESSION)
    await asyncio.sleep(0.1)
    await world.master.cut("pubsub")
    await world.publish("missed", SESSION)
    await until("the log has expired", lambda: gone(world, SESSION))
    await world.publish("new", SESSION)
    await asyncio.sleep(0.1)
    frozen.thaw()
    await asyncio.sleep(1.5)


@scenario(settings=CAPTURE)
async def capture_loss(world):
    """Plain messages are captured while the links by which instances publish are cut again and again: each one that an
    instance has heard is in the history, or is counted."""
    gateway = await world.gateway(1)
    await world.opened("s", "id")
    heard, server = set(), world.master.client
    for n in range(40):
        labels = [f"c.{n}.{k}" for k in range(5)]
        async with server.pipeline(transaction=True) as pipe:
            for label in labels:
                world.truth.sending(label, SESSION, "captured")
                pipe.publish(SESSION, world.payload(label, SESSION, label))
            # In the moment in which the instance has heard, and has not captured yet.
            if n % 4 == 2:
                pipe.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            answers = await pipe.execute()
        heard |= {label for label, receivers in zip(labels, answers[: len(labels)], strict=True) if receivers > 1}
        await asyncio.sleep(0.1)
    await world.ready()
    await asyncio.sleep(0.5)
    stored = set(world.truth.entries.get(SESSION, {})) & heard
    metrics = await gateway.metrics()
    counted = metrics.get("wsproxy_uncaptured_messages_total", 0)
    missing = len(heard) - len(stored)
    lost = metrics.get("wsproxy_bus_publishes_lost_total", 0)
    world.notes.append(f"{len(heard)} heard, {len(stored)} stored, {counted:.0f} counted, {lost:.0f} publishes lost")
    world.expect(counted >= missing, f"{missing} heard messages were not captured, and {counted:.0f} are counted")


@scenario(settings=CAPTURE, slow=True)
async def capture_twice(world):
    """An instance stands still for more than a minute while another one captures a message that both have got."""
    await world.gateway(2)
    for n in range(2):
        await world.opened("s", "id", world.gateways[n])
    world.gateways[1].freeze()
    await asyncio.sleep(0.2)
    await world.plain("once", SESSION, captured=True)
    await asyncio.sleep(63)
    world.gateways[1].thaw()
    await asyncio.sleep(2)


@scenario(settings=CAPTURE, lossless=True)
async def captured_by_several(world):
    """Several instances see the same plain messages, and clients come back: each message is captured once."""
    *_, away = await spread_clients(world, gateways=3)
    for n in range(40):
        await world.plain(f"c.{n}", SESSION, captured=True)
        if n % 10 == 3:
            await away.leave()
        if n % 10 == 6:
            await away.come(world.gateways[n % 3])
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    missing = {f"c.{n}" for n in range(40)} - set(world.truth.entries.get(SESSION, {}))
    world.expect(not missing, f"not captured, although nothing failed: {sorted(missing)}")
