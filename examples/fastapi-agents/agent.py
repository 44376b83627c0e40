"""The user's agent: it lets the application read text files of one folder on the user's machine, and nothing else."""

import asyncio
import logging
import os
import pathlib
import sys

from wsproxy import AgentReplaced, ConnectionClosed, Refused, ToolError
from wsproxy.agent import Agent, Context

# Nothing outside of this folder is read, also not through a symbolic link in it.
FOLDER = pathlib.Path(os.environ.get("AGENT_FOLDER", ".")).resolve()
FILE_BYTES_MAX = 512 * 1024
FILES_MAX = 500
PIECE_BYTES = 4096
# A file of the demonstration is read in a millisecond; so that its progress can be seen, each piece takes longer.
PAUSE = float(os.environ.get("AGENT_PAUSE", "0.05"))

agent = Agent(
    os.environ.get("GATEWAY_URL", "http://127.0.0.1:8080"), os.environ.get("AGENT_USER", "demo"), os.environ["AGENT_SECRET"]
)


def own(path: str) -> pathlib.Path:
    """The file of a path that a caller sent, if it is inside of the folder."""
    try:
        file = (FOLDER / path).resolve()
        if not file.is_relative_to(FOLDER):
            raise ToolError("The path leads out of the agent's folder.")
        if file.is_file():
            return file
    except (OSError, RuntimeError, ValueError):
        pass  # A name that is too long, a circle of links, a NUL.
    raise ToolError("There is no such file.")


@agent.tool
def list_files() -> list[str]:
    """Names of the text files, below the folder."""
    names = []
    for path in sorted(FOLDER.rglob("*")):
        name = path.relative_to(FOLDER).as_posix()
        if path.is_file() and not path.is_symlink() and not any(part.startswith(".") for part in name.split("/")):
            names.append(name)
        if len(names) == FILES_MAX:
            break
    return names


@agent.tool
async def read_file(ctx: Context, path: str) -> str:
    """The text of a file, in pieces with progress; a caller that cancels ends it at the next piece."""
    file = own(path)
    size = file.stat().st_size
    if size > FILE_BYTES_MAX:
        raise ToolError(f"The file has {size} bytes, and at most {FILE_BYTES_MAX} are read.")
    pieces: list[bytes] = []
    with file.open("rb") as source:
        # One byte more than allowed: the file may have grown.
        while (piece := source.read(PIECE_BYTES)) and sum(map(len, pieces)) <= FILE_BYTES_MAX:
            pieces.append(piece)
            ctx.progress(sum(map(len, pieces)), size, file.name)
            await asyncio.sleep(PAUSE)
    return b"".join(pieces)[:FILE_BYTES_MAX].decode("utf-8", "replace")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(f"The agent offers the files in {FOLDER}.", flush=True)
    try:
        asyncio.run(agent.run())
    except AgentReplaced:
        sys.exit("Another agent of this user has connected, so this one has ended.")
    except Refused as error:
        sys.exit(f"{error} Is the secret the newest one?")
    except ConnectionClosed as error:
        sys.exit(f"The application ended the agent: {error}")
    except KeyboardInterrupt:
        pass
