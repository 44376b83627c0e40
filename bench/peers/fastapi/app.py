"""The same relay as a FastAPI worker would do it alone: one pub/sub connection, a set of sockets per channel."""

import asyncio
import os
from contextlib import asynccontextmanager

import redis.asyncio as redis
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

sockets: dict[str, set[WebSocket]] = {}
confirmed: dict[str, asyncio.Event] = {}
client = redis.from_url(os.environ["REDIS_URL"], decode_responses=True)
subscription = client.pubsub()


async def read_redis() -> None:
    while True:
        message = await subscription.get_message(timeout=None)
        if message is None:
            continue
        channel = message["channel"]
        if message["type"] == "subscribe":
            if event := confirmed.get(channel):
                event.set()
        elif message["type"] == "message":
            for socket in list(sockets.get(channel, ())):
                try:
                    await socket.send_text(message["data"])
                except (RuntimeError, WebSocketDisconnect):
                    sockets.get(channel, set()).discard(socket)


@asynccontextmanager
async def lifespan(_: FastAPI):
    # A subscription must exist before the reader may wait for messages.
    await subscription.subscribe("bench:peer")
    reader = asyncio.create_task(read_redis())
    yield
    reader.cancel()


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health() -> dict:
    return {"status": "ok"}


@app.websocket("/ws/{session}")
async def relay(socket: WebSocket, session: str) -> None:
    down, up = f"session:{session}:down", f"session:{session}:up"
    members = sockets.setdefault(down, set())
    if down not in confirmed:
        confirmed[down] = asyncio.Event()
        await subscription.subscribe(down)
    await confirmed[down].wait()
    await socket.accept()
    members.add(socket)
    try:
        while True:
            await client.publish(up, await socket.receive_text())
    except WebSocketDisconnect:
        pass
    finally:
        members.discard(socket)
        if not members:
            sockets.pop(down, None)
            confirmed.pop(down, None)
            await subscription.unsubscribe(down)
