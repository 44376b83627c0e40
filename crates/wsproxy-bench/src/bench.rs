//! What all scenarios share: the fleet, the publisher, the processes that are watched, and the first figures.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cli::Common;
use crate::clock::{NS_PER_SECOND, now_ns};
use crate::fleet::{Fleet, FleetConfig, Opening, Span, Tally};
use crate::procfs::{CpuSample, Memory, Processes};
use crate::progress::Progress;
use crate::publisher::Publisher;
use crate::report::Report;
use crate::target::Target;

/// A running benchmark.
pub struct Bench {
    /// What was asked for.
    pub common: Common,
    /// How sessions are named.
    pub target: Target,
    /// The clients.
    pub fleet: Fleet,
    /// What publishes to them.
    pub publisher: Publisher,
    /// The server's processes.
    pub server: Processes,
    /// Redis, where it is on this host.
    pub redis: Processes,
    /// This process.
    pub own: Processes,
    /// The line on standard error.
    pub progress: Progress,
    /// What was found.
    pub report: Report,
}

/// CPU time of all watched processes, and when it was taken.
#[derive(Debug, Clone)]
pub struct Moment {
    at_ns: u64,
    server: CpuSample,
    redis: CpuSample,
    own: CpuSample,
}

/// CPU time of all watched processes over a phase, and how long that was; in nanoseconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spent {
    /// The server's.
    pub server: u64,
    /// Redis'.
    pub redis: u64,
    /// This process'.
    pub client: u64,
    /// By the clock.
    pub elapsed: u64,
}

impl Spent {
    /// Adds another phase.
    pub fn add(&mut self, other: &Self) {
        self.server += other.server;
        self.redis += other.redis;
        self.client += other.client;
        self.elapsed += other.elapsed;
    }
}

/// How a scenario lays out its clients.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// All clients, measured ones first.
    pub clients: u32,
    /// How many of them are measured.
    pub measured: u32,
    /// Whether all belong to one session.
    pub shared: bool,
    /// Whether clients that connect again continue where they were.
    pub resumes: bool,
}

impl Layout {
    /// So many clients, each with a session of its own, all measured.
    #[must_use]
    pub fn sessions(clients: u32) -> Self {
        Self { clients, measured: clients, shared: false, resumes: false }
    }
}

impl Bench {
    /// Starts the fleet's threads and connects the publisher; no client connects yet.
    pub fn start(scenario: &str, common: &Common, layout: Layout) -> Result<Self> {
        let run = format!("b{:x}", now_ns() & 0xff_ffff_ffff);
        let target = Target::new(common.target, &common.path, &run, layout.shared);
        let target = if layout.resumes { target.resuming() } else { target };
        let fleet = Fleet::start(&FleetConfig {
            server: common.server,
            target: target.clone(),
            threads: common.threads,
            sources: common.sources,
            clients: layout.clients,
            measured: layout.measured,
            handshake_timeout: common.timeout,
        })?;
        let mut publisher = Publisher::connect(common.publish, &target)?;
        let redis_pid: Vec<u32> = publisher.server_pid().into_iter().collect();
        let mut report = Report::new(scenario, &format!("{:?}", common.target).to_lowercase());
        report.set("connections", layout.clients);
        report.set("size_bytes", common.size);
        Ok(Self {
            common: common.clone(),
            target,
            fleet,
            publisher,
            server: Processes::new(&common.pid),
            redis: Processes::new(&redis_pid),
            own: Processes::own(),
            progress: Progress::new("connect"),
            report,
        })
    }

    /// Connects a range of clients with whatever credentials they need, and waits for all of them.
    pub fn open(&mut self, span: Span) -> Result<()> {
        self.progress.phase("connect");
        if self.target.is_shared() && self.target.needs_token() {
            return self.open_one_by_one(span);
        }
        let target = self.target.clone();
        let sessions =
            (span.first..span.first + span.count).map(|client| target.session_of(client));
        self.publisher.set_tokens(sessions)?;
        let opening = Opening { span, in_flight: self.common.in_flight, rate: None };
        let Self { fleet, progress, common, .. } = self;
        fleet.open_and_wait(opening, common.timeout * 4, |counters| progress.tick(counters))
    }

    /// A session's token admits one handshake: the next one needs the next token.
    fn open_one_by_one(&mut self, span: Span) -> Result<()> {
        for first in span.first..span.first + span.count {
            self.publisher.set_tokens(std::iter::once(0))?;
            let wanted = self.fleet.counters().settled() + 1;
            let span = Span { first, count: 1 };
            self.fleet.open(Opening { span, in_flight: 1, rate: None })?;
            if !self.fleet.counters().wait_settled(wanted, self.common.timeout) {
                bail!("client {first} did not connect");
            }
            self.progress.tick(self.fleet.counters());
        }
        Ok(())
    }

    /// Closes a range of clients politely, and by force those that do not end in time.
    pub fn close(&mut self, span: Span) -> Result<()> {
        self.progress.phase("close");
        self.fleet.close(span, false)?;
        let Self { fleet, progress, common, .. } = self;
        let all =
            fleet.wait(common.timeout, |counters| counters.open_now() == 0, &mut |counters| {
                progress.tick(counters)
            });
        if all.is_err() {
            self.report.problems.push("not every client was closed politely".to_owned());
            fleet.close(span, true)?;
        }
        Ok(())
    }

