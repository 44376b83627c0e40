//! The memory of a member that does nothing.

use anyhow::Result;

use super::{Options, QUIET, SECOND, Stage};
use crate::fleet::Span;
use crate::report::Report;

pub(super) fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let all = common.connections;
    let from = options.from.min(all);
    let mut stage = Stage::new(options, all)?;
    anyhow::ensure!(!stage.bench.server.is_empty(), "the idle members need the server's --pid");
    stage.bench.report.set("from", from);
    // Members of a room come one after the other, so that the memory of rooms is in the growth.
    stage.crew.join(Span { first: 0, count: from }, common.in_flight)?;
    stage.rest(QUIET);
    let few = stage.bench.memory();
    let start = stage.bench.moment();
    stage.crew.join(Span { first: from, count: all - from }, common.in_flight)?;
    let spent = stage.bench.spent_since(&start);
    stage.rest(QUIET);
    let many = stage.bench.memory();
    let more = f64::from(all - from);
    let report = &mut stage.bench.report;
    report.ratio("joins_per_s", more * SECOND, spent.elapsed as f64);
    report.ratio("server_cpu_us_per_join", spent.server as f64 / 1e3, more);
    let growth = many.resident.saturating_sub(few.resident) as f64;
    report.ratio("idle_bytes_per_member", growth, more);
    let anonymous = many.anonymous.saturating_sub(few.anonymous) as f64;
    report.ratio("idle_anonymous_bytes_per_member", anonymous, more);
    report.figure("resident_bytes", many.resident);
    let seen = stage.crew.report();
    report.figure("pings", seen.tally.pings);
    stage.judge(&seen);
    let here = stage.crew.ready(Span::all(all));
    stage.bench.report.problem_if(here < all, || format!("{here} of {all} members are connected"));
    Ok(stage.bench.report)
}
