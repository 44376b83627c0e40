//! Many clients on few threads, each thread one epoll loop; knows sockets and frames, not their purpose.

mod client;
mod counters;
pub(crate) mod secure;
mod tally;
mod worker;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;

pub(crate) use client::{Client, Phase};
pub use counters::Counters;
pub use tally::{Ending, Tally};

use crate::clock::{now_ns, ns};
use crate::target::Target;

/// Configuration of a fleet.
#[derive(Debug, Clone)]
pub struct FleetConfig {
    /// The server's address.
    pub server: SocketAddr,
    /// The handshakes and channels of the clients.
    pub target: Target,
    /// The clients speak TLS.
    pub tls: bool,
    /// Number of threads that share the clients.
    pub threads: u32,
    /// Number of source addresses, from 127.0.0.1 up; each gives some 28,000 ports.
    pub sources: u32,
    /// Number of clients.
    pub clients: u32,
    /// Number of measured clients, which are the first ones; the others only take part.
    pub measured: u32,
    /// Longest duration of a handshake; later it counts as failed.
    pub handshake_timeout: Duration,
}

/// A range of clients; client `n` belongs to thread `n % threads`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first client.
    pub first: u32,
    /// Number of clients.
    pub count: u32,
}

/// Connects of a range of clients, and their pace.
#[derive(Debug, Clone, Copy)]
pub struct Opening {
    /// The clients that connect.
    pub span: Span,
    /// Upper bound of concurrent handshakes per thread.
    pub in_flight: u32,
    /// Connections per second of the whole fleet; `None`: as fast as `in_flight` allows.
    pub rate: Option<f64>,
}

/// A steady stream of messages from clients.
#[derive(Debug, Clone, Copy)]
pub struct Echo {
    /// The clients that send, in turn.
    pub span: Span,
    /// Messages per second of the whole fleet.
    pub rate: f64,
    /// Payload bytes.
    pub bytes: usize,
    /// Send heartbeats of agents in place of stamped messages.
    pub heartbeats: bool,
    /// Interval at which due messages are sent; latency is measured from their schedule.
    pub tick: Duration,
    /// Begin, in monotonic nanoseconds.
    pub start_ns: u64,
    /// End, in monotonic nanoseconds.
    pub end_ns: u64,
}

pub(crate) enum Command {
    Open(Opening),
    Close { span: Span, abort: bool },
    Stall(Span),
    Resume(Span),
    Echo(Echo),
    Redirect(Vec<SocketAddr>),
    Mark(u64),
    Report(SyncSender<Tally>),
    Stop,
}

/// The clients. Dropping this closes all of them and ends the threads.
#[derive(Debug)]
pub struct Fleet {
    workers: Vec<Handle>,
    counters: Arc<Counters>,
}

