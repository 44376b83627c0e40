"""Judges what every client has seen against what happened at Redis.

These are the promises of docs/concepts/guarantees.md and docs/concepts/history.md that it checks:

- *Delivery, with history*: from where a client opened, resumed, or was told `history_lost`, its messages of each
  channel are a contiguous run of what the Redis that acknowledged them had there: each once, in order, unchanged,
  with the position that Redis gave. Where a run breaks (messages are missing, come again, or belong to a history
  that Redis has forgotten) there is a `history_lost` in between, and behind it the run is exact again.
- What Redis forgets, and a client had seen, that client is told.
- `0` begins with the first message of a log, or is told `history_lost`.
- A client that resumes is told `resumed` or `history_lost` before it gets messages, and `count` messages follow.
- No client waits for ever: every client gets the last message of each of its channels within a bounded time after the
  faults (the scenario waits; the judge says who got none).
- *Histories over HTTP*: page by page the same, or `history_lost`.
- *Events*: broadcast, user and connection share one order. One notice per client and incident, where the scenario
  has one incident.
- *One connection*: a channel `ws:connection:…` is exact while that connection lives.
- *A plain publish*: at most once.
- *Captured*: once in the history, however many instances see it.
- *A token stream*: the text that a client has put together is the worker's; a stream that has ended at Redis has
  ended at every client.
- A message never has two members `event_id`. No client gets a message that was not published.
- An acknowledged message is in its channel's history, once where it was published once or with an idempotency key,
  unless Redis has forgotten it.
- Without faults (`Expectations.calm`) no client is told `history_lost`, and the counters of losses stay 0. After faults
  in which Redis loses nothing (`Expectations.lossless`) no client is told it either, but for `ambiguous` in answer to
  an event id of a worker's own: an instance that lost sight of Redis cannot know what Redis has kept.

It does not check: reports of acknowledgements (`ack`), the upstream direction, announcements, presence, revocation,
and that plain messages arrive at all while there are faults.
"""

import json
from dataclasses import dataclass, field

import names
from truth import UNKNOWN


@dataclass
class Expectations:
    """A scenario's promises beyond those that always hold."""

    # Redis forgets nothing: no client may be told `history_lost` that resumes from a position.
    lossless: bool = False
    # No fault at all: plain messages arrive too, and nothing is counted as lost.
    calm: bool = False
    # Most notices of `history_lost` for one client.
    notices_max: int | None = None


@dataclass
class Item:
    """One thing that a client has seen."""

    kind: str
    at: float
    label: str = ""
    # The id by which the message resumes, as this client could read it.
    event_id: str | None = None
    text: str = ""
    said: dict = field(default_factory=dict)

    def __str__(self):
        shown = {"message": self.label, "connect": f"connects to {self.text}"}.get(
            self.kind, f"{self.kind} {self.text}"
        )
        return f"{self.at:8.3f}  {shown.strip()}" + (f"  id {self.event_id}" if self.event_id is not None else "")


class View:
    """The messages of one client, in its order, and the id from which it would resume."""

    def __init__(self, name, channels):
        self.name = name
        self.channels = list(channels)
        self.items = []
        self.last_id = None
        self.labels = set()

    def add(self, item):
        """Notes what came; an id that came with it is the one to resume from."""
        self.items.append(item)
        if item.label:
            self.labels.add(item.label)
        if item.event_id:
            self.last_id = item.event_id

    def count(self, kind):
        """Returns the number of items of this kind."""
        return sum(item.kind == kind for item in self.items)


@dataclass
class Violation:
    """A promise that was broken, and the item with which this showed."""

    view: View | None
    what: str
    index: int = 0

    def history(self, before=14, after=3):
        """The client's own view around the place."""
        if self.view is None:
            return ""
        start = max(0, self.index - before)
        lines = [
            f"    {'>' if n == self.index else ' '} {item}"
            for n, item in enumerate(self.view.items[start : self.index + after + 1], start)
        ]
        return "\n".join(lines)


# ---- where a client stands on one channel ----


@dataclass(frozen=True)
class Behind:
    """It has seen one of these last; `None`: perhaps nothing yet."""

    entries: frozenset

    def allows(self, entry):
        return entry.parent is UNKNOWN or entry.parent in self.entries


@dataclass(frozen=True)
class After:
    """It was given a position, and what follows that position comes."""

    position: str
    time: float
    entries: frozenset

    def allows(self, entry):
        parent = entry.parent
        if parent is None or parent is UNKNOWN or parent in self.entries:
            return True
        if parent.sent_at >= self.time:
            return False
        # Sent before the position was given: then it is at or before it, or of a log that is no more.
        return not self.entries and (entry.begins_log or names.order(parent.position) <= names.order(self.position))


@dataclass(frozen=True)
class Start:
    """It has asked for everything."""

    def allows(self, entry):
        return entry.begins_log or entry.parent is UNKNOWN


@dataclass(frozen=True)
class Anywhere:
    """It has not asked, so that it begins with whatever is live."""

    def allows(self, entry):
        return True


