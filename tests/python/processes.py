"""Child processes and free ports, as the Python tests and the chaos suite use them."""

import os
import pathlib
import random
import signal
import socket
import subprocess
import time

import httpx
import redis as redis_py

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEADLINE = 20.0


# Ports that this process has given to parts, which may not listen yet.
_given = set()


def free_port():
    # Below the range that the kernel hands out to clients, so that none of them takes it meanwhile.
    while True:
        port = random.randrange(10_000, 30_000)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                _given.add(port)
                return port
            except OSError:
                continue


def until(what, condition, deadline=DEADLINE):
    """Polls until `condition` gives something true; an exception counts as not yet."""
    end, last = time.monotonic() + deadline, None
    while time.monotonic() < end:
        try:
            if result := condition():
                return result
        except (OSError, httpx.HTTPError, redis_py.RedisError) as error:
            last = error
        time.sleep(0.02)
    raise TimeoutError(f"{what} did not happen within {deadline} s: {last}")


class Process:
    """A child process whose output goes to a file, and which never outlives the test."""

    def __init__(self, name, command, folder, env=None, cwd=None):
        self.log = folder / f"{name}.log"
        # A clean environment: variables of the person who runs the tests must not configure the gateway.
        base = {key: os.environ[key] for key in ("PATH", "HOME", "VIRTUAL_ENV", "LANG") if key in os.environ}
        with self.log.open("ab") as output:
            self.child = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=base | (env or {}), cwd=cwd
            )

    def ready(self, what, condition):
        def alive_and_ready():
            assert self.child.poll() is None, f"{what} ended with {self.child.returncode}:\n{self.output()}"
            return condition()

        until(f"{what} ready", alive_and_ready)

    def output(self):
        return self.log.read_text(errors="replace")

    def stop(self, with_signal=signal.SIGTERM):
        if self.child.poll() is None:
            self.child.send_signal(with_signal)
            try:
                self.child.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
        return self.child.returncode
