//! The members of one process: an epoll loop that connects, reads, counts and moves them while the scenario waits.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, bail};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{RecvFlags, sockopt};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use wsproxy_proto::ws::frame::Opcode;

use super::dialect::{Dialect, Sight, Told, sights};
use super::inbox::{Event, Inbox};
use super::member::Member;
use super::moves::{Moves, Pace};
use super::seen::Seen;
use crate::clock::{NS_PER_SECOND, now_ns, ns};
use crate::fleet::{Ending, Phase, Span};
use crate::frame::push_client_frame;
use crate::handshake::{self, Answer};

/// Configuration of a crew.
#[derive(Debug, Clone)]
pub struct CrewConfig {
    /// Address of the server.
    pub server: SocketAddr,
    /// Form of the members' messages.
    pub dialect: Dialect,
    /// Part of all ids that is this run's own.
    pub run: String,
    /// Number of members.
    pub members: u32,
    /// Number of rooms, each with as many members, which are next to each other.
    pub rooms: u32,
    /// Set where members take batches of positions.
    pub batch: bool,
    /// Number of source addresses, from 127.0.0.1 up.
    pub sources: u32,
    /// Interval at which due moves are sent.
    pub tick: Duration,
    /// Longest time without progress.
    pub timeout: Duration,
}

/// The members. Dropping this closes their sockets.
pub struct Crew {
    config: CrewConfig,
    epoll: OwnedFd,
    timer: OwnedFd,
    members: Vec<Member>,
    moves: Option<Moves>,
    /// Zero of the time in moves.
    epoch_ns: u64,
    /// Members whose connection or hello is not complete.
    coming: u32,
    seen: Seen,
    buffer: Vec<u8>,
    events: Vec<epoll::Event>,
}

