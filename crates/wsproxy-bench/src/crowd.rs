//! Many clients in several processes, spread over the instances of one Redis; knows no scenario.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::bench::Bench;
use crate::clock::{now_ns, ns};
use crate::fleet::Tally;
use crate::load::{self, Flow};
use crate::procfs::Processes;
use crate::remote::{Generator, RemoteFleet, Status};

/// All generators, with the calls of one fleet.
#[derive(Debug)]
pub struct Crowd {
    fleets: Vec<RemoteFleet>,
    /// Instances that the generators were started with, in turn.
    instances: usize,
    timeout: Duration,
    /// Heartbeats that clients have answered.
    pub pings: u64,
}

impl Crowd {
    /// Starts generators that share the clients, evenly over the instances. An empty `secret` means clients without
    /// signed tokens.
    pub fn start(bench: &Bench, servers: &[SocketAddr], secret: &str) -> Result<Self> {
        let common = &bench.common;
        let instances = servers.len() as u32;
        let each = common.connections.div_ceil(instances).div_ceil(CLIENTS_MAX).max(1);
        let generators = instances * each;
        let mut fleets = Vec::new();
        let mut first = 0;
        for number in 0..generators {
            let more = u32::from(number < common.connections % generators);
            let count = common.connections / generators + more;
            fleets.push(RemoteFleet::start(&Generator {
                server: servers[(number % instances) as usize],
                target: common.target,
                run: bench.target.run().to_owned(),
                secret: secret.to_owned(),
                first,
                count,
                sources: common.sources,
                handshake_timeout: common.timeout.as_secs().max(1),
            })?);
            first += count;
        }
        let instances = servers.len();
        Ok(Self { fleets, instances, timeout: common.timeout, pings: 0 })
    }

    /// Returns the number of generators.
    #[must_use]
    pub fn generators(&self) -> u32 {
        self.fleets.len() as u32
    }

    /// Connects the clients from `first` up to `end` of every generator, at the rate of all.
    pub fn connect(&mut self, bench: &mut Bench, rate: f64, first: u32, end: u32) -> Result<()> {
        let coming =
            self.fleets.iter().map(|fleet| fleet.count.min(end).saturating_sub(first)).collect();
        self.open(bench, "connect", Opening { first, coming, rate: Some(rate) })
    }

    /// Lets all clients of the last instance connect to the others, all at once; they must have lost their connections.
    pub fn reconnect_last(&mut self, bench: &mut Bench, servers: &[SocketAddr]) -> Result<()> {
        let last = self.instances - 1;
        let of_last = |number: usize| number % self.instances == last;
        let mut sessions = Vec::new();
        let mut coming = Vec::new();
        for (number, fleet) in self.fleets.iter_mut().enumerate() {
            coming.push(if of_last(number) { fleet.count } else { 0 });
            if of_last(number) {
                fleet.redirect(servers)?;
                sessions.push(fleet.first..fleet.first + fleet.count);
            }
        }
        // A one-time token was used up.
        bench.publisher.set_tokens(sessions.into_iter().flatten())?;
        self.open(bench, "storm", Opening { first: 0, coming, rate: None })
    }

    fn open(&mut self, bench: &mut Bench, phase: &str, opening: Opening) -> Result<()> {
        bench.progress.phase(phase);
        let before = self.status()?;
        let start = bench.moment();
        let all: u32 = opening.coming.iter().sum();
        for (fleet, &count) in self.fleets.iter_mut().zip(&opening.coming) {
            let share = f64::from(count) / f64::from(all.max(1));
            if count > 0 {
                fleet.open(opening.first, count, opening.rate.map(|rate| rate * share))?;
            }
        }
        let wanted = u64::from(all);
        let settled = |status: &Status| status.opened + status.failed;
        let complete = self.wait(settled, settled(&before) + wanted)?;
        let opened = self.status()?.opened - before.opened;
        bench.note_cpu(&start, opened, "connect");
        bench.rename_cpu(phase);
        let tally = self.report()?;
        let report = &mut bench.report;
        report.problem_if(!complete, || "not every handshake ended in time".to_owned());
        report.quantiles(phase, &tally.handshake);
        report.problem_if(opened < wanted, || format!("{opened} of {wanted} clients connected"));
        report.figure(if phase == "connect" { "opened" } else { "reopened" }, opened);
        bench.judge(&tally, false);
        ensure!(opened > 0, "no client could connect");
        Ok(())
    }