    /// CPU time of everybody, now.
    #[must_use]
    pub fn moment(&self) -> Moment {
        Moment {
            at_ns: now_ns(),
            server: self.server.cpu(),
            redis: self.redis.cpu(),
            own: self.own.cpu(),
        }
    }

    /// CPU time of everybody since `start`.
    #[must_use]
    pub fn spent_since(&self, start: &Moment) -> Spent {
        let end = self.moment();
        Spent {
            server: end.server.since(&start.server),
            redis: end.redis.since(&start.redis),
            client: end.own.since(&start.own),
            elapsed: end.at_ns - start.at_ns,
        }
    }

    /// Notes who used how much of a CPU since `start`, and what that is per one of `amount` things.
    pub fn note_cpu(&mut self, start: &Moment, amount: u64, per: &str) {
        let spent = self.spent_since(start);
        let elapsed = spent.elapsed as f64;
        let parties = [
            ("server", spent.server, self.server.is_empty()),
            ("redis", spent.redis, self.redis.is_empty()),
            ("client", spent.client, false),
        ];
        for (who, spent, unknown) in parties {
            if unknown {
                continue;
            }
            self.report.ratio(
                &format!("{who}_cpu_us_per_{per}"),
                spent as f64 / 1e3,
                amount as f64,
            );
            self.report.ratio(&format!("{who}_cpu_percent"), spent as f64 * 100.0, elapsed);
        }
        self.report.ratio("measured_s", elapsed, NS_PER_SECOND as f64);
    }

    /// Puts the name of a phase before the CPU figures that were noted last, since others follow.
    pub fn rename_cpu(&mut self, phase: &str) {
        let figures = &mut self.report.figures;
        let names: Vec<String> = figures
            .keys()
            .filter(|name| {
                ["server_cpu", "redis_cpu", "client_cpu"].iter().any(|of| name.starts_with(of))
            })
            .cloned()
            .collect();
        for name in names {
            if let Some(value) = figures.remove(&name) {
                figures.insert(format!("{phase}_{name}"), value);
            }
        }
        figures.remove("measured_s");
    }

    /// Memory of the server, now.
    #[must_use]
    pub fn memory(&self) -> Memory {
        self.server.memory()
    }

    /// Notes what must not have happened: failed handshakes, lost connections, messages out of order.
    pub fn judge(&mut self, tally: &Tally, endings_expected: bool) {
        for (reason, count) in &tally.failures {
            self.report.problems.push(format!("{count} handshakes failed: {reason}"));
        }
        let codes = tally.codes();
        self.report.problem_if(!endings_expected && !codes.is_empty(), || {
            format!("the server ended connections (code: number): {codes:?}")
        });
        self.report.problem_if(tally.out_of_order > 0, || {
            format!("{} messages were not the next of their channel", tally.out_of_order)
        });
        self.report.problem_if(tally.history_lost > 0, || {
            format!("{} clients were told that history is lost", tally.history_lost)
        });
        self.report.figure("server_messages", tally.unstamped);
    }

    /// Notes messages that did not arrive, and publishes that were refused.
    pub fn judge_deliveries(&mut self, expected: u64, delivered: u64) {
        let lost = expected.saturating_sub(delivered);
        self.report.figure("delivered", delivered);
        self.report.figure("lost", lost);
        self.report.problem_if(lost > 0, || format!("{lost} of {expected} messages were lost"));
        let extra = delivered.saturating_sub(expected);
        self.report.problem_if(extra > 0, || format!("{extra} messages came that were never sent"));
        let refused = self.publisher.refused();
        self.report.problem_if(refused > 0, || format!("{refused} publishes were refused"));
    }

    /// Notes publishes that reached nobody, by the server's own account.
    pub fn judge_unheard(&mut self) {
        let unheard = self.publisher.unheard();
        self.report.problem_if(unheard > 0, || format!("{unheard} messages had no subscriber"));
    }
}

/// The raw limit as a process of its own, so that its CPU time is its own; killed when this is dropped.
#[derive(Debug)]
pub struct LimitServer {
    child: Child,
    /// Where its clients connect.
    pub server: SocketAddr,
    /// Where messages for everybody are published.
    pub publish: SocketAddr,
}

impl LimitServer {
    /// Starts it and waits until it listens.
    pub fn start(redis: Option<SocketAddr>) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["limit", "serve"]).stdin(Stdio::null()).stdout(Stdio::piped());
        if let Some(redis) = redis {
            command.arg("--redis").arg(redis.to_string());
        }
        let mut child = command.spawn().context("the raw limit does not start")?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let address = |name: &str| {
            line.split_whitespace().find_map(|word| word.strip_prefix(name)?.parse().ok())
        };
        let (Some(server), Some(publish)) = (address("server="), address("publish=")) else {
            let _ = child.kill();
            let _ = child.wait();
            bail!("the raw limit did not say where it listens");
        };
        Ok(Self { child, server, publish })
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for LimitServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
