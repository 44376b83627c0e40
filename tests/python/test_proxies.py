"""The samples in deploy/ behind which a client cannot choose its address, with the real nginx and HAProxy."""

import json
import shutil
import socket

import pytest
from conftest import ROOT, Process, free_port, until

# The gateway trusts 127.0.0.1, where the proxies run; clients come from another address of this machine.
CLIENT = "127.0.0.2"
FORGED = "192.0.2.66"
HEADERS = [
    [],
    [("X-Forwarded-For", FORGED)],
    [("Forwarded", f"for={FORGED}")],
    [("X-Forwarded-For", FORGED), ("Forwarded", f"for={FORGED}")],
    [("X-Forwarded-For", FORGED), ("X-Forwarded-For", FORGED), ("Forwarded", f"for={FORGED}"), ("Forwarded", "for=x")],
    [("X-Forwarded-For", f"{FORGED}, {FORGED}"), ("Forwarded", f'for="{FORGED}:1", for={FORGED}')],
    [("X-Forwarded-For", ""), ("Forwarded", 'for="')],
    [("X-Forwarded-For", "127.0.0.1"), ("Forwarded", "for=127.0.0.1")],
    [("x-forwarded-for", CLIENT), ("forwarded", f"for={FORGED}")],
    # Names that are spelled differently are other headers.
    [("X_Forwarded_For", FORGED), ("X-Real-IP", FORGED), ("X-Forwarded", f"for={FORGED}")],
]


def nginx(folder, port, upstream):
    sample = (ROOT / "deploy/nginx/wsproxy.conf").read_text()
    for old, new in [
        ("server 127.0.0.1:8080;", f"server 127.0.0.1:{upstream};"),
        ("listen 80;", f"listen 127.0.0.1:{port};"),
        ("/var/log/nginx/wsproxy.log", f"{folder}/access.log"),
    ]:
        assert old in sample, old
        sample = sample.replace(old, new)
    (folder / "wsproxy.conf").write_text(sample)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr;\n"
        f"events {{}}\nhttp {{ {temporary} include {folder}/wsproxy.conf; }}\n"
    )
    return [program("nginx"), "-p", str(folder), "-c", str(config)]


def haproxy(folder, port, upstream):
    sample = (ROOT / "deploy/haproxy/haproxy.cfg").read_text()
    for old, new in [
        ("server one 127.0.0.1:8080", f"server one 127.0.0.1:{upstream}"),
        ("bind :80\n", f"bind 127.0.0.1:{port}\n"),
        ("maxconn 100000", "maxconn 100"),
    ]:
        assert old in sample, old
        sample = sample.replace(old, new)
    config = folder / "haproxy.cfg"
    config.write_text(sample)
    return [program("haproxy"), "-f", str(config), "-db"]


def program(name):
    # Debian puts servers where the path of an ordinary user does not lead.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")
    assert found, f"{name} is missing: apt-get install {name}"
    return found


class Behind:
    """The gateway with a proxy in front."""

    def __init__(self, gateway, port):
        self.gateway, self.port = gateway, port

    def ask(self, path, headers=()):
        """The status of an answer to a client at `CLIENT`."""
        with socket.create_connection(("127.0.0.1", self.port), 10, source_address=(CLIENT, 0)) as client:
            lines = [f"GET {path} HTTP/1.1", "Host: gateway.example", "Connection: close", *(f"{n}: {v}" for n, v in headers)]
            client.sendall("\r\n".join([*lines, "", ""]).encode())
            return int(client.recv(64).split(b" ")[1])

    def seen(self):
        """The addresses of clients that were refused, in their order."""
        lines = [json.loads(line) for line in self.gateway.process.output().splitlines() if line.startswith("{")]
        return [line["address"] for line in lines if line["message"] == "Handshake refused."]


@pytest.fixture(params=[nginx, haproxy], ids=["nginx", "haproxy"])
def start_behind(request, tmp_path, start_gateway):
    started = []

    def start(**settings):
        # At this level no line about a refused handshake is left out.
        gateway = start_gateway(WSPROXY_SERVER__TRUSTED_PROXIES="127.0.0.1", LOG_LEVEL="debug", **settings)
        port = free_port()
        folder = tmp_path / "proxy"
        folder.mkdir()
        started.append(Process("proxy", request.param(folder, port, gateway.port), folder))
        behind = Behind(gateway, port)
        started[-1].ready("proxy", lambda: behind.ask("/ready") == 200)
        return behind

    yield start
    for process in started:
        process.stop()


@pytest.mark.parametrize("header", ["auto", "x-forwarded-for"])
def test_a_client_cannot_choose_its_address(start_behind, header):
    behind = start_behind(WSPROXY_SERVER__FORWARDED_HEADER=header)
    for headers in HEADERS:
        assert behind.ask("/demo/ws/s-1", headers) == 426, headers
    until("all are logged", lambda: len(behind.seen()) == len(HEADERS))
    assert behind.seen() == [CLIENT] * len(HEADERS)


def test_attempts_are_counted_whatever_a_client_says(start_behind):
    behind = start_behind(WSPROXY_RATE_LIMIT__MAX_REQUESTS="3", WSPROXY_RATE_LIMIT__WINDOW_SECONDS="600")
    forged = ([("Forwarded", f"for=192.0.2.{n}"), ("X-Forwarded-For", f"192.0.2.{n}")] for n in range(6))
    assert [behind.ask("/demo/ws/s-1", headers) for headers in forged] == [426] * 3 + [429] * 3
