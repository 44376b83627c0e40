//! All members move at a rate; each sees the others of its room.

use anyhow::Result;

use super::{LATE, Options, SECOND, Stage, note_moves};
use crate::fleet::Span;
use crate::report::Report;

pub(super) fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let all = Span::all(common.connections);
    let mut stage = Stage::new(options, all.count)?;
    stage.bench.report.set("hz", options.hz);
    stage.crew.join(all, common.in_flight)?;
    stage.move_for(all, options.hz, common.warmup);
    let warm = stage.crew.report();
    stage.judge(&warm);

    let (moved, commands) = (stage.crew.moved(), stage.bench.publisher.server_commands());
    let start = stage.bench.moment();
    stage.move_for(all, options.hz, common.duration);
    stage.note_cores("server_cores", &start);
    let spent = stage.bench.spent_since(&start);
    let after = stage.bench.publisher.server_commands();
    let seen = stage.crew.report();
    stage.bench.note_cpu(&start, seen.moves, "delivery");
    let moved = stage.crew.moved() - moved;

    let report = &mut stage.bench.report;
    note_moves(report, "", &seen, common.duration);
    report.ratio("moves_per_s", moved as f64, common.duration.as_secs_f64());
    // Each move is for all others in the room of its member.
    let others = (f64::from(all.count) / f64::from(options.rooms) - 1.0).max(0.0);
    report.ratio("delivered_share", seen.moves as f64, moved as f64 * others);
    if let (Some(before), Some(after)) = (commands, after) {
        let done = after.saturating_sub(before) as f64;
        report.ratio("redis_commands_per_s", done * SECOND, spent.elapsed as f64);
    }
    stage.judge(&seen);
    stage.judge_missing(LATE);
    let rest = stage.crew.report();
    stage.judge(&rest);
    Ok(stage.bench.report)
}
