//! One thread of a fleet: an epoll loop that connects, reads, counts and sends for its share of the clients.

mod reading;

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use anyhow::Result;
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use rustls::ClientConfig;

use wsproxy_proto::ws::frame::Opcode;

use super::client::{Client, Phase};
use super::counters::Round;
use super::secure::{self, Secure};
use super::tally::Ending;
use super::{Command, Counters, Echo, FleetConfig, Opening, Span, Tally};
use crate::clock::{NS_PER_SECOND, now_ns, ns};
use crate::frame;
use crate::stamp::Stamp;

/// The state of one thread.
///
/// Invariant: the slot of a client is its number divided by the number of threads.
pub(super) struct Worker {
    index: u32,
    config: FleetConfig,
    /// Servers that the clients take in turn; never empty.
    servers: Vec<SocketAddr>,
    /// Encryption of the clients; `None`: they speak plain HTTP.
    tls: Option<Arc<ClientConfig>>,
    /// Decrypted bytes of one read.
    plain: Vec<u8>,
    counters: Arc<Counters>,
    wake: Arc<OwnedFd>,
    commands: Receiver<Command>,
    epoll: OwnedFd,
    timer: OwnedFd,
    clients: Vec<Client>,
    /// Slots below this are measured.
    measured: u32,
    to_open: VecDeque<u32>,
    in_flight: u32,
    in_flight_max: u32,
    open_pace: Option<Pace>,
    /// Handshakes in the order in which they began: slot and generation.
    handshakes: VecDeque<(u32, u32)>,
    echo: Option<Sending>,
    /// Messages that were to be sent until this time are counted separately; 0 for none.
    mark_ns: u64,
    tally: Tally,
    round: Round,
    running: bool,
}

/// A schedule: the next point in time, and how far apart they are.
#[derive(Debug, Clone, Copy)]
struct Pace {
    next_ns: f64,
    interval_ns: f64,
}

struct Sending {
    plan: Echo,
    slots: Vec<u32>,
    turn: usize,
    pace: Pace,
    scratch: Vec<u8>,
    frame: Vec<u8>,
}

