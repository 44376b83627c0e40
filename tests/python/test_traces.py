"""Traces: real OTLP, decoded by opentelemetry-proto, and collectors that freeze, refuse, are slow, or are away."""

import asyncio
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time

import httpx
import pytest
from conftest import ROOT, Process, free_port, until
from samples import Certificate
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

HERE = ROOT / "tests/python"
KEY = "a-key-for-tests-0123456789abcdef"
SECRET = "a-secret-of-the-tests-with-more-than-32-bytes"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
UNSAMPLED = {"traceparent": f"00-{TRACE}-{SPAN}-00"}
SERVER, INTERNAL, CLIENT, PRODUCER = 2, 1, 3, 4


class Collector:
    def __init__(self, folder, certificate=None):
        self.port, self.file = free_port(), folder / "spans.jsonl"
        self.http = f"{'https' if certificate else 'http'}://localhost:{self.port}"
        self.verify = certificate.context if certificate else True
        command = [sys.executable, str(HERE / "collector.py"), str(self.port), str(self.file)]
        command += [str(certificate.cert), str(certificate.key)] if certificate else []
        self.process = Process("collector", command, folder)
        self.process.ready("collector", lambda: self.ask("GET").status_code == 200)

    def ask(self, method, **options):
        return httpx.request(method, self.http, verify=self.verify, **options)

    def behave(self, **behaviour):
        self.ask("PUT", json=behaviour)

    def requests(self):
        return int(self.ask("GET").text)

    def spans(self):
        if not self.file.exists():
            return []
        # The last line may not be whole yet.
        return [json.loads(line) for line in self.file.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def root(self, name, count=1):
        """Waits for spans of a name, and returns the last one with its children by name, in the order of their beginnings."""
        found = until(f"{count} of {name}", lambda: (roots := [s for s in self.spans() if s["name"] == name]) and len(roots) >= count and roots)
        root = found[-1]
        children = sorted((s for s in self.spans() if s["parent"] == root["span"]), key=lambda span: span["start"])
        return root, children

    def freeze(self):
        self.process.child.send_signal(signal.SIGSTOP)

    def stop(self):
        self.process.child.send_signal(signal.SIGCONT)
        self.process.stop(signal.SIGKILL)


@pytest.fixture
def collector(tmp_path):
    collector = Collector(tmp_path)
    yield collector
    collector.stop()


@pytest.fixture
def start_traced(start_gateway, collector):
    """Starts instances that send their spans soon."""

    def start(**settings):
        traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.http, "OTEL_BSP_SCHEDULE_DELAY": "50"}
        return start_gateway(**traced | {"WSPROXY_API__KEYS": KEY} | settings)

    return start


def api(gateway, method, path, **options):
    headers = {"Authorization": f"Bearer {KEY}"} | options.pop("headers", {})
    return httpx.request(method, f"{gateway.http}/api/v1/{path}", headers=headers, timeout=20, **options)


def open_session(gateway, token, headers=None):
    protocols = ["wsproxy.v1", f"bearer.{token}"]
    return connect(f"{gateway.ws}/demo/ws/s-1?x=not-for-traces", subprotocols=protocols, additional_headers=headers, proxy=None)


def metric(gateway, name):
    found = re.search(rf"^wsproxy_{re.escape(name)} (\S+)$", httpx.get(f"{gateway.http}/metrics").text, re.M)
    return float(found[1])


def context_of(span):
    return f"00-{span['trace']}-{span['span']}-01"


