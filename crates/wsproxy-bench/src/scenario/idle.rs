//! The memory of an idle connection, and whether the server gives a burst's memory back.

use std::time::Duration;

use anyhow::Result;
use clap::Args;

use crate::bench::{Bench, Layout};
use crate::clock::{now_ns, ns};
use crate::fleet::Span;
use crate::load::Flow;
use crate::options::{Common, seconds};
use crate::procfs::Memory;
use crate::report::Report;

/// Options of the scenario.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Memory is compared between this many connections and all of them.
    #[arg(long, default_value_t = 1_000)]
    from: u32,
    /// Bytes that each connection receives at once before it idles again; 0 for no burst.
    #[arg(long, default_value_t = 65_536)]
    burst_bytes: usize,
    /// Longest wait for memory to stop changing, in seconds.
    #[arg(long, default_value = "15", value_parser = seconds)]
    settle: Duration,
}

/// Runs the scenario.
pub fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let clients = common.connections;
    let from = options.from.min(clients);
    let layout = Layout::sessions(clients);
    let mut bench = Bench::start("idle", common, layout)?;
    bench.report.set("from", from);
    bench.report.set("burst_bytes", options.burst_bytes);
    anyhow::ensure!(!bench.server.is_empty(), "the idle scenario needs the server's --pid");

    bench.open(Span { first: 0, count: from })?;
    let few = settle(&mut bench, "settle with few", options.settle);
    bench.open(Span { first: from, count: clients - from })?;
    let many = settle(&mut bench, "settle with all", options.settle);
    let more = f64::from(clients - from);
    note(&mut bench.report, "idle", few, many, more);

    if options.burst_bytes > 0 {
        let delivered = burst(&mut bench, options.burst_bytes)?;
        bench.judge_deliveries(u64::from(clients), delivered);
        bench.judge_unheard();
        let peak = bench.memory();
        let after = settle(&mut bench, "settle after the burst", options.settle);
        bench.report.figure("resident_at_burst_bytes", peak.resident);
        note(&mut bench.report, "after_burst", few, after, more);
        let before = many.resident.saturating_sub(few.resident) as f64;
        let growth = after.resident.saturating_sub(few.resident) as f64;
        bench.report.ratio("after_burst_ratio", growth, before);
    }
    let tally = bench.fleet.report()?;
    bench.report.figure("pings", tally.pings);
    let open = bench.fleet.counters().open_now();
    bench.report.problem_if(open < u64::from(clients), || {
        format!("{open} of {clients} clients are connected")
    });
    bench.judge(&tally, false);
    bench.close(Span::all(clients))?;
    let closed = settle(&mut bench, "settle with none", options.settle);
    bench.report.figure("resident_after_close_bytes", closed.resident);
    Ok(bench.report)
}

/// Publishes one message to each session, a few at a time: Redis drops subscribers that fall behind by 32 MB.
fn burst(bench: &mut Bench, bytes: usize) -> Result<u64> {
    bench.progress.phase("burst");
    let clients = bench.common.connections;
    let mut flow = Flow::new(0, clients, bytes, 0.0);
    let before = bench.fleet.counters().delivered();
    for sent in (0..u64::from(clients)).step_by(BURST_CHUNK as usize) {
        let chunk = BURST_CHUNK.min(u64::from(clients) - sent);
        for _ in 0..chunk {
            flow.publish(&mut bench.publisher, now_ns());
        }
        bench.publisher.settle()?;
        let counters = bench.fleet.counters();
        if !counters.wait_delivered(before + sent + chunk, bench.common.timeout) {
            break;
        }
        bench.progress.tick(counters);
    }
    Ok(bench.fleet.counters().delivered() - before)
}

/// Waits until the server's memory stops changing.
fn settle(bench: &mut Bench, phase: &str, patience: Duration) -> Memory {
    bench.progress.phase(phase);
    let deadline = now_ns() + ns(patience);
    let mut last = bench.memory();
    let mut still = 0;
    while now_ns() < deadline && still < STILL_SAMPLES {
        std::thread::sleep(SAMPLE_INTERVAL);
        let memory = bench.memory();
        still = if memory.resident.abs_diff(last.resident) < STILL_BYTES { still + 1 } else { 0 };
        last = memory;
        bench.progress.tick(bench.fleet.counters());
    }
    last
}

fn note(report: &mut Report, name: &str, few: Memory, many: Memory, connections: f64) {
    report.figure(&format!("{name}_resident_bytes"), many.resident);
    let resident = many.resident.saturating_sub(few.resident) as f64;
    let anonymous = many.anonymous.saturating_sub(few.anonymous) as f64;
    report.ratio(&format!("{name}_bytes_per_connection"), resident, connections);
    report.ratio(&format!("{name}_anonymous_bytes_per_connection"), anonymous, connections);
}

const BURST_CHUNK: u64 = 64;
const SAMPLE_INTERVAL: Duration = Duration::from_millis(500);
const STILL_SAMPLES: u32 = 4;
const STILL_BYTES: u64 = 64 * 1024;