    /// Publishes at the flows' rates, and notes deliveries and latencies.
    pub fn phase(
        &mut self,
        bench: &mut Bench,
        flows: &mut [Flow],
        name: &str,
        duration: Duration,
    ) -> Result<()> {
        bench.progress.phase(name);
        let before = self.status()?;
        let published: Vec<u64> = flows.iter().map(Flow::published).collect();
        let start = bench.moment();
        let tick = bench.common.tick();
        let steady = load::steady(&mut bench.publisher, flows, tick, duration, || {})?;
        let receivers = |flow: &Flow| if flow.is_to_all() { before.open_now } else { 1 };
        let expected = flows
            .iter()
            .zip(published)
            .map(|(flow, published)| (flow.published() - published) * receivers(flow))
            .sum();
        let complete = self.wait(|status| status.delivered, before.delivered + expected)?;
        bench.note_cpu(&start, expected, "delivery");
        bench.rename_cpu(name);
        let delivered = self.status()?.delivered - before.delivered;
        let tally = self.report()?;
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
        let lost = expected.saturating_sub(delivered);
        report.problem_if(!complete, || format!("{name}: {lost} of {expected} messages were lost"));
        report.problem_if(delivered > expected, || {
            format!("{name}: {} messages came that were never sent", delivered - expected)
        });
        bench.judge(&tally, false);
        Ok(())
    }

    /// Notes the memory of each instance between `few_each` clients of every generator and all of them. Instances that
    /// share a port share its clients by chance: of those only the sum is known.
    pub fn note_memory(&self, bench: &mut Bench, few_each: u32, few: &[u64], many: &[u64]) {
        let more = |instance: usize, step: usize| -> f64 {
            let fleets = self.fleets.iter().skip(instance).step_by(step);
            let more: u32 = fleets.map(|fleet| fleet.count.saturating_sub(few_each)).sum();
            f64::from(more.max(1))
        };
        let mut worst = 0.0f64;
        for (instance, (few, many)) in few.iter().zip(many).enumerate() {
            let each = many.saturating_sub(*few) as f64 / more(instance, self.instances);
            worst = worst.max(each);
            bench.report.ratio(&format!("instance_{instance}_bytes_per_connection"), each, 1.0);
            bench.report.figure(&format!("instance_{instance}_resident_bytes"), *many);
        }
        let growth = many.iter().sum::<u64>().saturating_sub(few.iter().sum());
        bench.report.ratio("bytes_per_connection", worst, 1.0);
        bench.report.ratio("bytes_per_connection_of_all", growth as f64, more(0, 1));
    }

    /// Returns the totals of all generators.
    pub fn status(&mut self) -> Result<Status> {
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

    /// Returns the figures of all generators since the last report.
    pub fn report(&mut self) -> Result<Tally> {
        let mut total = Tally::default();
        for fleet in &mut self.fleets {
            total.add(&fleet.report()?);
        }
        self.pings += total.pings;
        Ok(total)
    }

    /// Waits until the clients of the last instance have seen its end; `all` clients were connected before it. Returns the
    /// number of those that were cut off.
    pub fn wait_lost(&mut self, all: u64) -> Result<u64> {
        let of_last: u32 = self
            .fleets
            .iter()
            .skip(self.instances - 1)
            .step_by(self.instances)
            .map(|f| f.count)
            .sum();
        let lost = u64::from(of_last);
        self.wait(|status| all.saturating_sub(status.open_now), lost)?;
        Ok(lost)
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

/// Connects of some clients of each generator.
struct Opening {
    /// Number of the first client in each generator.
    first: u32,
    /// Number of clients of each generator.
    coming: Vec<u32>,
    /// Connects per second of all together; `None`: all at once.
    rate: Option<f64>,
}

/// Waits until the memory of each process stops changing, and returns it.
pub fn settle(bench: &mut Bench, patience: Duration) -> Vec<u64> {
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

/// Upper bound of clients per generator: a process has some 20,000 descriptors.
const CLIENTS_MAX: u32 = 19_000;
const POLL_INTERVAL: Duration = Duration::from_millis(20);
const SAMPLE_INTERVAL: Duration = Duration::from_millis(500);
const STILL_SAMPLES: u32 = 4;
const STILL_BYTES: u64 = 64 * 1024;