@pytest.mark.asyncio
async def test_a_handshake_is_a_trace_with_its_phases(start_traced, collector, redis, session):
    gateway = start_traced(
        SERVER_ID="gw-1",
        OTEL_SERVICE_NAME="front-door",
        OTEL_RESOURCE_ATTRIBUTES="service.name=other,deployment.environment.name=test%201",
        OTEL_EXPORTER_OTLP_HEADERS="x-collector-key=a%20secret",
    )
    announced = redis.client.pubsub()
    announced.subscribe("agent:demo:sessions")
    until("the subscription", lambda: announced.get_message(timeout=1))
    before = time.time_ns()
    async with open_session(gateway, session(), SAMPLED | {"tracestate": "vendor=a"}):
        pass
    root, phases = collector.root("handshake sessions")
    after = time.time_ns()

    assert (root["trace"], root["parent"], root["state"]) == (TRACE, SPAN, "vendor=a")
    assert (root["kind"], root["failed"], root["scope"], root["path"]) == (SERVER, False, "wsproxy", "/v1/traces")
    assert root["flags"] & 0x301 == 0x301, "sampled, and below a span of another process"
    assert root["headers"]["x-collector-key"] == "a secret"
    assert root["resource"] == root["resource"] | {
        "service.name": "front-door",
        "deployment.environment.name": "test 1",
        "service.instance.id": "gw-1",
        "telemetry.sdk.language": "rust",
    }
    attributes = root["attributes"]
    connection = attributes.pop("wsproxy.connection_id")
    assert attributes.pop("user_agent.original").startswith("Python/")
    assert attributes == {
        "http.request.method": "GET",
        "http.route": "/{agent_id}/ws/{session_id}",
        "http.response.status_code": 101,
        "url.path": "/demo/ws/s-1",
        "client.address": "127.0.0.1",
        "wsproxy.endpoint": "sessions",
        "wsproxy.transport": "websocket",
        "wsproxy.agent_id": "demo",
        "wsproxy.session_id": "s-1",
        "wsproxy.resumes": False,
    }
    assert [phase["name"] for phase in phases] == ["parse", "authenticate", "subscribe", "consume token", "accept"]
    assert all((phase["trace"], phase["kind"]) == (TRACE, INTERNAL) for phase in phases)
    assert all(phase["flags"] & 0x301 == 0x101 for phase in phases)
    ends = [root["start"]] + [phase["end"] for phase in phases]
    assert ends == sorted(ends) and before <= root["start"] and ends[-1] <= root["end"] <= after
    assert all(earlier <= phase["start"] <= phase["end"] for phase, earlier in zip(phases, ends, strict=False))
    assert len({span["span"] for span in [root, *phases]}) == 6

    messages = [json.loads(until("the announcement", lambda: announced.get_message(timeout=1))["data"]) for _ in range(2)]
    assert [(m["event"], m["connection_id"]) for m in messages] == [("opened", connection), ("closed", connection)]
    assert all((m["traceparent"], m["tracestate"]) == (context_of(root), "vendor=a") for m in messages)
    told = collector.file.read_text() + gateway.process.output()
    assert "a-token" not in told and "not-for-traces" not in told
    assert "a secret" not in gateway.process.output()


@pytest.mark.asyncio
async def test_a_refused_handshake_tells_its_phase(start_traced, collector, session):
    gateway = start_traced()
    session("another")
    with pytest.raises(InvalidStatus):
        async with open_session(gateway, "wrong"):
            pass
    root, phases = collector.root("handshake sessions")
    assert (root["attributes"]["http.response.status_code"], root["attributes"]["error.type"]) == (403, "invalid_token")
    assert [phase["name"] for phase in phases] == ["parse", "authenticate"]
    assert phases[-1]["attributes"] == {"error.type": "invalid_token"}
    assert not root["failed"] and not root["parent"], "a client's fault is no failure of the server"
    lines = [json.loads(line) for line in gateway.process.output().splitlines()]
    assert [line["trace_id"] for line in lines if line["message"] == "Handshake refused."] == [root["trace"]]


def test_event_streams_and_lost_buses_have_spans(start_traced, collector, redis, session):
    gateway = start_traced()
    headers = {"Accept": "text/event-stream", "Authorization": f"Bearer {session()}"}
    with httpx.stream("GET", f"{gateway.http}/demo/ws/s-1", headers=headers) as stream:
        assert stream.status_code == 200
        root, phases = collector.root("handshake sessions")
    assert (root["attributes"]["wsproxy.transport"], root["attributes"]["http.response.status_code"]) == ("sse", 200)
    assert [phase["name"] for phase in phases][-2:] == ["consume token", "accept"]
    redis.kill()
    refused = httpx.get(f"{gateway.http}/demo/ws/s-1", headers=headers, timeout=20)
    assert refused.status_code in (503, 504)
    root, phases = collector.root("handshake sessions", 2)
    assert root["failed"] and phases[-1]["failed"], "a fault of the server is a failure"
    redis.start()


