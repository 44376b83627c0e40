"""Event ids of a worker's own, payloads that have one already, and messages that only look like ones with history."""

import asyncio
import contextlib
import time

from redis.exceptions import ResponseError

import names
from parts import until
from scenarios import scenario
from scenarios.identity import SESSION, spread_clients


@scenario()
async def own_id_twice(world):
    """A worker's id is published twice without an idempotency key, with other messages between; a client has seen
    the first copy and comes back with that id."""
    clients = await spread_clients(world)
    await world.publish("copy.1", SESSION, "task-5")
    await asyncio.gather(*(client.until("copy.1") for client in clients))
    for client in clients:
        await client.leave()
    await world.run("between", SESSION, 2)
    await world.publish("copy.2", SESSION, "task-5")
    await world.publish("behind", SESSION)
    for n, client in enumerate(clients):
        # Forms that show positions would not fall back on the worker's id by themselves.
        await client.come(world.gateways[n % 2], "task-5" if client.form == "ws" else None)


@scenario()
async def own_id_retry(world):
    """The documented retry with the same key and id: Redis was rolled back in between, so that it is a new entry
    behind others. The client has seen the first copy, and comes back with that id."""
    await world.gateway(2)
    client = await world.opened("s")
    await world.publish("m.1", SESSION, "o-1", "k-1")
    replica = await world.replica()
    await replica.promote(world.master)
    await world.publish("m.2", SESSION, "o-2", "k-2")
    await client.until("m.2")
    await client.leave()
    await world.fail_over(replica)
    await world.ready()
    await world.publish("x", SESSION, "x-1", "k-x")
    await world.publish("m.2", SESSION, "o-2", "k-2")
    await world.publish("y", SESSION, "y-1")
    await client.come(world.gateways[0])


@scenario(lossless=True)
async def ids_like_positions(world):
    """A worker's own ids look like positions. They are refused by Redis' script and over HTTP, or a client that comes
    back with one goes on exactly there."""
    await world.gateway(2)
    looks = ["0", "0-0", "2026-11", "1001-2", "18446744073709551615-1", f"{int(time.time() * 1e6)}-7", "7"]
    for n, own_id in enumerate(looks):
        session = f"s{n}"
        channel = names.session(session)
        client = await world.opened(session, "ws", world.gateways[n % 2])
        await world.publish(f"{n}.first", channel)
        try:
            await world.publish(f"{n}.odd", channel, own_id)
        except ResponseError:
            world.truth.refuse(f"{n}.odd")
            world.notes.append(f"{own_id} is refused")
            continue
        await client.until(f"{n}.odd")
        await client.leave()
        await world.publish(f"{n}.behind", channel)
        await client.come(world.gateways[(n + 1) % 2])
        # Asked with the worker's id where the gateway showed that one.
        await client.until(f"{n}.behind")


@scenario(lossless=True)
async def own_id_of_a_connection(world):
    """An event for one connection has an id of the worker's own; its client comes back with it. Nothing is lost."""
    await world.gateway(2)
    for form in ("ws", "sse"):
        client = await world.opened("user:u", form)
        await world.publish(f"{form}.all", names.BROADCAST)
        await world.publish(f"{form}.one", names.connection(client.connection_id), f"job-{form}")
        await client.until(f"{form}.one")
        await client.leave()
        await world.publish(f"{form}.missed", names.user("u"))
        await client.come(world.gateways[1])


@scenario(lossless=True)
async def members_named_event_id(world):
    """Payloads that have a member `event_id` of the application's own: no client gets two members of that name, and
    clients that know positions resume exactly."""
    await world.gateway(2)
    readers = [await world.opened("s", form) for form in ("id", "sse")]
    readers += [await world.opened("user:u", form) for form in ("id", "sse")]
    # It reads on, and never comes back with what the application calls an id.
    await world.opened("s", "ws")
    for n, value in enumerate(("evt_9", 42, None, "x y", "evt_9")):
        await world.publish(f"s.{n}", SESSION, event_id=value)
        await world.publish(f"u.{n}", names.user("u"), event_id=value)
    for client, last in zip(readers, ("s.4", "s.4", "u.4", "u.4"), strict=True):
        await client.until(last)
        await client.leave()
    await world.publish("s.missed", SESSION, event_id="evt_9")
    await world.publish("u.missed", names.user("u"), event_id="evt_9")
    for client in readers:
        await client.come(world.gateways[1])


