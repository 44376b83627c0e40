//! Complete handshakes as fast as the server takes them, or at a rate: credentials, subscription, upgrade.

use anyhow::Result;
use clap::Args;

use crate::bench::{Bench, Layout};
use crate::fleet::{Client, Opening, Span};
use crate::options::Common;
use crate::report::Report;

/// Options of the scenario.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Connections per second on a schedule, instead of as fast as possible.
    #[arg(long)]
    rate: Option<f64>,
    /// Connections that have sent the beginning of a TLS handshake, and stay silent beside the others.
    #[arg(long, default_value_t = 0)]
    half_done: u32,
}

/// Runs the scenario.
pub fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let clients = common.connections;
    let layout = Layout::sessions(clients);
    let mut bench = Bench::start("connect", common, layout)?;

    let some = Span { first: 0, count: clients.min(WARM_UP_CLIENTS) };
    bench.open(some)?;
    bench.close(some)?;
    let warm = bench.fleet.report()?;
    bench.judge(&warm, false);

    let all = Span::all(clients);
    let target = bench.target.clone();
    bench.publisher.set_tokens((0..clients).map(|client| target.session_of(client)))?;
    bench.report.set("half_done", options.half_done);
    let half_done = half_done(options)?;
    bench.progress.phase("measure");
    let start = bench.moment();
    let opening = Opening { span: all, in_flight: common.in_flight, rate: options.rate };
    let Bench { fleet, progress, .. } = &mut bench;
    let waited =
        fleet.open_and_wait(opening, common.timeout * 4, |counters| progress.tick(counters));
    bench.note_cpu(&start, u64::from(clients), "handshake");
    let opened = bench.fleet.counters().open_now();
    let tally = bench.fleet.report()?;
    let report = &mut bench.report;
    report.set("in_flight", common.in_flight * common.threads);
    if let Some(rate) = options.rate {
        report.set("rate_per_s", rate);
    }
    report.figure("opened", opened);
    report.ratio("handshakes_per_s", opened as f64, report.seconds("measured_s"));
    report.quantiles("handshake", &tally.handshake);
    report.problem_if(waited.is_err(), || "not every handshake ended in time".to_owned());
    report.problem_if(opened < u64::from(clients), || {
        format!("{} clients are not connected", u64::from(clients) - opened)
    });
    bench.judge(&tally, false);
    bench.close(all)?;
    drop(half_done);
    Ok(bench.report)
}

/// Opens the connections that stay in the handshake, from all source addresses in turn.
fn half_done(options: &Options) -> Result<Vec<Client>> {
    let common = &options.common;
    let opened = (0..options.half_done).map(|number| {
        let source = FIRST_SOURCE + number % common.sources;
        let mut client = Client::new();
        client.connect(common.server, source.into())?;
        client.send_as_is(BEGUN)?;
        Ok(client)
    });
    opened.collect()
}

/// Head of a long record with a message of the handshake.
const BEGUN: &[u8] = &[22, 3, 1, 0x3f, 0, 1];

/// 127.0.0.1, in the order in which addresses count up.
const FIRST_SOURCE: u32 = 0x7f00_0001;

/// Connections of the warm-up: enough to use every code path and every pool of the server once.
const WARM_UP_CLIENTS: u32 = 500;