def test_a_client_that_leaves_early_has_a_span(start_traced, collector, redis, session):
    gateway = start_traced()
    token = session()
    redis.process.child.send_signal(signal.SIGSTOP)
    try:
        with socket.create_connection(("127.0.0.1", gateway.port)) as client:
            head = "GET /demo/ws/s-1 HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            client.sendall(f"{head}Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
            until("the handshake", lambda: metric(gateway, "handshakes_waiting") == 1)
        root, phases = collector.root("handshake sessions")
    finally:
        redis.process.child.send_signal(signal.SIGCONT)
    assert (root["attributes"]["error.type"], phases[-1]["name"]) == ("cancelled", "authenticate")
    assert "http.response.status_code" not in root["attributes"]


def test_calls_of_the_api_pass_the_trace_on(start_traced, collector):
    gateway = start_traced()
    answer = api(gateway, "POST", "sessions/s-1/messages?history=true", json={"text": "a private message"}, headers=SAMPLED)
    assert answer.status_code == 200, answer.text
    root, [publish] = collector.root("POST /api/v1/sessions/{session_id}/messages")
    assert answer.headers["traceparent"] == context_of(root)
    assert (root["trace"], root["parent"], root["kind"]) == (TRACE, SPAN, SERVER)
    assert (root["attributes"]["http.route"], root["attributes"]["wsproxy.api_key"]) == ("/api/v1/sessions/{session_id}/messages", "api.keys[1]")
    assert (publish["name"], publish["kind"]) == ("publish", PRODUCER)
    assert publish["attributes"] == {
        "messaging.destination.name": "session:s-1:down",
        "messaging.message.body.size": 28,
        "messaging.message.id": answer.json()["event_id"],
        "wsproxy.receivers": 0,
    }
    assert root["start"] <= publish["start"] <= publish["end"] <= root["end"]

    # A wrong call is refused with its code; a worker without a parent begins a trace of its own.
    answer = api(gateway, "POST", "sessions/s-1/close", json={"code": 5})
    root, _ = collector.root("POST /api/v1/sessions/{session_id}/close")
    assert answer.status_code == 400 and answer.headers["traceparent"] == context_of(root)
    assert (root["attributes"]["error.type"], root["parent"]) == ("bad_request", "")
    # Without a valid key, the wish to be recorded does not count.
    assert api(gateway, "GET", "info", headers=SAMPLED | {"Authorization": "Bearer wrong-key-0123456789"}).status_code == 403
    assert api(gateway, "GET", "events/history?channel=x").status_code == 400
    collector.root("GET /api/v1/events/history")
    spans = collector.spans()
    assert not [span for span in spans if span["name"] == "GET /api/v1/info"]
    assert "private" not in collector.file.read_text() and KEY not in collector.file.read_text()


def test_batches_have_one_span(start_traced, collector):
    gateway = start_traced()
    messages = [{"to": "session:s-1", "message": {"n": n}} for n in range(50)]
    assert api(gateway, "POST", "events/batch", json={"messages": messages}).status_code == 200
    root, children = collector.root("POST /api/v1/events/batch")
    assert (root["attributes"]["wsproxy.messages"], children) == (50, [])


@pytest.mark.parametrize(
    ("settings", "headers", "recorded"),
    [
        ({}, {}, True),
        ({}, UNSAMPLED, False),
        ({"OTEL_TRACES_SAMPLER": "always_on"}, UNSAMPLED, True),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, SAMPLED, False),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, {}, False),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, SAMPLED, True),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5"}, SAMPLED, False),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.52"}, UNSAMPLED, True),
        ({}, SAMPLED | {"traceparent": f"00-{TRACE.upper()}-{SPAN}-00"}, True),
    ],
)
def test_samplers_choose_the_traces(start_traced, collector, settings, headers, recorded):
    gateway = start_traced(**settings)
    answer = api(gateway, "GET", "info", headers=headers)
    _, trace, span, flags = answer.headers["traceparent"].split("-")
    # The last 64 bits of the parent's id are 0.517 of the largest number.
    assert (flags == "01", span != SPAN) == (recorded, True)
    assert (trace == TRACE) == (headers in (SAMPLED, UNSAMPLED)), "a malformed parent counts as none"
    gateway.process.stop()
    assert bool(collector.spans()) == recorded, "the last spans are sent at the end"


