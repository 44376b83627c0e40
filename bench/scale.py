"""The part of `bench/run` about many: as many connections as the host holds, several instances on one port, the constants of
Redis, and the highest rate of one channel."""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import harness
from harness import answers, free_port, generate, process, redis_server, wait_until

# Clients of an instance: a process gets 20,000 descriptors here.
PER_INSTANCE = 18_500
FEW, MORE, MANY = 20_000, 100_000, 250_000

# The runs: a name, the arguments, the servers beside it.
SCALE = {
    # At a rate that two cores have time for beside all else: a connect takes a fifth of a millisecond of all parties, with
    # a signed token and an entry in the registry three times that.
    **{f"{kind}_{n // 1000}k": (["scale", kind, "-n", n, "--from", n // 10, "--connect-rate", rate], False)
       for kind, rate in (("sessions", 1500), ("users", 800)) for n in (FEW, MORE, MANY)},
    **{f"host_{n}": (["scale", "host", n, "-n", 10000], False) for n in (1, 2, 4)},
    **{f"broadcast_{n}": (["scale", "broadcast", n, "-n", 16000, "--from", 1000, "--rate", 1000], False) for n in (1, 2, 4)},
    "redis": (["scale", "redis"], False),
    **{f"bus_{n}": (["scale", "bus", n], False) for n in (3, 6)},
    **{f"one_{how}_{size}": (["scale", "one", how, size], False) for how in ("ws", "sse") for size in (128, 4096)},
    "bursts_bun": (["scale", "bun", "-n", 5000, "--burst", 16], "bun"),
    "fanout_bun": (["scale", "bun", "-n", 5000], "bun"),
}

RATES = [5_000, 10_000, 20_000, 40_000, 60_000, 80_000, 100_000, 120_000, 140_000]
ONE_RATES = {128: [20_000, 50_000, 100_000, 150_000, 200_000, 300_000, 400_000],
             4096: [5_000, 10_000, 20_000, 40_000, 60_000, 80_000, 100_000]}


def many_figures(name: str, what: str) -> list:
    return [
        {"of": name, "take": "idle_server_cpu_us_per_connection_second", "unit": "us",
         "title": f"{what}: CPU of the gateways per idle connection and second, heartbeats included"},
        {"of": name, "take": "idle_redis_cpu_us_per_connection_second", "unit": "us", "title": "the same, CPU of Redis"},
        {"of": name, "take": "bytes_per_connection_of_all", "unit": "B", "title": "the same, memory of the gateways per connection"},
        {"of": name, "take": "kernel_bytes_per_connection_at_server", "unit": "B",
         "title": "the same, memory of the kernel per connection at the gateway's end"},
        {"of": name, "take": "kernel_bytes_per_connection_both_ends", "unit": "B",
         "title": "the same, at both ends (clients are on this host)"},
        {"of": name, "take": "redis_bytes_per_connection", "unit": "B", "title": "the same, memory of Redis"},
        {"of": name, "take": "connect_server_cpu_us_per_connect", "unit": "us",
         "title": "the same, CPU of the gateways per connect"},
        {"of": name, "take": "connect_redis_cpu_us_per_connect", "unit": "us", "title": "the same, CPU of Redis"},
        {"of": name, "take": "users_user_latency_p99_ms", "unit": "ms", "title": "the same, 5,000 messages/s, p99"},
        {"of": name, "take": "users_server_cpu_us_per_delivery", "unit": "us", "title": "the same, CPU of the gateways per delivery"},
        {"of": name, "take": "cut_off", "unit": "", "title": "one instance is killed: clients that connect to the others at once"},
        {"of": name, "take": "all_back_s", "unit": "s", "title": "the same, from the SIGKILL until all are back"},
        {"of": name, "take": "after_user_latency_p99_ms", "unit": "ms", "title": "the same, 5,000 messages/s after that, p99"},
    ]


SCALE_FIGURES = [
    *[figure for n in (FEW, MORE, MANY) for figure in many_figures(f"sessions_{n // 1000}k", f"{n:,} sessions")],
    *[figure for n in (FEW, MORE, MANY) for figure in many_figures(f"users_{n // 1000}k", f"{n:,} event connections")],
    *[figure for n in (1, 2, 4) for figure in (
        {"of": f"host_{n}", "take": "highest_rate_held_per_s", "unit": "/s", "higher_is_better": True,
         "title": f"{n} instances on one port of this host, 10,000 sessions: highest rate with p99 < 50 ms"},
        {"of": f"host_{n}", "take": "first_server_cpu_us_per_delivery", "unit": "us",
         "title": "the same, CPU of the gateways per delivery at 5,000/s"},
        {"of": f"host_{n}", "take": "last_held_server_cpu_us_per_delivery", "unit": "us",
         "title": "the same, CPU of the gateways per delivery at that rate"},
        {"of": f"broadcast_{n}", "take": "bytes_per_connection_of_all", "unit": "B",
         "title": f"{n} instances on one port of this host, 16,000 event connections: memory of the gateways per connection"},
        {"of": f"broadcast_{n}", "take": "resident_bytes_of_all", "unit": "B", "title": "the same, memory of all instances"},
        {"of": f"broadcast_{n}", "take": "broadcast_broadcast_latency_max_ms", "unit": "ms",
         "title": "the same, until a broadcast has reached all"},
        {"of": f"broadcast_{n}", "take": "both_user_latency_p99_ms", "unit": "ms",
         "title": "the same, messages to users beside one broadcast per second, p99"})],
    *[{"of": "redis", "take": f"{take}_us", "unit": "us", "title": f"CPU of Redis, pipelined, 200 B: {title}"}
      for take, title in (
          ("ping", "`PING`, the floor of a command"), ("publish", "`PUBLISH`, no subscriber"),
          ("publish_heard", "`PUBLISH`, one subscriber"), ("publish_history", "`publish.lua`, one subscriber, 1,000 channels"),
          ("publish_event", "`publish.lua` of an event channel (with the clock `{ws}:clock`)"),
          ("append", "append to a token stream (`stream.lua`, 20 B)"), ("subscribe", "`SUBSCRIBE`"),
          ("set_token", "`SET … EX` of a token"), ("take_token", "`GETDEL` of a token"),
          ("xrange", "`XRANGE` of one entry"), ("positions", "`room_positions.lua`, one position"))],
    *[{"of": "redis", "take": f"{take}_bytes", "unit": "B", "title": f"memory of Redis: {title}"}
      for take, title in (
          ("channel", "per subscribed channel and instance (name of 30 B)"), ("log", "per history with one entry of 200 B"),
          ("log_entry", "per further entry of 200 B"), ("room", "per room with one member"),
          ("room_member", "per further member, with one entity and a position"), ("token", "per token"))],
    *[figure for n in (3, 6) for figure in (
        {"of": f"bus_{n}", "take": "publishing_us", "unit": "us",
         "title": f"Redis Cluster of {n} nodes, one subscriber at another node: CPU per `PUBLISH` at the node that takes it"},
        {"of": f"bus_{n}", "take": "each_other_us", "unit": "us", "title": "the same, at each other node"},
        {"of": f"bus_{n}", "take": "all_us", "unit": "us", "title": "the same, of all nodes together"})],
    *[{"of": f"one_{how}_{size}", "take": "highest_rate_held_per_s", "unit": "/s", "higher_is_better": True,
       "title": f"one channel to one {'WebSocket' if how == 'ws' else 'event stream'}, {size:,} B: highest rate with p99 < 50 ms"}
      for how in ("ws", "sse") for size in (128, 4096)],
    {"of": "fanout_bun", "take": "server_cpu_us_per_delivery", "unit": "x", "versus": "bun",
     "title": "one message to 5,000 sockets of one session: CPU per delivery, over Bun's `publish` behind its Redis client"},
    {"of": "bursts_bun", "take": "server_cpu_us_per_delivery", "unit": "x", "versus": "bun",
     "title": "the same in bursts of 16"},
]


def load(who: str, scenario: list, redis: int) -> dict:
    """Runs one row, by its second word."""
    what, rest = scenario[1], scenario[2:]
    if what in ("sessions", "users"):
        return many(what, rest)
    if what == "host":
        return host(int(rest[0]), rest[1:])
    if what == "broadcast":
        return broadcast(int(rest[0]), rest[1:])
    if what == "one":
        return one_channel(rest[0], int(rest[1]), rest[2:])
    if what == "bus":
        return cluster_bus(int(rest[0]), "--quick" in rest)
    if what == "bun":
        with harness.server("bun" if who == "bun" else who, redis) as target:
            return generate(["fanout", *rest, *target.arguments])
    return redis_costs("--quick" in rest)


def quick(what: str) -> list:
    """The arguments that make a row short."""
    if what in ("one", "redis", "bus"):
        return ["--quick"]
    short = ["-n", 300, "--duration", 1, "--warmup", 0.3, "--timeout", 15]
    return [*short, *{"host": ["--rates", "2000,3000"], "broadcast": ["--from", 30, "--rate", 200],
                      "sessions": ["--from", 30, "--idle", 1, "--rate", 200],
                      "users": ["--from", 30, "--idle", 1, "--rate", 200]}.get(what, [])]


# --- Many connections ---


def many(kind: str, arguments: list) -> dict:
    """Several instances on one Redis, with room for the clients of one that is killed."""
    clients = int(last_value(arguments, "-n", 0))
    number = max(3, math.ceil(clients / PER_INSTANCE) + 1)
    secret = secrets.token_hex(32) if kind == "users" else ""
    settings = {} if kind == "sessions" else {"WSPROXY_ENDPOINTS__EVENTS": "true", "WSPROXY_JWT__SECRET_KEY": secret}
    # A host has one address here, from which all come back at once.
    settings["WSPROXY_RATE_LIMIT__MAX_REQUESTS"] = "0"
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(redis_server())
        servers = [stack.enter_context(harness.gateway(redis, settings)) for _ in range(number)]
        told = ["--servers", ",".join(f"127.0.0.1:{server.port}" for server in servers),
                "--pid", ",".join(str(server.pid) for server in servers), "--publish", f"127.0.0.1:{redis}"]
        users = ["--target", "events", "--secret", secret, "--history"] if kind == "users" else []
        return generate(["scale", *told, *users, *arguments])


# --- Several instances on one host ---


@contextlib.contextmanager
def one_port(number: int, redis: int, settings: dict):
    """Gives a port that several instances share, and their processes."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        pids = []
        for _ in range(number):
            admin = free_port()
            environment = {
                **os.environ, "PORT": str(port), "REDIS_URL": f"redis://127.0.0.1:{redis}",
                "WSPROXY_SERVER__BIND": "127.0.0.1", "WSPROXY_SERVER__REUSE_PORT": "true",
                # The shared port is answered by any of them.
                "METRICS_PORT": str(admin), "WSPROXY_ADMIN__BIND": "127.0.0.1",
                "WSPROXY_LIMITS__MAX_CONNECTIONS": "18500", "WSPROXY_SERVER__DRAIN_DELAY": "0s", "LOG_LEVEL": "warn", **settings,
            }
            binary = Path(os.environ.get("BENCH_GATEWAY", harness.GATEWAY))
            child = stack.enter_context(process([binary, "serve"], env=environment, stdout=sys.stderr))
            wait_until("wsproxy", lambda: answers(f"http://127.0.0.1:{admin}/ready"), child)
            pids.append(child.pid)
        yield port, pids


def host(number: int, arguments: list) -> dict:
    """The highest rate of sessions over instances that share a port."""
    rates = [] if "--rates" in arguments else ["--rates", ",".join(map(str, RATES)), "--duration", 5]
    with redis_server() as redis, one_port(number, redis, {}) as (port, pids):
        report = generate(["sessions", *rates, *arguments, "--server", f"127.0.0.1:{port}",
                           "--publish", f"127.0.0.1:{redis}", "--pid", ",".join(map(str, pids))])
    steps = report["figures"].get("steps", [])
    held = [step for step in steps if step["held"]]
    for which, found in (("first", steps[:1]), ("last_held", held[-1:])):
        report["figures"].update({f"{which}_{name}": value for step in found for name, value in step.items()})
    return report


def broadcast(number: int, arguments: list) -> dict:
    """Messages to users and to all, over instances that share a port."""
    secret = secrets.token_hex(32)
    settings = {"WSPROXY_ENDPOINTS__EVENTS": "true", "WSPROXY_JWT__SECRET_KEY": secret}
    with redis_server() as redis, one_port(number, redis, settings) as (port, pids):
        told = ["--servers", ",".join([f"127.0.0.1:{port}"] * number), "--pid", ",".join(map(str, pids)),
                "--publish", f"127.0.0.1:{redis}", "--secret", secret]
        report = generate(["cluster", *arguments, *told])
    figures = report["figures"]
    figures["resident_bytes_of_all"] = sum(figures.get(f"instance_{n}_resident_bytes", 0) for n in range(number))
    return report


# --- The constants of Redis ---


def command(*words) -> bytes:
    words = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def cpu_ns(pid: int) -> int:
    """CPU time of all threads of a process."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


class Link:
    """A connection to Redis that is written to and read from at once, so that neither side waits."""

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def pipeline(self, commands: list) -> None:
        """Sends all commands and reads all answers meanwhile; their end is that to a `PING` with a name."""
        mark = b"end-" + secrets.token_hex(8).encode()
        waiting = memoryview(b"".join(commands) + command("PING", mark))
        wanted, tail = b"$%d\r\n%b\r\n" % (len(mark), mark), b""
        self.socket.setblocking(False)
        while not tail.endswith(wanted):
            readable, writable, _ = select.select([self.socket], [self.socket] if waiting else [], [], 30)
            if not readable and not writable:
                raise RuntimeError("Redis does not answer")
            if writable:
                waiting = waiting[self.socket.send(waiting[:16_384]):]
            if readable:
                read = self.socket.recv(1 << 20)
                if not read:
                    raise RuntimeError("Redis has closed the connection")
                if b"-ERR" in read or b"-NOSCRIPT" in read or b"-WRONG" in read:
                    raise RuntimeError(f"Redis refuses: {read[:300]}")
                tail = (tail + read)[-200:]
        self.socket.setblocking(True)

    def subscribe(self, channels: list) -> None:
        """Subscribes, and waits for all confirmations."""
        self.socket.sendall(b"".join(command("SUBSCRIBE", channel) for channel in channels))
        confirmed = 0
        while confirmed < len(channels):
            # No name has a line of its own like this.
            confirmed += self.socket.recv(1 << 20).count(b"\r\n:")

    @contextlib.contextmanager
    def drained(self):
        """Reads messages, and forgets them."""
        done = threading.Event()

        def read() -> None:
            while not done.is_set():
                if select.select([self.socket], [], [], 0.05)[0]:
                    self.socket.recv(1 << 20)

        reading = threading.Thread(target=read)
        reading.start()
        try:
            yield
        finally:
            done.set()
            reading.join()

    def ask(self, *words) -> bytes:
        """Gives the raw answer to one command, whose end is its first line, or that of one bulk."""
        self.socket.sendall(command(*words))
        got = b""
        while not got.endswith(b"\r\n") or (got.startswith(b"$") and got[:3] != b"$-1" and
                                            len(got) < got.index(b"\r\n") + 4 + int(got[1:got.index(b"\r\n")])):
            got += self.socket.recv(1 << 16)
        return got

    def memory(self) -> int:
        """Bytes that Redis counts as used; what waits in buffers of clients is not among them."""
        info = self.ask("INFO", "memory").decode()
        fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
        return int(fields["used_memory_dataset"]) + int(fields["used_memory_overhead"]) - int(fields["mem_clients_normal"])


def script(name: str) -> bytes:
    return (harness.ROOT / "spec/scripts" / f"{name}.lua").read_bytes()


def redis_costs(quick: bool) -> dict:
    """CPU of Redis per command, and its memory per thing, on a Redis of its own and with a client that pipelines."""
    rounds = 1_000 if quick else 20_000
    figures: dict = {}
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(redis_server())
        link, listener = Link(port), Link(port)
        info = link.ask("INFO", "server").decode()
        pid = int(next(line for line in info.splitlines() if line.startswith("process_id")).split(":")[1])
        text, piece = b"x" * 200, b"x" * 20
        digest = {name: hashlib.sha1(script(name)).hexdigest() for name in ("publish", "stream", "room_join", "room_positions")}
        for name in digest:
            link.ask("SCRIPT", "LOAD", script(name))

        def cost(name: str, commands: list) -> None:
            # The first tenth warms up.
            link.pipeline(commands[:len(commands) // 10])
            rest = commands[len(commands) // 10:]
            before = cpu_ns(pid)
            link.pipeline(rest)
            figures[f"{name}_us"] = round((cpu_ns(pid) - before) / len(rest) / 1000, 2)

        def memory(name: str, number: int, work) -> None:
            before = link.memory()
            work()
            figures[f"{name}_bytes"] = round((link.memory() - before) / number)

        def session(n: int) -> str:
            return f"session:{n:012}:down"

        def keep(n: int, channel: str, log: str, *clock: str) -> bytes:
            return command("EVALSHA", digest["publish"], 1 + len(clock), log, *clock, channel, text, 1000, 1048576, 3600000, "")

        def of_session(n: int) -> bytes:
            return keep(n, session(n), f"{{{session(n)}}}:log")

        channels = 1_000
        cost("ping", [command("PING")] * rounds)
        cost("publish", [command("PUBLISH", session(n % channels), text) for n in range(rounds)])
        memory("log", channels, lambda: link.pipeline([of_session(n) for n in range(channels)]))
        # Redis takes memory for some twenty of them at once.
        further = 9 if quick else 90
        memory("log_entry", further * channels, lambda: link.pipeline(
            [of_session(n % channels) for n in range(further * channels)]))
        memory("token", channels, lambda: link.pipeline(
            [command("SET", f"session:{n:012}:auth", "t" * 32, "EX", 600) for n in range(channels)]))
        cost("set_token", [command("SET", f"session:{n:012}:auth", "t" * 32, "EX", 600) for n in range(rounds)])
        cost("take_token", [command("GETDEL", f"session:{n:012}:auth") for n in range(rounds)])
        cost("xrange", [command("XRANGE", f"{{{session(n % channels)}}}:log", "-", "+", "COUNT", 1) for n in range(rounds)])
        heard = 10 * channels
        memory("channel", heard, lambda: listener.subscribe(
            [f"session:{n:016}:down.." for n in range(heard)]))
        before = cpu_ns(pid)
        listener.subscribe([session(n) for n in range(channels)])
        figures["subscribe_us"] = round((cpu_ns(pid) - before) / channels / 1000, 2)
        with listener.drained():
            cost("publish_heard", [command("PUBLISH", session(n % channels), text) for n in range(rounds)])
            cost("publish_history", [of_session(n % channels) for n in range(rounds)])
            cost("publish_event", [keep(n, f"ws:user:u-{n % channels}", f"{{ws}}:user:u-{n % channels}:log", "{ws}:clock")
                                   for n in range(rounds)])

        def stream(n: int, op: str, *rest) -> bytes:
            name = f"{{{session(n)}}}"
            keys = [f"{name}:log", f"{name}:stream:s", f"{name}:stream:s:text", f"{name}:streams"]
            return command("EVALSHA", digest["stream"], 4, *keys, op, session(n), "s", 1000, 1048576, 3600000, *rest)

        link.pipeline([stream(n, "open", 60000, "") for n in range(channels)])
        cost("append", [stream(n % channels, "append", 0, piece, "") for n in range(rounds)])

        def room(n: int) -> list:
            return [f"{{room:r-{n}}}:{part}" for part in ("members", "meta", "entities", "positions")]

        def join(n: int, member: int) -> bytes:
            record = json.dumps({"name": "A member", "color": "#123456"})
            return command("EVALSHA", digest["room_join"], 4, *room(n), f"client-{member:012}", f"connection-{member:012}",
                           f"user-{member:08}", record, 0, f"room:r-{n}", "o" * 17, 3600000, "", "cursor", b"s" * 60)

        def place(n: int, member: int) -> bytes:
            return command("EVALSHA", digest["room_positions"], 4, *room(n), 3600000, f"client-{member:012}",
                           f"connection-{member:012}", "cursor", b"p" * 80)

        memory("room", channels, lambda: link.pipeline([join(n, 0) for n in range(channels)] + [place(n, 0) for n in range(channels)]))
        memory("room_member", 9 * channels, lambda: link.pipeline(
            [act(n, m) for n in range(channels) for m in range(1, 10) for act in (join, place)]))
        cost("positions", [place(n % channels, n % 10) for n in range(rounds)])
    return {"scenario": "redis", "target": "redis", "settings": {"rounds": rounds}, "figures": figures, "problems": []}


@contextlib.contextmanager
def redis_cluster(number: int):
    """Gives the ports and processes of the masters of a Redis Cluster that has found together."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for _ in range(number):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-cluster-"))
            port, bus = free_port(), free_port()
            words = ["redis-server", "--port", port, "--cluster-port", bus, "--bind", "127.0.0.1", "--dir", folder, "--save", "",
                     "--cluster-enabled", "yes", "--daemonize", "no"]
            child = stack.enter_context(process(words, stdout=subprocess.DEVNULL))
            wait_until("redis-server", lambda: harness.listens(port), child)
            nodes.append((port, bus, child.pid))
        first = Link(nodes[0][0])
        for at, (port, bus, _) in enumerate(nodes):
            Link(port).ask("CLUSTER", "ADDSLOTSRANGE", 16384 * at // number, 16384 * (at + 1) // number - 1)
            if at:
                first.ask("CLUSTER", "MEET", "127.0.0.1", port, bus)
        deadline = time.monotonic() + 60
        while not all(f"cluster_known_nodes:{number}\r".encode() in told and b"cluster_state:ok" in told
                      for told in (Link(port).ask("CLUSTER", "INFO") for port, _, _ in nodes)):
            if time.monotonic() > deadline:
                raise RuntimeError("the nodes do not find together")
            time.sleep(0.2)
        yield [(port, pid) for port, _, pid in nodes]


def cluster_bus(number: int, quick: bool) -> dict:
    """CPU of the nodes of a Redis Cluster per message that one of them takes and passes on to all others."""
    rounds = 1_000 if quick else 20_000
    with redis_cluster(number) as nodes:
        link, listener = Link(nodes[0][0]), Link(nodes[-1][0])
        listener.subscribe(["c-0"])
        commands = [command("PUBLISH", "c-0", b"x" * 200)] * rounds
        with listener.drained():
            # The first tenth warms up.
            link.pipeline(commands[:rounds // 10])
            time.sleep(0.5)
            before = [cpu_ns(pid) for _, pid in nodes]
            link.pipeline(commands)
            # Messages that are still on the bus.
            time.sleep(1)
        spent = [(cpu_ns(pid) - start) / rounds / 1000 for (_, pid), start in zip(nodes, before)]
    figures = {"publishing_us": round(spent[0], 2), "each_other_us": round(sum(spent[1:]) / (number - 1), 2),
               "all_us": round(sum(spent), 2)}
    return {"scenario": "bus", "target": "redis", "settings": {"nodes": number}, "figures": figures, "problems": []}


# --- One channel to one client ---


def one_channel(how: str, size: int, arguments: list) -> dict:
    """The highest rate of one channel to one client: a WebSocket (`ws`) or an event stream (`sse`)."""
    quick = "--quick" in arguments
    seconds = float(last_value(arguments, "--duration", 0.5 if quick else 4))
    steps, problems = [], []
    # Nothing but messages is to come.
    quiet = {"WSPROXY_HEARTBEAT__INTERVAL": "10m", "WSPROXY_HEARTBEAT__TIMEOUT": "20m", "WSPROXY_SSE__KEEP_ALIVE": "10m"}
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(redis_server())
        server = stack.enter_context(harness.gateway(redis, quiet))
        info = Link(redis).ask("INFO", "server").decode()
        redis_pid = int(next(line for line in info.splitlines() if line.startswith("process_id")).split(":")[1])
        for rate in ONE_RATES[size][:1] if quick else ONE_RATES[size]:
            client = stack.enter_context(opened(how, server.port, redis, f"one-{rate}"))
            before = cpu_ns(server.pid), cpu_ns(redis_pid)
            got, latency = one_rate(client, redis, f"session:one-{rate}:down", size, rate, seconds)
            wanted = round(rate * seconds)
            spent = cpu_ns(server.pid) - before[0], cpu_ns(redis_pid) - before[1]
            held = got == wanted and latency[0.99] < 50
            steps.append({"rate_per_s": rate, "delivered": got, "latency_p50_ms": latency[0.5], "latency_p99_ms": latency[0.99],
                          "server_cpu_us_per_delivery": round(spent[0] / max(got, 1) / 1000, 3),
                          "redis_cpu_us_per_delivery": round(spent[1] / max(got, 1) / 1000, 3), "held": held})
            if not held:
                break
    highest = max((step["rate_per_s"] for step in steps if step["held"]), default=0)
    if not highest:
        problems.append("not even the first rate was held")
    figures = {"highest_rate_held_per_s": highest, "steps": steps}
    return {"scenario": "one", "target": "wsproxy", "settings": {"how": how, "size_bytes": size}, "figures": figures,
            "problems": problems}


def last_value(arguments: list, flag: str, otherwise):
    """The value behind the last of some equal flags."""
    at = [number for number, argument in enumerate(arguments) if argument == flag]
    return arguments[at[-1] + 1] if at else otherwise


@contextlib.contextmanager
def opened(how: str, port: int, redis: int, session: str):
    """A client of a session, as a socket behind the head of the answer."""
    Link(redis).ask("SET", f"session:{session}:auth", f"token-{session}", "EX", 60)
    lines = [f"GET /bench/ws/{session} HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Authorization: Bearer token-{session}"]
    if how == "ws":
        lines += ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
                  "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
    else:
        lines += ["Accept: text/event-stream"]
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        head = b""
        while b"\r\n\r\n" not in head:
            read = client.recv(4096)
            if not read:
                break
            head += read
        wanted = b" 101 " if how == "ws" else b" 200 "
        if wanted not in head[:20]:
            raise RuntimeError(f"the gateway answers {head[:200]}")
        yield client


STAMP_BYTES = 20


def one_rate(client: socket.socket, redis: int, channel: str, size: int, rate: int, seconds: float) -> tuple:
    """Publishes from a process of its own; gives the number of messages that came, and quantiles of their latency in ms.

    A message is `@`, the time of its schedule and filling. Each counts with the age of the oldest that was read with it.
    """
    sending = multiprocessing.get_context("fork").Process(target=publish, args=(redis, channel, size, rate, seconds))
    sending.start()
    wanted, got, ages, carry = round(rate * seconds), 0, [], b""
    client.settimeout(3)
    try:
        while got < wanted:
            read = client.recv(1 << 20)
            if not read:
                break
            now, count = time.monotonic_ns(), read.count(b"@")
            got += count
            read = carry + read
            first = read.find(b"@")
            stamp = read[first + 1:first + STAMP_BYTES]
            if first >= 0 and len(stamp) == STAMP_BYTES - 1:
                ages.append((now - int(stamp), max(count, 1)))
            # The stamp of a message may have been cut.
            last = read.rfind(b"@")
            carry = read[last:] if last >= 0 and len(read) - last < STAMP_BYTES else b""
    except TimeoutError:
        pass
    sending.join(20)
    if sending.is_alive():
        sending.kill()
        sending.join()
    return got, {part: quantile(ages, part) for part in (0.5, 0.99)}


def quantile(ages: list, part: float) -> float:
    """A quantile of nanoseconds, each with the number of messages it counts for; in milliseconds."""
    total, sum_so_far = sum(count for _, count in ages), 0
    for age, count in sorted(ages):
        sum_so_far += count
        if sum_so_far >= part * total:
            return round(age / 1e6, 3)
    return math.inf


def publish(redis: int, channel: str, size: int, rate: int, seconds: float) -> None:
    """Publishes what is due, a millisecond at a time."""
    with socket.create_connection(("127.0.0.1", redis)) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=forget_answers, args=(link,), daemon=True).start()
        start, sent, wanted = time.monotonic_ns() + 5_000_000, 0, round(rate * seconds)
        filling = b"x" * (size - STAMP_BYTES)
        while sent < wanted:
            now = time.monotonic_ns()
            due = min(wanted, int((now - start) * rate / 1e9))
            if due > sent:
                # The schedule's time of the first of them.
                stamp = start + int(sent * 1e9 / rate)
                message = b"@%019d%b" % (stamp, filling)
                link.sendall(command("PUBLISH", channel, message) * (due - sent))
                sent = due
            time.sleep(0.001)
        time.sleep(0.2)


def forget_answers(link: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while link.recv(1 << 20):
            pass
