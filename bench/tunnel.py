"""The tunnel's part of `bench/run`: a service with a gateway and a cluster agent before it, and the peers in their place."""

import contextlib
import getpass
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import harness
from harness import free_port, listens, process, wait_until

# A round trip of 50 ms at 1 Gbit/s, and a thin line.
LONG = ["--delay-ms", 25, "--rate", 125_000_000]
THIN = ["--rate", 10_000_000]
ALL = ["hyper", "nginx", "ssh"]

# The runs: a name, the load generator's arguments, the peers, and the link between both halves of the way.
TUNNEL = {
    "tunnel_bulk": (["tunnel", "bulk"], ALL),
    "tunnel_small": (["tunnel", "small"], ALL),
    "tunnel_long": (["tunnel", "bulk", "--times", 1, "--fresh"], ALL, {"link": LONG}),
    "tunnel_stalled": (["tunnel", "stalled"], ALL),
    "tunnel_waiting": (["tunnel", "waiting"], ALL),
    "tunnel_watches": (["tunnel", "watches", "-n", 1536], False, {"agents": 2}),
    "tunnel_watches_other": (["tunnel", "watches", "-n", 1536], False, {"agents": 2, "instances": 2}),
    "tunnel_fair": (["tunnel", "fair"], ALL),
    "tunnel_leave": (["tunnel", "leave", "-n", 200], ALL),
    "tunnel_deadlines": (["tunnel", "deadlines", "-n", 200], False, {"gateway": {
        "WSPROXY_TUNNEL__HEAD_TIMEOUT": "2s", "WSPROXY_TUNNEL__IDLE_TIMEOUT": "2s"}}),
    "tunnel_link": (["tunnel", "link"], ALL, {"link": THIN}),
    "tunnel_away": (["tunnel", "away", "--rate", 60], False, {"link": []}),
    "tunnel_away_500": (["tunnel", "away", "--rate", 500], False, {"link": []}),
    "tunnel_cuts": (["tunnel", "cuts", "--rate", 100, "--duration", 30], False, {"link": []}),
    "tunnel_other": (["tunnel", "bulk"], "local", {"instances": 2}),
    "tunnel_other_small": (["tunnel", "small", "--at-once", "1,32"], "local", {"instances": 2}),
}

