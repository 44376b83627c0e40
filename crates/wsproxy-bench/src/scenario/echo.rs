//! Clients send, the message goes up to a worker and comes back down; latency is the whole way.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;

use crate::bench::{Bench, Layout};
use crate::clock::{now_ns, ns};
use crate::echo_worker::EchoWorker;
use crate::fleet::{Echo, Span};
use crate::options::Common;
use crate::report::Report;
use crate::target::Kind;

/// Options of the scenario.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Messages per second over all clients.
    #[arg(long, default_value_t = 5_000.0)]
    rate: f64,
}

/// Runs the scenario.
pub fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    if !matches!(common.target, Kind::Wsproxy | Kind::Plain) {
        bail!("{:?} has no way up to a worker", common.target);
    }
    let clients = common.connections;
    let layout = Layout::sessions(clients);
    let mut bench = Bench::start("echo", common, layout)?;
    let _worker = EchoWorker::start(common.publish, &bench.target.up_pattern())?;
    bench.open(Span::all(clients))?;
    bench.progress.phase("warm up");
    phase(&mut bench, options.rate, common.warmup)?;
    let warm = bench.fleet.report()?;
    bench.judge(&warm, false);

    bench.progress.phase("measure");
    let start = bench.moment();
    let (sent, delivered) = phase(&mut bench, options.rate, common.duration)?;
    bench.note_cpu(&start, delivered, "echo");
    let tally = bench.fleet.report()?;
    bench.report.set("rate_per_s", options.rate);
    bench.report.figure("sent", sent);
    bench.report.ratio("echoes_per_s", delivered as f64, bench.report.seconds("measured_s"));
    bench.report.quantiles("round_trip", &tally.latency);
    bench.judge(&tally, false);
    bench.judge_deliveries(sent, delivered);
    Ok(bench.report)
}

/// Returns the numbers of messages that were sent and that came back.
fn phase(bench: &mut Bench, rate: f64, duration: Duration) -> Result<(u64, u64)> {
    let tick = bench.common.tick();
    let start_ns = now_ns() + ns(tick);
    let end_ns = start_ns + ns(duration);
    let span = Span::all(bench.common.connections);
    let bytes = bench.common.size;
    let Bench { fleet, progress, .. } = bench;
    let counters = fleet.counters();
    let (sent, delivered) = (counters.sent(), counters.delivered());
    fleet.echo(Echo { span, rate, bytes, heartbeats: false, tick, start_ns, end_ns })?;
    let over = |_: &_| now_ns() > end_ns + ns(tick) * 4;
    fleet.wait(duration * 2 + LATE, over, &mut |counters| progress.tick(counters))?;
    let sent = counters.sent() - sent;
    // Messages that do not come show in the figures.
    let _ = counters.wait_delivered(delivered + sent, LATE);
    Ok((sent, counters.delivered() - delivered))
}

/// Longest wait for echoes after the last message was sent; later ones count as lost.
const LATE: Duration = Duration::from_secs(5);
