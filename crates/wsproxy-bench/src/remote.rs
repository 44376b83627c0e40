//! Fleets in separate processes, since one process has descriptors for some 19,000 clients; they take commands
//! line by line over pipes.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::fleet::{Ending, Fleet, FleetConfig, Opening, Span, Tally};
use crate::target::{Kind, Target};

/// The clients of a process.
#[derive(Debug, Clone, Args)]
pub struct Generator {
    /// Address that its clients connect to.
    #[arg(long)]
    pub server: SocketAddr,
    /// Kind of the server, and of its clients.
    #[arg(long, value_enum)]
    pub target: Kind,
    /// Name of the run.
    #[arg(long)]
    pub run: String,
    /// Secret that signs tokens; empty where clients have none.
    #[arg(long)]
    pub secret: String,
    /// Number of its first user.
    #[arg(long)]
    pub first: u32,
    /// Number of its users.
    #[arg(long)]
    pub count: u32,
    /// Source addresses, from 127.0.0.1 up.
    #[arg(long)]
    pub sources: u32,
    /// Longest duration of a handshake, in seconds; later it counts as failed.
    #[arg(long)]
    pub handshake_timeout: u64,
}

/// Totals over all clients of a process.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Status {
    /// Handshakes that succeeded.
    pub opened: u64,
    /// Handshakes that failed.
    pub failed: u64,
    /// Connections that are open now.
    pub open_now: u64,
    /// Messages that arrived.
    pub delivered: u64,
}

#[derive(Debug, Serialize, Deserialize)]
enum Ask {
    /// Connect the clients from `first` on, `rate` per second or all at once.
    Open {
        first: u32,
        count: u32,
        rate: Option<f64>,
    },
    /// Connect to these servers in turn from now on.
    Redirect(Vec<SocketAddr>),
    Status,
    Report,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    latency: Vec<(u64, u64)>,
    shared_latency: Vec<(u64, u64)>,
    handshake: Vec<(u64, u64)>,
    failures: BTreeMap<String, u64>,
    endings: Vec<(u16, u64)>,
    out_of_order: u64,
    history_lost: u64,
    unstamped: u64,
    pings: u64,
}

/// A fleet in another process; that process is killed when this is dropped.
#[derive(Debug)]
pub struct RemoteFleet {
    child: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Number of its first client over all processes.
    pub first: u32,
    /// Number of its clients.
    pub count: u32,
}

impl RemoteFleet {
    /// Starts the process; no client connects yet.
    pub fn start(generator: &Generator) -> Result<Self> {
        let Generator { server, target, run, secret, first, count, .. } = generator;
        let mut command = Command::new(std::env::current_exe()?);
        let kind = target.to_possible_value().context("a kind has a name")?;
        command.args(["generator", "--run", run, "--secret", secret, "--target", kind.get_name()]);
        let numbers = [
            ("--server", server.to_string()),
            ("--first", first.to_string()),
            ("--count", count.to_string()),
            ("--sources", generator.sources.to_string()),
            ("--handshake-timeout", generator.handshake_timeout.to_string()),
        ];
        command.args(numbers.iter().flat_map(|(name, value)| [*name, value]));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("the generator does not start")?;
        let asks = child.stdin.take().context("no pipe")?;
        let answers = BufReader::new(child.stdout.take().context("no pipe")?);
        Ok(Self { child, asks, answers, first: *first, count: *count })
    }

    /// Lets clients from number `first` of this fleet on connect; returns at once.
    pub fn open(&mut self, first: u32, count: u32, rate: Option<f64>) -> Result<()> {
        self.ask::<Status>(&Ask::Open { first, count, rate }).map(|_| ())
    }

    /// Sets the servers that clients connect to in turn from now on.
    pub fn redirect(&mut self, servers: &[SocketAddr]) -> Result<()> {
        self.ask::<Status>(&Ask::Redirect(servers.to_vec())).map(|_| ())
    }

    /// Totals over all clients of a process.
    pub fn status(&mut self) -> Result<Status> {
        self.ask(&Ask::Status)
    }

    /// Returns the figures since the last report.
    pub fn report(&mut self) -> Result<Tally> {
        Ok(self.ask::<Record>(&Ask::Report)?.tally())
    }