impl Crew {
    /// Creates the members; none connects yet.
    pub fn new(config: CrewConfig) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &timer, epoll::EventData::new_u64(TIMER), epoll::EventFlags::IN)?;
        Ok(Self {
            epoll,
            timer,
            members: (0..config.members).map(|_| Member::new()).collect(),
            moves: None,
            epoch_ns: now_ns(),
            coming: 0,
            seen: Seen::default(),
            buffer: vec![0; READ_BYTES],
            events: Vec::with_capacity(EVENTS_MAX),
            config,
        })
    }

    /// Sets the server for all connections from now on.
    pub fn redirect(&mut self, server: SocketAddr) {
        self.config.server = server;
    }

    /// Lets a range of members join, a few at a time, and waits until each has all of its hello.
    ///
    /// # Errors
    /// Not all of them get it in time; the reasons are in the figures.
    pub fn join(&mut self, span: Span, at_once: u32) -> Result<()> {
        let mut next = span.first;
        let end = span.first + span.count;
        let mut deadline_ns = now_ns() + ns(self.config.timeout);
        while next < end || self.coming > 0 {
            let before = (next, self.coming);
            while next < end && self.coming < at_once.max(1) {
                self.open(next, now_ns());
                next += 1;
            }
            self.step(now_ns() + WAIT_NS);
            if (next, self.coming) != before {
                deadline_ns = now_ns() + ns(self.config.timeout);
            } else if now_ns() > deadline_ns {
                break;
            }
        }
        self.all_joined(span)
    }

    /// Lets a range of members join at a rate, and waits until each has all of its hello. Its time counts from the
    /// schedule.
    ///
    /// # Errors
    /// Not all of them get it in time; the reasons are in the figures.
    pub fn join_at(&mut self, span: Span, per_second: f64) -> Result<()> {
        let start_ns = now_ns();
        for number in 0..span.count {
            let after_ns = f64::from(number) * NS_PER_SECOND as f64 / per_second;
            let due_ns = start_ns + after_ns as u64;
            self.turn(due_ns);
            self.open(span.first + number, due_ns);
        }
        let deadline_ns = now_ns() + ns(self.config.timeout);
        while self.coming > 0 && now_ns() < deadline_ns {
            self.step(now_ns() + WAIT_NS);
        }
        self.all_joined(span)
    }

    fn all_joined(&self, span: Span) -> Result<()> {
        let here = self.ready(span);
        if here < span.count {
            let failures = &self.seen.tally.failures;
            bail!("{here} of {} members have joined; failures: {failures:?}", span.count);
        }
        Ok(())
    }

    /// Closes a range of members politely and waits until the server has closed their sockets.
    pub fn leave(&mut self, span: Span) {
        let mut close = Vec::new();
        push_client_frame(Opcode::Close, &1000u16.to_be_bytes(), &mut close);
        for index in span.first..span.first + span.count {
            let client = &mut self.members[index as usize].client;
            if client.phase == Phase::Open {
                client.phase = Phase::Closing;
                self.send(index, &close);
            }
        }
        let deadline_ns = now_ns() + ns(self.config.timeout);
        let ended = |member: &Member| member.client.phase == Phase::Idle;
        while now_ns() < deadline_ns {
            let range = span.first as usize..(span.first + span.count) as usize;
            if self.members[range].iter().all(ended) {
                return;
            }
            self.step(now_ns() + WAIT_NS);
        }
    }

    /// Returns how many members of a range are in their room.
    #[must_use]
    pub fn ready(&self, span: Span) -> u32 {
        let range = span.first as usize..(span.first + span.count) as usize;
        let ready = |member: &&Member| member.ready && member.client.phase == Phase::Open;
        self.members[range].iter().filter(ready).count() as u32
    }

    /// Begins to move members; [`turn`](Self::turn) does it.
    pub fn begin(&mut self, pace: Pace) {
        self.moves = Some(Moves::new(pace, self.config.rooms));
    }

    /// Reads and moves until a point in time.
    pub fn turn(&mut self, until_ns: u64) {
        while now_ns() < until_ns {
            self.step(until_ns);
        }
    }

    /// Reads until every member that reads has the last move of all others in its room; returns the number of pairs of
    /// a reader and a mover that lack it after `patience`.
    pub fn settle(&mut self, patience: Duration) -> u64 {
        let deadline_ns = now_ns() + ns(patience);
        loop {
            let missing = self.missing();
            if missing == 0 || now_ns() >= deadline_ns {
                return missing;
            }
            self.step(now_ns() + SETTLE_NS);
        }
    }

    fn missing(&self) -> u64 {
        let mut missing = 0;
        for room in self.members.chunks(self.room_members() as usize) {
            let reads =
                |member: &&Member| member.client.phase == Phase::Open && !member.client.stalled;
            for reader in room.iter().filter(reads) {
                let lacks = |(place, mover): &(usize, &Member)| {
                    !std::ptr::eq(reader, *mover) && reader.newest(*place) < mover.moved
                };
                missing += room.iter().enumerate().filter(lacks).count() as u64;
            }
        }
        missing
    }

    fn room_members(&self) -> u32 {
        (self.config.members / self.config.rooms).max(1)
    }

    /// Sets whether a member stops reading. From then on it is not measured.
    pub fn set_stalled(&mut self, index: u32, stalled: bool) {
        let member = &mut self.members[index as usize];
        member.aside = true;
        member.client.stalled = stalled;
        if let Some(socket) = &member.client.socket {
            // The kernel must not take for the member what it does not read.
            let bytes = if stalled { STALLED_BYTES } else { READ_BYTES };
            let _ = sockopt::set_socket_recv_buffer_size(socket, bytes);
        }
        self.set_interest(index);
    }

    /// Lets a range of members count what they are told of the joins and leaves of each member.
    pub fn watch(&mut self, span: Span) {
        for index in span.first..span.first + span.count {
            self.members[index as usize].told = vec![(0, 0); self.config.members as usize];
        }
    }

    /// Returns how often `watcher` was told of a join and a leave of each member.
    #[must_use]
    pub fn told(&self, watcher: u32) -> &[(u8, u8)] {
        &self.members[watcher as usize].told
    }

    /// Returns the figures since the last report so far.
    #[must_use]
    pub fn seen(&self) -> &Seen {
        &self.seen
    }

    /// Returns the figures since the last report, and begins the next one.
    pub fn report(&mut self) -> Seen {
        std::mem::take(&mut self.seen)
    }

    /// Returns the number of moves that members have sent so far.
    #[must_use]
    pub fn moved(&self) -> u64 {
        self.members.iter().map(|member| u64::from(member.moved)).sum()
    }

    /// Sends what is due, waits for events until `until_ns` at most, and takes them.
    fn step(&mut self, until_ns: u64) {
        let wake_ns = self.move_due().map_or(until_ns, |due_ns| due_ns.min(until_ns));
        self.arm(wake_ns);
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        let waited = epoll::wait(&self.epoll, spare_capacity(&mut events), None);
        let mut buffer = std::mem::take(&mut self.buffer);
        if waited.is_ok() {
            for event in &events {
                let epoll::Event { data, flags } = *event;
                match data.u64() {
                    TIMER => {
                        let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
                    }
                    member => self.on_member(member, flags, &mut buffer),
                }
            }
        }
        (self.events, self.buffer) = (events, buffer);
    }

    /// Sends every move whose time has come, and returns when to look again. A move carries its intended time, even when
    /// it leaves late.
    fn move_due(&mut self) -> Option<u64> {
        let mut moves = self.moves.take()?;
        let (now, mut message, mut frame) = (now_ns(), Vec::new(), Vec::new());
        let opcode = if self.config.dialect.is_text() { Opcode::Text } else { Opcode::Binary };
        while let Some(due_ns) = moves.due_ns() {
            if due_ns > now {
                // Moves that are due soon after each other leave together.
                self.moves = Some(moves);
                return Some(due_ns.max(now + ns(self.config.tick)));
            }
            let index = moves.take();
            let member = &mut self.members[index as usize];
            if !member.ready || member.client.phase != Phase::Open {
                continue;
            }
            member.moved += 1;
            let sent_us = (due_ns.saturating_sub(self.epoch_ns) / 1_000) as u32;
            let sight = Sight { mover: index, number: member.moved, sent_us };
            message.clear();
            frame.clear();
            self.config.dialect.push_move(sight, &mut message);
            push_client_frame(opcode, &message, &mut frame);
            self.send(index, &frame);
        }
        None
    }

    fn arm(&self, at_ns: u64) {
        let at = Timespec {
            tv_sec: (at_ns / NS_PER_SECOND).cast_signed(),
            tv_nsec: (at_ns % NS_PER_SECOND).cast_signed(),
        };
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        let spec = Itimerspec { it_interval: never, it_value: at };
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &spec);
    }

    fn open(&mut self, index: u32, started_ns: u64) {
        let room = format!("{}-{}", self.config.run, index / self.room_members());
        let path = self.config.dialect.path(&room, index);
        let request = handshake::request(&self.config.server.to_string(), &path, None);
        let source = Ipv4Addr::from(FIRST_SOURCE + index % self.config.sources);
        let member = &mut self.members[index as usize];
        member.start_over();
        member.client.started_ns = started_ns;
        self.coming += 1;
        let client = &mut member.client;
        let begun = client.connect(self.config.server, source).and_then(|()| client.send(&request));
        let member = &self.members[index as usize];
        let registered = begun.and_then(|_| {
            let Some(socket) = &member.client.socket else { return Ok(()) };
            epoll::add(&self.epoll, socket, token(index, member), interest(member))
        });
        if registered.is_err() {
            self.end(index, "no connection");
        }
    }

    fn on_member(&mut self, token: u64, flags: epoll::EventFlags, buffer: &mut [u8]) {
        let (index, generation) = (token as u32, (token >> 32) as u32);
        let client = &mut self.members[index as usize].client;
        if client.generation != generation || client.socket.is_none() {
            return;
        }
        if flags.contains(epoll::EventFlags::OUT) {
            match client.flush() {
                Ok(true) => self.set_interest(index),
                Ok(false) => {}
                Err(_) => return self.end(index, "connection reset"),
            }
        }
        let ended = epoll::EventFlags::HUP | epoll::EventFlags::ERR | epoll::EventFlags::RDHUP;
        let last = flags.intersects(ended);
        if !last && !flags.contains(epoll::EventFlags::IN) {
            return;
        }
        // Edges come once: a short read has taken everything, a full one or an end may have more behind it.
        while let Some(read) = self.read(index, buffer) {
            let same = self.members[index as usize].client.generation == generation;
            if !same || (!last && read < buffer.len()) {
                return;
            }
        }
    }

    /// Takes the bytes of one system call; `None` when no more follow.
    fn read(&mut self, index: u32, buffer: &mut [u8]) -> Option<usize> {
        let client = &mut self.members[index as usize].client;
        let socket = client.socket.as_ref()?;
        match rustix::net::recv(socket, &mut *buffer, RecvFlags::empty()) {
            Ok((_, read)) if read > 0 => {
                match client.phase {
                    Phase::Handshake => self.read_answer(index, &buffer[..read]),
                    _ => self.read_frames(index, &buffer[..read]),
                }
                Some(read)
            }
            Err(Errno::AGAIN) => None,
            Ok(_) => {
                self.end(index, "closed without a word");
                None
            }
            Err(_) => {
                self.end(index, "connection reset");
                None
            }
        }
    }

    fn read_answer(&mut self, index: u32, input: &[u8]) {
        let client = &mut self.members[index as usize].client;
        client.head.extend_from_slice(input);
        match handshake::answer(&client.head) {
            Answer::Incomplete => {}
            Answer::Accepted(head) => {
                let rest = client.head.split_off(head);
                client.head = Vec::new();
                client.phase = Phase::Open;
                match self.config.dialect.hello(self.config.batch) {
                    Some(hello) => self.say(index, &hello),
                    None => self.complete(index),
                }
                self.read_frames(index, &rest);
            }
            Answer::Refused(status) => self.end(index, &format!("status {status}")),
            Answer::Malformed => self.end(index, "malformed answer"),
        }
    }

    fn read_frames(&mut self, index: u32, input: &[u8]) {
        let now = now_ns();
        let member = &mut self.members[index as usize];
        let generation = member.client.generation;
        let mut inbox = std::mem::take(&mut member.inbox);
        let mut closed = None;
        let read = inbox.read(input, |event| match event {
            Event::Text(message) | Event::Binary(message) => self.take(index, message, now),
            Event::Ping(payload) => {
                let mut pong = Vec::with_capacity(payload.len() + 8);
                push_client_frame(Opcode::Pong, payload, &mut pong);
                self.seen.tally.pings += 1;
                self.send(index, &pong);
            }
            Event::Pong => {}
            Event::Close(code) => closed = Some(code),
        });
        if self.members[index as usize].client.generation == generation {
            self.members[index as usize].inbox = inbox;
        }
        match (read, closed) {
            (Err(_), _) => self.end(index, "broken frame"),
            (Ok(()), Some(code)) => {
                let mut reply = Vec::new();
                push_client_frame(Opcode::Close, &code.to_be_bytes(), &mut reply);
                self.send(index, &reply);
                self.lose(index, code);
            }
            (Ok(()), None) => {}
        }
    }

    fn take(&mut self, index: u32, message: &[u8], now: u64) {
        self.seen.messages += 1;
        self.seen.tally.bytes += message.len() as u64;
        match self.config.dialect.read(message) {
            Told::Hello { more: false } => self.complete(index),
            Told::Hello { more: true } | Told::Other => {}
            Told::Move(sight) if sight.mover == index => self.seen.own += 1,
            Told::Move(sight) => self.note(index, sight, now),
            // All members get the same batch, with the moves of each of them.
            Told::Batch(batch) => sights(batch)
                .filter(|sight| sight.mover != index)
                .for_each(|sight| self.note(index, sight, now)),
            Told::Joined(of) => {
                self.seen.joined += 1;
                self.members[index as usize].hear(of, true);
            }
            Told::Left(of) => {
                self.seen.left += 1;
                self.seen.left_last_ns = now;
                self.members[index as usize].hear(of, false);
            }
            Told::Refused(code) => *self.seen.refused.entry(code.to_owned()).or_insert(0) += 1,
            Told::Answer(answer) => self.say(index, answer),
        }
    }

    fn note(&mut self, index: u32, sight: Sight, now: u64) {
        let sent_ns = self.epoch_ns + u64::from(sight.sent_us) * 1_000;
        let place = (sight.mover % self.room_members()) as usize;
        let member = &mut self.members[index as usize];
        member.note(place, sight, now.saturating_sub(sent_ns), &mut self.seen);
    }

    /// Notes that a member has all of its hello.
    fn complete(&mut self, index: u32) {
        let member = &mut self.members[index as usize];
        if !member.ready {
            member.ready = true;
            self.coming -= 1;
            let took_ns = now_ns().saturating_sub(member.client.started_ns);
            self.seen.tally.handshake.saturating_record(took_ns);
        }
    }

    /// Sends a message.
    fn say(&mut self, index: u32, message: &[u8]) {
        let opcode = if self.config.dialect.is_text() { Opcode::Text } else { Opcode::Binary };
        let mut frame = Vec::with_capacity(message.len() + 8);
        push_client_frame(opcode, message, &mut frame);
        self.send(index, &frame);
    }

    fn send(&mut self, index: u32, bytes: &[u8]) {
        let client = &mut self.members[index as usize].client;
        let was_empty = client.unsent.is_empty();
        match client.send(bytes) {
            Ok(false) if was_empty => self.set_interest(index),
            Ok(_) => {}
            // The socket's end shows as a readable event of its own.
            Err(_) => client.unsent.clear(),
        }
    }

    fn set_interest(&mut self, index: u32) {
        let member = &self.members[index as usize];
        if let Some(socket) = &member.client.socket {
            let _ = epoll::modify(&self.epoll, socket, token(index, member), interest(member));
        }
    }

    /// Ends a connection for a reason other than a close frame.
    fn end(&mut self, index: u32, reason: &str) {
        if !self.members[index as usize].ready {
            *self.seen.tally.failures.entry(reason.to_owned()).or_insert(0) += 1;
        }
        self.lose(index, 1006);
    }

    fn lose(&mut self, index: u32, code: u16) {
        let member = &mut self.members[index as usize];
        if !member.ready {
            self.coming = self.coming.saturating_sub(1);
        } else if member.client.phase != Phase::Closing {
            self.seen.tally.endings.push(Ending { code, at_ns: now_ns() });
        }
        member.client.reset();
        member.inbox = Inbox::default();
    }
}

fn token(index: u32, member: &Member) -> epoll::EventData {
    epoll::EventData::new_u64(u64::from(member.client.generation) << 32 | u64::from(index))
}

fn interest(member: &Member) -> epoll::EventFlags {
    let mut flags = epoll::EventFlags::ET;
    if !member.client.stalled {
        flags |= epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
    }
    if !member.client.unsent.is_empty() {
        flags |= epoll::EventFlags::OUT;
    }
    flags
}

/// Above any member's token: its generation would have to wrap to collide.
const TIMER: u64 = u64::MAX;
const EVENTS_MAX: usize = 1024;
const READ_BYTES: usize = 256 * 1024;
const WAIT_NS: u64 = NS_PER_SECOND / 20;
const SETTLE_NS: u64 = NS_PER_SECOND / 50;
/// Receive buffer of a member that has stopped reading.
const STALLED_BYTES: usize = 4096;
/// 127.0.0.1, in the order in which addresses count up.
const FIRST_SOURCE: u32 = 0x7f00_0001;
