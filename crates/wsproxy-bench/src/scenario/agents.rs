//! Users' agents: their memory, the cost of their heartbeats, and calls of tools at one or several rates.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::bench::{Bench, Layout};
use crate::callers::Caller;
use crate::callers::each::EachCaller;
use crate::callers::http::HttpCaller;
use crate::callers::own::OwnCaller;
use crate::clock::{NS_PER_SECOND, now_ns, ns, sleep_until};
use crate::fleet::{Echo, Span};
use crate::options::{Common, seconds};
use crate::redis_memory;
use crate::report::Report;
use crate::stamp::CallStamp;
use crate::target::Kind;

/// Options of the scenario. The database must have the user `{run}-{n}` with the secret `token-{run}-{n}` for each client.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Memory is compared between this many agents and all of them.
    #[arg(long, default_value_t = 1_000)]
    from: u32,
    /// Seconds for which the agents only send heartbeats.
    #[arg(long, default_value = "30", value_parser = seconds)]
    idle: Duration,
    /// Interval of an agent's heartbeats, in seconds.
    #[arg(long, default_value = "30", value_parser = seconds)]
    heartbeat: Duration,
    /// Calls per second over all agents; several rates are tried one after the other.
    #[arg(long, value_delimiter = ',', default_value = "5000")]
    rates: Vec<f64>,
    /// The way of the calls.
    #[arg(long, value_enum, default_value = "own")]
    caller: Way,
    /// Instance that takes calls over HTTP; that of --server by default.
    #[arg(long)]
    call_at: Option<SocketAddr>,
    /// API key of calls over HTTP.
    #[arg(long, default_value = "")]
    api_key: String,
}

/// The way of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Way {
    /// Over Redis, with one channel for all answers.
    Own,
    /// Over Redis, with a channel for each answer, as existing callers do.
    Each,
    /// Over HTTP.
    Http,
}

/// Runs the scenario.
pub fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    if common.target != Kind::Agents {
        bail!("only --target agents has agents");
    }
    let clients = common.connections;
    let from = options.from.min(clients);
    let mut bench = Bench::start("agents", common, Layout::sessions(clients))?;
    bench.open(Span { first: 0, count: from })?;
    let few = settled(&bench);
    let opening = bench.moment();
    bench.open(Span { first: from, count: clients - from })?;
    let spent = bench.spent_since(&opening);
    let opened = f64::from(clients - from);
    bench.report.ratio("handshakes_per_s", opened * NS_PER_SECOND as f64, spent.elapsed as f64);
    bench.report.ratio("server_cpu_us_per_handshake", spent.server as f64 / 1e3, opened);
    let many = settled(&bench);
    let growth = many.saturating_sub(few) as f64;
    bench.report.ratio("idle_bytes_per_connection", growth, opened);
    let in_redis = redis_memory::bytes_per_agent(common.publish, &bench.target, clients)?;
    bench.report.figure("redis_bytes_per_agent", in_redis);
    if !options.idle.is_zero() {
        heartbeats(&mut bench, options)?;
    }
    let mut calls = Calls { number: 0, caller: caller(&bench, options)? };
    let mut steps = Vec::new();
    for &rate in &options.rates {
        bench.progress.phase(&format!("warm up at {rate}/s"));
        calls.steady(&bench, rate, common.warmup)?;
        drop(calls.caller.report());
        bench.progress.phase(&format!("measure at {rate}/s"));
        let start = bench.moment();
        let (sent, answered) = calls.steady(&bench, rate, common.duration)?;
        bench.note_cpu(&start, answered, "call");
        let report = &mut bench.report;
        report.figure("calls", sent);
        report.figure("answered", answered);
        report.ratio("calls_per_s", answered as f64, report.seconds("measured_s"));
        report.quantiles("call", &calls.caller.report());
        // A ramp is meant to find the rate that is too high.
        report.problem_if(answered < sent && steps.is_empty(), || {
            format!("{} of {sent} calls at {rate}/s had no answer", sent - answered)
        });
        let mut figures = report.figures.clone();
        figures.insert("rate_per_s".to_owned(), json!(rate));
        let p99_ms = figures.get("call_p99_ms").and_then(serde_json::Value::as_f64);
        let held = answered == sent && p99_ms.is_some_and(|p99_ms| p99_ms < HELD_MS);
        if steps.is_empty() {
            for name in ["call_p50_ms", "call_p99_ms", "server_cpu_us_per_call"] {
                let value = figures.get(name).cloned().unwrap_or_default();
                report.figure(&format!("first_{name}"), value);
            }
        }
        figures.insert("held".to_owned(), json!(held));
        steps.push(figures);
        if !held {
            break;
        }
        bench.report.figure("held_calls_per_s", rate);
    }
    let failed = calls.caller.ended().failed;
    bench.report.problem_if(failed > 0, || format!("{failed} calls failed"));
    if steps.len() > 1 {
        bench.report.figure("steps", steps);
    }
    let tally = bench.fleet.report()?;
    bench.judge(&tally, false);
    let unheard = calls.caller.unheard()?;
    bench.report.problem_if(unheard > 0, || format!("{unheard} calls reached no agent"));
    bench.close(Span::all(clients))?;
    Ok(bench.report)
}

