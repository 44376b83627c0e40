"""The parts of a world of chaos: redis-servers, addresses that lead to them, and gateways, and what can befall them.

Everything is a child process or a task of this one, on loopback, and ends with its world.
"""

import asyncio
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess

import httpx
import redis.asyncio
from processes import Process, free_port
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

import names

HERE = pathlib.Path(__file__).resolve().parent
API_KEY = "an-api-key-of-the-chaos-suite"
OBSERVER = "observer"
SECRET = "a-secret-of-more-than-32-bytes-for-chaos"


def connect(port, timeout=3.0, name=None):
    """A client of a Redis that fails at once instead of trying again: the caller decides what is repeated."""
    once = Retry(NoBackoff(), 0)
    return redis.asyncio.Redis(
        port=port, retry=once, socket_timeout=timeout, socket_connect_timeout=3, protocol=2, client_name=name
    )


async def until(what, condition, seconds=20.0, pause=0.02):
    """Waits until `condition` (plain or awaitable) gives something true; an error counts as not yet."""
    end, last = asyncio.get_running_loop().time() + seconds, None
    while asyncio.get_running_loop().time() < end:
        try:
            result = condition()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return result
        except (OSError, RedisError, httpx.HTTPError) as error:
            last = error
        await asyncio.sleep(pause)
    raise TimeoutError(f"{what} did not happen within {seconds} s" + (f": {last}" if last else ""))


class Clock:
    """The wall clock of the redis-servers of one world, which can be set."""

    def __init__(self, folder):
        self.path = folder / "clock"
        self.library = folder / "clock.so"
        self.set(0)
        subprocess.run(
            [shutil.which("cc") or "cc", "-O1", "-shared", "-fPIC", "-o", self.library, HERE / "clock.c"], check=True
        )

    def set(self, seconds):
        """Moves it to so many seconds from the right time."""
        # Replaced as a whole, so that no server reads half of it.
        new = self.path.with_suffix(".new")
        new.write_text(f"{seconds:+d}")
        new.replace(self.path)

    def environment(self):
        """The environment for a redis-server that lives by this clock."""
        return {"LD_PRELOAD": str(self.library), "CHAOS_CLOCK": str(self.path)}