def test_clients_can_ask_for_some_traces_only(start_traced, collector):
    gateway = start_traced(
        WSPROXY_TRACES__CLIENT_SAMPLES_PER_SECOND="1", OTEL_TRACES_SAMPLER="parentbased_always_off", WSPROXY_ENDPOINTS__ECHO="true"
    )
    begun = time.monotonic()
    for _ in range(50):
        httpx.get(f"{gateway.http}/echo", headers=SAMPLED)
    most = time.monotonic() - begun + 2
    gateway.process.stop()
    assert 1 <= len([span for span in collector.spans() if span["name"] == "handshake echo"]) <= most


@pytest.mark.asyncio
async def test_traces_are_off_by_default(start_gateway, redis, session, collector):
    gateway = start_gateway(WSPROXY_API__KEYS=KEY, OTEL_SERVICE_NAME="x")
    off = start_gateway(OTEL_EXPORTER_OTLP_ENDPOINT=collector.http, OTEL_SDK_DISABLED="true", OTEL_TRACES_SAMPLER="what?")
    announced = redis.client.pubsub()
    announced.subscribe("agent:demo:sessions")
    until("the subscription", lambda: announced.get_message(timeout=1))
    async with open_session(gateway, session(), SAMPLED):
        opened = json.loads(until("the announcement", lambda: announced.get_message(timeout=1))["data"])
    assert opened["event"] == "opened" and "traceparent" not in opened
    assert "traceparent" not in api(gateway, "GET", "info", headers=SAMPLED).headers
    assert metric(gateway, "trace_spans_sent_total") == 0
    async with open_session(off, session(), SAMPLED):
        pass
    off.process.stop()
    assert collector.spans() == [] and collector.requests() == 0


def wsproxy(*arguments, **variables):
    binary = os.environ.get("WSPROXY_BIN", str(ROOT / "target/debug/wsproxy"))
    return subprocess.run([binary, *arguments], env={"PATH": os.environ["PATH"]} | variables, capture_output=True, text=True)


def test_wrong_settings_are_named(tmp_path):
    done = wsproxy(
        "config",
        "check",
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:4317",
        OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
        OTEL_EXPORTER_OTLP_HEADERS="a secret",
        OTEL_TRACES_SAMPLER="jaeger_remote",
        OTEL_TRACES_SAMPLER_ARG="2",
        OTEL_BSP_MAX_QUEUE_SIZE="10",
    )
    assert done.returncode == 78
    for part in ["traces.protocol", "port 4318", "traces.headers", "traces.sampler ", "traces.sampler_arg", "traces.batch_max"]:
        assert part in done.stderr + done.stdout, part
    assert "a secret" not in done.stderr + done.stdout
    (tmp_path / "headers").write_text("x-key=hidden\n")
    good = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_HEADERS_FILE": str(tmp_path / "headers")}
    done = wsproxy("config", "show", **good, OTEL_EXPORTER_OTLP_TIMEOUT="7000", OTEL_EXPORTER_OTLP_TRACES_TIMEOUT="8000")
    assert done.returncode == 0 and "hidden" not in done.stdout, done.stderr
    shown = dict(line.split(" = ", 1) for line in done.stdout.split("[traces]")[1].split("\n[")[0].splitlines() if " = " in line)
    assert shown["headers"].startswith('"***"') and shown["timeout"].startswith('"8s"'), shown


async def latency(gateway, count=60):
    """Median and worst time of handshakes of `/echo`, which need no Redis."""
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        async with connect(f"{gateway.ws}/echo", proxy=None):
            times.append(time.perf_counter() - begun)
    return statistics.median(times), max(times)


def memory(gateway):
    status = open(f"/proc/{gateway.process.child.pid}/status").read()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


