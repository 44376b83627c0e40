"""A small imitation of a Kubernetes API server, for the clients of one: python apiserver.py PORT [CERTIFICATE KEY]

It has pods, which live in memory: list, get, create, delete, watch with 410, logs that follow, exec as real processes
in a folder of each pod, and port-forward to ports of this machine. Each request needs the bearer token TOKEN.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import h11

import channels

TOKEN = os.environ.get("TOKEN", "upstream-token")
PODS_PATH = "/api/v1/namespaces/default/pods"
VERBS = ["create", "delete", "get", "list", "watch"]


class Refused(Exception):
    """An answer that is an error of the API."""

    def __init__(self, status: int, reason: str, message: str, headers: dict[str, str] | None = None) -> None:
        self.status, self.headers = status, headers or {}
        self.body = failure(status, reason, message)


def failure(status: int, reason: str, message: str) -> dict:
    return {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": status,
    }  # fmt: skip


class Pods:
    """The pods and their history."""

    def __init__(self) -> None:
        self.version = 100
        self.oldest = 1
        self.by_name: dict[str, dict] = {}
        self.folders: dict[str, tempfile.TemporaryDirectory] = {}
        self.changes: list[tuple[int, dict]] = []
        self.changed = asyncio.Condition()
        self.busy: set[str] = set()

    async def change(self, kind: str, pod: dict) -> None:
        """Writes down a change, and wakes the watches."""
        self.version += 1
        pod["metadata"]["resourceVersion"] = str(self.version)
        self.changes.append((self.version, {"type": kind, "object": json.loads(json.dumps(pod))}))
        async with self.changed:
            self.changed.notify_all()

    async def create(self, pod: dict) -> dict:
        name = pod["metadata"]["name"]
        if name in self.by_name:
            raise Refused(409, "AlreadyExists", f'pods "{name}" already exists')
        pod |= {"kind": "Pod", "apiVersion": "v1"}
        pod["metadata"] |= {"namespace": "default", "uid": f"uid-{self.version}", "creationTimestamp": "2026-01-01T00:00:00Z"}
        pod["spec"] = {"containers": [{"name": "main", "image": "busybox"}], **pod.get("spec", {})}
        pod["status"] = {"phase": "Running", "containerStatuses": [
            {"name": "main", "ready": True, "restartCount": 0, "state": {"running": {}}, "image": "busybox", "imageID": ""}
        ]}  # fmt: skip
        self.by_name[name] = pod
        self.folders[name] = tempfile.TemporaryDirectory(prefix=f"pod-{name}-")
        await self.change("ADDED", pod)
        return pod

    async def delete(self, name: str) -> dict:
        pod = self.find(name)
        del self.by_name[name]
        self.folders.pop(name).cleanup()
        await self.change("DELETED", pod)
        return pod

    def find(self, name: str) -> dict:
        if name not in self.by_name:
            raise Refused(404, "NotFound", f'pods "{name}" not found')
        return self.by_name[name]

    def all(self, name: str | None) -> dict:
        items = [pod for pod in self.by_name.values() if name in (None, pod["metadata"]["name"])]
        return {
            "kind": "PodList", "apiVersion": "v1",
            "metadata": {"resourceVersion": str(self.version)}, "items": items,
        }  # fmt: skip

    async def watch(self, since: int, name: str | None) -> AsyncIterator[dict]:
        """Yields the changes after a version, without an end; one that is forgotten ends it with 410."""
        if since and since < self.oldest:
            yield {"type": "ERROR", "object": failure(410, "Expired", f"too old resource version: {since}")}
            return
        if not since:
            for pod in list(self.by_name.values()):
                if name in (None, pod["metadata"]["name"]):
                    yield {"type": "ADDED", "object": pod}
            since = self.version
        while True:
            for version, event in list(self.changes):
                if version > since:
                    since = version
                    if name in (None, event["object"]["metadata"]["name"]):
                        yield event
            async with self.changed:
                await self.changed.wait_for(lambda: self.version > since)


class Exchange:
    """One request of a client, and its answer."""

    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server, self.reader, self.writer = server, reader, writer
        self.http = h11.Connection(h11.SERVER)
        self.method = self.path = ""
        self.headers: dict[str, str] = {}
        self.query: dict[str, list[str]] = {}

    async def next(self) -> Any:
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(await self.reader.read(65536))
        return event

    async def send(self, event: Any) -> None:
        self.writer.write(self.http.send(event))
        await self.writer.drain()

    def asked(self, name: str) -> str | None:
        return self.query.get(name, [None])[0]

    async def body(self) -> bytes:
        parts: list[bytes] = []
        if self.http.their_state is not h11.SEND_BODY:
            return b""
        while isinstance(event := await self.next(), h11.Data):
            parts.append(bytes(event.data))
        return b"".join(parts)

    async def answer(self, status: int, value: dict, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        fields = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        await self.send(h11.Response(status_code=status, headers=list(fields.items())))
        await self.send(h11.Data(data=body))
        await self.send(h11.EndOfMessage())

    async def stream(self, content_type: str, parts: AsyncIterator[bytes]) -> None:
        headers = [("content-type", content_type), ("connection", "close")]
        await self.send(h11.Response(status_code=200, headers=headers))
        gone = asyncio.create_task(self.reader.read(1))
        try:
            iterator = aiter(parts)
            while True:
                part = asyncio.ensure_future(anext(iterator, None))
                await asyncio.wait({part, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not part.done():
                    part.cancel()
                    raise ConnectionError("the client left")
                if part.result() is None:
                    break
                await self.send(h11.Data(data=part.result()))
        finally:
            gone.cancel()
        await self.send(h11.EndOfMessage())

    async def upgrade(self, headers: dict[str, str]) -> channels.Socket:
        await self.send(h11.InformationalResponse(status_code=101, headers=list(headers.items())))
        return channels.Socket(self.reader, self.writer, self.http.trailing_data[0])

    async def upgrade_to_websocket(self, subprotocol: str) -> channels.Socket:
        key = self.headers["sec-websocket-key"].encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        return await self.upgrade({
            "upgrade": "websocket", "connection": "Upgrade", "sec-websocket-protocol": subprotocol,
            "sec-websocket-accept": base64.b64encode(hashlib.sha1(key).digest()).decode(),
        })  # fmt: skip

    async def upgrade_to_spdy(self, protocol: str) -> channels.Socket:
        return await self.upgrade({
            "upgrade": "SPDY/3.1", "connection": "Upgrade", "x-stream-protocol-version": protocol,
        })  # fmt: skip


class Server:
    """The API."""

    def __init__(self) -> None:
        self.pods = Pods()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        exchange = Exchange(self, reader, writer)
        try:
            while isinstance(request := await exchange.next(), h11.Request):
                await self.request(exchange, request)
                if exchange.http.our_state is not h11.DONE or exchange.http.their_state is not h11.DONE:
                    break
                exchange.http.start_next_cycle()
        except (ConnectionError, h11.ProtocolError, ssl.SSLError):
            pass
        finally:
            writer.close()

    async def request(self, exchange: Exchange, request: h11.Request) -> None:
        target = urlsplit(request.target.decode())
        exchange.method, exchange.path = request.method.decode(), target.path
        exchange.query = parse_qs(target.query, keep_blank_values=True)
        exchange.headers = {name.decode(): value.decode() for name, value in request.headers}
        try:
            if exchange.headers.get("authorization") != f"Bearer {TOKEN}":
                raise Refused(401, "Unauthorized", "the request has no credential of this server")
            await self.route(exchange)
        except Refused as refused:
            await exchange.body()
            await exchange.answer(refused.status, refused.body, refused.headers)

    async def route(self, exchange: Exchange) -> None:
        documents = {
            "/version": {"major": "1", "minor": "30", "gitVersion": "v1.30.0", "platform": "linux/amd64"},
            "/healthz": {"status": "ok"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [
                {"name": "pods", "singularName": "pod", "namespaced": True, "kind": "Pod", "verbs": VERBS, "shortNames": ["po"]},
                {"name": "pods/log", "singularName": "", "namespaced": True, "kind": "Pod", "verbs": ["get"]},
                {"name": "pods/exec", "singularName": "", "namespaced": True, "kind": "PodExecOptions", "verbs": ["create", "get"]},
            ]},
        }  # fmt: skip
        if exchange.path in documents:
            await exchange.body()
            return await exchange.answer(200, documents[exchange.path])
        if not exchange.path.startswith(PODS_PATH):
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        match exchange.path.removeprefix(PODS_PATH).split("/"):
            case [""]:
                await self.all_pods(exchange)
            case ["", name]:
                await self.one_pod(exchange, name)
            case ["", name, "log"]:
                await self.log(exchange, name)
            case ["", name, "exec"]:
                await self.exec(exchange, name)
            case ["", name, "portforward"]:
                await self.forward(exchange, name)
            case _:
                raise Refused(404, "NotFound", "the server could not find the requested resource")

    async def all_pods(self, exchange: Exchange) -> None:
        body = await exchange.body()
        if exchange.method == "POST":
            return await exchange.answer(201, await self.pods.create(json.loads(body)))
        name = (exchange.asked("fieldSelector") or "").removeprefix("metadata.name=") or None
        if exchange.asked("watch") in ("true", "1"):
            return await self.watch(exchange, name)
        await exchange.answer(200, self.pods.all(name))

    async def watch(self, exchange: Exchange, name: str | None) -> None:
        since = int(exchange.asked("resourceVersion") or 0)

        async def lines() -> AsyncIterator[bytes]:
            async for event in self.pods.watch(since, name):
                yield json.dumps(event).encode() + b"\n"

        await exchange.stream("application/json", lines())

    async def one_pod(self, exchange: Exchange, name: str) -> None:
        await exchange.body()
        if exchange.method == "DELETE":
            return await exchange.answer(200, await self.pods.delete(name))
        if name.startswith("busy") and name not in self.pods.busy:
            self.pods.busy.add(name)
            raise Refused(503, "ServiceUnavailable", "try again", {"retry-after": "1"})
        if name == "compacted":  # A request for it makes the server forget its history, as etcd's compaction does.
            self.pods.oldest = self.pods.version + 1
        await exchange.answer(200, self.pods.find(name))

    async def log(self, exchange: Exchange, name: str) -> None:
        await exchange.body()
        path = Path(self.pods.folders[self.pods.find(name)["metadata"]["name"]].name) / "log"
        follows = exchange.asked("follow") in ("true", "1")

        async def text() -> AsyncIterator[bytes]:
            at = 0
            while True:
                data = path.read_bytes()[at:] if path.exists() else b""
                at += len(data)
                if data:
                    yield data
                if not follows or name not in self.pods.by_name:
                    return
                await asyncio.sleep(0.02)

        await exchange.stream("text/plain", text())

    async def exec(self, exchange: Exchange, name: str) -> None:
        folder = self.pods.folders[self.pods.find(name)["metadata"]["name"]].name
        flags = {"stdin": channels.STDIN, "stdout": channels.STDOUT, "stderr": channels.STDERR}
        wanted = {channel for flag, channel in flags.items() if exchange.asked(flag) == "true"} | {channels.ERROR}
        if exchange.headers.get("upgrade", "").lower() == "websocket":
            offered = [name.strip() for name in exchange.headers["sec-websocket-protocol"].split(",")]
            chosen = next(name for name in ("v5.channel.k8s.io", "v4.channel.k8s.io") if name in offered)
            link = channels.WebSocketChannels(await exchange.upgrade_to_websocket(chosen))
        elif exchange.headers.get("upgrade") == "SPDY/3.1":
            link = channels.SpdyChannels(await exchange.upgrade_to_spdy("v4.channel.k8s.io"), wanted)
            await link.open()
        else:
            raise Refused(400, "BadRequest", "exec needs an upgrade")
        await self.run(exchange.query["command"], folder, link, channels.STDIN in wanted)

    async def run(self, command: list[str], folder: str, link: Any, has_input: bool) -> None:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=folder, stdout=-1, stderr=-1, stdin=-1 if has_input else asyncio.subprocess.DEVNULL
        )

        async def output(channel: int, reader: asyncio.StreamReader) -> None:
            while data := await reader.read(16384):
                await link.send(channel, data)

        async def feed() -> None:
            async for data in link.input():
                if data is None:
                    process.stdin.close()
                else:
                    process.stdin.write(data)
                    await process.stdin.drain()

        feeding = asyncio.create_task(feed()) if has_input else None
        try:
            await asyncio.gather(output(channels.STDOUT, process.stdout), output(channels.STDERR, process.stderr))
            code = await process.wait()
        finally:
            if feeding:
                feeding.cancel()
            if process.returncode is None:
                process.kill()
        status = {"metadata": {}, "status": "Success"}
        if code:
            causes = {"causes": [{"reason": "ExitCode", "message": str(code)}]}
            message = f"command terminated with non-zero exit code: exit code {code}"
            status = failure(500, "NonZeroExitCode", message) | {"details": causes}
        await link.finish(status)

    async def forward(self, exchange: Exchange, name: str) -> None:
        self.pods.find(name)
        if exchange.headers.get("upgrade", "").lower() == "websocket":
            link = channels.Messages(await exchange.upgrade_to_websocket("SPDY/3.1+portforward.k8s.io"))
        else:
            link = await exchange.upgrade_to_spdy("portforward.k8s.io")
        await channels.forwarded(link, lambda port: asyncio.open_connection("127.0.0.1", port))


async def main(port: int, certificate: str | None = None, key: str | None = None) -> None:
    """Serves until the process ends; says so with one line."""
    context = None
    if certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)
    listener = await asyncio.start_server(Server().serve, "127.0.0.1", port, ssl=context)
    print(json.dumps({"port": port}), flush=True)
    async with listener:
        await listener.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), *sys.argv[2:]))