impl Worker {
    pub(super) fn new(
        index: u32,
        config: &FleetConfig,
        counters: &Arc<Counters>,
        wake: &Arc<OwnedFd>,
        commands: Receiver<Command>,
    ) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK)?;
        let readable = epoll::EventFlags::IN;
        epoll::add(&epoll, wake, epoll::EventData::new_u64(WAKE), readable)?;
        epoll::add(&epoll, &timer, epoll::EventData::new_u64(TIMER), readable)?;
        let mine = Span::all(config.clients).of_thread(index, config.threads).count();
        Ok(Self {
            index,
            config: config.clone(),
            servers: vec![config.server],
            tls: config.tls.then(secure::config).transpose()?,
            plain: Vec::new(),
            counters: Arc::clone(counters),
            wake: Arc::clone(wake),
            commands,
            epoll,
            timer,
            clients: (0..mine).map(|_| Client::new()).collect(),
            measured: Span::all(config.measured).of_thread(index, config.threads).count() as u32,
            to_open: VecDeque::new(),
            in_flight: 0,
            in_flight_max: 0,
            open_pace: None,
            handshakes: VecDeque::new(),
            echo: None,
            mark_ns: 0,
            tally: Tally::default(),
            round: Round::default(),
            running: true,
        })
    }

    pub(super) fn run(mut self) {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        let mut buffer = vec![0u8; READ_BYTES];
        let patience = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        while self.running {
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&patience)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
            for event in &events {
                let epoll::Event { data, flags } = *event;
                match data.u64() {
                    WAKE => self.take_commands(),
                    TIMER => self.on_timer(),
                    client => self.on_client(client, flags, &mut buffer),
                }
            }
            self.expire_handshakes();
            self.open_more();
            self.counters.add(&self.round);
            self.round = Round::default();
        }
    }

    fn take_commands(&mut self) {
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&*self.wake, &mut count);
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Open(opening) => self.start_opening(opening),
                Command::Close { span, abort } => self.close_span(span, abort),
                Command::Stall(span) => self.set_stalled(span, true),
                Command::Resume(span) => self.set_stalled(span, false),
                Command::Echo(echo) => self.start_echo(echo),
                Command::Redirect(servers) => self.servers = servers,
                Command::Mark(at_ns) => self.mark_ns = at_ns,
                Command::Report(answer) => {
                    let _ = answer.send(std::mem::take(&mut self.tally));
                }
                Command::Stop => self.running = false,
            }
        }
    }

    fn slots(&self, span: Span) -> impl Iterator<Item = u32> + use<> {
        let threads = self.config.threads;
        span.of_thread(self.index, threads).map(move |client| client / threads)
    }

    fn start_opening(&mut self, opening: Opening) {
        let slots = self.slots(opening.span);
        self.to_open.extend(slots);
        self.in_flight_max = opening.in_flight.max(1);
        self.open_pace = opening.rate.map(|rate| {
            let interval_ns = NS_PER_SECOND as f64 * f64::from(self.config.threads) / rate;
            Pace { next_ns: now_ns() as f64, interval_ns }
        });
        if self.open_pace.is_some() {
            self.arm_timer(OPEN_TICK_NS);
        }
    }

    fn open_more(&mut self) {
        while self.in_flight < self.in_flight_max {
            let mut started_ns = now_ns();
            if let Some(pace) = &mut self.open_pace {
                if pace.next_ns > started_ns as f64 {
                    return;
                }
                // Latency counts from the schedule, not from when the in-flight limit allowed the connection.
                started_ns = pace.next_ns as u64;
                if !self.to_open.is_empty() {
                    pace.next_ns += pace.interval_ns;
                }
            }
            let Some(slot) = self.to_open.pop_front() else {
                self.open_pace = None;
                return;
            };
            self.open(slot, started_ns);
        }
    }

    fn open(&mut self, slot: u32, started_ns: u64) {
        if self.clients[slot as usize].phase != Phase::Idle {
            self.tally.fail("slot still open");
            self.lose(slot, 1006);
        }
        let number = slot * self.config.threads + self.index;
        let source = Ipv4Addr::from(FIRST_SOURCE + number % self.config.sources);
        let server = self.servers[number as usize % self.servers.len()];
        let client = &mut self.clients[slot as usize];
        if !self.config.target.resumes() {
            client.start_over();
        }
        let request = self.config.target.request(&server, number, client.position);
        client.started_ns = started_ns;
        if let Some(tls) = &self.tls {
            // An address is always a name, so that this cannot fail.
            client.secure = Secure::new(tls, server).ok().map(Box::new);
        }
        let begun = client.connect(server, source).and_then(|()| client.send(&request));
        self.in_flight += 1;
        self.handshakes.push_back((slot, client.generation));
        let registered = begun.and_then(|all| self.register(slot, all));
        if let Err(error) = registered {
            self.fail(slot, describe(error));
        }
    }

    fn register(&self, slot: u32, all_sent: bool) -> Result<(), Errno> {
        let client = &self.clients[slot as usize];
        let Some(socket) = &client.socket else { return Ok(()) };
        epoll::add(&self.epoll, socket, token(slot, client), interest(client, all_sent))
    }

    fn set_interest(&mut self, slot: u32, all_sent: bool) {
        let client = &self.clients[slot as usize];
        if let Some(socket) = &client.socket {
            let _ =
                epoll::modify(&self.epoll, socket, token(slot, client), interest(client, all_sent));
        }
    }

    fn on_client(&mut self, token: u64, flags: epoll::EventFlags, buffer: &mut [u8]) {
        let (slot, generation) = (token as u32, (token >> 32) as u32);
        let client = &mut self.clients[slot as usize];
        if client.generation != generation || client.socket.is_none() {
            return;
        }
        if flags.contains(epoll::EventFlags::OUT) {
            match client.flush() {
                Ok(true) => self.set_interest(slot, true),
                Ok(false) => {}
                Err(error) => return self.end(slot, describe(error)),
            }
        }
        let ended = epoll::EventFlags::HUP | epoll::EventFlags::ERR | epoll::EventFlags::RDHUP;
        let last = flags.intersects(ended);
        if !last && !flags.contains(epoll::EventFlags::IN) {
            return;
        }
        // Edges come once: a full buffer means that there may be more, and an end shows only after the last
        // byte. Otherwise a short read has taken everything, and one system call was enough.
        while let Some(read) = self.read(slot, buffer) {
            let same = self.clients[slot as usize].generation == generation;
            if !same || (!last && read < buffer.len()) {
                return;
            }
        }
    }

    fn send(&mut self, slot: u32, bytes: &[u8]) {
        let client = &mut self.clients[slot as usize];
        let was_empty = client.unsent.is_empty();
        match client.send(bytes) {
            Ok(false) if was_empty => self.set_interest(slot, false),
            Ok(_) => {}
            // The socket's end shows as a readable event of its own.
            Err(_) => client.unsent.clear(),
        }
    }

    /// Ends a connection for a reason other than a close frame.
    fn end(&mut self, slot: u32, reason: &str) {
        match self.clients[slot as usize].phase {
            Phase::Handshake => self.fail(slot, reason),
            _ => self.lose(slot, 1006),
        }
    }

    fn fail(&mut self, slot: u32, reason: &str) {
        self.tally.fail(reason);
        self.round.failed += 1;
        self.in_flight -= 1;
        self.clients[slot as usize].reset();
    }

    fn lose(&mut self, slot: u32, code: u16) {
        let client = &mut self.clients[slot as usize];
        match client.phase {
            Phase::Idle => return,
            Phase::Handshake => return self.fail(slot, "given up"),
            Phase::Open => self.tally.endings.push(Ending { code, at_ns: now_ns() }),
            Phase::Closing => {}
        }
        self.round.closed += 1;
        client.reset();
    }

    fn close_span(&mut self, span: Span, abort: bool) {
        for slot in self.slots(span) {
            let client = &mut self.clients[slot as usize];
            match client.phase {
                Phase::Open if abort => {
                    client.phase = Phase::Closing;
                    self.lose(slot, 1006);
                }
                Phase::Open => {
                    client.phase = Phase::Closing;
                    let mut close = Vec::new();
                    frame::push_client_frame(Opcode::Close, &1000u16.to_be_bytes(), &mut close);
                    self.send(slot, &close);
                }
                Phase::Handshake => self.fail(slot, "given up"),
                Phase::Closing if abort => self.lose(slot, 1006),
                Phase::Closing | Phase::Idle => {}
            }
        }
    }

    fn set_stalled(&mut self, span: Span, stalled: bool) {
        for slot in self.slots(span) {
            self.clients[slot as usize].stalled = stalled;
            let all_sent = self.clients[slot as usize].unsent.is_empty();
            self.set_interest(slot, all_sent);
        }
    }

    fn start_echo(&mut self, plan: Echo) {
        let slots: Vec<u32> = self.slots(plan.span).collect();
        let share = slots.len() as f64 / f64::from(plan.span.count.max(1));
        if slots.is_empty() {
            return;
        }
        let interval_ns = NS_PER_SECOND as f64 / (plan.rate * share);
        self.arm_timer(ns(plan.tick));
        let pace = Pace { next_ns: plan.start_ns as f64, interval_ns };
        let (scratch, frame) = (Vec::new(), Vec::new());
        self.echo = Some(Sending { plan, slots, turn: 0, pace, scratch, frame });
    }

    fn on_timer(&mut self) {
        let mut expirations = [0u8; 8];
        let _ = rustix::io::read(&self.timer, &mut expirations);
        self.send_due();
        if self.echo.is_none() && self.open_pace.is_none() {
            self.arm_timer(0);
        }
    }

    /// Sends every message whose time has come. It carries its intended time, even when it leaves late.
    fn send_due(&mut self) {
        let Some(mut sending) = self.echo.take() else { return };
        let now = now_ns() as f64;
        let end_ns = sending.plan.end_ns as f64;
        while sending.pace.next_ns <= now && sending.pace.next_ns < end_ns {
            let sent_ns = sending.pace.next_ns as u64;
            sending.pace.next_ns += sending.pace.interval_ns;
            let slot = sending.slots[sending.turn];
            sending.turn = (sending.turn + 1) % sending.slots.len();
            let client = &mut self.clients[slot as usize];
            if client.phase != Phase::Open {
                continue;
            }
            let stamp = Stamp { sent_ns, number: client.sent, shared: false };
            client.sent = client.sent.wrapping_add(1);
            sending.scratch.clear();
            sending.frame.clear();
            match sending.plan.heartbeats {
                true => sending.scratch.extend_from_slice(HEARTBEAT),
                false => stamp.write(sending.plan.bytes, &mut sending.scratch),
            }
            frame::push_client_frame(Opcode::Text, &sending.scratch, &mut sending.frame);
            self.round.sent += 1;
            self.send(slot, &sending.frame);
        }
        if sending.pace.next_ns < end_ns {
            self.echo = Some(sending);
        }
    }

    fn arm_timer(&self, period_ns: u64) {
        let period = Timespec {
            tv_sec: (period_ns / NS_PER_SECOND).cast_signed(),
            tv_nsec: (period_ns % NS_PER_SECOND).cast_signed(),
        };
        let spec = Itimerspec { it_interval: period, it_value: period };
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec);
    }

    fn expire_handshakes(&mut self) {
        let timeout = ns(self.config.handshake_timeout);
        while let Some(&(slot, generation)) = self.handshakes.front() {
            let client = &self.clients[slot as usize];
            if client.generation == generation && client.phase == Phase::Handshake {
                if now_ns().saturating_sub(client.started_ns) < timeout {
                    return;
                }
                self.fail(slot, "handshake timed out");
            }
            self.handshakes.pop_front();
        }
    }
}

