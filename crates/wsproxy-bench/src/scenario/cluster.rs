//! Users at the event endpoint of several instances on one Redis: their handshakes, their cost, and the latency of
//! messages to one user and to all.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;

use crate::bench::{Bench, Layout};
use crate::clock::{now_ns, ns};
use crate::fleet::Tally;
use crate::load::{self, Flow};
use crate::options::{Common, seconds};
use crate::procfs::Processes;
use crate::remote::{Generator, RemoteFleet, Status};
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

/// All generators, with the calls of one fleet.
struct Crowd {
    fleets: Vec<RemoteFleet>,
    timeout: Duration,
    /// Heartbeats that clients have answered.
    pings: u64,
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
    let mut crowd = Crowd::start(&bench, options)?;

    let from = options.from.min(clients);
    let few_each = from.div_ceil(crowd.fleets.len() as u32);
    connect(&mut bench, &mut crowd, options, 0, few_each)?;
    let few = settle(&mut bench, options.settle);
    connect(&mut bench, &mut crowd, options, few_each, u32::MAX)?;
    let many = settle(&mut bench, options.settle);
    note_memory(&mut bench, &crowd, few_each, &few, &many);

    let mut flows = [
        Flow::new(0, clients, common.size, options.rate),
        Flow::to_all(common.size, options.broadcast_rate),
    ];
    phase(&mut bench, &mut crowd, &mut flows, "warm_up", common.warmup)?;
    for (name, rate, broadcast_rate) in [
        ("users", options.rate, 0.0),
        ("broadcast", 0.0, options.broadcast_rate),
        ("both", options.rate, options.broadcast_rate),
    ] {
        flows[0].set_rate(rate);
        flows[1].set_rate(broadcast_rate);
        phase(&mut bench, &mut crowd, &mut flows, name, common.duration)?;
    }
    bench.judge_unheard();
    bench.report.figure("heartbeats_answered", crowd.pings);
    let open = crowd.status()?.open_now;
    bench.report.problem_if(open < u64::from(clients), || {
        format!("{open} of {clients} clients are connected at the end")
    });
    Ok(bench.report)
}

/// Connects the clients from `first` up to `end` of every generator, at the rate.
fn connect(
    bench: &mut Bench,
    crowd: &mut Crowd,
    options: &Options,
    first: u32,
    end: u32,
) -> Result<()> {
    bench.progress.phase("connect");
    let before = crowd.status()?;
    let start = bench.moment();
    let mut wanted = 0u64;
    let coming: Vec<u32> =
        crowd.fleets.iter().map(|fleet| fleet.count.min(end).saturating_sub(first)).collect();
    let all: u32 = coming.iter().sum();
    for (fleet, count) in crowd.fleets.iter_mut().zip(coming) {
        let rate = options.connect_rate * f64::from(count) / f64::from(all.max(1));
        if count > 0 {
            fleet.open(first, count, rate)?;
            wanted += u64::from(count);
        }
    }
    let settled = |status: &Status| status.opened + status.failed;
    let complete = crowd.wait(settled, settled(&before) + wanted)?;
    let tally = crowd.report()?;
    let report = &mut bench.report;
    report.problem_if(!complete, || "not every handshake ended in time".to_owned());
    report.quantiles("connect", &tally.handshake);
    let opened = crowd.status()?.opened - before.opened;
    report.problem_if(opened < wanted, || format!("{opened} of {wanted} clients connected"));
    report.figure("opened", opened);
    bench.note_cpu(&start, opened, "connect");
    bench.rename_cpu("connect");
    bench.judge(&tally, false);
    ensure!(opened > 0, "no client could connect");
    Ok(())
}

/// Publishes at the flows' rates, and notes deliveries and latencies.
fn phase(
    bench: &mut Bench,
    crowd: &mut Crowd,
    flows: &mut [Flow; 2],
    name: &str,
    duration: Duration,
) -> Result<()> {
    bench.progress.phase(name);
    let before = crowd.status()?;
    let published: Vec<u64> = flows.iter().map(Flow::published).collect();
    let start = bench.moment();
    let tick = bench.common.tick();
    let steady = load::steady(&mut bench.publisher, flows, tick, duration, || {})?;
    let [users, all] = [0, 1].map(|flow| flows[flow].published() - published[flow]);
    let expected = users + all * before.open_now;
    let complete = crowd.wait(|status| status.delivered, before.delivered + expected)?;
    bench.note_cpu(&start, expected, "delivery");
    bench.rename_cpu(name);
    let delivered = crowd.status()?.delivered - before.delivered;
    let tally = crowd.report()?;
    if name == "warm_up" {
        bench.judge(&tally, false);
        return Ok(());
    }
    let report = &mut bench.report;
    report.figure(&format!("{name}_delivered"), delivered);
    report.ratio(&format!("{name}_publisher_late_max_ms"), steady.late_ns_max as f64, 1e6);
    report.quantiles(&format!("{name}_user_latency"), &tally.latency);
    report.quantiles(&format!("{name}_broadcast_latency"), &tally.shared_latency);
    report.problem_if(steady.unsent > 0, || {
        format!("{name}: {} messages could not be published", steady.unsent)
    });
    report.problem_if(!complete, || {
        format!("{name}: {} of {expected} messages were lost", expected.saturating_sub(delivered))
    });
    report.problem_if(delivered > expected, || {
        format!("{name}: {} messages came that were never sent", delivered - expected)
    });
    bench.judge(&tally, false);
    Ok(())
}

