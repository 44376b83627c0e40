//! As many clients as the host holds, over many instances of one Redis: memory of both ends, idle CPU, messages, and a
//! killed instance.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};

use crate::bench::{Bench, Layout};
use crate::clock::now_ns;
use crate::crowd::{Crowd, settle};
use crate::load::Flow;
use crate::options::{Common, seconds};
use crate::procfs::{Kernel, Processes};
use crate::report::Report;
use crate::target::Kind;

/// Options of the scenario. The kind of clients is that of --target: `wsproxy` or `events`.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// The instances; --pid names their processes in the same order. The last one is killed.
    #[arg(long, value_delimiter = ',', required = true)]
    servers: Vec<SocketAddr>,
    /// Secret that the instances verify the tokens of users with.
    #[arg(long, default_value = "")]
    secret: String,
    /// Connections per second over all instances.
    #[arg(long, default_value_t = 5_000.0)]
    connect_rate: f64,
    /// Memory is compared between this many connections and all of them.
    #[arg(long, default_value_t = 5_000)]
    from: u32,
    /// Seconds without a message, over which idle CPU is measured. Heartbeats go on.
    #[arg(long, default_value = "60", value_parser = seconds)]
    idle: Duration,
    /// Messages per second, each to one client.
    #[arg(long, default_value_t = 5_000.0)]
    rate: f64,
    /// Messages to all clients per second, in a phase of their own; 0 for none. For users only.
    #[arg(long, default_value_t = 0.0)]
    broadcast_rate: f64,
    /// Publish with history.
    #[arg(long)]
    history: bool,
    /// Longest wait for memory to stop changing, in seconds.
    #[arg(long, default_value = "10", value_parser = seconds)]
    settle: Duration,
}

/// Memory at one moment, in bytes.
struct Memory {
    instances: Vec<u64>,
    clients: u64,
    redis: u64,
    kernel: Kernel,
}

/// Runs the scenario.
pub fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let (clients, instances) = (common.connections, options.servers.len());
    ensure!(common.pid.len() == instances, "each of --servers needs its --pid");
    ensure!(matches!(common.target, Kind::Wsproxy | Kind::Events), "clients are sessions or users");
    let mut bench = Bench::start("scale", common, Layout::sessions(0))?;
    // The generators are this process' children.
    bench.own = Processes::new(&[std::process::id()]);
    bench.report.set("connections", clients);
    bench.report.set("instances", instances);
    bench.report.set("history", options.history);
    bench.publisher.keep_history(options.history)?;
    let mut crowd = Crowd::start(&bench, &options.servers, &options.secret)?;

    let few_each = options.from.min(clients).div_ceil(crowd.generators());
    bench.publisher.set_tokens(0..clients)?;
    crowd.connect(&mut bench, options.connect_rate, 0, few_each)?;
    let few = memory(&mut bench, options.settle);
    crowd.connect(&mut bench, options.connect_rate, few_each, u32::MAX)?;
    let many = memory(&mut bench, options.settle);
    crowd.note_memory(&mut bench, few_each, &few.instances, &many.instances);
    let more = clients.saturating_sub(few_each * crowd.generators());
    note_others(&mut bench.report, &few, &many, f64::from(more.max(1)));

    idle(&mut bench, options.idle);
    drop(crowd.report()?);
    let mut flows = vec![Flow::new(0, clients, common.size, options.rate)];
    crowd.phase(&mut bench, &mut flows, "warm_up", common.warmup)?;
    crowd.phase(&mut bench, &mut flows, "users", common.duration)?;
    if options.broadcast_rate > 0.0 {
        flows.push(Flow::to_all(common.size, options.broadcast_rate));
        crowd.phase(&mut bench, &mut flows, "both", common.duration)?;
    }
    bench.judge_unheard();
    if instances > 1 {
        kill_last(&mut bench, &mut crowd, options)?;
        crowd.phase(&mut bench, &mut flows, "after", common.duration)?;
    }
    bench.report.figure("heartbeats_answered", crowd.pings);
    let open = crowd.status()?.open_now;
    bench.report.figure("open_at_the_end", open);
    bench.report.problem_if(open < u64::from(clients), || {
        format!("{open} of {clients} clients are connected at the end")
    });
    Ok(bench.report)
}

/// Kills the last instance, and times its clients until all are at the others.
fn kill_last(bench: &mut Bench, crowd: &mut Crowd, options: &Options) -> Result<()> {
    bench.progress.phase("kill");
    let last = bench.common.pid.last().copied().unwrap_or(0);
    let process =
        i32::try_from(last).ok().and_then(Pid::from_raw).context("that is no process id")?;
    let all = crowd.status()?.open_now;
    kill_process(process, Signal::KILL).context("the instance cannot be killed")?;
    let start_ns = now_ns();
    bench.server = Processes::new(&bench.common.pid[..options.servers.len() - 1]);
    let lost = crowd.wait_lost(all)?;
    drop(crowd.report()?);
    bench.report.figure("cut_off", lost);
    bench.report.ratio("cut_off_s", (now_ns() - start_ns) as f64, 1e9);
    crowd.reconnect_last(bench, &options.servers[..options.servers.len() - 1])?;
    bench.report.ratio("all_back_s", (now_ns() - start_ns) as f64, 1e9);
    Ok(())
}

/// Lets all clients idle, and notes the CPU time of a connection in a second.
fn idle(bench: &mut Bench, duration: Duration) {
    bench.progress.phase("idle");
    let start = bench.moment();
    std::thread::sleep(duration);
    let spent = bench.spent_since(&start);
    let elapsed = spent.elapsed as f64;
    let connection_seconds = f64::from(bench.common.connections) * elapsed / 1e9;
    for (who, spent) in [("server", spent.server), ("redis", spent.redis), ("client", spent.client)]
    {
        let name = format!("idle_{who}_cpu_us_per_connection_second");
        bench.report.ratio(&name, spent as f64 / 1e3, connection_seconds);
        bench.report.ratio(&format!("idle_{who}_cpu_percent"), spent as f64 * 100.0, elapsed);
    }
}

fn memory(bench: &mut Bench, patience: Duration) -> Memory {
    let instances = settle(bench, patience);
    let of = |processes: &Processes| processes.memory().resident;
    Memory { instances, clients: of(&bench.own), redis: of(&bench.redis), kernel: Kernel::now() }
}

/// Notes what the kernel, Redis and the load generators take for each connection. Both ends of a connection are on this
/// host and have the same objects of the kernel, so that one end has half of them.
fn note_others(report: &mut Report, few: &Memory, many: &Memory, more: f64) {
    let mut note = |name: &str, few: u64, many: u64| {
        report.ratio(name, many.saturating_sub(few) as f64, more);
    };
    note("client_bytes_per_connection", few.clients, many.clients);
    note("redis_bytes_per_connection", few.redis, many.redis);
    let (before, after) = (&few.kernel, &many.kernel);
    note("kernel_bytes_per_connection_both_ends", before.slab, after.slab);
    note("kernel_bytes_per_connection_at_server", before.slab / 2, after.slab / 2);
    note("host_bytes_per_connection", after.available, before.available);
    report.figure("host_used_bytes", many.kernel.total.saturating_sub(many.kernel.available));
}