TUNNEL_FIGURES = [
    {"of": "tunnel_bulk", "take": "down_cpu_s_per_gb", "unit": "s/GB", "bar": 1.1,
     "title": "100 MB down: CPU of both halves"},
    {"of": "tunnel_bulk", "take": "up_cpu_s_per_gb", "unit": "s/GB", "bar": 1.1, "title": "100 MB up: CPU of both halves"},
    {"of": "tunnel_bulk", "take": "down_mb_per_s", "unit": "MB/s", "higher_is_better": True,
     "title": "100 MB down: speed, client and service on the same cores"},
    {"of": "tunnel_bulk", "take": "up_mb_per_s", "unit": "MB/s", "higher_is_better": True, "title": "100 MB up: speed"},
    *[figure for number in (1, 32, 1000) for figure in (
        {"of": "tunnel_small", "take": f"at_{number}_cpu_us_per_request", "unit": "us", "bar": 1, "over": "hyper",
         "title": f"small requests, {number:,} at once: CPU of both halves per request"},
        {"of": "tunnel_small", "take": f"at_{number}_p99_ms", "unit": "ms", "bar": 2, "over": "hyper",
         "title": "the same, p99"},
        {"of": "tunnel_small", "take": f"at_{number}_errors", "unit": "", "bar": 0, "title": "the same, errors"})],
    {"of": "tunnel_long", "take": "down_s", "unit": "s", "bar": 1.5, "above": "hyper",
     "title": "100 MB down over a link of 50 ms (round trip) and 1 Gbit/s, nothing grown yet"},
    {"of": "tunnel_long", "take": "up_s", "unit": "s", "bar": 1.5, "above": "hyper", "title": "the same, up"},
    {"of": "tunnel_stalled", "take": "growth_mib", "unit": "MiB", "bar": 160,
     "title": "1,000 clients stop reading: growth of the process that grows most"},
    {"of": "tunnel_stalled", "take": "growth_of_sockets_mib", "unit": "MiB",
     "title": "the same, memory of all sockets in the kernel"},
    {"of": "tunnel_stalled", "take": "alone_p99_ms", "unit": "ms", "title": "a small request before that, p99"},
    {"of": "tunnel_stalled", "take": "beside_p99_ms", "unit": "ms", "bar": 20,
     "title": "a small request beside them, p99"},
    {"of": "tunnel_stalled", "take": "speed_ratio", "unit": "", "bar": 0.8, "higher_is_better": True,
     "title": "100 MB beside them: share of the usual speed"},
    {"of": "tunnel_stalled", "take": "left_mib", "unit": "MiB", "title": "growth that is left when they are gone"},
    {"of": "tunnel_waiting", "take": "beside_p99_ms", "unit": "ms", "bar": 20,
     "title": "a small request beside 1,000 that wait for their head, p99"},
    {"of": "tunnel_waiting", "take": "growth_mib", "unit": "MiB", "title": "the same, growth of the process that grows most"},
    {"of": "tunnel_watches", "take": "process_1_kib_per_watch", "unit": "KiB",
     "title": "1,536 idle watches over two agents: memory of the gateway for each"},
    {"of": "tunnel_watches", "take": "process_2_kib_per_watch", "unit": "KiB",
     "title": "the same, of one agent (which has half of them)"},
    {"of": "tunnel_watches", "take": "beside_p99_ms", "unit": "ms", "bar": 20, "title": "a small request beside them, p99"},
    {"of": "tunnel_watches", "take": "further_status", "unit": "", "title": "status of a further watch"},
    {"of": "tunnel_watches_other", "take": "process_1_kib_per_watch", "unit": "KiB",
     "title": "the same through an instance that forwards: its memory for each"},
    {"of": "tunnel_watches_other", "take": "process_2_kib_per_watch", "unit": "KiB",
     "title": "the same, of the instance with the agents"},
    {"of": "tunnel_watches_other", "take": "beside_p99_ms", "unit": "ms", "bar": 20,
     "title": "a small request beside them, p99"},
    {"of": "tunnel_fair", "take": "kept", "unit": "", "bar": 0.95, "higher_is_better": True,
     "title": "a fast reader beside one of 50 KB/s: share of its speed alone"},
    *[{"of": "tunnel_leave", "take": f"{state}_p99_ms", "unit": "ms", "bar": 50,
       "title": f"a client leaves while {words}, until the service has lost the connection, p99"}
      for state, words in (("streaming", "it reads"), ("waiting", "it waits for the head"),
                           ("stalled", "it has stopped reading"))],
    *[{"of": "tunnel_deadlines", "take": f"{name}_late_p99_ms", "unit": "ms", "bar": 50,
       "title": f"{words}, until the service has lost the connection, p99"}
      for name, words in (("head", "the deadline of a head passes"), ("idle", "the deadline of a body without a byte passes"))],
    {"of": "tunnel_link", "take": "idle_p99_ms", "unit": "ms", "title": "a small request on a link of 10 MB/s, p99"},
    {"of": "tunnel_link", "take": "beside_1_above_idle_ms", "unit": "ms", "bar": 40,
     "title": "beside one large body: p99 above that (bar: 20 ms and what the link itself buffers)"},
    {"of": "tunnel_link", "take": "beside_8_above_idle_ms", "unit": "ms", "bar": 40, "title": "the same beside eight"},
    {"of": "tunnel_link", "take": "beside_8_mb_per_s", "unit": "MB/s", "title": "speed of the eight together"},
    {"of": "tunnel_away", "take": "failed", "unit": "", "bar": 0,
     "title": "the lane is away for 3 s under 60 requests per second: requests that failed"},
    {"of": "tunnel_away", "take": "back_after_s", "unit": "s", "title": "the same, until the first that waited is answered"},
    {"of": "tunnel_away_500", "take": "waited_and_succeeded", "unit": "", "bar": 250, "higher_is_better": True,
     "title": "the same under 500: requests that waited and succeeded"},
    {"of": "tunnel_away_500", "take": "refused_p99_ms", "unit": "ms", "bar": 20,
     "title": "the same: time until a refusal, p99"},
    {"of": "tunnel_cuts", "take": "cuts", "unit": "", "title": "cuts of the link within half a minute, under 100 POSTs per second"},
    {"of": "tunnel_cuts", "take": "twice", "unit": "", "bar": 0, "title": "the same: POSTs that came twice"},
    {"of": "tunnel_cuts", "take": "answered_and_missing", "unit": "", "bar": 0,
     "title": "the same: POSTs that were answered and never came"},
    {"of": "tunnel_other", "take": "down_mb_per_s", "unit": "MB/s", "bar": 0.6, "over": "local", "higher_is_better": True,
     "title": "100 MB down through an instance that forwards: speed"},
    {"of": "tunnel_other", "take": "down_cpu_s_per_gb", "unit": "s/GB", "title": "the same, CPU of all three"},
    {"of": "tunnel_other_small", "take": "at_32_cpu_us_per_request", "unit": "us",
     "title": "small requests through it, 32 at once: CPU of all three per request"},
    {"of": "tunnel_other_small", "take": "at_32_p99_ms", "unit": "ms", "title": "the same, p99"},
]

