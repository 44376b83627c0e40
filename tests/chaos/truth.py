"""The events at Redis: the messages of every channel, and the predecessor of each.

It knows servers, channels and messages; it does not know clients, and judges nothing.
"""

import json
import time
from dataclasses import dataclass, field

import names


@dataclass(eq=False, slots=True)
class Entry:
    """A message with history, as one server has put it behind another."""

    channel: str
    label: str
    position: str
    own_id: str
    parent: "Entry | None"
    begins_log: bool
    server: str
    number: int
    sent_at: float

    def __repr__(self):
        own = f" {self.own_id}" if self.own_id else ""
        return f"{self.label} [{self.position}{own} at {self.server}]"


@dataclass
class Text:
    """A token stream, as the messages of its channel tell it."""

    pieces: dict = field(default_factory=dict)
    outcome: str | None = None
    opened: int = 0

    def whole(self, seq):
        """The text up to an append; `None` where this was not seen."""
        if any(number not in self.pieces for number in range(1, seq + 1)):
            return None
        return "".join(self.pieces[number] for number in range(1, seq + 1))


# Stands for an unknown message before it: any predecessor is right.
UNKNOWN = Entry("", "(unknown)", "0-0", "", None, False, "", -1, 0.0)


class Truth:
    """The messages of all channels as a forest: the parent of an entry is the message before it on its channel and
    server, or on the server that this one was a replica of. Emptying or expiring a log does not end a line: the
    first message of the new log follows the last one of the old.
    """

    def __init__(self):
        self.entries = {}
        self.positions = {}
        self.tails = {}
        self.sent = {}
        self.channels = {}
        self.acknowledged = {}
        self.refused = set()
        self.plain = set()
        self.captured = set()
        self.forged = set()
        self.own_ids = {}
        self.texts = {}
        self._number = 0

    # ---- what publishers say ----

    def sending(self, label, channel, kind="kept"):
        """A publisher is about to send a message: `kept` with history, `plain`, or `captured` by a gateway."""
        self.sent.setdefault(label, time.monotonic())
        self.channels[label] = channel
        if kind != "kept":
            {"plain": self.plain, "captured": self.captured}[kind].add(label)

    def answered(self, label, position):
        """Redis or the gateway has acknowledged it."""
        self.acknowledged.setdefault(label, []).append(position)

    def refuse(self, label):
        """The publisher was told that it was not done."""
        self.refused.add(label)

    # ---- what a server says ----

    def published(self, server, channel, message):
        """A message that a subscriber of this very server has got."""
        if not names.is_watched(channel) or message in self.forged:
            return
        envelope = names.envelope(message)
        if envelope is not None:
            self._append(server, channel, envelope.position, envelope.previous, envelope.own_id, envelope.payload)

    def promoted(self, server, master):
        """From here on `server` goes on by itself from what it has got as a replica."""
        for (name, channel), tail in list(self.tails.items()):
            if name == master:
                self.tails[server, channel] = tail

    def read(self, server, channel, log):
        """The log as it stands while no part publishes: after a start, or when a replica has been promoted."""
        known = [(n, entry) for n, item in enumerate(log) if (entry := self._known(channel, item))]
        behind = 0
        if known:
            behind, tail = known[-1][0] + 1, known[-1][1]
            self.tails[server, channel] = tail
        for position, previous, own_id, payload in log[behind:]:
            self._append(server, channel, position, previous, own_id, payload)

    def _known(self, channel, item):
        position, _, _, payload = item
        held = self.entries.get(channel, {}).get(names.label(payload), [])
        return next((entry for entry in held if entry.position == position), None)

    def _append(self, server, channel, position, previous, own_id, payload):
        label = names.label(payload)
        if label is None:
            return
        if any(each.server == server and each.position == position for each in self.find(channel, label)):
            return
        # A log that is new may begin behind a position that belongs to no message.
        positions = self.positions.setdefault(channel, set())
        begins = names.is_start(previous) or previous not in positions
        positions.add(position)
        parent = self.tails.get((server, channel))
        if parent is None and not begins:
            parent = UNKNOWN
        self._number += 1
        # Without a time of its publisher: a little earlier than it was seen, since it was sent before.
        sent_at = self.sent.get(label, time.monotonic() - 1)
        entry = Entry(channel, label, position, own_id, parent, begins, server, self._number, sent_at)
        self.entries.setdefault(channel, {}).setdefault(label, []).append(entry)
        self.tails[server, channel] = entry
        if own_id:
            self.own_ids.setdefault(own_id, []).append(entry)
        self.channels.setdefault(label, channel)
        self._text(payload)

    def _text(self, payload):
        if not payload.startswith(b"{") or b'"type":"stream_' not in payload:
            return
        said = json.loads(payload)
        text = self.texts.setdefault(said["stream"], Text())
        match said["type"]:
            case "stream_open":
                text.opened += 1
                text.pieces, text.outcome = {}, None
            case "stream_append":
                text.pieces[said["seq"]] = said["text"]
            case "stream_end":
                text.outcome = said["outcome"]

    # ---- questions ----

    def at(self, channel, position):
        """The entries of a channel with this position: more than one where two lives of a log gave it twice."""
        held = self.entries.get(channel, {}).values()
        return {entry for entries in held for entry in entries if entry.position == position}

    def find(self, channel, label, position=None):
        """The entries with this label, and with this position where it is known."""
        held = self.entries.get(channel, {}).get(label, [])
        return {entry for entry in held if position is None or entry.position == position}

    def unseen(self, channel, label, position):
        """A client got a message of which no server was seen: it died just then, and has forgotten it."""
        self._number += 1
        sent_at = self.sent.get(label, 0.0)
        entry = Entry(channel, label, position or "?", "", UNKNOWN, False, "a dead server", self._number, sent_at)
        self.entries.setdefault(channel, {}).setdefault(label, []).append(entry)
        return entry