class Judge:
    """Follows one client through its channels."""

    def __init__(self, view, truth, expectations):
        self.view, self.truth, self.expected = view, truth, expectations
        self.violations = []
        self.index = 0
        self.at = {}
        # Messages that the client had processed, in order, up to the id it remembers.
        self.seen = []
        self.memory = (None, {}, 0)
        self.connection = None
        # The id from which the connection resumes, until it is answered.
        self.asked = None
        self.must_say = False
        self.promised = 0
        self.last_entry = None
        self.texts = {}
        self.plain = set()

    def run(self):
        """All violations of this client."""
        for index, item in enumerate(self.view.items):
            self.index = index
            getattr(self, f"_{item.kind}")(item)
        self._end()
        return self.violations

    def _fail(self, what):
        self.violations.append(Violation(self.view, what, self.index))

    def _watched(self):
        return self.view.channels + ([self.connection] if self.connection else [])

    def _stand_after(self, position, time):
        self.at = {
            channel: After(position, time, frozenset(self.truth.at(channel, position))) for channel in self._watched()
        }
        self.last_entry = None

    # ---- what came ----

    def _connect(self, item):
        # A connection that broke off keeps no promises: what it announced is asked of the last one only.
        asked, self.must_say, self.connection = item.event_id, bool(item.event_id), None
        self.asked = asked
        self.promised = 0
        self.last_entry = None
        if asked == "0":
            self.at, self.seen, self.texts = {channel: Start() for channel in self.view.channels}, [], {}
        elif asked:
            remembered, at, length = self.memory
            self.at, self.seen = dict(at), self.seen[:length]
            if remembered != asked:
                self.at = {channel: Anywhere() for channel in self.view.channels}
            elif self._is_ambiguous(asked):
                # It is taken behind the oldest copy, or told; what it had since may come again.
                self.at = {channel: self._rewound(place) for channel, place in self.at.items()}
                self.seen = []
        else:
            # It is shown the token streams as they are.
            self.at, self.seen, self.texts = {channel: Anywhere() for channel in self.view.channels}, [], {}

    def _is_ambiguous(self, event_id):
        entries = self.truth.own_ids.get(event_id, ())
        return sum(entry.channel in self.view.channels for entry in entries) > 1

    def _rewound(self, place):
        if not isinstance(place, Behind):
            return place
        before = set()
        for entry in place.entries:
            while entry is not None and entry not in before:
                before.add(entry)
                entry = entry.parent
        return Behind(frozenset({*before, None}))

    def _connected(self, item):
        self.connection = names.connection(item.text)
        # No worker can have published to a connection before it was named.
        self.at[self.connection] = After("0-0", item.at, frozenset())
        if item.event_id:
            self._stand_after(item.event_id, item.at)
            self._remember(item.event_id)

    def _opened(self, item):
        self._stand_after(item.event_id, item.at)
        self._remember(item.event_id)

    def _resumed(self, item):
        self.must_say = False
        self.promised = item.said.get("count", 0)

    def _lost(self, item):
        asked = self.asked if self.must_say else None
        self.must_say = False
        self.promised = 0
        if item.event_id is None or not names.is_position(item.event_id):
            self._fail(f"history_lost gives no position: {item.text}")
            return
        self._stand_after(item.event_id, item.at)
        self._remember(item.event_id)
        self.texts = {}
        if self.expected.calm or (self.expected.lossless and not self._doubts_are_due(asked, item)):
            self._fail(f"was told history_lost ({item.said.get('reason')}) although Redis has lost nothing")

    @staticmethod
    def _doubts_are_due(asked, item):
        """Whether this is the answer to an event id of a worker's own, which is ambiguous after an outage."""
        is_own = bool(asked) and asked != "0" and not names.is_position(asked)
        return is_own and item.said.get("reason") == "ambiguous"

    def _gap(self, item):
        """A reader of a history was told that something behind its position may be missing: it begins anew."""
        self.seen = []
        self.at = {channel: Anywhere() for channel in self._watched()}
        if self.expected.lossless or self.expected.calm:
            self._fail(f"was told history_lost ({item.said.get('reason')}) although Redis has lost nothing")

    def _message(self, item):
        channel = self.truth.channels.get(item.label)
        self._check_members(item)
        if channel is None:
            self._fail(f"got {item.label}, which was never published")
            return
        if item.label in self.truth.plain:
            self._plain(item)
            return
        if channel not in self._watched():
            self._fail(f"got {item.label}, which is for {channel}")
            return
        if self.must_say:
            self._fail(f"got {item.label} before it was told `resumed` or `history_lost`")
            self.must_say = False
        self.promised -= 1
        self._follow(channel, item)
        self._text(item.said)
        if item.event_id:
            self._remember(item.event_id)

    def _plain(self, item):
        if item.label in self.plain:
            self._fail(f"the plain message {item.label} came twice")
        self.plain.add(item.label)

    def _follow(self, channel, item):
        entries = self.truth.find(channel, item.label)
        if not entries:
            entries = {self.truth.unseen(channel, item.label, item.event_id)}
        if item.event_id and names.is_position(item.event_id):
            with_position = {entry for entry in entries if entry.position in (item.event_id, "?")}
            if not with_position:
                self._fail(f"{item.label} came with the id {item.event_id}, but is {sorted(map(str, entries))}")
            entries = with_position or entries
        place = self.at.get(channel, Anywhere())
        allowed = {entry for entry in entries if place.allows(entry)}
        published_once = len(self.truth.find(channel, item.label)) == 1
        if item.label in self.seen and published_once:
            self._fail(f"{item.label} came again")
        elif not allowed:
            self._fail(self._explain(place, sorted(entries, key=lambda entry: entry.number)[-1]))
        self._check_order(allowed)
        self.at[channel] = Behind(frozenset(allowed or entries))
        self.seen.append(item.label)

    def _check_order(self, allowed):
        """Channels of events share one order."""
        entry = next(iter(allowed), None)
        last, self.last_entry = self.last_entry, entry if len(allowed) == 1 else None
        if last is None or self.last_entry is None or last.server != entry.server or len(self._watched()) == 1:
            return
        if entry.number < last.number:
            self._fail(f"{entry} came behind {last}, which was published later")

    def _explain(self, place, entry):
        missing, at = [], entry.parent
        while at is not None and at is not UNKNOWN and len(missing) < 10_000:
            if isinstance(place, Behind) and at in place.entries:
                break
            if isinstance(place, (After, Start)) and place.allows(at):
                missing.append(at)
                break
            missing.append(at)
            at = at.parent
        else:
            last = sorted(map(str, place.entries))[:4] if isinstance(place, Behind) else place
            return f"{entry} follows {entry.parent}, but the client was behind {last}, and was told nothing"
        names_of_missing = ", ".join(str(each) for each in reversed(missing[:8]))
        return (
            f"before {entry.label} {len(missing)} message(s) are missing, and it was told nothing: {names_of_missing}"
        )

    def _remember(self, event_id):
        self.memory = (event_id, dict(self.at), len(self.seen))

    def _check_members(self, item):
        if not item.text.startswith("{"):
            return
        twice = []

        def look(pairs):
            found = [name for name, _ in pairs]
            if found.count("event_id") > 1:
                twice.append(True)
            return dict(pairs)

        try:
            json.loads(item.text, object_pairs_hook=look)
        except ValueError:
            return
        if twice:
            self._fail(f"{item.label} has two members event_id: {item.text[:120]}")

    # ---- token streams: a snapshot replaces the text, an append adds to it ----

    def _snapshot(self, item):
        said = item.said
        self.texts[said["stream"]] = [said["seq"], said["text"], said["state"]]

    def _text(self, said):
        stream = said.get("stream")
        if not str(said.get("type", "")).startswith("stream_") or stream is None:
            return
        held = self.texts.get(stream)
        match said["type"]:
            case "stream_open":
                self.texts[stream] = [0, "", "open"]
            case "stream_append" if held is not None and said["seq"] > held[0]:
                held[:2] = said["seq"], held[1] + said["text"]
            case "stream_end" if held is not None:
                held[2] = said["outcome"]

    # ---- what else clients see ----

    def _end_of_connection(self, item):
        self.connection = None

    def _recovered(self, item):
        if self.expected.calm:
            self._fail("was told bus_recovered although there was no fault")

    def _refused(self, item):
        """A handshake that was refused changes nothing for the client."""

    def _other(self, item):
        """Pings and the like."""

    # ---- at the end ----

    def _end(self):
        self.index = len(self.view.items) - 1
        if self.promised > 0:
            self._fail(f"was told `resumed`, but {self.promised} of the messages it announced never came")
        for stream, (seq, text, state) in self.texts.items():
            truth = self.truth.texts.get(stream)
            if truth is None:
                continue
            whole = truth.whole(seq)
            if whole is not None and truth.opened == 1 and whole != text:
                self._fail(f"the text of {stream} up to {seq} is {text[:60]!r}, but was {whole[:60]!r}")
            if truth.outcome is not None and state == "open":
                self._fail(f"the token stream {stream} has ended ({truth.outcome}), but not for this client")
        most = self.expected.notices_max
        if most is not None and self.view.count("lost") > most:
            told = [f"{item.said.get('reason')} at {item.event_id}" for item in self.view.items if item.kind == "lost"]
            self._fail(f"was told history_lost {len(told)} times for one incident: {', '.join(told)}")


def judge_channels(truth, expectations):
    """Checks the histories without looking at any client."""
    violations = []
    for labels in truth.entries.values():
        for label, entries in labels.items():
            if label in truth.captured and len(entries) > 1:
                violations.append(Violation(None, f"{label} was published once, and captured {len(entries)} times"))
    if not (expectations.lossless or expectations.calm):
        return violations
    for label, positions in truth.acknowledged.items():
        if label in truth.plain or label in truth.captured:
            continue
        entries = truth.find(truth.channels[label], label)
        if not entries:
            violations.append(Violation(None, f"{label} was acknowledged as {positions}, but is in no history"))
        elif len(entries) > max(1, len(set(positions))):
            violations.append(
                Violation(None, f"{label} was published once, but is in the history {len(entries)} times")
            )
    return violations
