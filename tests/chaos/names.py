"""Spells everything that Redis and the gateway know by name: keys, channels, calls of scripts, envelopes, positions.

No other file of the chaos suite spells a key. `WSPROXY_NAMES=v1` selects the spelling of versions up to 0.3, so that
the same scenarios can be run against an older binary; `WSPROXY_SCRIPTS` and `WSPROXY_PACKAGE` name the folders of its
scripts and of its Python package (that one is a matter of `run`).
"""

import json
import os
import pathlib
import re
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[2]
FORM = os.environ.get("WSPROXY_NAMES", "v2")
SCRIPTS = pathlib.Path(os.environ.get("WSPROXY_SCRIPTS", ROOT / "spec/scripts"))
BINARY = pathlib.Path(os.environ.get("WSPROXY_BIN", ROOT / "target/debug/wsproxy"))
if FORM not in ("v1", "v2"):
    raise SystemExit(f"WSPROXY_NAMES is v1 or v2, not {FORM!r}.")

_IS_OLD = FORM == "v1"
# The first bytes of a message with history on its channel.
_MAGIC = b"\xffH1 " if _IS_OLD else b"\xffH2 "
_ENVELOPE = re.compile(rb"\xffH\d (\S+) (\S+) ([^\n]*)\n")
_POSITION = re.compile(r"(\d+)-(\d+)(?:-([0-9a-f]{8}))?")
_LABEL = re.compile(rb"~([A-Za-z0-9.]+)~")


@dataclass(frozen=True)
class Limits:
    """Bounds of a history, as the gateway and its workers have them."""

    entries_max: int = 1000
    bytes_max: int = 1 << 20
    ttl_ms: int = 3_600_000


# ---- channels and keys ----


def session(name):
    """The channel of a session's clients."""
    return f"session:{name}:down"


def user(name):
    """The channel of a user's connections."""
    return f"ws:user:{name}"


def connection(name):
    """The channel of one connection."""
    return f"ws:connection:{name}"


BROADCAST = "ws:broadcast"


def is_session(channel):
    """Whether a channel belongs to a session; else it belongs to the events."""
    return channel.startswith("session:")


def session_of(channel):
    """The session's id."""
    return channel.split(":")[1]


def is_watched(channel):
    """Whether clients of this suite get what is published there."""
    is_down = is_session(channel) and channel.endswith(":down")
    return is_down or channel == BROADCAST or channel.startswith(("ws:user:", "ws:connection:"))


def _derived(channel, suffix):
    if _IS_OLD:
        return f"{channel}:{suffix}"
    if is_session(channel):
        return f"{{{channel}}}:{suffix}"
    return f"{{ws}}:{channel.removeprefix('ws:')}:{suffix}"


def log(channel):
    """The stream that holds a channel's history."""
    return _derived(channel, "log")


def history(channel):
    """The keys without which Redis knows nothing of a channel's history any more."""
    return [log(channel)] if _IS_OLD else [log(channel), _derived(channel, "head")]


def token_key(name):
    """The one-time token of a session."""
    return f"session:{name}:auth"


def announcements(agent):
    """The log in which opened and closed sessions of an agent are kept."""
    return f"{{agent:{agent}:sessions}}:log"


CLOCK = "ws:clock" if _IS_OLD else "{ws}:clock"


def _once(channel, key):
    return f"{log(channel)}:once:{key}" if _IS_OLD else _derived(channel, f"once:{key}")


# ---- calls ----


def publish_call(channel, payload, limits, own_id="", once=""):
    """Keys and arguments of publish.lua."""
    keys = [log(channel)]
    clock = "" if is_session(channel) else CLOCK
    if clock or once:
        keys.append(clock)
    if once:
        keys.append(_once(channel, once))
    arguments = [channel, payload, limits.entries_max, limits.bytes_max, limits.ttl_ms, own_id]
    return keys, [*arguments, 600_000] if once else arguments


