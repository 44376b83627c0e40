"""A chat whose answers survive restarts: its workers stream tokens through wsproxy and never hold a socket.

The jobs are in Redis, and each session has an owner, a worker that renews its claim. A worker that finds a session
without an owner takes it, and continues its answers where the other worker stopped.
"""

import asyncio
import hashlib
import hmac
import logging
import os
import pathlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Annotated
from urllib.parse import quote

from fastapi import Cookie, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from model import tokens
from pydantic import BaseModel, Field
from redis import RedisError
from redis import asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from wsproxy import SessionToken, StreamEnded, StreamError, TokenStream, Unavailable, Worker, WsproxyError

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")
# Signs users and the ids of their sessions. All workers have the same secret, and keep it over restarts.
SECRET = os.environ["CHAT_SECRET"].encode()
GATEWAY_URL = os.environ.get("GATEWAY_URL", "http://127.0.0.1:8080")
PAUSE = 1 / float(os.environ.get("CHAT_TOKENS_PER_SECOND", "20"))
CLAIM_SECONDS = float(os.environ.get("CHAT_CLAIM_SECONDS", "3"))
LEASE_SECONDS = float(os.environ.get("CHAT_LEASE_SECONDS", "15"))
SESSION_SECONDS = 3600
HERE = pathlib.Path(__file__).parent
# Ids that a page may send. An answer's id becomes that of a stream, with room for the number of an attempt.
ID = re.compile(r"[A-Za-z0-9-]{1,64}")
PROMPT_MAX = 10_000

ME = f"{os.getpid()}-{secrets.token_hex(4)}"
worker = Worker.redis(REDIS_URL, retry_for=60)
# Issues tokens. It gives up before the page does (5 s): a late token would replace the one that the page asked for next.
issuer = Worker.redis(REDIS_URL, retry_for=3)
# After a restart of Redis each pooled connection fails once, and `from_url` alone does not ask again. All calls of this
# client may be done twice.
redis = aioredis.from_url(REDIS_URL, decode_responses=True, health_check_interval=10, retry=Retry(NoBackoff(), 1))

# Renews the claim on a session, or releases it (ARGV[2] is 0), unless another worker owns the session.
CLAIM = redis.register_script("""
    local owner = redis.call('GET', KEYS[1])
    if owner and owner ~= ARGV[1] then return 0 end
    if ARGV[2] == '0' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
    return 1""")


