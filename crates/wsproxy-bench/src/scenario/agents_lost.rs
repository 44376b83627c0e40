//! Users' agents lose their instance: the time until all are back at another one.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};

use crate::bench::{Bench, Layout};
use crate::clock::now_ns;
use crate::fleet::{Counters, Opening, Span};
use crate::options::Common;
use crate::procfs::Processes;
use crate::report::Report;

/// Options of the scenario. The database must have the users, as for `agents`.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// The instance that takes all agents when that of --server is killed. --pid names both, that of --server first.
    #[arg(long)]
    other: SocketAddr,
}

/// Runs the scenario.
pub fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let agents = common.connections;
    let [first, other] = common.pid[..] else { bail!("two --pid are needed: --server, --other") };
    let mut bench = Bench::start("agents-lost", common, Layout::sessions(agents))?;
    bench.server = Processes::new(&[other]);
    bench.open(Span::all(agents))?;
    let warm = bench.fleet.report()?;
    bench.judge(&warm, false);

    bench.progress.phase("kill");
    let process =
        i32::try_from(first).ok().and_then(Pid::from_raw).context("that is no process id")?;
    kill_process(process, Signal::KILL).context("the instance cannot be killed")?;
    let start_ns = now_ns();
    let Bench { fleet, progress, .. } = &mut bench;
    let gone = |counters: &Counters| counters.open_now() == 0;
    fleet
        .wait(common.timeout, gone, &mut |counters| progress.tick(counters))
        .context("agents do not see that their instance is gone")?;
    drop(bench.fleet.report()?);
    bench.fleet.redirect(vec![options.other])?;

    bench.progress.phase("come back");
    let settled = bench.fleet.counters().settled() + u64::from(agents);
    let start = bench.moment();
    bench.fleet.open(Opening { span: Span::all(agents), in_flight: agents, rate: None })?;
    let counters = bench.fleet.counters();
    let are_back = counters.wait_settled(settled, common.timeout);
    let back_ns = now_ns();
    bench.note_cpu(&start, u64::from(agents), "handshake");
    let tally = bench.fleet.report()?;
    let open = bench.fleet.counters().open_now();
    let report = &mut bench.report;
    if are_back {
        report.ratio("all_back_s", (back_ns - start_ns) as f64, 1e9);
    }
    report.quantiles("handshake", &tally.handshake);
    report.problem_if(open < u64::from(agents), || {
        format!("{open} of {agents} agents are connected")
    });
    bench.judge(&tally, false);
    bench.close(Span::all(agents))?;
    Ok(bench.report)
}
