//! The instance of most members of a room is killed: members at another instance see each leave, once.

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::{Options, QUIET, SECOND, Stage};
use crate::clock::{NS_PER_SECOND, now_ns, ns};
use crate::fleet::Span;
use crate::report::Report;

pub(super) fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let [first, other] = common.pid[..] else { bail!("two --pid are needed: --server, --other") };
    let at_other = options.other.context("--other is needed")?;
    let gone = Span::all(common.connections);
    let watchers = Span { first: gone.count, count: options.watchers };
    let mut stage = Stage::new(options, gone.count + watchers.count)?;
    stage.bench.server = crate::procfs::Processes::new(&[other]);
    stage.bench.report.set("watchers", watchers.count);
    stage.crew.watch(watchers);
    stage.crew.redirect(at_other);
    stage.crew.join(watchers, 1)?;
    stage.crew.redirect(common.server);
    stage.crew.join(gone, common.in_flight)?;
    stage.rest(QUIET);
    let opened = stage.crew.report();
    stage.judge(&opened);
    each_once(&mut stage, gone, watchers, "join", |(joins, _)| joins);

    let pid = i32::try_from(first).ok().and_then(Pid::from_raw).context("that is no process id")?;
    let start = stage.bench.moment();
    let killed_ns = now_ns();
    kill_process(pid, Signal::KILL).context("the instance cannot be killed")?;
    let wanted = u64::from(gone.count) * u64::from(watchers.count);
    let deadline_ns = killed_ns + ns(common.timeout) * 2;
    while stage.crew.seen().left < wanted && now_ns() < deadline_ns {
        stage.crew.turn(now_ns() + NS_PER_SECOND / 20);
    }
    stage.note_cores("server_cores", &start);
    // Leaves that come twice would come now.
    stage.rest(QUIET);
    let seen = stage.crew.report();
    let report = &mut stage.bench.report;
    report.figure("leaves_told", seen.left);
    report.ratio("all_left_s", seen.left_last_ns.saturating_sub(killed_ns) as f64, SECOND);
    let here = stage.crew.ready(watchers);
    report.problem_if(here < watchers.count, || "a member that stays was closed".to_owned());
    each_once(&mut stage, gone, watchers, "leave", |(_, leaves)| leaves);
    Ok(stage.bench.report)
}

/// Notes of how many members a watcher was told too often or not at all.
fn each_once(
    stage: &mut Stage,
    of: Span,
    watchers: Span,
    what: &str,
    count: impl Fn((u8, u8)) -> u8,
) {
    let (mut missed, mut repeated) = (0u64, 0u64);
    for watcher in watchers.first..watchers.first + watchers.count {
        for told in &stage.crew.told(watcher)[..of.count as usize] {
            let times = count(*told);
            missed += u64::from(times == 0);
            repeated += u64::from(times > 1);
        }
    }
    let report = &mut stage.bench.report;
    report.figure(&format!("{what}_missed"), missed);
    report.figure(&format!("{what}_repeated"), repeated);
    report.problem_if(missed > 0, || format!("{missed} times a member was told of no {what}"));
    report.problem_if(repeated > 0, || format!("{repeated} times a {what} was told twice"));
}
