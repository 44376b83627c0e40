"""Starts and ends what a benchmark needs: a private Redis, the gateway, the peers, the load generator."""

import contextlib
import http.server
import json
import os
import platform
import random
import re
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
BENCH = Path(os.environ.get("BENCH_TOOL", TARGET / "release" / "wsproxy-bench"))
GATEWAY = TARGET / "release" / "wsproxy"
# No scenario takes half as long; one that hangs must not hang the others.
RUN_SECONDS_MAX = 600
PEERS = ["axum", "node", "fastapi", "nchan"]


def free_port() -> int:
    # Below the range that the kernel hands out to clients: a port of that range can be taken until the server binds it,
    # and a client that polls such a port can connect to itself.
    while True:
        port = random.randrange(10_100, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@contextlib.contextmanager
def process(command: list, **options):
    """A child that is ended, by its own handle, however the block is left."""
    child = subprocess.Popen([str(part) for part in command], **options)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(timeout=40)
            except subprocess.TimeoutExpired:
                child.kill()
        child.wait()


def wait_until(what: str, ready, child: subprocess.Popen, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if child.poll() is not None:
            raise RuntimeError(f"{what} ended with {child.returncode} before it was ready")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} was not ready after {seconds} s")
        time.sleep(0.02)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def answers(url: str) -> bool:
    try:
        # Certificates are made for a run, and nothing secret is sent.
        trust = ssl._create_unverified_context() if url.startswith("https:") else None
        with urllib.request.urlopen(url, timeout=2, context=trust) as answer:
            return answer.status == 200
    except (OSError, urllib.error.HTTPError):
        return False


@contextlib.contextmanager
def redis_server():
    """Gives the port of a Redis that keeps nothing."""
    with redis_with_file("appendonly no") as (port, _):
        yield port


@contextlib.contextmanager
def redis_with_file(keeps: str):
    """Gives the port of a Redis and the file with which it can be started again."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-redis-") as folder:
        file = Path(folder) / "redis.conf"
        lines = [f"port {port}", "bind 127.0.0.1", f"dir {folder}", 'save ""', "tcp-backlog 4096", keeps]
        file.write_text("\n".join(lines) + "\n")
        with process(["redis-server", file], stdout=subprocess.DEVNULL) as child:
            wait_until("redis-server", lambda: listens(port), child)
            yield port, file


class Server:
    """A server under load, by the load generator's name for it."""

    def __init__(self, target: str, port: int, pid: int, publish: int):
        self.port, self.pid = port, pid
        self.arguments = ["--target", target, "--server", f"127.0.0.1:{port}"]
        self.arguments += ["--publish", f"127.0.0.1:{publish}", "--pid", str(pid)]


@contextlib.contextmanager
def gateway(redis: int, settings: dict | None = None):
    port = free_port()
    environment = {
        **os.environ,
        "PORT": str(port),
        "REDIS_URL": f"redis://127.0.0.1:{redis}",
        "WSPROXY_SERVER__BIND": "127.0.0.1",
        "WSPROXY_LIMITS__MAX_CONNECTIONS": "19000",
        # A fan-out is one session with all its clients.
        "WSPROXY_LIMITS__CONNECTIONS_PER_SESSION": "0",
        # No balancer looks at /ready while it ends.
        "WSPROXY_SERVER__DRAIN_DELAY": "0s",
        "LOG_LEVEL": "warn",
        **(settings or {}),
    }
    binary = Path(os.environ.get("BENCH_GATEWAY", GATEWAY))
    with process([binary, "serve"], env=environment, stdout=sys.stderr) as child:
        scheme = "https" if "WSPROXY_TLS__KEY" in environment else "http"
        wait_until("wsproxy", lambda: answers(f"{scheme}://127.0.0.1:{port}/ready"), child)
        yield Server("wsproxy", port, child.pid, redis)


@contextlib.contextmanager
def peer(name: str, redis: int):
    port = free_port()
    command = [HERE / "peers" / name / "start", port, f"redis://127.0.0.1:{redis}"]
    with process(command, stdout=subprocess.DEVNULL) as child:
        wait_until(name, lambda: answers(f"http://127.0.0.1:{port}/health"), child)
        nchan = name == "nchan"
        yield Server("nchan" if nchan else "plain", port, child.pid, port if nchan else redis)


@contextlib.contextmanager
def certificate():
    """Gives the files of a certificate on P-256 and of its key."""
    with tempfile.TemporaryDirectory(prefix="bench-tls-") as folder:
        cert, key = Path(folder) / "fullchain.pem", Path(folder) / "privkey.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "2", "-subj", "/CN=localhost", "-keyout", key, "-out", cert]
        subprocess.run(command, check=True, capture_output=True)
        yield cert, key


NGINX = """
worker_processes 2;
worker_rlimit_nofile 20000;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 19900; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port} ssl reuseport backlog=4096;
        ssl_certificate {cert};
        ssl_certificate_key {key};
        ssl_protocols TLSv1.2 TLSv1.3;
        location / {{
            proxy_pass http://127.0.0.1:{behind};
            proxy_http_version 1.1;
            proxy_set_header Host $host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection upgrade;
            proxy_read_timeout 1h;
        }}
    }}
}}
"""


@contextlib.contextmanager
def tls(who: str, redis: int):
    """A gateway that speaks TLS, the same in plain, or nginx that speaks TLS in front of that."""
    with contextlib.ExitStack() as stack:
        cert, key = stack.enter_context(certificate())
        encrypted = {"WSPROXY_TLS__CERTIFICATE": str(cert), "WSPROXY_TLS__KEY": str(key)}
        one = stack.enter_context(gateway(redis, encrypted if who == "wsproxy" else None))
        if who != "nginx":
            yield [*one.arguments, *(["--tls"] if who == "wsproxy" else [])]
            return
        folder, port = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-nginx-")), free_port()
        # The workers of a master that root has started have another user.
        os.chmod(folder, 0o777)
        conf = Path(folder) / "nginx.conf"
        conf.write_text(NGINX.format(folder=folder, port=port, behind=one.port, cert=cert, key=key))
        program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        child = stack.enter_context(process([program, "-p", folder, "-c", conf], stderr=subprocess.DEVNULL))
        wait_until("nginx", lambda: answers(f"https://127.0.0.1:{port}/ready"), child)
        yield [*Server("wsproxy", port, f"{child.pid},{one.pid}", redis).arguments, "--tls"]


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes traces, and throws them away."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.server.taken.append(len(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def collector():
    """Gives the URL of a collector of traces, and the counts of the bytes that it takes."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), Collector) as server:
        server.taken = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server.taken
        finally:
            server.shutdown()


@contextlib.contextmanager
def traced(who: str, redis: int):
    """A gateway that records one request in a hundred, or the same without traces."""
    with collector() as (url, taken):
        traces = {"WSPROXY_TRACES__ENDPOINT": url, "WSPROXY_TRACES__SAMPLER": "traceidratio",
                  "WSPROXY_TRACES__SAMPLER_ARG": "0.01"}
        with gateway(redis, traces if who == "wsproxy" else None) as one:
            yield one.arguments
        # The last spans come at the end of the gateway.
        if who == "wsproxy" and not taken:
            raise RuntimeError("the collector has got no span")


@contextlib.contextmanager
def watched(who: str, redis: int):
    """A gateway whose console is looked at, as by ten pages of which one looks for a client each second; or the same,
    not looked at."""
    port = free_port()
    settings = {"METRICS_PORT": str(port), "WSPROXY_ADMIN__BIND": "127.0.0.1", "WSPROXY_API__KEYS": API_KEY}
    with gateway(redis, settings) as one:
        done, problems = threading.Event(), []

        def look() -> None:
            session = 0
            while not done.wait(1):
                session = (session + 7) % 10_000
                for path in ("overview?after=0", f"find?kind=session&id=bench-{session}"):
                    url = f"http://127.0.0.1:{port}/api/v1/console/{path}"
                    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {API_KEY}"})
                    try:
                        urllib.request.urlopen(asked, timeout=5).read()
                    except OSError as error:
                        problems.append(str(error))

        looking = threading.Thread(target=look)
        if who == "wsproxy":
            looking.start()
        try:
            yield one.arguments
        finally:
            done.set()
            if looking.ident:
                looking.join()
        if problems:
            raise RuntimeError(f"the console answers {problems[0]} and {len(problems) - 1} more")


HISTORY = {"WSPROXY_SESSIONS__HISTORY": "true"}


@contextlib.contextmanager
def with_history():
    """One gateway that keeps histories."""
    with redis_server() as redis, gateway(redis, HISTORY) as one:
        yield one.arguments


@contextlib.contextmanager
def two_instances():
    """Two gateways that keep histories; the load generator kills the first."""
    with redis_server() as redis, gateway(redis, HISTORY) as one, gateway(redis, HISTORY) as other:
        yield [
            "--server", f"127.0.0.1:{one.port}", "--other", f"127.0.0.1:{other.port}",
            "--publish", f"127.0.0.1:{redis}", "--pid", f"{one.pid},{other.pid}",
        ]


@contextlib.contextmanager
def event_instances(number: int = 3):
    """Several gateways with the event endpoint, on one Redis."""
    secret = secrets.token_hex(32)
    settings = {"WSPROXY_ENDPOINTS__EVENTS": "true", "WSPROXY_JWT__SECRET_KEY": secret}
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(redis_server())
        servers = [stack.enter_context(gateway(redis, settings)) for _ in range(number)]
        yield [
            "--servers", ",".join(f"127.0.0.1:{server.port}" for server in servers),
            "--pid", ",".join(str(server.pid) for server in servers),
            "--publish", f"127.0.0.1:{redis}", "--secret", secret,
        ]


@contextlib.contextmanager
def lasting_redis():
    """A gateway that keeps histories, on a Redis that loses nothing it has acknowledged; the load generator kills it.

    With `everysec` Redis may answer before it writes, so that its end could take back what clients have seen.
    """
    with redis_with_file("appendonly yes\nappendfsync always") as (redis, file):
        with gateway(redis, HISTORY) as one:
            try:
                yield [*one.arguments, "--redis-conf", str(file)]
            finally:
                # A load generator that had to be stopped leaves the Redis behind that it started.
                if listens(redis):
                    subprocess.run(["redis-cli", "-p", str(redis), "shutdown", "nosave"], capture_output=True)


@contextlib.contextmanager
def postgres():
    """Gives the URL of a private PostgreSQL."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        raise RuntimeError("PostgreSQL is missing: apt-get install postgresql")
    # PostgreSQL does not run as root.
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-postgres-") as folder:
        os.chmod(folder, 0o755)
        data = Path(folder) / "data"
        data.mkdir()
        if user:
            shutil.chown(data, "postgres")
        initdb = [*user, programs[-1] / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync"]
        subprocess.run([str(part) for part in initdb], check=True, stdout=subprocess.DEVNULL)
        settings = {"port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "max_connections": 50}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = [*user, programs[-1] / "postgres", "-D", data, *options]
        with process(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
            wait_until("postgres", lambda: listens(port), child)
            yield f"postgres://postgres@127.0.0.1:{port}/postgres"


AGENTS_MAX = 20_000
# The rows that the load generator expects: users of the run `bench`, with secrets in clear as an application has them.
AGENTS_SQL = f"""
INSERT INTO agent_credentials (user_id, shared_secret, platform, status)
SELECT 'bench-' || n, 'token-bench-' || n, 'linux', 'disconnected' FROM generate_series(0, {AGENTS_MAX}) AS n
"""


API_KEY = "key-of-the-benchmark-0123456789abcdef"
AGENTS = {
    "WSPROXY_ENDPOINTS__AGENTS": "true",
    "WSPROXY_API__KEYS": API_KEY,
    # Calls over HTTP come from one address.
    "WSPROXY_RATE_LIMIT__MAX_REQUESTS": "0",
}


def agents(who: str, scenario: list) -> dict:
    """Runs a scenario with gateways on a PostgreSQL that knows the agents; or with the relay on the tables that a gateway
    has made. An argument `OTHER` stands for the address of the second gateway."""
    with redis_server() as redis, postgres() as database, contextlib.ExitStack() as stack:
        settings = {**AGENTS, "DATABASE_URL": database}
        if who == "relay":
            with gateway(redis, settings):
                add_agents(database)
            port = free_port()
            command = [HERE / "peers/relay/start", port, f"redis://127.0.0.1:{redis}", database]
            child = stack.enter_context(process(command, stdout=subprocess.DEVNULL))
            wait_until("the relay", lambda: answers(f"http://127.0.0.1:{port}/health"), child)
            return generate([*scenario, *agents_at(redis, [(port, child.pid)])])
        servers = [stack.enter_context(gateway(redis, settings)) for _ in range(2 if "OTHER" in scenario else 1)]
        add_agents(database)
        arguments = [f"127.0.0.1:{servers[-1].port}" if part == "OTHER" else part for part in scenario]
        before = transactions(database)
        report = generate([*arguments, *agents_at(redis, [(server.port, server.pid) for server in servers])])
        # PostgreSQL has the numbers of a session when it ends.
        stack.close()
        if scenario[0] == "agents-lost" and report["figures"]:
            handshakes = 2 * report["settings"]["connections"]
            report["figures"]["transactions_per_agent"] = round((transactions(database) - before) / handshakes, 2)
        return report


def add_agents(database: str) -> None:
    insert = ["psql", "-q", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", AGENTS_SQL]
    # The tables are made in the background.
    for _ in range(100):
        if not subprocess.run(insert, stderr=subprocess.DEVNULL).returncode:
            return
        time.sleep(0.1)
    subprocess.run(insert, check=True)


def transactions(database: str) -> int:
    sql = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
    return int(subprocess.run(["psql", "-At", "-d", database, "-c", sql], check=True, capture_output=True).stdout)


# Members name themselves, and all of them come from a few addresses.
ROOMS = {
    "WSPROXY_ENDPOINTS__ROOMS": "true",
    "WSPROXY_ROOMS__DEVELOPMENT": "true",
    "WSPROXY_RATE_LIMIT__MAX_REQUESTS": "0",
    "WSPROXY_ROOMS__MEMBERS_MAX": "5000",
}


@contextlib.contextmanager
def rooms(who: str, what: str, settings: dict):
    """A gateway with rooms, or a peer; two gateways where one is killed."""
    with redis_server() as redis:
        if who != "wsproxy":
            port = free_port()
            with process([HERE / "peers/rooms/start", who, port], stdout=subprocess.DEVNULL) as child:
                wait_until(who, lambda: answers(f"http://127.0.0.1:{port}/health"), child)
                dialect = "socketio" if who == "socketio" else "relay"
                yield [*rooms_at(port, child.pid, redis), "--dialect", dialect]
            return
        with gateway(redis, {**ROOMS, **settings}) as one:
            if what != "killed":
                yield rooms_at(one.port, one.pid, redis)
                return
            with gateway(redis, {**ROOMS, **settings}) as other:
                pids = f"{one.pid},{other.pid}"
                yield [*rooms_at(one.port, pids, redis), "--other", f"127.0.0.1:{other.port}"]


def rooms_at(port: int, pid, redis: int) -> list:
    return ["--server", f"127.0.0.1:{port}", "--publish", f"127.0.0.1:{redis}", "--pid", str(pid)]


def cost() -> dict:
    """The cost of single steps of the protocol, by the example of its crate; in nanoseconds."""
    example = TARGET / "release/examples/cost"
    if not example.exists():
        return {"figures": {}, "problems": [f"there is no {example.name}: cargo build --release --example cost"]}
    figures = {}
    for line in subprocess.run([example], capture_output=True, text=True).stdout.splitlines():
        if found := re.fullmatch(r"(check.* position) (\d+) B +([\d.]+) ns", line):
            step, size, cost_ns = found.groups()
            # The larger of the two envelopes comes last.
            figures[f"{step.replace(' ', '_')}_ns"], figures["envelope_bytes"] = float(cost_ns), int(size)
    return {"scenario": "cost", "figures": figures, "problems": [] if figures else ["no line about rooms"]}


def agents_at(redis: int, servers: list) -> list:
    return [
        "--target", "agents", "--server", f"127.0.0.1:{servers[0][0]}", "--publish", f"127.0.0.1:{redis}",
        "--pid", ",".join(str(pid) for _, pid in servers), "--run", "bench",
    ]


# Scenarios that need more than one gateway on the common Redis: each run has a Redis of its own.
SETUPS = {
    "history": with_history,
    "resume": two_instances,
    "cluster": event_instances,
    "outage": lasting_redis,
}


def server(name: str, redis: int):
    return gateway(redis) if name == "wsproxy" else peer(name, redis)


def load(name: str, arguments: list, redis: int, settings: dict | None = None) -> dict:
    """Runs one scenario once against a fresh server, and gives the load generator's report."""
    scenario = [str(argument) for argument in arguments]
    if scenario[0] == "cost":
        return cost()
    if scenario[0] == "rooms":
        with rooms(name, scenario[1], settings or {}) as arguments:
            return generate([*scenario, *arguments])
    if scenario[0] == "tunnel":
        # Made of this module's parts.
        import tunnel

        return tunnel.load(name, scenario, settings or {})
    if scenario[0] == "scale":
        # As above.
        import scale

        return scale.load(name, scenario, redis)
    if scenario[0] in ("agents", "agent-ends", "agents-lost"):
        return agents(name, scenario)
    if scenario[0] == "tls":
        with tls(name, redis) as arguments:
            return generate([*scenario[1:], *arguments])
    if scenario[0] in ("traced", "watched"):
        with {"traced": traced, "watched": watched}[scenario[0]](name, redis) as arguments:
            return generate([*scenario[1:], *arguments])
    setup = SETUPS.get(scenario[0])
    if setup:
        with setup() as arguments:
            return generate([*scenario, *arguments])
    if name == "limit":
        return generate(["limit", *scenario, "--publish", f"127.0.0.1:{redis}"])
    with server(name, redis) as target:
        return generate([*scenario, *target.arguments])


def generate(arguments: list) -> dict:
    command = [str(part) for part in (BENCH, *arguments, "--json")]
    with process(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            output, _ = child.communicate(timeout=RUN_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            return {"figures": {}, "problems": [f"not done after {RUN_SECONDS_MAX} s"]}
    try:
        return json.loads(output)
    except json.JSONDecodeError:
        return {"figures": {}, "problems": [f"no result, exit code {child.returncode}"]}


def missing(name: str) -> str | None:
    """Why a server cannot be measured here."""
    needs = {
        "wsproxy": Path(os.environ.get("BENCH_GATEWAY", GATEWAY)),
        "axum": HERE / "env/axum/release/bench-peer-axum",
        "node": HERE / "env/node/node_modules/ws",
        "relay": HERE / "env/relay/node_modules/ws",
        "socketio": HERE / "env/rooms/node_modules/socket.io",
        "bun": HERE / "env/rooms/node_modules/.bin/bun",
        "fastapi": HERE / "env/venv/bin/python",
        "nginx": Path("/usr/sbin/nginx"),
        "ssh": Path("/usr/sbin/sshd"),
        "nchan": Path("/usr/lib/nginx/modules/ngx_nchan_module.so"),
    }
    path = needs.get(name)
    return f"{name}: there is no {path.name}" if path and not path.exists() else None


def output_of(*command: str) -> str:
    if not shutil.which(command[0]) and not Path(command[0]).exists():
        return "absent"
    done = subprocess.run(command, capture_output=True, text=True)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else "?"


def conditions() -> dict:
    """The facts of this machine that a reader needs to compare figures."""
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    somaxconn = Path("/proc/sys/net/core/somaxconn")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "cores": os.cpu_count(),
        "cpu": model.group(1) if model else platform.machine(),
        "memory_gb": round(int(memory.group(1)) / 1e6, 1) if memory else None,
        "kernel": platform.release(),
        "load_before": os.getloadavg()[0],
        "somaxconn": somaxconn.read_text().strip() if somaxconn.exists() else None,
        "redis": output_of("redis-server", "--version"),
        "rustc": output_of("rustc", "--version"),
        "python": platform.python_version(),
        "node": output_of("node", "--version"),
        "nginx": output_of("nginx", "-v"),
        "ssh": output_of("ssh", "-V"),
    }
