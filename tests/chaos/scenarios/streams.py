"""Token streams whose workers die, and what they end with."""

import asyncio
import contextlib

import names
from parts import until
from scenarios import scenario
from scenarios.identity import spread_clients

# A worker that died is noticed after its lease, and some time for a Redis that refused meanwhile.
END_SECONDS = 12.0


async def written(world, stream, pieces, lease_ms=1000):
    """A worker opens a token stream, writes some pieces, and is not heard of again."""
    await world.stream("open", "s", stream, "{}", lease_ms=lease_ms)
    for n in range(pieces):
        await world.stream("append", "s", stream, f"word{n} ", n + 1, lease_ms=lease_ms)


async def must_end(world, *streams):
    """Waits for the end of streams whose worker is dead."""
    for stream in streams:
        with contextlib.suppress(TimeoutError):
            await until("it has ended", lambda s=stream: world.truth.texts[s].outcome, END_SECONDS)
        world.expect(world.truth.texts[stream].outcome, f"the token stream {stream} of a dead worker has no end")


@scenario(lossless=True)
async def stream_worker_dies(world):
    """Token streams: one ends well, one has a worker that dies, under clients that come and go."""
    *_, away = await spread_clients(world)
    await written(world, "dies", 3)
    await written(world, "ends", 3, lease_ms=15_000)
    await away.leave()
    await world.stream("append", "s", "ends", "more", 4)
    await away.come(world.gateways[0])
    await world.stream("end", "s", "ends", "finish", "")
    late = world.client("s", "ws")
    await late.come(world.gateways[1])
    await must_end(world, "dies", "ends")


@scenario(lossless=True)
async def stream_worker_dies_when_full(world):
    """The worker of a token stream dies while Redis takes no more (maxmemory): the stream ends when it takes again."""
    await dies_meanwhile(world, "maxmemory", 1)


@scenario(lossless=True)
async def stream_worker_dies_without_replicas(world):
    """As stream_worker_dies_when_full, while Redis has too few replicas to write."""
    await dies_meanwhile(world, "min-replicas-to-write", 1)


async def dies_meanwhile(world, setting, value):
    """The worker of a stream dies, and Redis refuses writes until after its lease has run out."""
    await spread_clients(world)
    await written(world, "dies", 3)
    await world.master.client.config_set(setting, value)
    await asyncio.sleep(4)
    await world.master.client.config_set(setting, 0)
    await must_end(world, "dies")


@scenario(lossless=True)
async def stream_over_a_restart(world):
    """A token stream is written while Redis is killed and instances come and go: all its text arrives, and its end."""
    *_, away = await spread_clients(world)
    await world.stream("open", "s", "long", "{}")
    for n in range(1, 41):

        async def append(n=n):
            # The number tells an append that was done already.
            return await world.stream("append", "s", "long", f"{n} ", n)

        await until("an append is taken", append)
        if n == 10:
            await world.restart_redis()
        if n == 20:
            world.gateways[1].kill()
        if n == 30:
            await world.gateways[1].start()
            await away.come(world.gateways[1])
    await until("the end is taken", lambda: world.stream("end", "s", "long", "finish", ""))
    await must_end(world, "long")


@scenario()
async def stream_of_an_emptied_redis(world):
    """Redis is emptied under a token stream: no client waits for an end that never comes."""
    await spread_clients(world)
    await written(world, "gone", 3, lease_ms=3000)
    await world.master.client.flushall()
    await world.publish("after", names.session("s"))
    await asyncio.sleep(4)
