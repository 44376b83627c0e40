"""Links of one instance that end at different servers: a name was pointed elsewhere, and the old master lives on."""

import asyncio

import names
from clients import Refused
from scenarios import scenario
from scenarios.identity import SESSION


async def pointed_elsewhere(world, target, channel, cut):
    """The address leads to a new master; the old one lives on for those who are connected, but `cut` links go."""
    await world.gateway(2)
    clients = [await world.opened(target, form, world.gateways[n % 2]) for n, form in enumerate(("ws", "id", "sse"))]
    await world.publish("both", channel)
    old, replica = world.master, await world.replica()
    await replica.promote(old)
    await world.fail_over(replica, kill=False)
    await old.cut(cut)
    for n in range(12):
        await world.publish(f"new.{n}", channel)
        await asyncio.sleep(0.25)
    for client in clients[:2]:
        await client.leave()
        try:
            await client.come(world.gateways[0])
        except Refused:
            world.notes.append("a client was refused while links were apart")


@scenario()
async def split_links(world):
    """A session: subscriptions are at the new master, all other links at the old one, which lives on."""
    await pointed_elsewhere(world, "s", SESSION, "pubsub")


@scenario()
async def split_links_commands(world):
    """As split_links, the other way round: subscriptions stay at the old master."""
    await pointed_elsewhere(world, "s", SESSION, "normal")


@scenario()
async def split_links_events(world):
    """As split_links, for events, whose clients need nothing from Redis to be let in."""
    await pointed_elsewhere(world, "user:u", names.BROADCAST, "pubsub")


@scenario()
async def demoted(world):
    """The old master becomes a replica that is cut off: it stays readable, and stale, while all go to the new one."""
    await world.gateway(2)
    clients = [await world.opened("user:u", form, world.gateways[n % 2]) for n, form in enumerate(("ws", "id", "sse"))]
    await world.publish("both", names.BROADCAST)
    old, replica = world.master, await world.replica()
    await replica.promote(old)
    await world.fail_over(replica, kill=False)
    await old.client.execute_command("REPLICAOF", "127.0.0.1", "1")
    for n in range(10):
        await world.publish(f"new.{n}", names.BROADCAST)
        await asyncio.sleep(0.2)
    await clients[0].leave()