class Session:
    """A session that this worker owns: it reads what the page sends, and runs an answer for each prompt."""

    def __init__(self, name: str) -> None:
        self.name, self.jobs = name, f"chat:{name}:jobs"
        self.answers: dict[str, asyncio.Task[None]] = {}
        self.streams: dict[str, TokenStream] = {}
        self.prompts: dict[str, str] = {}
        self.expires = time.time() + SESSION_SECONDS
        self.task = asyncio.create_task(self.run())

    async def run(self) -> None:
        async with worker.upstream(self.name) as messages:
            await self.catch_up()
            async for message in messages:
                match message.json():
                    case {"type": "prompt", "id": str(answer), "text": str(prompt)} if ID.fullmatch(answer):
                        prompt = prompt[:PROMPT_MAX]
                        # The page sends a prompt again until it sees an answer, so it may be known.
                        if answer not in self.answers:
                            await write_down(self.name, answer, prompt)
                        self.start(answer, prompt)
                    case {"type": "stream_stop", "stream": str(stream)} if stream in self.streams:
                        self.streams[stream].stopped.set()

    async def catch_up(self) -> None:
        """Starts the jobs in Redis: left unfinished by another worker, or taken from a page over HTTP."""
        for answer, prompt in (await redis.hgetall(self.jobs)).items():
            self.start(answer, prompt)

    def start(self, answer: str, prompt: str) -> None:
        if answer not in self.answers:
            self.prompts[answer] = prompt
            self.answers[answer] = asyncio.create_task(self.answer(answer, prompt))

    async def answer(self, answer: str, prompt: str) -> None:
        """Streams an answer to its end; under a further id if the gateway ended the stream with `worker_lost`."""
        attempt = 1
        while True:
            try:
                await self.stream(answer, prompt, attempt)
                break
            except StreamEnded as ended:
                # Finished or stopped by a worker that died before it removed the job.
                if ended.outcome != "error":
                    break
                attempt += 1
            except StreamError:
                return  # Another worker continues it.
            except Unavailable as error:
                logging.warning("The answer waits: %s", error)
                await asyncio.sleep(1)
            except WsproxyError:
                logging.exception("The answer cannot be given.")
                break
        await redis.hdel(self.jobs, answer)
        self.prompts.pop(answer, None)

    async def stream(self, answer: str, prompt: str, attempt: int) -> None:
        name = answer if attempt == 1 else f"{answer}.{attempt}"
        meta = {"answer": answer, "prompt": prompt}
        opened = worker.stream(
            self.name, name, meta=meta, lease=LEASE_SECONDS, adopt=True, watch_stop=False, on_cancel="leave"
        )
        async with opened as stream:
            self.streams[name] = stream
            sent = len(stream.text)
            print(f"Worker process {os.getpid()} answers from character {sent} on: {prompt[:40]}", flush=True)
            for token in tokens(prompt):
                # Tokens that an earlier worker has sent are skipped.
                if (sent := sent - len(token)) >= 0:
                    continue
                if stream.stopped.is_set():
                    break
                await stream.append(token)
                await asyncio.sleep(PAUSE)

    async def keep(self) -> None:
        """Renews the claim, and writes the jobs again if Redis has come back empty."""
        expires = await redis.zscore("chat:sessions", self.name)
        if not await CLAIM(keys=[f"chat:{self.name}:owner"], args=[ME, round(CLAIM_SECONDS * 1000)]):
            await self.close()
        elif expires is None and time.time() < self.expires:
            await redis.zadd("chat:sessions", {self.name: self.expires})
            for answer, prompt in self.prompts.items():
                await redis.hset(self.jobs, answer, prompt)
        elif expires is None:
            await self.release()
        else:
            self.expires = expires
            await self.catch_up()
            if self.task.done():
                # A message came while Redis was away; the page sends it again.
                self.task = asyncio.create_task(self.run())

    async def release(self) -> None:
        """Gives the session back, so that another worker can continue at once."""
        await self.close()
        with suppress(RedisError, OSError):  # Otherwise the claim runs out.
            await CLAIM(keys=[f"chat:{self.name}:owner"], args=[ME, 0])

    async def close(self) -> None:
        sessions.pop(self.name, None)
        tasks = [self.task, *self.answers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=CLAIM_SECONDS / 4)


sessions: dict[str, Session] = {}


async def write_down(name: str, answer: str, prompt: str) -> None:
    """Writes a job to Redis: from here on a worker answers it, even if others die."""
    await redis.hset(f"chat:{name}:jobs", answer, prompt)
    await redis.zadd("chat:sessions", {name: time.time() + SESSION_SECONDS})


async def claim(name: str) -> None:
    """Takes a session for this worker, unless another worker owns it."""
    if name in sessions or not await CLAIM(keys=[f"chat:{name}:owner"], args=[ME, round(CLAIM_SECONDS * 1000)]):
        return
    # Another task may have done the same while the claim was under way.
    if name not in sessions:
        sessions[name] = Session(name)


async def look_after_sessions() -> None:
    while True:
        for session in list(sessions.values()):
            await in_time(session.keep())
        await in_time(claim_all())
        await asyncio.sleep(CLAIM_SECONDS / 4)


async def claim_all() -> None:
    """Takes every session without an owner."""
    await redis.zremrangebyscore("chat:sessions", 0, time.time())
    for name in await redis.zrange("chat:sessions", 0, -1):
        await claim(name)


async def in_time(work: Coroutine[None, None, None]) -> None:
    """Runs work with a limit of time: a session that hangs must not let the claims of others run out."""
    try:
        async with asyncio.timeout(CLAIM_SECONDS / 2):
            await work
    except (RedisError, WsproxyError, OSError):
        pass  # Redis is away: the next round tries again. A TimeoutError is an OSError.
    except Exception:
        logging.exception("A session cannot be looked after.")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    caretaker = asyncio.create_task(look_after_sessions())
    yield
    caretaker.cancel()
    await asyncio.gather(*(session.release() for session in list(sessions.values())))
    await issuer.aclose()
    await worker.aclose()
    await redis.aclose()


app = FastAPI(lifespan=lifespan)