def stream_call(op, name, stream, limits, lease_ms, *more):
    """Keys and arguments of stream.lua."""
    channel, state = session(name), _stream_state(name, stream)
    keys = [log(channel), state, f"{state}:text"]
    keys += [f"session:{name}:streams", "streams:leases"] if _IS_OLD else [_derived(channel, "streams")]
    arguments = [op, channel, *([name] if _IS_OLD else []), stream]
    return keys, [*arguments, limits.entries_max, limits.bytes_max, limits.ttl_ms, lease_ms, *more]


async def note_lease(client, name, stream, lease_ms):
    """Writes the lease of a token stream where the script does not: it has another slot."""
    if not _IS_OLD:
        seconds, micros = await client.time()
        await client.zadd("streams:leases", {f"{name}/{stream}": seconds * 1000 + micros // 1000 + lease_ms})


def _stream_state(name, stream):
    return f"session:{name}:stream:{stream}" if _IS_OLD else _derived(session(name), f"stream:{stream}")


async def is_open(client, name, stream):
    """Whether Redis knows this token stream, and it has not ended."""
    return await client.hget(_stream_state(name, stream), "state") == b"open"


def script(name):
    """The text of a documented script."""
    return (SCRIPTS / name).read_text()


# ---- what travels ----


@dataclass(frozen=True)
class Envelope:
    """A message with history as it stands on its channel."""

    position: str
    previous: str
    own_id: str
    payload: bytes


def envelope(message):
    """Reads a message of a channel; `None` where it is a plain one."""
    found = _ENVELOPE.match(message)
    if not found or not is_position(found[1].decode()):
        return None
    return Envelope(found[1].decode(), found[2].decode(), found[3].decode(), message[found.end() :])


def forged(position, previous, payload=b""):
    """A plain message that looks like one with history."""
    return _MAGIC + f"{position} {previous} \n".encode() + payload


def log_item(position, fields):
    """(position, position of the entry before, the worker's own id, payload) of an entry of a log."""
    if _IS_OLD:
        own_id = fields.get(b"event_id", b"").decode()
        return position.decode(), fields.get(b"prev", b"").decode(), own_id, fields.get(b"data", b"")
    tag, previous, _, _, own_id = fields.get(b"meta", b"00000000 0-0 0 0 ").decode().split(" ", 4)
    return f"{position.decode()}-{tag}", previous, own_id, fields.get(b"data", b"")


def is_position(text):
    """Whether an id is a position that the gateway gave, rather than a worker's own id."""
    return _POSITION.fullmatch(text) is not None


def order(position):
    """Returns the order of a position within one life of a log."""
    found = _POSITION.fullmatch(position)
    milliseconds, sequence = (int(found[1]), int(found[2])) if found else (0, 0)
    # `0-T`: where nothing was at the time T.
    return (milliseconds, sequence) if milliseconds else (sequence, 2**64)


def is_start(position):
    """Whether it stands before everything: the entry that names it is the first one of its log's life."""
    return position.startswith("0-0")


def at_time(milliseconds, sequence=0):
    """A position that an entry of this time could have."""
    return f"{milliseconds}-{sequence}" + ("" if _IS_OLD else "-5eed5eed")


HIGHEST = f"{2**64 - 1}-{2**64 - 1}" + ("" if _IS_OLD else "-ffffffff")


def token(is_reusable):
    """A token for one WebSocket, or for the event streams of a session."""
    return ("sse." if is_reusable and not _IS_OLD else "") + os.urandom(9).hex()


# ---- labels: every message of this suite says which one it is ----


def mark(label):
    """The form in which a payload carries its label."""
    return f"~{label}~"


def label(payload):
    """The label of a payload; messages of token streams get one from what they say. `None`: none of ours."""
    if found := _LABEL.search(payload):
        return found[1].decode()
    if payload.startswith(b"{") and b'"type":"stream_' in payload:
        said = json.loads(payload)
        kind = said["type"].removeprefix("stream_")
        return stream_label(said["stream"], kind, said.get("seq", 0)) if kind != "snapshot" else None
    return None


def stream_label(stream, kind, seq):
    """The label of a message of a token stream: open, append or end."""
    return f"{stream}.{kind}.{seq}"