#[derive(Debug)]
struct Handle {
    commands: SyncSender<Command>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Fleet {
    /// Starts the threads; no client connects yet.
    pub fn start(config: &FleetConfig) -> Result<Self> {
        let counters = Arc::new(Counters::default());
        let mut workers = Vec::new();
        for index in 0..config.threads {
            let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
            let (commands, queue): (_, Receiver<Command>) = sync_channel(COMMANDS_MAX);
            let worker = worker::Worker::new(index, config, &counters, &wake, queue)?;
            let thread = std::thread::Builder::new()
                .name(format!("clients-{index}"))
                .spawn(move || worker.run())?;
            workers.push(Handle { commands, wake, thread: Some(thread) });
        }
        Ok(Self { workers, counters })
    }

    /// Returns the totals so far, over all threads.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Connects a range of clients; returns at once.
    pub fn open(&self, opening: Opening) -> Result<()> {
        self.command(|| Command::Open(opening))
    }

    /// Connects a range of clients and waits until each has succeeded or failed.
    pub fn open_and_wait(
        &self,
        opening: Opening,
        timeout: Duration,
        mut waiting: impl FnMut(&Counters),
    ) -> Result<()> {
        let wanted = self.counters.settled() + u64::from(opening.span.count);
        self.open(opening)?;
        self.wait(timeout, |c| c.settled() >= wanted, &mut waiting)
            .with_context(|| format!("{} clients did not all connect", opening.span.count))
    }

    /// Closes a range of clients, politely or by closing the socket.
    pub fn close(&self, span: Span, abort: bool) -> Result<()> {
        self.command(|| Command::Close { span, abort })
    }

    /// Lets a range of clients stop reading.
    pub fn stall(&self, span: Span) -> Result<()> {
        self.command(|| Command::Stall(span))
    }

    /// Lets stalled clients read again.
    pub fn resume(&self, span: Span) -> Result<()> {
        self.command(|| Command::Resume(span))
    }

    /// Starts a stream of messages from clients; returns at once.
    pub fn echo(&self, echo: Echo) -> Result<()> {
        self.command(|| Command::Echo(echo))
    }

    /// Sets the servers for all connections from now on; clients take them in turn, by their number.
    ///
    /// # Errors
    /// There is none, or a thread is gone.
    pub fn redirect(&self, servers: Vec<SocketAddr>) -> Result<()> {
        anyhow::ensure!(!servers.is_empty(), "clients need a server");
        self.command(|| Command::Redirect(servers.clone()))
    }

    /// Begins to count separately the messages that were to be sent until `at_ns`.
    pub fn mark(&self, at_ns: u64) -> Result<()> {
        self.command(|| Command::Mark(at_ns))
    }

    /// Returns the figures since the last report, over all threads.
    pub fn report(&self) -> Result<Tally> {
        let mut total = Tally::default();
        for worker in &self.workers {
            let (answer, report) = sync_channel(1);
            worker.send(Command::Report(answer))?;
            total.add(&report.recv_timeout(REPORT_TIMEOUT).context("client thread is gone")?);
        }
        Ok(total)
    }

    /// Waits until `done`.
    ///
    /// # Errors
    /// The time is over first.
    pub fn wait(
        &self,
        timeout: Duration,
        mut done: impl FnMut(&Counters) -> bool,
        waiting: &mut impl FnMut(&Counters),
    ) -> Result<()> {
        let deadline = now_ns().saturating_add(ns(timeout));
        while !done(&self.counters) {
            if now_ns() >= deadline {
                bail!("timed out after {timeout:?}");
            }
            waiting(&self.counters);
            std::thread::sleep(WAIT_STEP);
        }
        Ok(())
    }

    fn command(&self, command: impl Fn() -> Command) -> Result<()> {
        self.workers.iter().try_for_each(|worker| worker.send(command()))
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            let _ = worker.send(Command::Stop);
            if let Some(thread) = worker.thread.take() {
                let _ = thread.join();
            }
        }
    }
}

impl Handle {
    fn send(&self, command: Command) -> Result<()> {
        self.commands.send(command).ok().context("client thread is gone")?;
        rustix::io::write(&*self.wake, &1u64.to_ne_bytes()).map_err(io::Error::from)?;
        Ok(())
    }
}

impl Span {
    /// All clients of a fleet of `clients`.
    #[must_use]
    pub fn all(clients: u32) -> Self {
        Self { first: 0, count: clients }
    }

    /// The clients of this range that belong to thread `index` of `threads`.
    pub(crate) fn of_thread(self, index: u32, threads: u32) -> impl Iterator<Item = u32> {
        let offset = (index + threads - self.first % threads) % threads;
        (self.first + offset..self.first + self.count).step_by(threads as usize)
    }
}

const COMMANDS_MAX: usize = 64;
const REPORT_TIMEOUT: Duration = Duration::from_secs(10);
const WAIT_STEP: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_client_of_a_range_belongs_to_exactly_one_thread() {
        let span = Span { first: 5, count: 17 };
        let mut all: Vec<u32> = (0..3).flat_map(|index| span.of_thread(index, 3)).collect();
        all.sort_unstable();
        assert_eq!(all, (5..22).collect::<Vec<_>>());
        assert!(span.of_thread(2, 3).all(|client| client % 3 == 2));
    }
}
