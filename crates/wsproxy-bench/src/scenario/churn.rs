//! Clients come and go at a rate while their number stays the same; memory must not grow.

use anyhow::Result;
use clap::Args;

use crate::bench::{Bench, Layout};
use crate::clock::{NS_PER_SECOND, now_ns, ns, sleep_until};
use crate::fleet::{Opening, Span};
use crate::options::Common;
use crate::report::Report;

/// Options of the scenario.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Connections opened, and as many closed, per second.
    #[arg(long, default_value_t = 500.0)]
    rate: f64,
    /// Leave without a close handshake.
    #[arg(long)]
    abort: bool,
}

/// Runs the scenario.
pub fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let standing = common.connections;
    // A client's slot is used again a second after the client left, at the earliest.
    let places = standing + (options.rate * REST_SECONDS).ceil() as u32;
    let layout = Layout { clients: places, measured: places, shared: false, resumes: false };
    let mut bench = Bench::start("churn", common, layout)?;
    bench.report.set("rate_per_s", options.rate);
    bench.report.set("standing", standing);
    bench.open(Span::all(standing))?;
    let warm = bench.fleet.report()?;
    bench.judge(&warm, false);
    let before = bench.memory();

    bench.progress.phase("churn");
    let start = bench.moment();
    let (opened, failed) = (bench.fleet.counters().opened(), bench.fleet.counters().failed());
    let asked = come_and_go(&mut bench, options, places)?;
    let wanted = u64::from(standing) + asked;
    let whole = bench.fleet.counters().wait_settled(wanted, common.timeout);
    let opened = bench.fleet.counters().opened() - opened;
    bench.note_cpu(&start, opened, "handshake");
    let tally = bench.fleet.report()?;
    let failed = bench.fleet.counters().failed() - failed;
    let after = bench.memory();
    let report = &mut bench.report;
    report.figure("opened", opened);
    report.figure("failed", failed);
    report.ratio("handshakes_per_s", opened as f64, report.seconds("measured_s"));
    report.quantiles("handshake", &tally.handshake);
    report.figure("resident_before_bytes", before.resident);
    report.figure("resident_after_bytes", after.resident);
    report.problem_if(!whole || opened < asked, || {
        format!("{} of {asked} clients did not connect", asked - opened.min(asked))
    });
    bench.judge(&tally, false);
    bench.close(Span::all(places))?;
    bench.report.figure("resident_after_close_bytes", bench.memory().resident);
    Ok(bench.report)
}

/// Opens and closes connections at the rate; returns the number of those that were to be opened.
fn come_and_go(bench: &mut Bench, options: &Options, places: u32) -> Result<u64> {
    let standing = bench.common.connections;
    let start_ns = now_ns();
    let ticks = ns(bench.common.duration) / TICK_NS;
    let mut done = 0u64;
    for tick in 1..=ticks {
        sleep_until(start_ns + tick * TICK_NS);
        let due = options.rate * (tick * TICK_NS) as f64 / NS_PER_SECOND as f64;
        let target = bench.target.clone();
        while done < due as u64 {
            let count = due as u64 - done;
            let coming = range(u64::from(standing) + done, count, places);
            let going = range(done, count, places);
            let count = coming.count.min(going.count);
            let (coming, going) = (Span { count, ..coming }, Span { count, ..going });
            let clients = coming.first..coming.first + count;
            bench.publisher.set_tokens(clients.map(|client| target.session_of(client)))?;
            let in_flight = bench.common.in_flight;
            bench.fleet.open(Opening { span: coming, in_flight, rate: None })?;
            bench.fleet.close(going, options.abort)?;
            done += u64::from(count);
        }
        bench.progress.tick(bench.fleet.counters());
    }
    Ok(done)
}

/// Cuts a range of a ring at the ring's end.
fn range(first: u64, count: u64, places: u32) -> Span {
    let first = (first % u64::from(places)) as u32;
    Span { first, count: (places - first).min(count as u32) }
}

const TICK_NS: u64 = 20_000_000;
const REST_SECONDS: f64 = 1.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_stop_at_the_end_of_the_ring() {
        assert_eq!(range(7, 5, 10), Span { first: 7, count: 3 });
        assert_eq!(range(20, 5, 10), Span { first: 0, count: 5 });
    }
}
