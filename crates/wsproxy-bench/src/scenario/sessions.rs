//! Many sessions with a channel each; messages are spread over them at one or several rates, or in rounds.

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::bench::{Bench, Layout, Moment};
use crate::fleet::{Span, Tally};
use crate::load::{self, Flow, Rounds, Steady};
use crate::options::Common;
use crate::report::Report;

/// Options of the scenario.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Messages per second over all sessions; several rates are tried one after the other, until one is not held.
    #[arg(long, value_delimiter = ',', default_value = "10000")]
    rates: Vec<f64>,
    /// A rate counts as held when 99 % of its messages arrive within this many milliseconds.
    #[arg(long, default_value_t = 50.0)]
    hold_p99_ms: f64,
    /// Messages published at once, to as many sessions in turn, the next ones when all have arrived; instead of
    /// a rate.
    #[arg(long)]
    burst: Option<u64>,
}

/// Figures of one rate.
struct Step {
    steady: Steady,
    delivered: u64,
    tally: Tally,
    start: Moment,
}

/// Runs the scenario.
pub fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let clients = common.connections;
    let layout = Layout::sessions(clients);
    let mut bench = Bench::start("sessions", common, layout)?;
    bench.open(Span::all(clients))?;
    let mut flow = Flow::new(0, clients, common.size, 0.0);
    if let Some(burst) = options.burst {
        in_rounds(&mut bench, &mut flow, burst)?;
        return Ok(bench.report);
    }
    let ramp = options.rates.len() > 1;
    let mut highest = 0.0;
    let mut steps = Vec::new();
    for &rate in &options.rates {
        flow.set_rate(rate);
        bench.progress.phase(&format!("warm up at {rate}/s"));
        let warm = step(&mut bench, &mut flow, common.warmup)?;
        if !ramp {
            bench.judge(&warm.tally, false);
        }
        bench.progress.phase(&format!("measure at {rate}/s"));
        let step = step(&mut bench, &mut flow, common.duration)?;
        note(&mut bench, &step);
        let held = is_held(&step, options.hold_p99_ms);
        if !ramp {
            judge(&mut bench, rate, &step);
        }
        let mut figures = bench.report.figures.clone();
        figures.insert("rate_per_s".to_owned(), json!(rate));
        figures.insert("held".to_owned(), json!(held));
        steps.push(figures);
        if held {
            highest = rate;
        } else {
            break;
        }
    }
    bench.report.set("rates_per_s", options.rates.clone());
    if ramp {
        // A ramp is meant to find the rate that is too high. Its first rate must be held.
        bench.report.problem_if(highest == 0.0, || "not even the first rate was held".to_owned());
        bench.report.figure("highest_rate_held_per_s", highest);
        bench.report.figure("steps", steps);
    }
    Ok(bench.report)
}

fn in_rounds(bench: &mut Bench, flow: &mut Flow, burst: u64) -> Result<()> {
    let timeout = bench.common.timeout;
    bench.report.set("burst", burst);
    for (phase, duration) in [("warm up", bench.common.warmup), ("measure", bench.common.duration)]
    {
        bench.progress.phase(phase);
        let start = bench.moment();
        let published = flow.published();
        let Bench { publisher, fleet, progress, .. } = bench;
        let counters = fleet.counters();
        let delivered = counters.delivered();
        let plan = Rounds { burst, receivers: 1, duration, timeout };
        load::rounds(publisher, counters, progress, flow, plan)?;
        let delivered = counters.delivered() - delivered;
        let published = flow.published() - published;
        let steady = Steady { published, ..Steady::default() };
        let step = Step { steady, delivered, tally: bench.fleet.report()?, start };
        note(bench, &step);
        judge(bench, 0.0, &step);
    }
    Ok(())
}

fn step(bench: &mut Bench, flow: &mut Flow, duration: Duration) -> Result<Step> {
    let start = bench.moment();
    let tick = bench.common.tick();
    let Bench { publisher, fleet, progress, .. } = bench;
    let counters = fleet.counters();
    let before = counters.delivered();
    let flows = std::slice::from_mut(flow);
    let steady = load::steady(publisher, flows, tick, duration, || progress.tick(counters))?;
    // Messages that do not come show in the figures.
    let _ = counters.wait_delivered(before + steady.published, LATE);
    let delivered = counters.delivered() - before;
    Ok(Step { steady, delivered, tally: bench.fleet.report()?, start })
}

fn note(bench: &mut Bench, step: &Step) {
    bench.note_cpu(&step.start, step.delivered, "delivery");
    let report = &mut bench.report;
    report.figure("published", step.steady.published);
    report.figure("delivered", step.delivered);
    report.figure("unsent", step.steady.unsent);
    report.ratio("deliveries_per_s", step.delivered as f64, report.seconds("measured_s"));
    report.ratio("publisher_late_max_ms", step.steady.late_ns_max as f64, 1e6);
    report.quantiles("latency", &step.tally.latency);
}

fn judge(bench: &mut Bench, rate: f64, step: &Step) {
    bench.report.problem_if(step.steady.unsent > 0, || {
        format!("{} messages could not be published at {rate}/s", step.steady.unsent)
    });
    bench.judge(&step.tally, false);
    bench.judge_deliveries(step.steady.published, step.delivered);
    bench.judge_unheard();
}

fn is_held(step: &Step, hold_p99_ms: f64) -> bool {
    let p99_ms = step.tally.latency.value_at_quantile(0.99) as f64 / 1e6;
    let whole = step.delivered == step.steady.published && step.steady.unsent == 0;
    let undisturbed = step.tally.endings.is_empty() && step.tally.out_of_order == 0;
    whole && undisturbed && p99_ms < hold_p99_ms
}

/// Longest wait for messages after the last one was published; later ones count as lost.
const LATE: Duration = Duration::from_secs(5);
