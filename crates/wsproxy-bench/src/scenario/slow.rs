//! Some clients stop reading: the cost for the server, and the effect on the other clients.

use std::time::Duration;

use anyhow::Result;
use clap::Args;

use crate::bench::{Bench, Layout};
use crate::clock::{NS_PER_SECOND, now_ns};
use crate::fleet::{Span, Tally};
use crate::load::{self, Flow};
use crate::options::Common;
use crate::report::Report;

/// Options of the scenario.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Messages per second over the clients that read.
    #[arg(long, default_value_t = 10_000.0)]
    rate: f64,
    /// Number of clients that stop reading, beside those that go on.
    #[arg(long, default_value_t = 1)]
    stalled: u32,
    /// Messages per second to each client that does not read.
    #[arg(long, default_value_t = 500.0)]
    stalled_rate: f64,
    /// Payload bytes of a message to a client that does not read.
    #[arg(long, default_value_t = 8_192)]
    stalled_size: usize,
}

/// Figures of one phase.
struct Phase {
    published: u64,
    delivered: u64,
    aside: u64,
    tally: Tally,
    resident_max: u64,
}

/// Runs the scenario.
pub fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let (readers, stalled) = (common.connections, options.stalled);
    let layout =
        Layout { clients: readers + stalled, measured: readers, shared: false, resumes: false };
    let mut bench = Bench::start("slow", common, layout)?;
    bench.report.set("stalled", stalled);
    bench.report.set("rate_per_s", options.rate);
    bench.open(Span::all(readers + stalled))?;
    let mut flows = [
        Flow::new(0, readers, common.size, options.rate),
        Flow::new(
            readers,
            stalled,
            options.stalled_size,
            options.stalled_rate * f64::from(stalled),
        ),
    ];
    bench.progress.phase("warm up");
    let warm = phase(&mut bench, &mut flows, common.warmup)?;
    bench.judge(&warm.tally, false);
    bench.progress.phase("all read");
    let before = phase(&mut bench, &mut flows, common.duration)?;
    note(&mut bench, "all_read", &before);
    bench.judge(&before.tally, false);

    bench.progress.phase("some have stopped reading");
    let victims = Span { first: readers, count: stalled };
    bench.fleet.stall(victims)?;
    let resident = bench.memory().resident;
    let during = phase(&mut bench, &mut flows, common.duration)?;
    note(&mut bench, "some_stalled", &during);
    let growth = during.resident_max.saturating_sub(resident) as f64;
    bench.report.ratio("resident_growth_per_stalled_bytes", growth, f64::from(stalled));
    bench
        .judge_deliveries(before.published + during.published, before.delivered + during.delivered);

    bench.fleet.resume(victims)?;
    let Bench { fleet, progress, .. } = &mut bench;
    let counters = fleet.counters();
    let still_open = u64::from(readers);
    // Clients that the server did not disconnect stay connected; the figures show them.
    let _ = fleet.wait(RESUMED, |c| c.open_now() <= still_open, &mut |c| progress.tick(c));
    let open = counters.open_now();
    let tally = fleet.report()?;
    let mut endings = during.tally.codes();
    for (code, count) in tally.codes() {
        *endings.entry(code).or_insert(0) += count;
    }
    bench.report.figure("stalled_endings", serde_json::to_value(endings)?);
    bench.report.problem_if(open < still_open, || {
        format!("{} clients that read are not connected any more", still_open - open)
    });
    Ok(bench.report)
}

fn phase(bench: &mut Bench, flows: &mut [Flow], duration: Duration) -> Result<Phase> {
    let published = flows[0].published();
    let tick = bench.common.tick();
    let Bench { publisher, fleet, progress, server, .. } = bench;
    let counters = fleet.counters();
    let (delivered, aside) = (counters.delivered(), counters.aside());
    let mut resident_max = server.memory().resident;
    let mut next_ns = now_ns();
    load::steady(publisher, flows, tick, duration, || {
        progress.tick(counters);
        if now_ns() >= next_ns {
            next_ns = now_ns() + NS_PER_SECOND / 2;
            resident_max = resident_max.max(server.memory().resident);
        }
    })?;
    let published = flows[0].published() - published;
    // Messages that do not come show in the figures.
    let _ = counters.wait_delivered(delivered + published, LATE);
    let (delivered, aside) = (counters.delivered() - delivered, counters.aside() - aside);
    Ok(Phase { published, delivered, aside, tally: fleet.report()?, resident_max })
}

fn note(bench: &mut Bench, name: &str, phase: &Phase) {
    bench.report.quantiles(&format!("{name}_latency"), &phase.tally.latency);
    bench.report.figure(&format!("{name}_resident_max_bytes"), phase.resident_max);
    bench.report.figure(&format!("{name}_aside"), phase.aside);
}

const LATE: Duration = Duration::from_secs(5);
const RESUMED: Duration = Duration::from_secs(5);