QUICK = ["-n", 40, "--duration", 1, "--bytes", 2_000_000, "--times", 2, "--at-once", "1,8,40", "--rate", 20]


def load(who: str, scenario: list, settings: dict) -> dict:
    """Runs one case against the gateway with its agents or against a peer, and gives the load generator's report."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-tunnel-")))
        service = serve(stack, "upstream")
        control = free_port()

        def link(to: int) -> int:
            """The port of the link to this one; the port itself where there is no link."""
            options = settings.get("link")
            return to if options is None else serve(stack, "relay", "--to", f"127.0.0.1:{to}", "--control",
                                                    f"127.0.0.1:{control}", *options).port
        way = {"wsproxy": through_gateways, "local": through_gateways, "hyper": through_hyper, "nginx": through_nginx,
               "ssh": through_ssh}[who]
        arguments = way(stack, folder, service.port, link, {**settings, "local": who == "local"})
        report = harness.generate([*scenario, *arguments, "--upstream", f"127.0.0.1:{service.port}",
                                   "--control", f"127.0.0.1:{control}"])
        report["target"] = who
        return report


class Part:
    """A process on the way, and its port."""

    def __init__(self, port: int, pid: int):
        self.port, self.pid = port, pid


def serve(stack, name: str, *options) -> Part:
    port = free_port()
    child = stack.enter_context(process([harness.BENCH, name, "--listen", f"127.0.0.1:{port}", *options]))
    wait_until(name, lambda: listens(port), child)
    return Part(port, child.pid)


def at(port: int, *pids: int) -> list:
    return ["--server", f"127.0.0.1:{port}", "--pid", ",".join(map(str, pids))]


def through_gateways(stack, folder: Path, service: int, link, settings: dict) -> list:
    """The gateway and its agents. With two instances the agents are at the second, and the client at the first."""
    agent_token, client_token = secrets.token_hex(24), secrets.token_hex(24)
    digest = lambda token: hashlib.sha256(token.encode()).hexdigest()
    values = {
        "WSPROXY_ENDPOINTS__TUNNEL": "true",
        "WSPROXY_TUNNEL__AGENTS": json.dumps([{"cluster": "c1", "token_sha256": digest(agent_token)}]),
        "WSPROXY_TUNNEL__CLIENTS": json.dumps([{"token_sha256": digest(client_token), "clusters": ["c1"]}]),
        # All clients come from one address.
        "WSPROXY_RATE_LIMIT__MAX_REQUESTS": "0",
        **settings.get("gateway", {}),
    }
    redis = stack.enter_context(harness.redis_server())
    secret = secrets.token_hex(24)

    def start():
        peering = {"WSPROXY_TUNNEL__PEER_BIND": f"127.0.0.1:{free_port()}", "WSPROXY_TUNNEL__PEER_SECRET": secret}
        several = settings.get("instances", 1) > 1
        return stack.enter_context(harness.gateway(redis, {**values, **(peering if several else {})}))
    servers = [start() for _ in range(settings.get("instances", 1))]
    token = folder / "agent-token"
    token.write_text(agent_token)
    gateway, pids = link(servers[-1].port), [server.pid for server in servers]
    binary = os.environ.get("BENCH_GATEWAY", harness.GATEWAY)
    for number in range(settings.get("agents", 1)):
        command = [binary, "agent", "--gateway", f"ws://127.0.0.1:{gateway}", "--cluster", "c1", "--token-file", token,
                   "--agent-id", f"agent-{number}", "--upstream", f"http://127.0.0.1:{service}"]
        environment = {**os.environ, "LOG_LEVEL": "warn"}
        child = stack.enter_context(process(command, env=environment, stdout=sys.stderr))
        pids.append(child.pid)
    for server in servers:
        wait_until("the agent", lambda: is_answered(server.port, client_token), child)
    # The measured processes are those that a request passes.
    if settings["local"]:
        return [*at(servers[-1].port, *pids[1:]), "--prefix", "/clusters/c1/proxy", "--token", client_token]
    return [*at(servers[0].port, *pids), "--prefix", "/clusters/c1/proxy", "--token", client_token]


def is_answered(port: int, token: str) -> bool:
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/clusters/c1/proxy/small",
                                   headers={"Authorization": f"Bearer {token}"})
    try:
        return urllib.request.urlopen(asked, timeout=15).status == 200
    except (OSError, urllib.error.HTTPError):
        return False


def through_hyper(stack, _folder, service: int, link, _settings) -> list:
    """Two plain proxies, one behind the other, on the HTTP library of the gateway."""
    second = serve(stack, "proxy", "--to", f"127.0.0.1:{service}")
    first = serve(stack, "proxy", "--to", f"127.0.0.1:{link(second.port)}")
    return at(first.port, first.pid, second.pid)


NGINX = """
worker_processes 2;
worker_rlimit_nofile 20000;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log crit;
events {{ worker_connections 9900; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 100000000;
    upstream behind {{ server 127.0.0.1:{behind}; keepalive 1024; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port} reuseport backlog=4096;
        client_max_body_size 0;
        tcp_nodelay on;
        location / {{
            proxy_pass http://behind;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            # Each piece goes on as it comes, as in a tunnel.
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_buffer_size 64k;
            proxy_buffers 4 64k;
            proxy_busy_buffers_size 128k;
            client_body_buffer_size 64k;
            proxy_read_timeout 1h;
            proxy_send_timeout 1h;
            send_timeout 1h;
        }}
    }}
}}
"""


def through_nginx(stack, folder: Path, service: int, link, _settings) -> list:
    """Two nginx, one behind the other."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    # The workers of a master that root has started have another user.
    os.chmod(folder, 0o755)

    def start(behind: int) -> Part:
        port = free_port()
        own = folder / str(port)
        own.mkdir(mode=0o777)
        os.chmod(own, 0o777)
        conf = own / "nginx.conf"
        conf.write_text(NGINX.format(folder=own, port=port, behind=behind))
        child = stack.enter_context(process([program, "-p", own, "-c", conf], stderr=subprocess.DEVNULL))
        wait_until("nginx", lambda: listens(port), child)
        return Part(port, child.pid)
    second = start(service)
    first = start(link(second.port))
    return at(first.port, first.pid, second.pid)


SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/client.pub
PidFile {folder}/sshd.pid
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
AllowTcpForwarding yes
Compression no
LogLevel ERROR
"""


def through_ssh(stack, folder: Path, service: int, link, _settings) -> list:
    """OpenSSH: `ssh -R` opens a port at the server's side."""
    for name in ("host", "client"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name]
        subprocess.run([str(part) for part in command], check=True)
    port, opened = free_port(), free_port()
    conf = folder / "sshd_config"
    conf.write_text(SSHD.format(port=port, folder=folder))
    if os.geteuid() == 0:
        # The folder of the privilege separation, which only the system's service makes.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    server = stack.enter_context(process([SSHD_PROGRAM, "-D", "-e", "-f", conf], stderr=subprocess.DEVNULL))
    wait_until("sshd", lambda: listens(port), server)
    options = ["StrictHostKeyChecking=no", f"UserKnownHostsFile={folder}/known", "ExitOnForwardFailure=yes",
               "IdentitiesOnly=yes", "Compression=no", "LogLevel=ERROR"]
    command = ["ssh", "-F", "none", "-N", "-T", "-i", folder / "client", "-p", link(port)]
    command += [part for option in options for part in ("-o", option)]
    command += ["-R", f"127.0.0.1:{opened}:127.0.0.1:{service}", f"{getpass.getuser()}@127.0.0.1"]
    client = stack.enter_context(process(command, stdin=subprocess.DEVNULL))
    wait_until("ssh", lambda: listens(opened), client)
    return at(opened, server.pid, client.pid)


SSHD_PROGRAM = "/usr/sbin/sshd"
