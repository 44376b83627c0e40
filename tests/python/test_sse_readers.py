"""Event streams as the standard clients of other languages read them: every event when it comes, compressed or not."""

import json
import os
import queue
import shutil
import subprocess
import threading

import httpx
import pytest
from conftest import ROOT, until
from processes import DEADLINE

READERS = ROOT / "tests/python/readers"
KEY = "a-key-for-tests-0123456789abcdef"
SETTINGS = {"WSPROXY_API__KEYS": KEY, "WSPROXY_SESSIONS__HISTORY": "true", "WSPROXY_SSE__KEEP_ALIVE": "200ms"}
# Below and above what is compressed, and above what an inflater holds back.
TEXTS = ["short", "x" * 300, "again", json.dumps({"text": "all work and no play " * 4000}), "last"]


def needs(name):
    if not (found := shutil.which(name)):
        pytest.skip(f"{name} is not installed")
    return found


def go(folder, url):
    program = folder / "reader"
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "GOCACHE": str(folder / "go"), "GO111MODULE": "off"}
    if goroot := os.environ.get("GOROOT"):
        env["GOROOT"] = goroot
    subprocess.run([needs("go"), "build", "-o", str(program), str(READERS / "reader.go")], env=env, check=True)
    return [str(program), url]


def java(encoding):
    def command(folder, url):
        compiler = needs("javac")
        subprocess.run([compiler, "-d", str(folder), str(READERS / "Reader.java")], check=True)
        return [needs("java"), "-cp", str(folder), "Reader", url, encoding]

    return command


def curl(*options):
    def command(_folder, url):
        return [needs("curl"), "-sSN", *options, "-H", "Accept: text/event-stream", url]

    return command


class Reader:
    """A program that reads a stream, and the data that it has read."""

    def __init__(self, command):
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.child.stdout:
            self.lines.put(line.rstrip("\n"))

    def next(self):
        """The next line of data; curl prints the others too."""
        while True:
            # An event that is held back until the next one never comes: that one is published behind this.
            line = self.lines.get(timeout=DEADLINE)
            if line == "" or line.startswith((":", "id:", "retry:", "event:")):
                continue
            return line.removeprefix("data: ")

    def end(self):
        code = self.child.wait(20)
        return code, self.child.stderr.read()

    def stop(self):
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()


@pytest.mark.parametrize(
    "command",
    [curl(), curl("--compressed"), go, java("identity"), java("gzip")],
    ids=["curl", "curl-gzip", "go-gzip", "java", "java-gzip"],
)
def test_a_standard_client_reads_every_event_when_it_comes(start_gateway, redis, session, tmp_path, command):
    gateway = start_gateway(**SETTINGS)
    command = command(tmp_path, f"{gateway.http}/demo/ws/s-1?token={session()}")
    reader = Reader(command)
    try:
        until("the reader listens", lambda: redis.client.pubsub_numsub("session:s-1:down")[0][1] == 1)
        assert "event_id" in json.loads(reader.next())
        for text in TEXTS:
            publish(gateway, text)
            assert reader.next() == text
        redis.client.publish("session:s-1:control", json.dumps({"op": "close"}))
        assert json.loads(reader.next())["code"] == 4004
        assert reader.end() == (0, "")
    finally:
        reader.stop()


def publish(gateway, text):
    answer = httpx.post(
        f"{gateway.http}/api/v1/sessions/s-1/messages?history=true",
        content=text,
        headers={"Authorization": f"Bearer {KEY}"},
    )
    assert answer.status_code == 200, answer.text