/// Waits until the memory of each instance stops changing, and returns it.
fn settle(bench: &mut Bench, patience: Duration) -> Vec<u64> {
    bench.progress.phase("settle");
    let instances: Vec<Processes> =
        bench.common.pid.iter().map(|pid| Processes::new(&[*pid])).collect();
    let memory = || instances.iter().map(|instance| instance.memory().resident).collect();
    let deadline = now_ns() + ns(patience);
    let mut last: Vec<u64> = memory();
    let mut still = 0;
    while now_ns() < deadline && still < STILL_SAMPLES {
        std::thread::sleep(SAMPLE_INTERVAL);
        let now: Vec<u64> = memory();
        let moved = now.iter().zip(&last).any(|(now, last)| now.abs_diff(*last) > STILL_BYTES);
        still = if moved { 0 } else { still + 1 };
        last = now;
    }
    last
}

fn note_memory(bench: &mut Bench, crowd: &Crowd, few_each: u32, few: &[u64], many: &[u64]) {
    let instances = few.len();
    let mut worst = 0.0f64;
    for (instance, (few, many)) in few.iter().zip(many).enumerate() {
        let more: u32 = crowd
            .fleets
            .iter()
            .skip(instance)
            .step_by(instances)
            .map(|fleet| fleet.count.saturating_sub(few_each))
            .sum();
        let each = many.saturating_sub(*few) as f64 / f64::from(more.max(1));
        worst = worst.max(each);
        bench.report.ratio(&format!("instance_{instance}_bytes_per_connection"), each, 1.0);
        bench.report.figure(&format!("instance_{instance}_resident_bytes"), *many);
    }
    bench.report.ratio("bytes_per_connection", worst, 1.0);
}

impl Crowd {
    /// Spreads the clients over generators, evenly over the instances.
    fn start(bench: &Bench, options: &Options) -> Result<Self> {
        let common = &options.common;
        let instances = options.servers.len() as u32;
        let each = common.connections.div_ceil(instances).div_ceil(CLIENTS_MAX).max(1);
        let generators = instances * each;
        let mut fleets = Vec::new();
        let mut first = 0;
        for number in 0..generators {
            let more = u32::from(number < common.connections % generators);
            let count = common.connections / generators + more;
            fleets.push(RemoteFleet::start(&Generator {
                server: options.servers[(number % instances) as usize],
                run: bench.target.run().to_owned(),
                secret: options.secret.clone(),
                first,
                count,
                sources: common.sources,
                handshake_timeout: common.timeout.as_secs().max(1),
            })?);
            first += count;
        }
        Ok(Self { fleets, timeout: common.timeout, pings: 0 })
    }

    fn status(&mut self) -> Result<Status> {
        let mut total = Status::default();
        for fleet in &mut self.fleets {
            let status = fleet.status()?;
            total.opened += status.opened;
            total.failed += status.failed;
            total.open_now += status.open_now;
            total.delivered += status.delivered;
        }
        Ok(total)
    }

    fn report(&mut self) -> Result<Tally> {
        let mut total = Tally::default();
        for fleet in &mut self.fleets {
            total.add(&fleet.report()?);
        }
        self.pings += total.pings;
        Ok(total)
    }

    /// Waits until a total is reached; false when progress stops before that.
    fn wait(&mut self, what: impl Fn(&Status) -> u64, wanted: u64) -> Result<bool> {
        let (mut last, mut since_ns) = (0, now_ns());
        loop {
            let now = what(&self.status()?);
            if now >= wanted {
                return Ok(true);
            }
            if now != last {
                (last, since_ns) = (now, now_ns());
            }
            if now_ns() - since_ns > ns(self.timeout) {
                return Ok(false);
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

/// Upper bound of clients per generator: a process has some 20,000 descriptors.
const CLIENTS_MAX: u32 = 19_000;
const POLL_INTERVAL: Duration = Duration::from_millis(20);
const SAMPLE_INTERVAL: Duration = Duration::from_millis(500);
const STILL_SAMPLES: u32 = 4;
const STILL_BYTES: u64 = 64 * 1024;
