"""Random rounds: publishers by every documented way, clients that come and go, and faults in a random order.

A seed gives the plan: which faults, when, for how long, how many instances and clients. What befalls whom within a
millisecond is up to the machine.
"""

import asyncio
import contextlib
import random
import time

import httpx

import names
from clients import Refused
from faults import FORGETFUL, HARMLESS, Interrupted
from oracle import Expectations
from publishers import Publishers
from world import World

# Seconds for which messages flow and faults come.
ROUND_SECONDS = 14.0


class Plan:
    """A round's plan, from its seed."""

    def __init__(self, seed):
        self.seed = seed
        self.random = random.Random(seed)
        # Half of the rounds promise that no client is told `history_lost`.
        self.lossless = self.random.random() < 0.5
        self.gateways = self.random.randint(2, 3)
        self.capture = self.random.random() < 0.3
        bounds = [names.Limits()]
        if not self.lossless:
            bounds += [names.Limits(ttl_ms=4000), names.Limits(entries_max=25), names.Limits(bytes_max=8192)]
        self.limits = self.random.choice(bounds)
        known = HARMLESS if self.lossless else HARMLESS + FORGETFUL
        self.faults = [self.random.choice(known) for _ in range(self.random.randint(2, 4))]
        self.moves_clock = any(fault.moves_clock for fault in self.faults)

    def __str__(self):
        bounds = "" if self.limits == names.Limits() else f", {self.limits}"
        faults = ", ".join(fault.__name__ for fault in self.faults)
        kind = "nothing may be lost" if self.lossless else "history_lost is allowed"
        return f"{self.gateways} instances{', capture' if self.capture else ''}{bounds}; {faults}; {kind}"

    def world(self):
        """The world of this round."""
        settings = {"WSPROXY_SESSIONS__CAPTURE": str(self.capture).lower()}
        expected = Expectations(lossless=self.lossless)
        return World(self.seed, self.limits, settings, expected, self.moves_clock)

    async def play(self, world):
        """Starts all parts, lets the faults happen, and ends the publishers and the clients that come and go."""
        await world.gateway(self.gateways)
        sessions, users = ["s1", "s2", "s3"], ["u1", "u2"]
        people = [Person(world, name, form) for name in sessions for form in ("ws", "id", "sse")]
        people += [Person(world, f"user:{name}", form) for name in users for form in ("ws", "id", "sse")]
        for channel in (names.session("s1"), names.user("u1"), names.BROADCAST):
            await world.reader(channel)
        for name, transport in (("p1", "websocket"), ("p2", "sse")):
            await world.packaged(name, transport)
        publishers = Publishers(world, [*sessions, "p1", "p2"], users, self.capture)
        tasks = [asyncio.create_task(person.live()) for person in people]
        tasks += publishers.start()
        try:
            await self._faults(world)
        finally:
            publishers.stop()
            for person in people:
                person.stays = True
            await asyncio.wait(tasks, timeout=20)
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result
        await publishers.end(world)

    async def _faults(self, world):
        pause = ROUND_SECONDS / (len(self.faults) + 1) / 2
        for fault in self.faults:
            await asyncio.sleep(pause * self.random.uniform(0.5, 1.0))
            world.notes.append(f"{time.monotonic() - world.started:5.1f} s: {fault.__name__}")
            with contextlib.suppress(Interrupted):
                await fault(world, self.random)
            await world.ready()
        await asyncio.sleep(pause)


class Person:
    """A client that comes and goes as it likes, and resumes in every documented way."""

    def __init__(self, world, target, form):
        self.world = world
        self.client = world.client(target, form)
        self.random = random.Random(world.random.random())
        self.stays = False

    async def live(self):
        """Comes, stays, goes, until it is told to stay."""
        while not self.stays:
            if not self.client.is_open:
                await self._come()
                continue
            end = time.monotonic() + self.random.expovariate(1 / 2.5)
            while time.monotonic() < end and self.client.is_open and not self.stays:
                await asyncio.sleep(0.05)
            if not self.stays and self.client.is_open:
                await self.client.leave(politely=self.random.random() < 0.3)
                await asyncio.sleep(self.random.uniform(0, 1.0))

    async def _come(self):
        up = [gateway for gateway in self.world.gateways if gateway.is_up]
        asked = None
        if self.random.random() < 0.08:
            # A page that was loaded again remembers nothing.
            asked = self.random.choice(["0", ""])
        in_frame = self.client.form != "sse" and self.random.random() < 0.2
        try:
            await self.client.come(self.random.choice(up or self.world.gateways), asked, in_frame=in_frame)
        except (Refused, httpx.HTTPError):
            await asyncio.sleep(self.random.uniform(0.05, 0.3))
