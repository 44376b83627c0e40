"""Histories whose ids repeat: two masters, logs that are emptied, clocks that are set."""

import asyncio

import names
from scenarios import scenario

SESSION = names.session("s")


async def spread_clients(world, gateways=2):
    """Clients of one session in every form, spread over the instances; scenarios send the last one away."""
    await world.gateway(gateways)
    forms = ("ws", "id", "sse", "id")
    clients = [await world.opened("s", form, world.gateways[n % gateways]) for n, form in enumerate(forms)]
    return clients


async def emptied_in_a_millisecond(world, empty):
    """Publishes, empties and publishes again, in one transaction, while clients are connected."""
    *_, away = await spread_clients(world)
    for n in range(12):
        before = [{"label": f"{n}.{x}", "channel": SESSION} for x in "ab"]
        after = [{"label": f"{n}.{x}", "channel": SESSION} for x in "cd"]
        await world.pipeline(world.master, [*before, empty, *after])
        await asyncio.sleep(0.02)
        if n % 4 == 3:
            await away.leave()
            await away.come(world.gateways[n % 2])


@scenario()
async def same_ms(world):
    """A log is deleted and written again within one millisecond, while clients are connected and no link is lost."""
    await emptied_in_a_millisecond(world, ("DEL", *names.history(SESSION)))


@scenario()
async def log_deleted_same_ms(world):
    """As same_ms, but what Redis knows of the log beside its entries stays."""
    await emptied_in_a_millisecond(world, ("DEL", names.log(SESSION)))


@scenario()
async def flushall_same_ms(world):
    """As same_ms, with FLUSHALL."""
    await emptied_in_a_millisecond(world, ("FLUSHALL",))


@scenario()
async def emptied(world):
    """FLUSHALL, and DEL of one log, at an easier pace, while messages flow and one client is away."""
    *_, away = await spread_clients(world)
    for n, empty in enumerate((("FLUSHALL",), ("DEL", names.log(SESSION)), ("DEL", *names.history(SESSION)))):
        await world.run(f"before.{n}", SESSION, 5)
        await away.leave()
        await world.run(f"missed.{n}", SESSION, 3)
        await world.master.client.execute_command(*empty)
        await world.run(f"after.{n}", SESSION, 3)
        await away.come(world.gateways[n % 2])
        await world.run(f"later.{n}", SESSION, 3)
        await away.until(f"later.{n}.2")


@scenario()
async def lagging_replica(world):
    """A replica that lags is promoted and counts on: what the old master acknowledged since is forgotten."""
    *_, away = await spread_clients(world)
    await world.run("both", SESSION, 3)
    replica = await world.replica()
    await replica.promote(world.master)
    await world.run("forgotten", SESSION, 3)
    await away.until("forgotten.2")
    await away.leave()
    await world.fail_over(replica)
    await world.run("new", SESSION, 5)
    await world.ready()
    await away.come(world.gateways[0])


@scenario()
async def two_masters(world):
    """For a moment two masters take messages of one session, in the same milliseconds; then one of them is dead."""
    *_, away = await spread_clients(world)
    replica = await world.replica()
    await world.publish("both", SESSION)
    await replica.follow(world.master)
    await replica.promote(world.master)
    # Both have the script, and a connection.
    await asyncio.gather(*(world.publish(f"first.{s.name[-1]}", "session:other:down", server=s) for s in world.servers))
    for n in range(300):
        ids = await asyncio.gather(*(world.publish(f"{s.name[-1]}.{n}", SESSION, server=s) for s in world.servers))
        if names.order(ids[0]) == names.order(ids[1]):
            break
    world.notes.append(f"the same time and number after {n + 1} pairs")
    await away.until(f"A.{n}")
    await away.leave()
    await world.fail_over(replica)
    await world.ready()
    await away.come(world.gateways[1])
    await world.run("later", SESSION, 2)


@scenario(moves_clock=True)
async def clock_back(world):
    """The clock of the Redis host is set back; within that time a replica that lags is promoted. Ids just count on
    from the last one then, so that the new master gives ids that clients have seen."""
    *_, away = await spread_clients(world)
    await world.publish("first", SESSION)
    replica = await world.replica()
    world.clock.set(-8)
    await asyncio.sleep(0.1)
    await world.publish("both", SESSION)
    await replica.follow(world.master)
    await replica.promote(world.master)
    await world.publish("forgotten", SESSION)
    await away.until("forgotten")
    await away.leave()
    await world.fail_over(replica)
    await world.publish("instead", SESSION)
    await world.ready()
    await away.come(world.gateways[0])
    await world.publish("later", SESSION)


@scenario(moves_clock=True)
async def clock_back_emptied(world):
    """The clock is set back, then the log is emptied: ids begin anew below those that clients have seen."""
    world.clock.set(20)
    *_, away = await spread_clients(world)
    await world.publish("future", SESSION)
    await away.until("future")
    await away.leave()
    world.clock.set(0)
    await world.master.client.flushall()
    await world.run("present", SESSION, 6)
    await away.come(world.gateways[0])
    await world.run("later", SESSION, 3)


@scenario(moves_clock=True, limits=names.Limits(ttl_ms=2000))
async def clock_ahead_for_a_moment(world):
    """The clock was ahead by more than the ttl and is corrected; messages flow on and no link is lost."""
    world.clock.set(20)
    await spread_clients(world)
    await world.publish("future", SESSION)
    world.clock.set(0)
    for n in range(12):
        await world.publish(f"present.{n}", SESSION)
        await asyncio.sleep(0.35)