class Server:
    """A redis-server that keeps everything it has acknowledged, and an observer of what it publishes."""

    def __init__(self, name, folder, truth, clock=None):
        self.name, self.truth = name, truth
        self.folder = folder / name
        self.folder.mkdir()
        self.port, self.clock = free_port(), clock
        self.client = connect(self.port)
        self.process = None
        self._observing = None

    async def start(self, observe=True):
        """Starts it with what it has on its disk, and notes what the logs hold before a worker can publish."""
        if self._observing:
            # It reads what the one that ended has still said.
            await asyncio.wait([self._observing], timeout=2)
        command = [shutil.which("redis-server") or "redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        # In the file before it answers. The disk may have it later: processes are killed here, no machine loses its power.
        command += ["--dir", str(self.folder), "--save", "", "--appendonly", "yes", "--appendfsync", "no"]
        command += ["--repl-diskless-sync-delay", "0", "--auto-aof-rewrite-percentage", "0"]
        environment = self.clock.environment() if self.clock else None
        self.process = Process(self.name, command, self.folder, environment)
        await until(f"redis-server {self.name}", self.client.ping)
        if observe:
            await self.observe()

    async def observe(self):
        """From here on every message that it publishes is known. No part may publish before this returns."""
        await self.unobserve()
        feed = connect(self.port, None, OBSERVER).pubsub()
        await feed.psubscribe("*")
        await feed.get_message(timeout=5)
        await self.read_logs()
        self._observing = asyncio.create_task(self._observe(feed))

    async def _observe(self, feed):
        try:
            with contextlib.suppress(OSError, RedisError):
                while True:
                    message = await feed.get_message(ignore_subscribe_messages=True, timeout=None)
                    if message is not None:
                        self.truth.published(self.name, message["channel"].decode(), message["data"])
        finally:
            with contextlib.suppress(OSError, RedisError):
                await feed.aclose()

    async def unobserve(self):
        """Stops observing."""
        if self._observing:
            self._observing.cancel()
            await asyncio.gather(self._observing, return_exceptions=True)
            self._observing = None

    async def read_logs(self):
        """Notes what the logs hold; no part may publish meanwhile."""
        for channel in {*self.truth.entries, *self.truth.channels.values()}:
            log = await self.client.xrange(names.log(channel))
            self.truth.read(self.name, channel, [names.log_item(position, fields) for position, fields in log])

    async def follow(self, master):
        """Becomes a replica, and has everything when this returns."""
        # It repeats what its master publishes, which is no second publishing.
        await self.unobserve()
        await self.client.execute_command("REPLICAOF", "127.0.0.1", master.port)

        async def has_all():
            mine, its = await self.client.info("replication"), await master.client.info("replication")
            return mine["master_link_status"] == "up" and mine["slave_repl_offset"] == its["master_repl_offset"]

        await until(f"{self.name} is a replica", has_all)

    async def promote(self, master):
        """Goes on by itself; from here on it lacks what its master is told."""
        self.truth.promoted(self.name, master.name)
        await self.client.execute_command("REPLICAOF", "NO", "ONE")
        # The observer of the master has read by then what this one has.
        await asyncio.sleep(0.1)
        await self.observe()

    def signal(self, number):
        """Sends a signal to the process."""
        self.process.child.send_signal(number)

    def kill(self):
        """As a loss of power: it cannot say anything any more."""
        self.process.stop(signal.SIGKILL)

    def freeze(self):
        """It accepts connections, and answers nothing."""
        self.signal(signal.SIGSTOP)

    def thaw(self):
        """It goes on."""
        self.signal(signal.SIGCONT)

    async def cut(self, kind):
        """Cuts off subscribers (`pubsub`), all others (`normal`), or `all`; but never the observer."""
        for each in await self.client.client_list():
            is_subscriber = int(each["sub"]) + int(each["psub"]) > 0 or "P" in each["flags"]
            wanted = kind == "all" or (kind == "pubsub") == is_subscriber
            is_link = "r" not in each["flags"] and "S" not in each["flags"] and "M" not in each["flags"]
            if wanted and is_link and each["name"] != OBSERVER:
                # Those who went meanwhile are gone either way.
                await self.client.execute_command("CLIENT", "KILL", "ID", each["id"], "SKIPME", "yes")

    async def stop(self):
        """Ends it for good."""
        await self.unobserve()
        with contextlib.suppress(OSError, RedisError):
            await self.client.aclose()
        if self.process and self.process.child.poll() is None:
            self.kill()


class Address:
    """An address of Redis, as a name or a virtual address is one: its target can be another, for new connections."""

    def __init__(self, target):
        self.target = target
        self.port = free_port()
        self._links = set()
        self._listener = None
        self._flows = asyncio.Event()
        self._flows.set()

    async def start(self):
        """Begins to listen."""
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    def lead_to(self, target):
        """New connections go to this server; without one they are closed at once. Old ones stay where they are."""
        self.target = target

    def stall(self):
        """Nothing passes any more, and neither side is told: a network that swallows packets."""
        self._flows.clear()

    def flow(self):
        """Lets the waiting bytes pass."""
        self._flows.set()

    def cut(self):
        """Cuts all connections."""
        for link in list(self._links):
            link.cancel()

    async def _accept(self, reader, writer):
        link = asyncio.current_task()
        self._links.add(link)
        upstream = None
        try:
            if self.target is not None:
                other, upstream = await asyncio.open_connection("127.0.0.1", self.target.port)
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pump(reader, upstream))
                    both.create_task(self._pump(other, writer))
        except (OSError, ExceptionGroup):
            pass
        except asyncio.CancelledError:
            for end in (writer, upstream):
                if end is not None:
                    end.transport.abort()
        finally:
            self._links.discard(link)
            for end in (writer, upstream):
                if end is not None:
                    end.close()

    async def _pump(self, reader, writer):
        while data := await reader.read(65536):
            await self._flows.wait()
            writer.write(data)
            await writer.drain()
        # Bytes from before the end are still read, also by an instance that stands still just now.
        writer.close()
        raise ConnectionResetError

    async def stop(self):
        """Ends it for good."""
        if self._listener:
            self._listener.close()
        self.cut()