@pytest.mark.asyncio
@pytest.mark.parametrize("fault", ["frozen", "away", "refuses", "slow"])
async def test_a_bad_collector_costs_bounded_memory_and_no_latency(start_traced, start_gateway, collector, fault):
    small = {"WSPROXY_ENDPOINTS__ECHO": "true", "OTEL_BSP_MAX_QUEUE_SIZE": "20", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "10"}
    traced = start_traced(**small, OTEL_BSP_EXPORT_TIMEOUT="2000", OTEL_EXPORTER_OTLP_TIMEOUT="1000")
    plain = start_gateway(WSPROXY_ENDPOINTS__ECHO="true")
    for gateway in (traced, plain):
        await latency(gateway, 20)
    match fault:
        case "frozen":
            collector.freeze()
        case "away":
            collector.stop()
        case "refuses":
            collector.behave(status=503, retry_after=2**64 - 1)
        case "slow":
            collector.behave(delay=0.8)
    dropped = "trace_spans_dropped_total"

    def drops():
        return sum(metric(traced, f'{dropped}{{reason="{reason}"}}') for reason in ["queue_full", "unsent"])

    before = memory(traced)
    [there, here] = [(await latency(gateway))[0] for gateway in (plain, traced)]
    # Generous, for machines that are busy; a handshake that waits for the collector would take a second and more.
    assert here < there * 4 + 0.05, (here, there)
    await until_async(f"dropped spans: {fault}", lambda: latency(traced, 20), lambda: drops() > 100)
    assert memory(traced) < before + 20
    assert metric(traced, "trace_spans_waiting") <= 20
    if fault != "slow":
        until("the log line", lambda: "The collector does not take spans." in traced.process.output())
    begun = time.monotonic()
    assert traced.process.stop() == 0
    # Three seconds for the last spans, and one to end.
    assert time.monotonic() - begun < 10
    assert "Ended." in traced.process.output()


async def until_async(what, work, condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, what
        await work()


def test_spans_come_again_after_an_outage(start_traced, collector):
    gateway = start_traced(OTEL_BSP_EXPORT_TIMEOUT="20000")
    collector.behave(status=503)
    api(gateway, "GET", "info")
    until("an attempt", lambda: metric(gateway, "trace_export_failures_total") >= 1)
    collector.behave()
    collector.root("GET /api/v1/info")
    until("the count", lambda: metric(gateway, "trace_spans_sent_total") == 1)
    assert "The collector takes spans again." in gateway.process.output()
    # Spans that a collector refuses are counted, and not sent again.
    collector.behave(status=400)
    api(gateway, "GET", "info")
    refused = 'trace_spans_dropped_total{reason="refused"}'
    until("the refusal", lambda: metric(gateway, refused) == 1)
    collector.behave(rejected=1)
    api(gateway, "GET", "info")
    until("the rejected span", lambda: metric(gateway, refused) == 2)
    until("the line", lambda: "The collector refused spans." in gateway.process.output() and "too old" in gateway.process.output())
    requests = collector.requests()
    gateway.process.stop()
    assert collector.requests() == requests


def test_a_page_in_place_of_a_collector_takes_no_spans(start_traced, collector):
    gateway = start_traced()
    collector.behave(page=True)
    api(gateway, "GET", "info")
    until("the refusal", lambda: metric(gateway, 'trace_spans_dropped_total{reason="refused"}') == 1)
    assert metric(gateway, "trace_spans_sent_total") == 0
    until("the line", lambda: "the answer is a web page" in gateway.process.output())


def test_an_encrypted_collector_needs_a_known_certificate(start_gateway, tmp_path):
    # The gateway takes no certificate of an authority for that of a server.
    certificate = Certificate(tmp_path, "basicConstraints=critical,CA:FALSE")
    collector = Collector(tmp_path, certificate)
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.http, "OTEL_BSP_SCHEDULE_DELAY": "50", "WSPROXY_API__KEYS": KEY}
    try:
        trusting = start_gateway(**settings, OTEL_EXPORTER_OTLP_CERTIFICATE=str(certificate.cert))
        api(trusting, "GET", "info")
        root, _ = collector.root("GET /api/v1/info")
        assert root["path"] == "/v1/traces"
        until("the count", lambda: metric(trusting, "trace_spans_sent_total") == 1)
        # Without the file its certificate is unknown, and no span leaves.
        distrusting = start_gateway(**settings, OTEL_BSP_EXPORT_TIMEOUT="1000")
        api(distrusting, "GET", "info")
        until("the drop", lambda: metric(distrusting, 'trace_spans_dropped_total{reason="unsent"}') == 1)
        assert "The collector does not take spans." in distrusting.process.output()
        assert len(collector.spans()) == 1
        # A listener that never answers the handshake.
        collector.freeze()
        api(trusting, "GET", "info")
        begun = time.monotonic()
        assert trusting.process.stop() == 0
        assert time.monotonic() - begun < 10
    finally:
        collector.stop()