    fn ask<T: DeserializeOwned>(&mut self, ask: &Ask) -> Result<T> {
        let mut line = serde_json::to_string(ask)?;
        line.push('\n');
        self.asks.write_all(line.as_bytes()).context("a generator is gone")?;
        line.clear();
        self.answers.read_line(&mut line)?;
        serde_json::from_str(&line).context("a generator is gone")
    }
}

impl Drop for RemoteFleet {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a fleet and executes the commands on standard input, until it ends.
pub fn serve(generator: &Generator) -> Result<()> {
    let Generator { server, run, secret, first, count, sources, handshake_timeout, .. } = generator;
    let target = Target::new(generator.target, "", run, false).starting_at(*first);
    let target = if secret.is_empty() { target } else { target.with_users(secret, *first) };
    let fleet = Fleet::start(&FleetConfig {
        server: *server,
        target,
        tls: false,
        threads: 1,
        sources: *sources,
        clients: *count,
        measured: *count,
        handshake_timeout: Duration::from_secs(*handshake_timeout),
    })?;
    let mut output = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let answer = match serde_json::from_str(&line?)? {
            Ask::Open { first, count, rate } => {
                let span = Span { first, count };
                fleet.open(Opening { span, in_flight: count.max(1), rate })?;
                serde_json::to_string(&status(&fleet))?
            }
            Ask::Redirect(servers) => {
                fleet.redirect(servers)?;
                serde_json::to_string(&status(&fleet))?
            }
            Ask::Status => serde_json::to_string(&status(&fleet))?,
            Ask::Report => serde_json::to_string(&Record::of(&fleet.report()?))?,
        };
        writeln!(output, "{answer}")?;
        output.flush()?;
    }
    Ok(())
}

fn status(fleet: &Fleet) -> Status {
    let counters = fleet.counters();
    Status {
        opened: counters.opened(),
        failed: counters.failed(),
        open_now: counters.open_now(),
        delivered: counters.delivered(),
    }
}

impl Record {
    fn of(tally: &Tally) -> Self {
        let counts = |histogram: &Histogram<u64>| {
            let recorded = histogram.iter_recorded();
            recorded.map(|step| (step.value_iterated_to(), step.count_at_value())).collect()
        };
        Self {
            latency: counts(&tally.latency),
            shared_latency: counts(&tally.shared_latency),
            handshake: counts(&tally.handshake),
            failures: tally.failures.clone(),
            endings: tally.endings.iter().map(|ending| (ending.code, ending.at_ns)).collect(),
            out_of_order: tally.out_of_order,
            history_lost: tally.history_lost,
            unstamped: tally.unstamped,
            pings: tally.pings,
        }
    }

    fn tally(self) -> Tally {
        let mut tally = Tally {
            failures: self.failures,
            out_of_order: self.out_of_order,
            history_lost: self.history_lost,
            unstamped: self.unstamped,
            pings: self.pings,
            ..Tally::default()
        };
        let histograms = [
            (&mut tally.latency, self.latency),
            (&mut tally.shared_latency, self.shared_latency),
            (&mut tally.handshake, self.handshake),
        ];
        for (histogram, counts) in histograms {
            for (value, count) in counts {
                histogram.saturating_record_n(value, count);
            }
        }
        tally.endings =
            self.endings.into_iter().map(|(code, at_ns)| Ending { code, at_ns }).collect();
        tally
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_survives_the_way_between_processes() {
        let mut tally = Tally { out_of_order: 3, pings: 4, ..Tally::default() };
        for value in 1..=1000u64 {
            tally.latency.saturating_record(value * 77_777);
        }
        tally.shared_latency.saturating_record(5_000_000);
        tally.endings.push(Ending { code: 1012, at_ns: 9 });
        let text = serde_json::to_string(&Record::of(&tally)).unwrap();
        let back = serde_json::from_str::<Record>(&text).unwrap().tally();
        for quantile in [0.5, 0.99, 1.0] {
            let of = |tally: &Tally| tally.latency.value_at_quantile(quantile);
            assert_eq!(of(&back), of(&tally));
        }
        assert_eq!((back.shared_latency.len(), back.out_of_order, back.pings), (1, 3, 4));
        assert_eq!(back.codes()[&1012], 1);
    }
}
