"""docs/deploy/scaling.md: behind each proxy, with the lines of the page, the members of a room are at one instance."""

import contextlib
import re

import httpx
import pytest
from conftest import ROOT, Process, free_port, until
from samples import program
from websockets.sync.client import connect

PAGE = (ROOT / "docs/deploy/scaling.md").read_text()
ROOMS = [f"room-{number}" for number in range(16)]


def shown(language):
    """Configuration that the page shows."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.S | re.M)


def nginx(folder, port):
    upstream, location = shown("nginx")
    further = "proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade;"
    location = location.replace("# … all further lines of `location /`", further)
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"])
    return (
        [program("nginx"), "-c", "{file}"],
        f"daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off;\n{temporary}{upstream}\nserver {{ listen 127.0.0.1:{port};\n{location} }} }}\n",
    )


def haproxy(folder, port):
    [backend] = shown("haproxy")
    servers = "".join(f"    server s{each} 127.0.0.1:{each}\n" for each in ["8080", "8081"])
    return (
        [program("haproxy"), "-f", "{file}"],
        "defaults\n    mode http\n    timeout connect 2s\n    timeout client 60s\n    timeout server 60s\n"
        f"frontend clients\n    bind 127.0.0.1:{port}\n    default_backend rooms\n{backend}{servers}",
    )


def caddy(folder, port):
    [site] = shown("caddy")
    return (
        [program("caddy"), "run", "--adapter", "caddyfile", "--config", "{file}"],
        f"{{\n    admin off\n    auto_https off\n}}\nhttp://127.0.0.1:{port} {{\n{site}}}\n",
    )


@pytest.mark.parametrize("proxy", [nginx, haproxy, caddy])
def test_members_of_a_room_are_at_one_instance(proxy, start_gateway, tmp_path):
    settings = {"WSPROXY_ENDPOINTS__ROOMS": "true", "WSPROXY_ROOMS__DEVELOPMENT": "true", "WSPROXY_SERVER__BIND": "127.0.0.1"}
    gateways = [start_gateway(**settings, RATE_LIMIT_MAX_REQUESTS="0") for _ in range(2)]
    port = free_port()
    command, text = proxy(tmp_path, port)
    for written, gateway in zip(["8080", "8081"], gateways, strict=True):
        text = text.replace(f"127.0.0.1:{written}", f"127.0.0.1:{gateway.port}")
    file = tmp_path / "proxy.conf"
    file.write_text(text)
    process = Process("proxy", [each.format(file=file) for each in command], tmp_path, {"HOME": str(tmp_path)})
    with contextlib.ExitStack() as stack:
        stack.callback(process.stop)
        process.ready("proxy", lambda: httpx.get(f"http://127.0.0.1:{port}/ws/lobby").status_code == 426)
        for room in ROOMS:
            url = f"ws://127.0.0.1:{port}/ws/{room}?user_id="
            for user in ("ann", "bob", "cat"):
                stack.enter_context(connect(f"{url}{user}", proxy=None))

        def spread():
            """Numbers of connections at each instance."""
            metrics = [httpx.get(f"{each.http}/metrics").text for each in gateways]
            found = [re.search(r'^wsproxy_active_connections\{endpoint="rooms"\} (\d+)', each, re.M) for each in metrics]
            return [int(each[1]) for each in found if each]

        until("all are counted", lambda: sum(spread()) == 3 * len(ROOMS))
        assert all(count and count % 3 == 0 for count in spread()), spread()