@app.exception_handler(Unavailable)
@app.exception_handler(RedisConnectionError)
@app.exception_handler(RedisTimeoutError)
async def redis_is_away(_: Request, error: Exception) -> JSONResponse:
    """Tells pages to come again: all that they ask for may be asked twice."""
    logging.warning("A request is refused: %s", error)
    return JSONResponse({"detail": "Redis is away."}, 503, {"Retry-After": "1"})


def seal(*parts: str) -> str:
    """Returns a signature that only this application can make."""
    return hmac.new(SECRET, "\0".join(parts).encode(), hashlib.sha256).hexdigest()[:32]


def is_sealed(mark: str, *parts: str) -> bool:
    return hmac.compare_digest(mark.encode(), seal(*parts).encode())


async def user(response: Response, chat_user: Annotated[str | None, Cookie()] = None) -> str:
    """Returns the user. Put your login here: this example makes a user of every browser, by a cookie."""
    name, _, mark = (chat_user or "").partition(".")
    if not is_sealed(mark, "user", name):
        name = secrets.token_urlsafe(16)
        cookie = f"{name}.{seal('user', name)}"
        response.set_cookie("chat_user", cookie, max_age=SESSION_SECONDS * 24, httponly=True, samesite="lax")
    return name


async def own_session(asking: Annotated[str, Depends(user)], session_id: str | None = None) -> str:
    """Returns a session of the user: a new one, or the named one if its id is signed for this user."""
    if session_id is None:
        name = secrets.token_urlsafe(16)
        return f"{name}.{seal('session', asking, name)}"
    name, _, mark = session_id.partition(".")
    if not is_sealed(mark, "session", asking, name):
        raise HTTPException(403, "The session is another user's.")
    return session_id


@app.post("/sessions", status_code=201)
async def create(token: Annotated[SessionToken, Depends(issuer.token_dependency("chat", own_session))]) -> dict:
    """Returns a token that opens one connection, and its path; with `session_id` a further token of that session."""
    await redis.zadd("chat:sessions", {token.session_id: time.time() + SESSION_SECONDS})
    await claim(token.session_id)
    return token.as_dict() | {"gateway": GATEWAY_URL}


# An EventSource comes back with the same URL: its token opens event streams, and nothing else, for an hour.
lasting = issuer.token_dependency("chat", own_session, ttl=SESSION_SECONDS, event_stream=True)


@app.post("/event-sources", status_code=201)
async def create_event_source(token: Annotated[SessionToken, Depends(lasting)]) -> dict:
    """Returns the URL for an EventSource."""
    url = f"{GATEWAY_URL}{token.path}?token={quote(token.token)}"
    return {"session_id": token.session_id, "url": url}


class Prompt(BaseModel):
    """A prompt; the page chooses `id`, so that it can send the prompt again without a second answer."""

    id: str = Field(pattern=f"^{ID.pattern}$")
    text: str = Field(max_length=PROMPT_MAX)


@app.post("/prompts", status_code=202)
async def ask(prompt: Prompt, session: Annotated[str, Depends(own_session)]) -> dict:
    """Takes a prompt from a page without a WebSocket, as `{"type":"prompt"}` does over one."""
    # The page sends a prompt again until it is taken, so it may be known.
    if session not in sessions or prompt.id not in sessions[session].answers:
        await write_down(session, prompt.id, prompt.text)
    await claim(session)
    # If another worker owns the session, it finds the job when it renews its claim.
    if session in sessions:
        sessions[session].start(prompt.id, prompt.text)
    return {"id": prompt.id}


@app.get("/answer")
async def whole_answer(prompt: str) -> PlainTextResponse:
    """Returns the whole answer, which a page must show in the end, byte for byte."""
    return PlainTextResponse("".join(tokens(prompt)))


@app.get("/")
async def page() -> FileResponse:
    """The page, with the JavaScript client."""
    return FileResponse(HERE / "index.html")


@app.get("/sse.html")
async def page_of_events() -> FileResponse:
    """The page with an EventSource."""
    return FileResponse(HERE / "sse.html")


@app.get("/chat.css")
async def looks() -> FileResponse:
    """The looks of both pages."""
    return FileResponse(HERE / "chat.css")


# Built by `run`.
app.mount("/client", StaticFiles(directory=HERE / "../../clients/js/dist", check_dir=False))
