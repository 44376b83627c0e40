//! Redis is killed under load and comes back with its data: no client reconnects, no message is lost, all catch up.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};

use crate::bench::{Bench, Layout};
use crate::clock::{NS_PER_SECOND, now_ns, ns, sleep_until};
use crate::fleet::Span;
use crate::options::{Common, seconds};
use crate::persistent::{Counts, PersistentPublisher};
use crate::procfs::Processes;
use crate::report::Report;

/// Options of the scenario.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Messages per second over all sessions.
    #[arg(long, default_value_t = 5_000.0)]
    rate: f64,
    /// Seconds from the end of Redis to its new start.
    #[arg(long, default_value = "5", value_parser = seconds)]
    down: Duration,
    /// Configuration file with which Redis is started again; it must name a port and make Redis keep its data.
    #[arg(long)]
    redis_conf: PathBuf,
}

/// A Redis that this tool has started; ended when this is dropped.
struct Redis(Child);

/// The publisher's counts, and the time since which no message is behind.
struct Published {
    messages: u64,
    counts: Counts,
    backlog_done_ns: u64,
    late_ns_max: u64,
}

/// Runs the scenario: the duration before the outage, the outage, and the duration after it.
pub fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let clients = common.connections;
    let mut bench = Bench::start("outage", common, Layout::sessions(clients))?;
    let pid = bench.publisher.server_pid().context("Redis does not say its process")?;
    ensure!(options.redis_conf.exists(), "there is no {}", options.redis_conf.display());
    bench.report.set("rate_per_s", options.rate);
    bench.report.set("down_s", options.down.as_secs_f64());
    bench.open(Span::all(clients))?;
    let warm = bench.fleet.report()?;
    bench.judge(&warm, false);
    // This Redis will be another process afterwards.
    bench.redis = Processes::default();
    let mut publisher =
        PersistentPublisher::connect(common.publish, &bench.target, clients, common.size)?;

    bench.progress.phase("load");
    let start = bench.moment();
    let start_ns = now_ns();
    let kill_ns = start_ns + ns(common.duration);
    let outage = take_down(pid, kill_ns, options)?;
    let published = publish(&mut bench, &mut publisher, options, start_ns)?;
    let _redis = outage.join().map_err(|_| anyhow!("the outage failed"))??;
    let counters = bench.fleet.counters();
    let complete = counters.wait_delivered(published.messages, common.timeout);
    bench.note_cpu(&start, published.messages, "message");
    // Duplicates would come now.
    std::thread::sleep(SETTLE);
    note(&mut bench, &published, kill_ns)?;
    bench.report.problem_if(!complete, || "not every message arrived".to_owned());
    Ok(bench.report)
}

/// Kills Redis at `kill_ns` and starts it again after the outage, in a thread.
fn take_down(pid: u32, kill_ns: u64, options: &Options) -> Result<JoinHandle<Result<Redis>>> {
    let process =
        i32::try_from(pid).ok().and_then(Pid::from_raw).context("that is no process id")?;
    let (down, conf) = (options.down, options.redis_conf.clone());
    let thread = std::thread::Builder::new().name("outage".to_owned());
    Ok(thread.spawn(move || {
        sleep_until(kill_ns);
        kill_process(process, Signal::KILL).context("Redis cannot be killed")?;
        sleep_until(kill_ns + ns(down));
        let mut command = Command::new("redis-server");
        command.arg(&conf).stdin(Stdio::null()).stdout(Stdio::null());
        Ok(Redis(command.spawn().context("Redis cannot be started again")?))
    })?)
}

/// Publishes at the rate, with or without Redis, until all messages are acknowledged.
fn publish(
    bench: &mut Bench,
    publisher: &mut PersistentPublisher,
    options: &Options,
    start_ns: u64,
) -> Result<Published> {
    let common = &bench.common;
    let tick_ns = ns(common.tick());
    let length_ns = ns(common.duration * 2 + options.down);
    let give_up_ns = start_ns + length_ns + ns(common.timeout);
    let (sessions, mut messages) = (u64::from(common.connections), 0u64);
    let mut result =
        Published { messages: 0, counts: Counts::default(), backlog_done_ns: 0, late_ns_max: 0 };
    let mut backlog = None;
    for tick in 1.. {
        let due_ns = start_ns + tick * tick_ns;
        sleep_until(due_ns);
        let now = now_ns();
        let due = options.rate * due_ns.saturating_sub(start_ns).min(length_ns) as f64;
        while messages < (due / NS_PER_SECOND as f64) as u64 {
            let (session, number) = (messages % sessions, messages / sessions);
            publisher.publish(session as u32, number as u32, due_ns);
            messages += 1;
        }
        let before = publisher.counts();
        publisher.step()?;
        let counts = publisher.counts();
        if counts.answered_ns != before.answered_ns {
            // Every message that was due until now was missed, or waits in front of the next ones.
            bench.fleet.mark(counts.answered_ns)?;
            backlog = Some(messages);
        }
        if backlog.is_some_and(|backlog| counts.acknowledged >= backlog) {
            (backlog, result.backlog_done_ns) = (None, now_ns());
        }
        if before.outages == counts.outages && counts.outages == 0 {
            result.late_ns_max = result.late_ns_max.max(now.saturating_sub(due_ns));
        }
        bench.progress.tick(bench.fleet.counters());
        let over = due_ns >= start_ns + length_ns && publisher.outstanding() == 0;
        if over || now > give_up_ns {
            (result.messages, result.counts) = (messages, counts);
            break;
        }
    }
    Ok(result)
}

fn note(bench: &mut Bench, published: &Published, kill_ns: u64) -> Result<()> {
    let Published { messages, counts, backlog_done_ns, late_ns_max } = *published;
    let delivered = bench.fleet.counters().delivered();
    let tally = bench.fleet.report()?;
    let answered_ns = counts.answered_ns;
    let report = &mut bench.report;
    report.figure("published", messages);
    report.figure("acknowledged", counts.acknowledged);
    report.figure("published_again", counts.retried);
    report.figure("of_which_redis_had", counts.known);
    report.figure("repeated", tally.repeated);
    report.figure("missed_or_late", tally.late);
    report.figure("bus_recovered", tally.bus_recovered);
    report.ratio("publisher_late_max_ms", late_ns_max as f64, 1e6);
    if answered_ns > 0 {
        report.ratio("redis_away_s", answered_ns.saturating_sub(kill_ns) as f64, 1e9);
        let after = |at_ns: u64| at_ns.saturating_sub(answered_ns) as f64;
        report.ratio("backlog_published_s", after(backlog_done_ns), 1e9);
        report.ratio("caught_up_s", after(tally.late_last_ns), 1e9);
    }
    report.problem_if(answered_ns == 0, || "Redis did not come back in time".to_owned());
    report.problem_if(counts.acknowledged < messages, || {
        format!("{} messages were never acknowledged", messages - counts.acknowledged)
    });
    report.problem_if(tally.bus_recovered > 0, || {
        format!("{} clients were told that messages may be missing", tally.bus_recovered)
    });
    bench.judge(&tally, false);
    bench.judge_deliveries(messages, delivered);
    Ok(())
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const SETTLE: Duration = Duration::from_millis(500);