class Gateway:
    """An instance of the gateway, which reaches Redis through an address of its own."""

    def __init__(self, name, folder, address, settings):
        self.name, self.folder, self.address = name, folder, address
        self.port = free_port()
        self.http, self.ws = f"http://127.0.0.1:{self.port}", f"ws://127.0.0.1:{self.port}"
        self.settings = {
            "PORT": str(self.port),
            "REDIS_URL": f"redis://127.0.0.1:{address.port}",
            "SECRET_KEY": SECRET,
            "LOG_LEVEL": os.environ.get("CHAOS_LOG_LEVEL", "info"),
            "WSPROXY_API__KEYS": API_KEY,
            "WSPROXY_ENDPOINTS__EVENTS": "true",
            "WSPROXY_LOG__FORMAT": "json",
            "WSPROXY_SERVER__BIND": "127.0.0.1",
            "WSPROXY_SERVER__DRAIN_DELAY": "0s",
            "WSPROXY_SERVER__DRAIN_SPREAD": "500ms",
            "WSPROXY_SERVER__THREADS": "1",
            "WSPROXY_SESSIONS__HISTORY": "true",
            "WSPROXY_SSE__RETRY": "100ms",
            **settings,
        }
        self.process = None
        self.client = httpx.AsyncClient(
            base_url=self.http, timeout=10, headers={"Authorization": f"Bearer {API_KEY}"}, trust_env=False
        )
        self.is_up = False

    async def start(self, wait=True):
        """Starts it; waits until it takes clients."""
        self.process = Process(self.name, [str(names.BINARY), "serve"], self.folder, self.settings, cwd=self.folder)
        self.is_up = True
        if wait:
            await until(f"{self.name} ready", self.is_ready)

    async def is_ready(self):
        """Asks as a load balancer does."""
        if self.process.child.poll() is not None:
            raise RuntimeError(
                f"{self.name} ended with {self.process.child.returncode}:\n{self.process.output()[-2000:]}"
            )
        return (await self.client.get("/ready", timeout=2)).status_code == 200

    def kill(self):
        """As a loss of power."""
        self.is_up = False
        self.process.stop(signal.SIGKILL)

    def freeze(self):
        """As a virtual machine that is paused."""
        self.is_up = False
        self.process.child.send_signal(signal.SIGSTOP)

    def thaw(self):
        """It goes on, and does not know for how long it was away."""
        self.process.child.send_signal(signal.SIGCONT)
        self.is_up = True

    async def drain(self):
        """Ends politely."""
        self.is_up = False
        await asyncio.to_thread(self.process.stop, signal.SIGTERM)

    async def metrics(self):
        """Sums of its counters and gauges by name; the reasons of lost histories by `name/reason`."""
        answer = await self.client.get("/metrics", headers={"Accept": "application/json"})
        sums = {}
        for sample in answer.json()["metrics"]:
            name, labels = sample["name"], sample.get("labels") or {}
            sums[name] = sums.get(name, 0) + sample["value"]
            if "reason" in labels:
                sums[f"{name}/{labels['reason']}"] = sums.get(f"{name}/{labels['reason']}", 0) + sample["value"]
        return sums

    async def stop(self):
        """Ends it for good."""
        await self.client.aclose()
        if self.process and self.process.child.poll() is None:
            self.process.stop(signal.SIGKILL)
