"""Server-sent events as other programs read them: httpx, zlib, curl; and resumed after the gateway has restarted."""

import json
import shutil
import signal
import subprocess
import zlib

import httpx
import pytest
from conftest import until

KEY = "a-key-for-tests-0123456789abcdef"
SETTINGS = {
    "WSPROXY_API__KEYS": KEY,
    "WSPROXY_SESSIONS__HISTORY": "true",
    "WSPROXY_SSE__KEEP_ALIVE": "200ms",
    "WSPROXY_SERVER__DRAIN_SPREAD": "0s",
}
ACCEPT = {"Accept": "text/event-stream"}
LONG = "a sentence that comes again and again. " * 200


class Stream:
    """Events of one session, parsed as the format says."""

    def __init__(self, gateway, token, **headers):
        self.client = httpx.Client(timeout=20)
        url = f"{gateway.http}/demo/ws/s-1?token={token}"
        request = self.client.build_request("GET", url, headers=ACCEPT | headers)
        self.response = self.client.send(request, stream=True)
        assert self.response.status_code == 200, self.response.read()
        self.lines = self.response.iter_lines()
        self.last_id = None

    def next(self):
        kind, data = "message", []
        for line in self.lines:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "id":
                self.last_id = value
            elif name == "event":
                kind = value
            elif name == "data":
                data.append(value)
            elif not line and data:
                if kind != "position":
                    return kind, "\n".join(data)
                kind, data = "message", []
        return None

    def close(self):
        self.client.close()


@pytest.fixture
def sse_gateway(start_gateway):
    return start_gateway(**SETTINGS)


def publish(gateway, text):
    answer = httpx.post(
        f"{gateway.http}/api/v1/sessions/s-1/messages?history=true",
        content=text,
        headers={"Authorization": f"Bearer {KEY}"},
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["event_id"]


def close_session(redis):
    redis.client.publish("session:s-1:control", json.dumps({"op": "close"}))


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_httpx_reads_events_until_the_worker_ends_them(sse_gateway, redis, session, encoding):
    stream = Stream(sse_gateway, session(), **{"Accept-Encoding": encoding})
    assert stream.response.headers.get("content-encoding", "identity") == encoding
    for text in ["short", LONG, "two\nlines", LONG]:
        event_id = publish(sse_gateway, text)
        assert stream.next() == ("message", text)
        assert stream.last_id == event_id
    close_session(redis)
    kind, data = stream.next()
    assert (kind, json.loads(data)["code"]) == ("close", 4004)
    assert stream.next() is None


def test_every_event_can_be_inflated_when_it_comes_and_the_checksum_is_right(sse_gateway, redis, session):
    stream = Stream(sse_gateway, session(), **{"Accept-Encoding": "gzip"})
    raw = stream.response.iter_raw()
    inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    seen, wire = b"", 0
    for text in ["short", LONG, "again", LONG]:
        publish(sse_gateway, text)
        while f"data: {text}\n\n".encode() not in seen:
            chunk = next(raw)
            wire += len(chunk)
            seen += inflater.decompress(chunk)
        seen = b""
    assert wire < len(LONG) / 4
    close_session(redis)
    for chunk in raw:
        seen += inflater.decompress(chunk)
    # It has compared checksum and length then.
    assert inflater.eof and not inflater.unused_data
    assert b"event: close" in seen


def test_curl_reads_compressed_events(sse_gateway, redis, session):
    if not (curl := shutil.which("curl")):
        pytest.skip("curl is not installed")
    url = f"{sse_gateway.http}/demo/ws/s-1?token={session()}"
    command = [curl, "-sSN", "--compressed", "-H", "Accept: text/event-stream", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        until("curl listens", lambda: redis.client.pubsub_numsub("session:s-1:down")[0][1] == 1)
        publish(sse_gateway, LONG)
        close_session(redis)
        output, error = child.communicate(timeout=20)
    assert (child.returncode, error) == (0, "")
    assert f"data: {LONG}\n\n" in output
    assert output.endswith('event: close\ndata: {"code":4004,"reason":"ended by the backend"}\n\n')


def test_a_client_that_comes_back_after_a_restart_has_missed_nothing(start_gateway, redis, session):
    first, other = start_gateway(**SETTINGS), start_gateway(**SETTINGS)
    # An EventSource comes back with the same URL: its token says so.
    token = session("sse.of-the-worker")
    stream = Stream(first, token)
    for n in range(3):
        publish(other, f"before {n}")
        assert stream.next() == ("message", f"before {n}")
    first.process.child.send_signal(signal.SIGTERM)
    kind, data = stream.next()
    assert (kind, json.loads(data)["code"]) == ("close", 1012)
    assert stream.next() is None
    assert first.process.stop() == 0
    for n in range(3):
        publish(other, f"meanwhile {n}")
    stream = Stream(other, token, **{"Last-Event-ID": stream.last_id})
    kind, data = stream.next()
    assert json.loads(data)["count"] == 3
    for n in range(3):
        assert stream.next() == ("message", f"meanwhile {n}")
    publish(other, "after")
    assert stream.next() == ("message", "after")
    stream.close()
