//! An instance is killed while many clients are connected; they get missed messages from another instance.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};

use crate::bench::{Bench, Layout};
use crate::clock::now_ns;
use crate::fleet::{Opening, Span};
use crate::load::Flow;
use crate::options::Common;
use crate::procfs::Processes;
use crate::report::Report;

/// Options of the scenario.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// The instance that takes all clients when that of --server is killed. --pid names both, that of --server first.
    #[arg(long)]
    other: SocketAddr,
    /// Messages that each client gets before the kill.
    #[arg(long, default_value_t = 5)]
    before: u32,
    /// Messages that each client misses.
    #[arg(long, default_value_t = 20)]
    missed: u32,
    /// Handshakes at once when all clients come back; 0: all.
    #[arg(long, default_value_t = 0)]
    returning: u32,
}

/// Runs the scenario.
pub fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let clients = common.connections;
    let [first, other] = common.pid[..] else { bail!("two --pid are needed: --server, --other") };
    ensure!(options.before > 0, "clients must have got something, to say where they are");
    let layout = Layout { resumes: true, ..Layout::sessions(clients) };
    let mut bench = Bench::start("resume", common, layout)?;
    bench.server = Processes::new(&[other]);
    bench.report.set("before", options.before);
    bench.report.set("missed", options.missed);
    bench.open(Span::all(clients))?;
    bench.publisher.keep_history(true)?;
    let mut flow = Flow::new(0, clients, common.size, 0.0);

    bench.progress.phase("messages before");
    publish(&mut bench, &mut flow, options.before)?;
    let before = u64::from(clients) * u64::from(options.before);
    if !bench.fleet.counters().wait_delivered(before, common.timeout) {
        let delivered = bench.fleet.counters().delivered();
        bail!("{delivered} of {before} messages had arrived before the instance was killed");
    }
    let warm = bench.fleet.report()?;
    bench.judge(&warm, false);
    bench.judge_unheard();

    kill_and_miss(&mut bench, &mut flow, first, options)?;
    come_back(&mut bench, options, before)
}

/// Kills the instance, and publishes messages while no client is connected.
fn kill_and_miss(bench: &mut Bench, flow: &mut Flow, pid: u32, options: &Options) -> Result<()> {
    bench.progress.phase("kill");
    let process =
        i32::try_from(pid).ok().and_then(Pid::from_raw).context("that is no process id")?;
    kill_process(process, Signal::KILL).context("the instance cannot be killed")?;
    let Bench { fleet, progress, common, .. } = &mut *bench;
    let gone = |counters: &crate::fleet::Counters| counters.open_now() == 0;
    fleet
        .wait(common.timeout, gone, &mut |counters| progress.tick(counters))
        .context("clients do not see that their instance is gone")?;
    bench.progress.phase("messages that are missed");
    publish(bench, flow, options.missed)?;
    let target = bench.target.clone();
    let sessions = 0..bench.common.connections;
    bench.publisher.set_tokens(sessions.map(|client| target.session_of(client)))?;
    let lost = bench.fleet.report()?.endings.len();
    bench.report.figure("cut_off", lost);
    bench.fleet.redirect(vec![options.other])
}

/// Connects all clients at once, each with the position of its last message.
fn come_back(bench: &mut Bench, options: &Options, before: u64) -> Result<Report> {
    bench.progress.phase("resume");
    let clients = bench.common.connections;
    let missed = u64::from(clients) * u64::from(options.missed);
    let in_flight = if options.returning == 0 { clients } else { options.returning };
    bench.report.set("handshakes_at_once", in_flight);
    let settled = bench.fleet.counters().settled() + u64::from(clients);
    let memory = bench.memory();
    let start = bench.moment();
    let start_ns = now_ns();
    bench.fleet.open(Opening { span: Span::all(clients), in_flight, rate: None })?;
    let counters = bench.fleet.counters();
    let connected = counters.wait_settled(settled, bench.common.timeout);
    let connected_ns = now_ns();
    let complete = counters.wait_delivered(before + missed, bench.common.timeout);
    let complete_ns = now_ns();
    bench.note_cpu(&start, missed, "missed_message");
    let after = bench.memory();
    // Duplicates would come now.
    std::thread::sleep(SETTLE);
    let delivered = bench.fleet.counters().delivered() - before;
    let open = bench.fleet.counters().open_now();
    let tally = bench.fleet.report()?;

    let report = &mut bench.report;
    if connected {
        report.ratio("all_connected_s", (connected_ns - start_ns) as f64, 1e9);
    }
    if complete {
        report.ratio("complete_s", (complete_ns - start_ns) as f64, 1e9);
    }
    report.quantiles("handshake", &tally.handshake);
    report.figure("resumed", tally.resumed);
    report.figure("repeated", tally.repeated);
    report.figure("resident_before_bytes", memory.resident);
    report.figure("resident_after_bytes", after.resident);
    report.problem_if(!complete, || "not every client got all it had missed".to_owned());
    report.problem_if(open < u64::from(clients), || {
        format!("{open} of {clients} clients are connected")
    });
    report.problem_if(tally.resumed != u64::from(clients), || {
        format!("{} of {clients} clients were told that they resume", tally.resumed)
    });
    bench.judge(&tally, false);
    bench.judge_deliveries(missed, delivered);
    Ok(bench.report.clone())
}

/// Publishes the same number of messages to each session, in chunks that Redis' buffers for subscribers can hold.
fn publish(bench: &mut Bench, flow: &mut Flow, each: u32) -> Result<()> {
    let all = u64::from(bench.common.connections) * u64::from(each);
    for published in 1..=all {
        flow.publish(&mut bench.publisher, now_ns());
        if published % CHUNK == 0 {
            bench.publisher.settle()?;
            bench.progress.tick(bench.fleet.counters());
        }
    }
    bench.publisher.settle()
}

const CHUNK: u64 = 500;
const SETTLE: Duration = Duration::from_millis(500);
