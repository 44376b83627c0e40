//! Users at the event endpoint of several instances on one Redis: their handshakes, their cost, and the latency of
//! messages to one user and to all.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;

use crate::bench::{Bench, Layout};
use crate::crowd::{Crowd, settle};
use crate::load::Flow;
use crate::options::{Common, seconds};
use crate::procfs::Processes;
use crate::report::Report;
use crate::target::Kind;

/// Options of the scenario.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// The instances; --pid names their processes in the same order.
    #[arg(long, value_delimiter = ',', required = true)]
    servers: Vec<SocketAddr>,
    /// Secret that the instances verify tokens with.
    #[arg(long)]
    secret: String,
    /// Connections per second over all instances.
    #[arg(long, default_value_t = 1_000.0)]
    connect_rate: f64,
    /// Memory is compared between this many connections and all of them.
    #[arg(long, default_value_t = 3_000)]
    from: u32,
    /// Messages to one user per second.
    #[arg(long, default_value_t = 3_000.0)]
    rate: f64,
    /// Messages to all users per second.
    #[arg(long, default_value_t = 1.0)]
    broadcast_rate: f64,
    /// Publish without history.
    #[arg(long)]
    plain: bool,
    /// Longest wait for memory to stop changing, in seconds.
    #[arg(long, default_value = "10", value_parser = seconds)]
    settle: Duration,
}

/// Runs the scenario.
pub fn run(options: &Options) -> Result<Report> {
    let mut common = options.common.clone();
    common.target = Kind::Events;
    let (clients, instances) = (common.connections, options.servers.len());
    ensure!(common.pid.len() == instances, "each of --servers needs its --pid");
    let layout = Layout::sessions(0);
    let mut bench = Bench::start("cluster", &common, layout)?;
    // The generators are this process' children.
    bench.own = Processes::new(&[std::process::id()]);
    bench.report.set("connections", clients);
    bench.report.set("instances", instances);
    bench.report.set("connect_rate_per_s", options.connect_rate);
    bench.report.set("history", !options.plain);
    bench.publisher.keep_history(!options.plain)?;
    let mut crowd = Crowd::start(&bench, &options.servers, &options.secret)?;

    let from = options.from.min(clients);
    let few_each = from.div_ceil(crowd.generators());
    crowd.connect(&mut bench, options.connect_rate, 0, few_each)?;
    let few = settle(&mut bench, options.settle);
    crowd.connect(&mut bench, options.connect_rate, few_each, u32::MAX)?;
    let many = settle(&mut bench, options.settle);
    crowd.note_memory(&mut bench, few_each, &few, &many);

    let mut flows = [
        Flow::new(0, clients, common.size, options.rate),
        Flow::to_all(common.size, options.broadcast_rate),
    ];
    crowd.phase(&mut bench, &mut flows, "warm_up", common.warmup)?;
    for (name, rate, broadcast_rate) in [
        ("users", options.rate, 0.0),
        ("broadcast", 0.0, options.broadcast_rate),
        ("both", options.rate, options.broadcast_rate),
    ] {
        flows[0].set_rate(rate);
        flows[1].set_rate(broadcast_rate);
        crowd.phase(&mut bench, &mut flows, name, common.duration)?;
    }
    bench.judge_unheard();
    bench.report.figure("heartbeats_answered", crowd.pings);
    let open = crowd.status()?.open_now;
    bench.report.problem_if(open < u64::from(clients), || {
        format!("{open} of {clients} clients are connected at the end")
    });
    Ok(bench.report)
}