@pytest.mark.asyncio
async def test_events_and_rooms_have_their_phases(start_traced, collector):
    families = {"WSPROXY_ENDPOINTS__EVENTS": "true", "WSPROXY_ENDPOINTS__ROOMS": "true", "SECRET_KEY": SECRET}
    gateway = start_traced(**families)
    token = wsproxy("jwt", "--sub", "alice", SECRET_KEY=SECRET).stdout.strip()
    headers = SAMPLED | {"Authorization": f"Bearer {token}"}
    async with connect(f"{gateway.ws}/ws", additional_headers=headers, proxy=None):
        root, phases = collector.root("handshake events")
    assert [phase["name"] for phase in phases] == ["parse", "authenticate", "register", "subscribe", "accept"]
    assert root["attributes"]["wsproxy.user_id"] == "alice"
    async with connect(f"{gateway.ws}/ws/lobby", additional_headers=headers, proxy=None):
        root, phases = collector.root("handshake rooms")
    assert [phase["name"] for phase in phases] == ["parse", "authenticate", "open room", "join room", "accept"]
    assert (root["attributes"]["wsproxy.room_id"], root["attributes"]["wsproxy.user_id"]) == ("lobby", "alice")
    assert token not in collector.file.read_text()


@pytest.mark.asyncio
async def test_calls_of_tools_have_spans_over_http_and_redis(start_traced, collector, redis, tmp_path):
    database = {"WSPROXY_ENDPOINTS__AGENTS": "true", "WSPROXY_DATABASE__PATH": str(tmp_path / "agents.db")}
    gateway = start_traced(**database)
    until("the database", lambda: "wsproxy_database_up 1" in httpx.get(f"{gateway.http}/metrics").text)
    secret = api(gateway, "POST", "agents/u-1/secrets").json()["secret"]
    url = f"{gateway.ws}/?userId=u-1&secret={secret}&v=2"
    async with connect(url, proxy=None) as agent:
        assert json.loads(await agent.recv())["type"] == "connected"
        root, phases = collector.root("handshake agents")
        assert [phase["name"] for phase in phases] == ["parse", "authenticate", "take place", "accept"]

        call = asyncio.create_task(asyncio.to_thread(api, gateway, "POST", "agents/u-1/calls", json={"tool": "ls", "params": {"p": "hidden-param"}}, headers=SAMPLED))
        message = json.loads(await agent.recv())
        await agent.send(json.dumps({"type": "tool_response", "requestId": message["requestId"], "success": True, "result": {}}))
        assert (await call).status_code == 200
        root, [tool] = collector.root("POST /api/v1/agents/{user_id}/calls")
        assert (root["trace"], root["parent"]) == (TRACE, SPAN)
        assert (tool["name"], tool["kind"], tool["failed"]) == ("tool call", CLIENT, False)
        assert message["traceparent"] == context_of(tool)
        assert tool["attributes"] == {
            "wsproxy.user_id": "u-1",
            "wsproxy.request_id": message["requestId"],
            "wsproxy.tool": "ls",
            "wsproxy.caller": "api.keys[1]",
            "wsproxy.outcome": "response",
        }

        command = {"type": "tool_call", "requestId": "q-1", "tool": "rm", "params": {}, "timeout": 200} | SAMPLED
        assert redis.client.publish("agent:u-1:commands", json.dumps(command)) == 1
        message = json.loads(await agent.recv())
        [tool] = until("the span of the call", lambda: [s for s in collector.spans() if s["attributes"].get("wsproxy.request_id") == "q-1"])
        assert (tool["trace"], tool["parent"], message["traceparent"]) == (TRACE, SPAN, context_of(tool))
        assert (tool["attributes"]["wsproxy.outcome"], tool["attributes"]["error.type"]) == ("timeout", "timeout")
        assert tool["failed"] and tool["end"] - tool["start"] >= 150e6
    assert secret not in collector.file.read_text() and "hidden-param" not in collector.file.read_text()
