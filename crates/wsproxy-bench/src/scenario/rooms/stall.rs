//! All members move, and one stops reading: the effect on the others, and the memory that it takes.

use anyhow::Result;

use super::{Options, RESUMED, Stage, note_moves};
use crate::clock::{NS_PER_SECOND, now_ns, ns};
use crate::fleet::Span;
use crate::report::Report;
use crate::rooms::Pace;

pub(super) fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let all = Span::all(common.connections);
    let victim = all.count.saturating_sub(1);
    let mut stage = Stage::new(options, all.count)?;
    stage.bench.report.set("hz", options.hz);
    stage.crew.join(all, common.in_flight)?;
    stage.move_for(all, options.hz, common.warmup);
    let warm = stage.crew.report();
    stage.judge(&warm);

    let before_bytes = resident_while(&mut stage, all, options);
    let before = stage.crew.report();
    note_moves(&mut stage.bench.report, "all_read_", &before, common.duration);
    stage.judge(&before);

    stage.crew.set_stalled(victim, true);
    let during_bytes = resident_while(&mut stage, all, options);
    let during = stage.crew.report();
    let report = &mut stage.bench.report;
    note_moves(report, "one_stalled_", &during, common.duration);
    report.figure("all_read_resident_bytes", before_bytes);
    report.figure("one_stalled_resident_bytes", during_bytes);
    report.figure("stalled_bytes", during_bytes.saturating_sub(before_bytes));
    let (p99, p99_before) =
        (report.seconds("one_stalled_move_p99_ms"), report.seconds("all_read_move_p99_ms"));
    report.ratio("p99_ratio", p99, p99_before);
    stage.judge(&during);

    // A member that reads again must get the newest position of all others, not all that it has missed.
    stage.crew.set_stalled(victim, false);
    let resumed_ns = now_ns();
    stage.judge_missing(RESUMED);
    stage.bench.report.ratio("caught_up_ms", (now_ns() - resumed_ns) as f64, 1e6);
    let rest = stage.crew.report();
    stage.bench.report.figure("caught_up_bytes", rest.tally.bytes);
    stage.judge(&rest);
    Ok(stage.bench.report)
}

/// Lets all move for the measured phase, and returns the greatest memory of the server.
fn resident_while(stage: &mut Stage, span: Span, options: &Options) -> u64 {
    let start_ns = now_ns();
    let end_ns = start_ns + ns(options.common.duration);
    stage.crew.begin(Pace { span, hz: options.hz, start_ns, end_ns });
    let mut most = 0;
    while now_ns() < end_ns {
        stage.crew.turn((now_ns() + NS_PER_SECOND / 2).min(end_ns));
        most = most.max(stage.bench.memory().resident);
    }
    most
}
