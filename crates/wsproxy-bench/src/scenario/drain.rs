//! The server is told to end while clients are connected: close codes, the time they are spread over, and its exit.

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};

use crate::bench::{Bench, Layout};
use crate::clock::now_ns;
use crate::fleet::Span;
use crate::options::Common;
use crate::procfs::has_ended;
use crate::report::Report;
use crate::target::Kind;

/// Options of the scenario.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
}

/// Runs the scenario.
pub fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let clients = common.connections;
    let [pid] = common.pid[..] else { bail!("the drain scenario needs exactly one --pid") };
    let layout = Layout::sessions(clients);
    let mut bench = Bench::start("drain", common, layout)?;
    bench.open(Span::all(clients))?;
    let warm = bench.fleet.report()?;
    bench.judge(&warm, false);
    let connected = bench.fleet.counters().open_now();

    bench.progress.phase("drain");
    let process =
        i32::try_from(pid).ok().and_then(Pid::from_raw).context("that is no process id")?;
    let start_ns = now_ns();
    kill_process(process, Signal::TERM).context("the server cannot be signalled")?;
    let Bench { fleet, progress, .. } = &mut bench;
    let mut exit_ns = None;
    let _ = fleet.wait(
        common.timeout * 2,
        |counters| {
            if exit_ns.is_none() && has_ended(pid) {
                exit_ns = Some(now_ns());
            }
            exit_ns.is_some() && counters.open_now() == 0
        },
        &mut |counters| progress.tick(counters),
    );
    let tally = bench.fleet.report()?;
    let after_ms = |at_ns: u64| at_ns.saturating_sub(start_ns) as f64 / 1e6;
    let times: Vec<u64> = tally.endings.iter().map(|ending| ending.at_ns).collect();
    let report = &mut bench.report;
    report.figure("connected", connected);
    report.figure("ended", times.len());
    report.figure("codes", serde_json::to_value(tally.codes())?);
    if let (Some(first), Some(last)) = (times.iter().min(), times.iter().max()) {
        report.ratio("first_close_ms", after_ms(*first), 1.0);
        report.ratio("last_close_ms", after_ms(*last), 1.0);
    }
    if let Some(exit_ns) = exit_ns {
        report.ratio("exit_ms", after_ms(exit_ns), 1.0);
    }
    report.problem_if(exit_ns.is_none(), || "the server did not exit".to_owned());
    let told = tally.codes().get(&RESTARTING).copied().unwrap_or(0);
    report.problem_if(common.target == Kind::Wsproxy && told < connected, || {
        format!("{} clients were not told to reconnect", connected - told)
    });
    Ok(bench.report)
}

/// Close code of an instance that restarts.
const RESTARTING: u16 = 1012;
