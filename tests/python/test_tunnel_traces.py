"""Spans of proxied requests: through one instance and through two, of refusals, broken answers and upgrades."""

import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest
from conftest import free_port, until
from test_traces import SAMPLED, SERVER, SPAN, TRACE, UNSAMPLED, collector, context_of  # noqa: F401 (a fixture)
from tunnel import CLIENT, PROXY, Tunnel, TunnelGateway

AUTHORIZED = {"Authorization": f"Bearer {CLIENT}"}
PEER_SECRET = "secret-of-the-instances-0123456789abcdef"


class Handler(BaseHTTPRequestHandler):
    """Notes the `traceparent` of each request by its path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.parents[self.path] = self.headers["traceparent"]
        if self.path.endswith("/switch"):
            self.send_response(101)
            self.send_header("Connection", "upgrade")
            self.send_header("Upgrade", "raw")
            self.end_headers()
            self.wfile.flush()
            self.rfile.read(1)
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Length", "100" if self.path.endswith("/broken") else "2")
        self.end_headers()
        self.wfile.write(b"ok")
        if self.path.endswith("/broken"):
            # The head reaches the client before the end.
            time.sleep(0.5)
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def upstream():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.parents = True, {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def traced(collector, name):  # noqa: F811
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.http, "OTEL_BSP_SCHEDULE_DELAY": "50", "SERVER_ID": name}


def peered():
    return f'peer_bind = "127.0.0.1:{free_port()}"\npeer_secret = "{PEER_SECRET}"'


@pytest.fixture
def tunnel(tmp_path, redis, upstream, collector):  # noqa: F811
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None, config=peered(), **traced(collector, "gw-1"))
    yield tunnel
    tunnel.stop()


def get(url, path, headers):
    return httpx.get(f"{url}{path}", headers=headers, timeout=20)


def of_trace(collector, name, trace=TRACE):  # noqa: F811
    """Waits for the spans of a name in a trace, and returns the last one with the names of its phases."""
    spans = until(name, lambda: [s for s in collector.spans() if (s["name"], s["trace"]) == (name, trace)])
    phases = [s for s in collector.spans() if s["parent"] == spans[-1]["span"]]
    return spans[-1], [s["name"] for s in sorted(phases, key=lambda span: span["start"]) if s["kind"] != SERVER]


def test_a_request_is_a_span_between_client_and_upstream(tunnel, upstream, collector):  # noqa: F811
    path = "/api/v1/namespaces/secret-name/pods"
    assert get(tunnel.url, f"{path}?token=secret-query", AUTHORIZED | SAMPLED | {"tracestate": "vendor=a"}).text == "ok"
    root, phases = of_trace(collector, "proxied request")
    assert (root["parent"], root["state"], root["kind"], root["failed"]) == (SPAN, "vendor=a", SERVER, False)
    assert upstream.parents[f"{path}?token=secret-query"] == context_of(root)
    assert phases == ["authenticate", "check", "find lane", "head", "answer"]
    attributes = root["attributes"]
    assert attributes.pop("user_agent.original").startswith("python-httpx/")
    assert attributes == {
        "http.request.method": "GET",
        "http.route": "/clusters/{cluster_id}/proxy/{path}",
        "http.response.status_code": 200,
        "client.address": "127.0.0.1",
        "wsproxy.cluster": "c1",
        "wsproxy.pattern": "/api/v1/namespaces/{}/pods",
        "wsproxy.source": "upstream",
    }
    assert "secret-" not in str(collector.spans()).replace(str(PEER_SECRET), "") and CLIENT not in str(collector.spans())
    # The line of the request has the same trace.
    assert f'"trace_id":"{TRACE}"' in until("the line", lambda: tunnel.gateway.process.output())


def test_a_trace_passes_two_instances(tunnel, upstream, collector, tmp_path, redis):  # noqa: F811
    second = TunnelGateway(tmp_path, redis.url, tunnel.write("second", peered()), None, **traced(collector, "gw-2"))
    try:
        assert get(f"{second.http}{PROXY}", "/two", AUTHORIZED | SAMPLED).text == "ok"
        first, phases = of_trace(collector, "proxied request")
        assert (first["parent"], first["resource"]["service.instance.id"]) == (SPAN, "gw-2")
        assert phases == ["authenticate", "check", "forward", "answer"]
        forwarded, phases = of_trace(collector, "forwarded request")
        assert (forwarded["parent"], forwarded["resource"]["service.instance.id"]) == (first["span"], "gw-1")
        assert phases == ["find lane", "head", "answer"]
        assert upstream.parents["/two"] == context_of(forwarded)
    finally:
        second.process.stop()


def test_refusals_and_broken_answers_are_told(tunnel, collector):  # noqa: F811
    assert get(tunnel.url, "/", SAMPLED).status_code == 401
    root, phases = of_trace(collector, "proxied request")
    assert (root["failed"], root["attributes"]["error.type"], phases) == (False, "unauthorized", ["authenticate"])
    trace = "1" * 32
    with pytest.raises(httpx.RemoteProtocolError):
        get(tunnel.url, "/broken", AUTHORIZED | {"traceparent": f"00-{trace}-{SPAN}-01"})
    root, _ = of_trace(collector, "proxied request", trace)
    attributes = root["attributes"]
    assert (root["failed"], attributes["http.response.status_code"], attributes["error.type"]) == (True, 200, "upstream_reset")


def test_the_span_of_an_upgrade_ends_with_the_switch(tunnel, upstream, collector):  # noqa: F811
    with socket.create_connection(("127.0.0.1", tunnel.gateway.port), timeout=20) as client:
        lines = [f"GET {PROXY}/switch HTTP/1.1", "Host: a", f"Authorization: Bearer {CLIENT}", "Connection: upgrade", "Upgrade: raw"]
        lines += [f"traceparent: {SAMPLED['traceparent']}", "", ""]
        client.sendall("\r\n".join(lines).encode())
        assert client.recv(12) == b"HTTP/1.1 101"
        # The connection is open still.
        root, _ = of_trace(collector, "proxied request")
        assert root["attributes"]["http.response.status_code"] == 101
        assert upstream.parents["/switch"] == context_of(root)


def test_an_unrecorded_trace_goes_on_as_such(tunnel, upstream, collector):  # noqa: F811
    assert get(tunnel.url, "/unrecorded", AUTHORIZED | UNSAMPLED).text == "ok"
    passed = upstream.parents["/unrecorded"]
    assert passed.startswith(f"00-{TRACE}-") and passed.endswith("-00") and SPAN not in passed
    assert get(tunnel.url, "/recorded", AUTHORIZED | SAMPLED | {"traceparent": f"00-{'2' * 32}-{SPAN}-01"}).text == "ok"
    of_trace(collector, "proxied request", "2" * 32)
    assert [span for span in collector.spans() if span["trace"] == TRACE] == []
