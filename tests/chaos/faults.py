"""Faults of the random rounds, each from its beginning to its end. Every one gets the world and a random generator."""

import asyncio
import time

import names


class Interrupted(Exception):
    """A fault could not be made, since another one was not over."""


def _any_instance(world, random):
    up = [gateway for gateway in world.gateways if gateway.is_up]
    if len(up) < 2:
        raise Interrupted
    return random.choice(up)


def _any_channel(world, random):
    return random.choice(sorted({channel for client in world.clients for channel in client.view.channels}))


def _keys(world, random):
    channel = _any_channel(world, random)
    return random.choice([[names.log(channel)], names.history(channel)])


# ---- Redis loses nothing ----


async def nothing(world, random):
    """A calm while."""
    await asyncio.sleep(random.uniform(0.2, 1.0))


async def cut(world, random):
    """Redis cuts off subscribers, all other connections or all, once or several times."""
    for _ in range(random.randint(1, 4)):
        await world.master.cut(random.choice(["pubsub", "pubsub", "normal", "all"]))
        await asyncio.sleep(random.uniform(0, 0.5))


async def redis_restarted(world, random):
    """Redis is killed, and comes back with what it acknowledged."""
    await world.restart_redis(random.uniform(0.05, 2.0))


async def redis_stands_still(world, random):
    """Redis answers nothing for a while."""
    world.master.freeze()
    await asyncio.sleep(random.choice([0.2, 1.0, 4.0]))
    world.master.thaw()


async def redis_refuses(world, random):
    """Redis is full, or has too few replicas, for a while."""
    setting = random.choice(["maxmemory", "min-replicas-to-write"])
    await world.master.client.config_set(setting, 1)
    await asyncio.sleep(random.uniform(0.3, 2.0))
    await world.master.client.config_set(setting, 0)


async def scripts_forgotten(world, random):
    """Redis forgets all scripts, several times."""
    for _ in range(3):
        await world.master.client.script_flush()
        await asyncio.sleep(random.uniform(0, 0.2))


async def instance_killed(world, random):
    """An instance is killed, and started again."""
    gateway = _any_instance(world, random)
    gateway.kill()
    await asyncio.sleep(random.uniform(0.1, 1.0))
    await gateway.start()


async def instance_stands_still(world, random):
    """An instance stands still, and Redis may cut it off meanwhile."""
    gateway = _any_instance(world, random)
    gateway.freeze()
    # Longer than the ttl, where that is short.
    is_short = world.limits.ttl_ms < 10_000
    await asyncio.sleep(random.uniform(0.3, world.limits.ttl_ms / 700 if is_short else 3.0))
    if random.random() < 0.5:
        await world.master.cut("pubsub")
        await asyncio.sleep(0.3)
    gateway.thaw()


async def instance_drained(world, random):
    """An instance ends politely, and is started again."""
    gateway = _any_instance(world, random)
    await gateway.drain()
    await gateway.start()


async def instance_cut_off(world, random):
    """The network between an instance and Redis is gone for a while."""
    address = _any_instance(world, random).address
    address.lead_to(None)
    address.cut()
    await asyncio.sleep(random.uniform(0.2, 2.0))
    address.lead_to(world.master)


async def network_stalls(world, random):
    """Nothing passes between an instance and Redis for a while; both believe that they are connected."""
    address = _any_instance(world, random).address
    address.stall()
    await asyncio.sleep(random.choice([0.3, 2.0, 5.0]))
    address.flow()


async def forged(world, random):
    """Plain messages that look like ones with history."""
    soon = int(time.time() * 1000) + 3_600_000
    for position in (names.HIGHEST, names.at_time(soon), names.at_time(1)):
        previous = random.choice(["0-0", names.HIGHEST, names.at_time(1)])
        await world.forge(_any_channel(world, random), names.forged(position, previous, b"{}"))
        await asyncio.sleep(random.uniform(0, 0.2))


# ---- Redis forgets, or its history is not one line ----


async def emptied(world, random):
    """FLUSHALL, or the deletion of a log."""
    if random.random() < 0.5:
        await world.master.client.flushall()
    else:
        await world.master.client.delete(*_keys(world, random))


async def emptied_in_a_millisecond(world, random):
    """A log is emptied and written again, in one transaction."""
    for n in range(5):
        channel, mark = _any_channel(world, random), f"ms.{len(world.truth.sent)}.{n}"
        calls = [{"label": f"{mark}.{k}", "channel": channel} for k in range(4)]
        empty = random.choice([("FLUSHALL",), ("DEL", names.log(channel)), ("DEL", *names.history(channel))])
        await world.pipeline(world.master, [*calls[:2], empty, *calls[2:]])
        await asyncio.sleep(random.uniform(0, 0.1))


async def replica_promoted(world, random):
    """A replica that lags is promoted; what the old master acknowledged since is forgotten."""
    replica = await world.replica()
    await replica.promote(world.master)
    await asyncio.sleep(random.uniform(0, 0.5))
    await world.fail_over(replica)


async def two_masters(world, random):
    """Two masters take messages for a moment, then one is dead."""
    replica = await world.replica()
    await replica.promote(world.master)
    for n in range(100):
        channel, mark = _any_channel(world, random), f"two.{len(world.truth.sent)}.{n}"
        both = [
            world.publish(f"{mark}.{server.name[-1]}", channel, server=server) for server in (world.master, replica)
        ]
        await asyncio.gather(*both)
    await world.fail_over(replica)


async def links_apart(world, random):
    """The address leads to a new master, the old one lives on, and some links stay there."""
    old, replica = world.master, await world.replica()
    await replica.promote(old)
    await world.fail_over(replica, kill=False)
    await old.cut(random.choice(["pubsub", "normal"]))
    await asyncio.sleep(random.uniform(0.5, 2.0))


async def clock_set(world, random):
    """The clock of the Redis host is set back or ahead, and perhaps a log is emptied then."""
    world.clock.set(random.choice([-20, -6, 0, 10, 30]))
    if random.random() < 0.5:
        await emptied(world, random)
    await asyncio.sleep(random.uniform(0.1, 1.0))


HARMLESS = [
    nothing,
    cut,
    redis_restarted,
    redis_stands_still,
    redis_refuses,
    scripts_forgotten,
    instance_killed,
    instance_stands_still,
    instance_drained,
    instance_cut_off,
    network_stalls,
    forged,
]
FORGETFUL = [emptied, emptied_in_a_millisecond, replica_promoted, two_masters, links_apart, clock_set]
for _fault in HARMLESS + FORGETFUL:
    _fault.moves_clock = _fault is clock_set