fn token(slot: u32, client: &Client) -> epoll::EventData {
    epoll::EventData::new_u64(u64::from(client.generation) << 32 | u64::from(slot))
}

fn interest(client: &Client, all_sent: bool) -> epoll::EventFlags {
    let mut flags = epoll::EventFlags::ET;
    if !client.stalled {
        flags |= epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
    }
    if !all_sent {
        flags |= epoll::EventFlags::OUT;
    }
    flags
}

fn describe(error: Errno) -> &'static str {
    match error {
        Errno::CONNREFUSED => "connection refused",
        Errno::CONNRESET | Errno::PIPE => "connection reset",
        Errno::MFILE | Errno::NFILE => "out of descriptors",
        Errno::ADDRINUSE | Errno::ADDRNOTAVAIL => "out of source ports",
        Errno::TIMEDOUT => "connection timed out",
        _ => "socket error",
    }
}

/// Epoll tokens above any slot: a slot is 32 bits, and its generation would have to wrap to collide.
const WAKE: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
const EVENTS_MAX: usize = 1024;
const READ_BYTES: usize = 256 * 1024;
const OPEN_TICK_NS: u64 = 250_000;
/// Sign of life of an agent.
const HEARTBEAT: &[u8] = br#"{"type":"heartbeat","timestamp":1763729000000}"#;
/// 127.0.0.1, in the order in which addresses count up.
const FIRST_SOURCE: u32 = 0x7f00_0001;
