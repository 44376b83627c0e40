"""A backend that serves all sessions of an agent: as many processes as you like, each session by one of them at a time."""
import os
from contextlib import asynccontextmanager
from typing import Annotated
from fastapi import Depends, FastAPI, Response
from wsproxy import ServedSession, SessionToken, Unavailable, Worker

worker = Worker.redis(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379"))

async def chat(session: ServedSession) -> None:
    async for message in session:
        match message.json():  # Any JSON: a client sends what it likes.
            case {"type": "prompt", "text": str(text)}:
                async with session.stream(meta={"prompt": text}, cancel_on_stop=True) as stream:
                    for word in text.split():  # Here is your model.
                        await stream.append(word.upper() + " ")

@asynccontextmanager
async def lifespan(_: FastAPI):
    async with worker, worker.serve("demo", chat):
        yield

async def new_session() -> None:  # Put your login here: a dependency that answers whose session it is, or raises.
    return None

# Where Redis stays away, clients are told to try again.
app = FastAPI(lifespan=lifespan, exception_handlers={Unavailable: lambda *_: Response(status_code=503)})

@app.post("/sessions", status_code=201)
async def create(token: Annotated[SessionToken, Depends(worker.token_dependency("demo", new_session))]) -> dict:
    return token.as_dict()
