//! A large room, into which others come at a rate: the time until each has all of the room's state.

use anyhow::Result;

use super::{Options, QUIET, Stage};
use crate::fleet::Span;
use crate::report::Report;

pub(super) fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let members = Span::all(common.connections);
    let joining = Span { first: members.count, count: options.joins };
    let mut stage = Stage::new(options, members.count + joining.count)?;
    stage.bench.report.set("joins_per_s", options.joins);
    stage.crew.join(members, common.in_flight)?;
    // Each member has its avatar at a place.
    stage.move_for(members, 1.0, std::time::Duration::from_secs(1));
    stage.rest(QUIET);
    let opened = stage.crew.report();
    stage.judge(&opened);

    let (mut joined, mut left) = (0, 0);
    let (mut server_ns, mut elapsed_ns) = (0, 0);
    let mut hello = opened.tally.handshake;
    hello.reset();
    for _ in 0..options.rounds {
        let start = stage.bench.moment();
        stage.crew.join_at(joining, f64::from(joining.count))?;
        let spent = stage.bench.spent_since(&start);
        server_ns += spent.server;
        elapsed_ns += spent.elapsed;
        stage.rest(QUIET);
        let seen = stage.crew.report();
        stage.judge(&seen);
        // The bounds of both are the same, so that they can be added.
        let _ = hello.add(&seen.tally.handshake);
        joined += seen.joined;
        stage.crew.leave(joining);
        stage.rest(QUIET);
        let seen = stage.crew.report();
        stage.judge(&seen);
        left += seen.left;
    }
    let report = &mut stage.bench.report;
    report.quantiles("hello", &hello);
    report.ratio("server_cores", server_ns as f64, elapsed_ns as f64);
    let rounds = u64::from(options.rounds);
    let (here, more) = (u64::from(members.count), u64::from(joining.count));
    // Members hear of all who come and go. Those who come hear of later ones, unless their state has them already, and
    // those who go hear of others until they are gone.
    let due = rounds * here * more;
    let most = due + rounds * more * more.saturating_sub(1) / 2;
    report.figure("joins_told", joined);
    report.figure("leaves_told", left);
    for (what, told) in [("joins", joined), ("leaves", left)] {
        report.problem_if(!(due..=most).contains(&told), || {
            format!("{told} {what} were told, not {due} to {most}")
        });
    }
    Ok(stage.bench.report)
}