fn caller(bench: &Bench, options: &Options) -> Result<Caller> {
    let Bench { common, target, .. } = bench;
    let (redis, size) = (common.publish, common.size);
    Ok(match options.caller {
        Way::Own => Caller::Own(OwnCaller::start(redis, target, size)?),
        Way::Each => Caller::Each(EachCaller::start(redis, target, common.connections, size)?),
        Way::Http => {
            let server = options.call_at.unwrap_or(common.server);
            Caller::Http(HttpCaller::start(server, &options.api_key, target, size)?)
        }
    })
}

/// Calls of tools by one caller, to all agents in turn.
struct Calls {
    number: u32,
    caller: Caller,
}

impl Calls {
    /// Calls at a rate, and returns the numbers of calls and of answers.
    fn steady(&mut self, bench: &Bench, rate: f64, duration: Duration) -> Result<(u64, u64)> {
        let before = self.caller.ended().all();
        let (tick_ns, duration_ns) = (ns(bench.common.tick()), ns(duration));
        let start_ns = now_ns() + tick_ns;
        let mut sent = 0;
        for tick in 1..=duration_ns / tick_ns {
            let at_ns = start_ns + tick * tick_ns;
            self.caller.wait_until(at_ns)?;
            let due = (rate * (tick * tick_ns) as f64 / NS_PER_SECOND as f64).round() as u64;
            while sent < due {
                let agent = self.number % bench.common.connections;
                self.caller.call(agent, CallStamp { sent_ns: at_ns, number: self.number });
                self.number = self.number.wrapping_add(1);
                sent += 1;
            }
            self.caller.flush()?;
        }
        let give_up_ns = now_ns() + ns(LATE);
        while self.caller.ended().all() - before < sent && now_ns() < give_up_ns {
            self.caller.wait_until(now_ns() + ns(LOOK_EVERY))?;
        }
        Ok((sent, self.caller.ended().all() - before))
    }
}

/// Lets the agents send heartbeats only, and notes the CPU time.
fn heartbeats(bench: &mut Bench, options: &Options) -> Result<()> {
    bench.progress.phase("heartbeats");
    let clients = bench.common.connections;
    let rate = f64::from(clients) / options.heartbeat.as_secs_f64();
    let start_ns = now_ns();
    let end_ns = start_ns + ns(options.idle);
    let (span, tick) = (Span::all(clients), Duration::from_millis(10));
    bench.fleet.echo(Echo { span, rate, bytes: 0, heartbeats: true, tick, start_ns, end_ns })?;
    let start = bench.moment();
    sleep_until(end_ns);
    bench.note_cpu(&start, (rate * options.idle.as_secs_f64()) as u64, "heartbeat");
    bench.rename_cpu("heartbeats");
    Ok(())
}

/// Returns the server's resident memory once it is quiet.
fn settled(bench: &Bench) -> u64 {
    std::thread::sleep(QUIET);
    bench.memory().resident
}

/// A rate counts as held when 99 % of its calls are answered within this many milliseconds.
const HELD_MS: f64 = 50.0;
/// Longest wait for answers after the last call.
const LATE: Duration = Duration::from_secs(5);
/// Interval of looks at answers that are late.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// Time in which the server becomes quiet.
const QUIET: Duration = Duration::from_secs(3);
