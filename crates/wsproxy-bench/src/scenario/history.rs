//! The cost of a history: the same messages at the same rate to the same clients, plain and with history in turn.

use std::time::Duration;

use anyhow::Result;
use clap::Args;

use crate::bench::{Bench, Layout, Spent};
use crate::fleet::{Span, Tally};
use crate::load::{self, Flow};
use crate::options::Common;
use crate::report::Report;

/// Options of the scenario.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Messages per second.
    #[arg(long, default_value_t = 10_000.0)]
    rate: f64,
    /// All clients belong to one session, so that each message goes to all of them.
    #[arg(long)]
    shared: bool,
    /// Number of turns of both kinds; each phase lasts its part of the duration.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    turns: u32,
}

/// CPU time and messages of all phases of one kind.
#[derive(Default)]
struct Kind {
    published: u64,
    delivered: u64,
    unsent: u64,
    spent: Spent,
    tally: Tally,
}

/// Runs the scenario.
pub fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let clients = common.connections;
    let layout = Layout { shared: options.shared, ..Layout::sessions(clients) };
    let mut bench = Bench::start("history", common, layout)?;
    bench.report.set("rate_per_s", options.rate);
    bench.report.set("shared", options.shared);
    bench.report.set("turns", options.turns);
    anyhow::ensure!(!bench.server.is_empty(), "the history scenario needs the server's --pid");
    bench.open(Span::all(clients))?;
    let (sessions, receivers) =
        if options.shared { (1, bench.fleet.counters().open_now()) } else { (clients, 1) };
    let mut flow = Flow::new(0, sessions, common.size, options.rate);

    let mut warm = Kind::default();
    for with_history in [false, true] {
        phase(&mut bench, &mut flow, with_history, receivers, common.warmup, &mut warm)?;
    }
    bench.judge(&warm.tally, false);
    let (mut plain, mut kept) = (Kind::default(), Kind::default());
    let duration = common.duration / options.turns;
    for turn in 0..options.turns {
        // Neither kind is always the first, so that drift hits both.
        for with_history in [turn % 2 == 1, turn % 2 == 0] {
            let kind = if with_history { &mut kept } else { &mut plain };
            phase(&mut bench, &mut flow, with_history, receivers, duration, kind)?;
        }
    }
    note(&mut bench, "plain", &plain);
    note(&mut bench, "history", &kept);
    let per = |spent: u64, kind: &Kind| spent as f64 / kind.published.max(1) as f64;
    let report = &mut bench.report;
    let (ours, base) = (per(kept.spent.server, &kept), per(plain.spent.server, &plain));
    report.ratio("server_cpu_ratio", ours, base);
    let (ours, base) = (per(kept.spent.redis, &kept), per(plain.spent.redis, &plain));
    report.ratio("redis_cpu_ratio", ours, base);
    let mut all = warm.tally;
    all.add(&plain.tally);
    all.add(&kept.tally);
    bench.judge(&all, false);
    let unsent = plain.unsent + kept.unsent;
    bench.report.problem_if(unsent > 0, || format!("{unsent} messages could not be published"));
    let sum = |of: fn(&Kind) -> u64| of(&plain) + of(&kept);
    let expected = sum(|kind| kind.published) * receivers;
    bench.judge_deliveries(expected, sum(|kind| kind.delivered));
    bench.judge_unheard();
    Ok(bench.report)
}

/// Adds a phase to the sums of its kind.
fn phase(
    bench: &mut Bench,
    flow: &mut Flow,
    with_history: bool,
    receivers: u64,
    duration: Duration,
    kind: &mut Kind,
) -> Result<()> {
    bench.progress.phase(if with_history { "with history" } else { "plain" });
    bench.publisher.keep_history(with_history)?;
    let start = bench.moment();
    let tick = bench.common.tick();
    let Bench { publisher, fleet, progress, .. } = &mut *bench;
    let counters = fleet.counters();
    let before = counters.delivered();
    let flows = std::slice::from_mut(flow);
    let steady = load::steady(publisher, flows, tick, duration, || progress.tick(counters))?;
    // Messages that do not come show in the figures.
    let _ = counters.wait_delivered(before + steady.published * receivers, LATE);
    kind.published += steady.published;
    kind.unsent += steady.unsent;
    kind.delivered += counters.delivered() - before;
    kind.spent.add(&bench.spent_since(&start));
    kind.tally.add(&bench.fleet.report()?);
    Ok(())
}

fn note(bench: &mut Bench, name: &str, kind: &Kind) {
    let report = &mut bench.report;
    report.figure(&format!("{name}_published"), kind.published);
    let Spent { server, redis, client, elapsed } = kind.spent;
    for (who, spent) in [("server", server), ("redis", redis), ("client", client)] {
        let per_message = format!("{name}_{who}_cpu_us_per_message");
        report.ratio(&per_message, spent as f64 / 1e3, kind.published as f64);
        report.ratio(&format!("{name}_{who}_cpu_percent"), spent as f64 * 1e2, elapsed as f64);
    }
    report.quantiles(&format!("{name}_latency"), &kind.tally.latency);
}

/// Longest wait for messages after the last one was published; later ones count as lost.
const LATE: Duration = Duration::from_secs(5);
