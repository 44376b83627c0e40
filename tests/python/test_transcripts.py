"""Shell transcripts of the documentation, typed in as a reader does: what they show is what comes."""

import json
import os
import pathlib
import re
import shlex
import subprocess

import httpx
import pytest
from conftest import ROOT, Process, free_port, until
from websockets.sync.client import connect

BINARY = pathlib.Path(os.environ.get("WSPROXY_BIN", str(ROOT / "target/debug/wsproxy")))


def transcript(page, word):
    """The lines of the one shell block of a page that holds a word."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)
    [block] = [block for block in blocks if word in block]
    return block.splitlines()


def matches(shown, came):
    """Whether an object is the one that is shown, in which `…` stands for any value."""
    shown, came = json.loads(shown), json.loads(came)
    return shown.keys() == came.keys() and all(value in ("…", came[name]) for name, value in shown.items())


@pytest.fixture
def shell(tmp_path):
    """Runs lines of bash with the gateway in the path; everything that they start ends with them."""
    (tmp_path / "wsproxy").symlink_to(BINARY)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "WSPROXY_SERVER__BIND": "127.0.0.1"}

    def run(lines, **further):
        script = "trap 'kill $(jobs -p)' EXIT\n" + "\n".join(lines)
        done = subprocess.run(["bash", "-c", script], env=env | further, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        return done.stdout

    return run


def test_the_calls_of_the_api_answer_as_shown(shell):
    port = str(free_port())
    lines = [line.replace("8080", port) for line in transcript("docs/guides/http-worker.md", "api info")]
    blank = lines.index("")
    lines, calls = lines[:blank], lines[blank + 1 :]
    lines.append(f"until curl -sf http://localhost:{port}/ready; do sleep 0.1; done")
    for call in calls:
        lines += ["echo; echo '====='", call if "-N" not in call else call.split(" #")[0] + " --max-time 1"]
    answers = shell(lines, PORT=port).split("=====\n")[1:]
    assert len(answers) == len(calls)
    shown = 0
    for call, answer in zip(calls, answers, strict=True):
        expected = call.partition(" # ")[2]
        if expected.startswith("{"):
            shown += 1
            assert matches(expected, answer), f"{call}\n{answer}"
        elif "-N" not in call:
            assert "error" not in json.loads(answer), f"{call}\n{answer}"
    assert shown >= 5


def test_a_worker_by_hand_hears_and_answers(redis, start_gateway):
    """The steps of docs/tutorials/first-session.md, in as many terminals as they say."""
    port = str(start_gateway().port)
    subscribe, token, client, publish, close = [
        shlex.split(line.replace("redis-cli", f"redis-cli -p {redis.port}").replace("8080", port), comments=True)
        for line in transcript("docs/tutorials/first-session.md", "PUBLISH session:s-1:down")
    ]
    listener = subprocess.Popen(subscribe, stdout=subprocess.PIPE, text=True)
    try:
        until("the worker listens", lambda: redis.client.pubsub_numsub("session:s-1:up")[0][1])
        assert subprocess.run(token, capture_output=True, text=True).stdout == "OK\n"
        # wscat, without Node.js.
        [header] = [client[at + 1] for at, word in enumerate(client) if word == "-H"]
        with connect(client[client.index("-c") + 1], additional_headers=[header.split(": ", 1)], proxy=None) as socket:
            socket.send('{"hello":1}')
            subprocess.run(publish, check=True, capture_output=True)
            assert socket.recv(timeout=10) == '{"type":"token","text":"hi"}'
            subprocess.run(close, check=True, capture_output=True)
            with pytest.raises(Exception, match="4004.*done"):
                socket.recv(timeout=10)
    finally:
        listener.terminate()
    assert '{"hello":1}' in listener.communicate()[0]


def test_the_demo_answers_the_shell(tmp_path, shell):
    """The transcript of docs/tutorials/first-session.md with the demo worker, up to the client."""
    port = str(free_port())
    dev = Process("dev", [str(BINARY), "dev", "--port", port], tmp_path)
    try:
        dev.ready("dev", lambda: httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200)
        lines = [line.replace("8080", port) for line in transcript("docs/tutorials/first-session.md", "/dev/session")]
        [client] = [line for line in lines if "wscat" in line]
        words = shell([*lines[: lines.index(client)], f"printf '%s\\n' {client.removeprefix('npx -y wscat ')}"]).splitlines()
        header, url = words[words.index("-H") + 1], words[words.index("-c") + 1]
        with connect(url, additional_headers=[header.split(": ", 1)], proxy=None) as socket:
            socket.send('{"type":"prompt","text":"hello"}')
            assert json.loads(socket.recv(timeout=10))["type"]
    finally:
        dev.stop()
