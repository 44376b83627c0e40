"""A backend behind wsproxy: it issues tokens and streams answers over Redis, and never holds a socket."""
import asyncio, hmac, json, os, secrets, uuid
from contextlib import asynccontextmanager
from fastapi import FastAPI, HTTPException
from redis import asyncio as aioredis, backoff

AGENT, WORKER = "demo", secrets.token_hex(8)
SECRET = os.environ.get("SESSION_SECRET", secrets.token_hex()).encode()  # The same for all workers.
retry = aioredis.retry.Retry(backoff.ExponentialWithJitterBackoff(cap=1), -1)  # With the default the reader ends after seconds.
redis = aioredis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1"), retry=retry, health_check_interval=10, decode_responses=True)

async def answer(session, inbox):  # One prompt after the other, also while the client is away.
    while message := await inbox.get():
        prompt = json.loads(message)  # The gateway passes any valid JSON.
        words = str(prompt.get("text") if isinstance(prompt, dict) else prompt).split()
        for part in [*({"type": "token", "text": word + " "} for word in words), {"type": "done"}]:
            await redis.publish(f"session:{session}:down", json.dumps(part))
            await asyncio.sleep(1 / 30)

async def work():
    sessions = {}  # Sessions of this worker: inbox and open connections.
    async with redis.pubsub() as pubsub, asyncio.TaskGroup() as answers:
        await pubsub.subscribe(f"agent:{AGENT}:sessions")
        async for message in pubsub.listen():
            (_, name, kind), data = message["channel"].split(":"), message["data"]
            if kind == "up" and name in sessions and message["type"] == "message":
                sessions[name][0].put_nowait(data)
            elif kind == "up" and name in sessions and message["type"] == "subscribe":
                for log in (f"session:{name}:up:log", f"{{session:{name}:up}}:log"):  # First the messages
                    for entry, kept in await redis.xrange(log):  # that came while no worker listened; each is deleted once taken.
                        sessions[name][0].put_nowait(kept["data"])
                        await redis.xdel(log, entry)
            elif kind == "sessions" and message["type"] == "message":
                event = json.loads(data)
                name, owner = event["session_id"], f"session:{event['session_id']}:owner"
                if event["event"] == "opened":  # One of all workers takes the session.
                    if name not in sessions and await redis.set(owner, WORKER, nx=True, ex=3600):
                        sessions[name] = asyncio.Queue(), set()
                        answers.create_task(answer(name, sessions[name][0]))
                        await pubsub.subscribe(f"session:{name}:up")
                    sessions.get(name, (None, set()))[1].add(event["connection_id"])
                elif name in sessions:
                    sessions[name][1].discard(event["connection_id"])
                    if not sessions[name][1]:  # The last client has left: the answer in progress is the last one.
                        sessions.pop(name)[0].put_nowait(None)
                        await asyncio.gather(pubsub.unsubscribe(f"session:{name}:up"), redis.delete(owner))

@asynccontextmanager
async def lifespan(_):
    worker = asyncio.create_task(work())
    yield
    worker.cancel()

app = FastAPI(lifespan=lifespan)

@app.post("/sessions", status_code=201)
async def create(session_id: uuid.UUID = None, proof: str = ""):
    """A one-time token for a new session; with session_id and its proof a further one. Put your login in front of this."""
    session, token = str(session_id or uuid.uuid4()), secrets.token_urlsafe(32)
    own = hmac.new(SECRET, session.encode(), "sha256").hexdigest()  # Only the session's client knows it.
    if session_id and not hmac.compare_digest(own.encode(), proof.encode()):
        raise HTTPException(403, "The session is another client's.")
    await redis.set(f"session:{session}:auth", f"agent/{AGENT} {token}", ex=60)  # Opens the path below, and no other.
    return {"path": f"/{AGENT}/ws/{session}", "session_id": session, "proof": own, "token": token}
