"""Events: several channels with one order, one id that resumes them all, one notice for an incident."""

import asyncio
import contextlib

import names
from parts import until
from scenarios import scenario

USER = names.user("u")


async def listeners(world):
    """Connections of one user in every form, on two instances."""
    await world.gateway(2)
    return [await world.opened("user:u", form, world.gateways[n % 2]) for n, form in enumerate(("ws", "id", "sse"))]


@scenario(notices_max=1)
async def many_notices(world):
    """Redis is rolled back behind what clients have seen on two channels: they are told once, for all channels, and
    what comes then, and after they have come back, comes once."""
    clients = await listeners(world)
    await world.publish("user.1", USER)
    for n in range(3):
        await asyncio.sleep(0.01)
        await world.publish(f"all.{n}", names.BROADCAST)
    replica = await world.replica()
    await replica.promote(world.master)
    await world.publish("forgotten.user", USER)
    await asyncio.sleep(0.01)
    await world.publish("forgotten.all", names.BROADCAST)
    await asyncio.gather(*(client.until("forgotten.all") for client in clients))
    await world.fail_over(replica)
    await world.ready()
    with contextlib.suppress(TimeoutError):
        await until("all are told", lambda: all(client.view.count("lost") for client in clients), 5)
    await asyncio.sleep(0.3)
    for n, client in enumerate(clients):
        await client.leave()
        await client.come(world.gateways[n % 2])
    await world.publish("new.user", USER)
    await world.publish("new.all", names.BROADCAST)


@scenario(notices_max=1)
async def emptied_events(world):
    """FLUSHALL under clients of several channels, and a subscriber that is cut off then: one notice at most."""
    clients = await listeners(world)
    await world.run("user", USER, 3)
    await world.run("all", names.BROADCAST, 3)
    await asyncio.gather(*(client.until("all.2") for client in clients))
    await world.master.client.flushall()
    await world.master.cut("pubsub")
    await asyncio.sleep(1)
    await world.publish("new.user", USER)
    await world.publish("new.all", names.BROADCAST)
    await asyncio.gather(*(client.until("new.all", 5) for client in clients))
    for n, client in enumerate(clients):
        await client.leave()
        await client.come(world.gateways[n % 2])


@scenario(lossless=True)
async def one_order(world):
    """Broadcast, user and connection share one order, over a lost link and for those who come back."""
    clients = await listeners(world)
    for n in range(30):
        await world.publish(f"all.{n}", names.BROADCAST)
        await world.publish(f"user.{n}", USER)
        if clients[0].is_open and n % 3 == 0:
            await world.publish(f"one.{n}", names.connection(clients[0].connection_id))
        if n % 10 == 5:
            await world.master.cut("pubsub")
        if n % 10 == 7:
            client = clients[n % 3]
            await client.leave()
            await world.publish(f"missed.{n}", USER)
            await client.come(world.gateways[n % 2])
