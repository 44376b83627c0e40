//! A running benchmark, shared by all scenarios: the fleet, the publisher, the watched processes, the first figures.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::clock::{NS_PER_SECOND, now_ns};
use crate::fleet::{Fleet, FleetConfig, Opening, Span, Tally};
use crate::options::Common;
use crate::procfs::{CpuSample, Memory, Processes};
use crate::progress::Progress;
use crate::publisher::Publisher;
use crate::report::Report;
use crate::target::Target;

/// A running benchmark.
pub struct Bench {
    /// The options of the run.
    pub common: Common,
    /// Names of sessions and their channels.
    pub target: Target,
    /// The clients.
    pub fleet: Fleet,
    /// The publisher of their messages.
    pub publisher: Publisher,
    /// The server's processes.
    pub server: Processes,
    /// Redis, where it is on this host.
    pub redis: Processes,
    /// This process.
    pub own: Processes,
    /// The progress line on standard error.
    pub progress: Progress,
    /// The results.
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
    /// CPU time of the server.
    pub server: u64,
    /// CPU time of Redis.
    pub redis: u64,
    /// CPU time of this process.
    pub client: u64,
    /// Duration by the clock.
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

/// Layout of a scenario's clients.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// All clients, measured ones first.
    pub clients: u32,
    /// Number of the clients that are measured.
    pub measured: u32,
    /// Set where all clients belong to one session.
    pub shared: bool,
    /// Set where clients that connect again continue at their position.
    pub resumes: bool,
}

impl Layout {
    /// Creates a layout of `clients` clients, each with a session of its own, all measured.
    #[must_use]
    pub fn sessions(clients: u32) -> Self {
        Self { clients, measured: clients, shared: false, resumes: false }
    }
}

impl Bench {
    /// Starts the fleet's threads and connects the publisher; no client connects yet.
    pub fn start(scenario: &str, common: &Common, layout: Layout) -> Result<Self> {
        let own = || format!("b{:x}", now_ns() & 0xff_ffff_ffff);
        let run = common.run.clone().unwrap_or_else(own);
        let target = Target::new(common.target, &common.path, &run, layout.shared);
        let target = if layout.resumes { target.resuming() } else { target };
        let fleet = Fleet::start(&FleetConfig {
            server: common.server,
            target: target.clone(),
            tls: common.tls,
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

    /// Connects a range of clients with their credentials, and waits for all of them.
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

    /// Stores a new token for each session: a one-time token admits one handshake.
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

    /// Takes a sample of the CPU time of all watched processes.
    #[must_use]
    pub fn moment(&self) -> Moment {
        Moment {
            at_ns: now_ns(),
            server: self.server.cpu(),
            redis: self.redis.cpu(),
            own: self.own.cpu(),
        }
    }

    /// Returns the CPU time of all watched processes since `start`.
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

    /// Notes each process' CPU time since `start`, in percent and per one of `amount` things.
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

    /// Prefixes the CPU figures that were noted last with a phase's name, since others follow.
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

    /// Takes a sample of the server's memory.
    #[must_use]
    pub fn memory(&self) -> Memory {
        self.server.memory()
    }

    /// Notes failures: failed handshakes, lost connections, messages out of order.
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

    /// Notes lost messages and refused publishes.
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

    /// Notes publishes that reached no subscriber, by the server's own account.
    pub fn judge_unheard(&mut self) {
        let unheard = self.publisher.unheard();
        self.report.problem_if(unheard > 0, || format!("{unheard} messages had no subscriber"));
    }
}

/// The raw limit as a separate process, so that its CPU time is its own; killed when this is dropped.
#[derive(Debug)]
pub struct LimitServer {
    child: Child,
    /// Address for its clients.
    pub server: SocketAddr,
    /// Address where messages to all clients are published.
    pub publish: SocketAddr,
}

impl LimitServer {
    /// Starts the process and waits until it listens.
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

    /// Returns its process id.
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