def forgeries(last):
    """Messages that no script has published: their ids are ahead of the clock, or not above the last."""
    soon = int(time.time() * 1000) + 3_600_000
    return [
        names.forged(names.HIGHEST, last, b"{}"),
        names.forged(names.HIGHEST, "0-0", b"{}"),
        names.forged(names.at_time(soon), last, b"{}"),
        names.forged(last, last, b"{}"),
        names.forged(names.at_time(1), "0-0", b"{}"),
    ]


@scenario(lossless=True)
async def forged_envelope(world):
    """A worker publishes plain messages that begin like ones with history: the channel goes on, for those who are
    there and for those who come back."""
    *_, away = await spread_clients(world)
    last = await world.publish("first", SESSION)
    for n in range(len(forgeries(last))):
        await world.forge(SESSION, forgeries(last)[n])
        last = await world.publish(f"behind.{n}", SESSION)
        await away.until(f"behind.{n}", 3)
        await away.leave()
        await world.forge(SESSION, forgeries(last)[n])
        last = await world.publish(f"missed.{n}", SESSION)
        await away.come(world.gateways[n % 2])
        await away.until(f"missed.{n}", 3)


@scenario(lossless=True)
async def forged_envelope_events(world):
    """As forged_envelope, on the channel that all clients have."""
    await world.gateway(2)
    clients = [
        await world.opened(f"user:u{n}", form, world.gateways[n % 2]) for n, form in enumerate(("ws", "id", "sse"))
    ]
    last = await world.publish("first", names.BROADCAST)
    for n in range(len(forgeries(last))):
        await world.forge(names.BROADCAST, forgeries(last)[n])
        last = await world.publish(f"behind.{n}", names.BROADCAST)
        await world.publish(f"user.{n}", names.user(f"u{n % 3}"))
    await clients[0].until("behind.4", 3)


@scenario()
async def forged_envelope_plausible(world):
    """A forged message whose id could be one: no client can tell it from that of another master, so that clients may be
    told; then all goes on."""
    *_, away = await spread_clients(world)
    for n in range(4):
        last = await world.publish(f"first.{n}", SESSION)
        await away.until(f"first.{n}", 3)
        milliseconds, _ = names.order(last)
        previous = (last, "0-0", names.at_time(milliseconds - 5), last)[n]
        await asyncio.sleep(0.01)
        await world.forge(SESSION, names.forged(names.at_time(milliseconds + 1), previous, b"{}"))
        await asyncio.sleep(0.1)
        if n % 2:
            await away.leave()
        await world.publish(f"behind.{n}", SESSION)
        if n % 2:
            await away.come(world.gateways[n % 2])


@scenario(lossless=True)
async def payloads_like_envelopes(world):
    """A payload with history begins with an envelope's first bytes, over HTTP and the Python package: it is refused,
    or reaches clients as it is."""
    await world.gateway(2)
    await world.opened("s", "id")
    await world.opened("s", "ws")
    for history in ("true", "false"):
        forgery = names.forged(names.HIGHEST, "0-0", b"{}")
        world.truth.forged.add(forgery)
        answer = await world.api(world.gateways[0], "POST", f"sessions/s/messages?history={history}", forgery)
        world.notes.append(f"history={history}: {answer.status_code}")
        await world.publish(f"behind.{history}", SESSION)
    with contextlib.suppress(TimeoutError):
        await until("it came", lambda: all("behind.false" in each.view.labels for each in world.clients), 3)
