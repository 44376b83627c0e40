//! Members of rooms: moves and who sees them, joins into a large room, an instance that is killed, memory.

mod idle;
mod join;
mod killed;
mod moves;
mod stall;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::bench::{Bench, Layout};
use crate::clock::{NS_PER_SECOND, now_ns, ns};
use crate::fleet::Span;
use crate::options::Common;
use crate::report::Report;
use crate::rooms::{Crew, CrewConfig, Dialect, Pace, Seen};

/// Options of the scenario. Members name themselves: a gateway has to be in development mode.
#[derive(Debug, Args)]
pub struct Options {
    /// Behaviour of the members.
    #[arg(value_enum)]
    what: What,
    #[command(flatten)]
    pub(crate) common: Common,
    /// Form of the messages; takes the place of --target.
    #[arg(long, value_enum, default_value = "rooms")]
    dialect: Dialect,
    /// Number of rooms, each with as many members.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    rooms: u32,
    /// Moves of a member per second.
    #[arg(long, default_value_t = 20.0)]
    hz: f64,
    /// Members take each position in a message of its own.
    #[arg(long)]
    single: bool,
    /// `idle`: memory is compared between this many members and all of them.
    #[arg(long, default_value_t = 1_000)]
    from: u32,
    /// `join`: members that come in one second.
    #[arg(long, default_value_t = 200)]
    joins: u32,
    /// `join`: how often that many come and go.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// `killed`: the instance of the members that stay. --pid names both, that of --server first.
    #[arg(long)]
    other: Option<SocketAddr>,
    /// `killed`: number of the members that stay.
    #[arg(long, default_value_t = 5)]
    watchers: u32,
}

/// Behaviour of the members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// All of them move.
    Moves,
    /// All of them move, and one stops reading.
    Stall,
    /// Others join their room at a rate.
    Join,
    /// Their instance is killed.
    Killed,
    /// Nothing.
    Idle,
}

/// Runs the scenario.
pub fn run(options: &Options) -> Result<Report> {
    match options.what {
        What::Moves => moves::run(options),
        What::Stall => stall::run(options),
        What::Join => join::run(options),
        What::Killed => killed::run(options),
        What::Idle => idle::run(options),
    }
}

/// A benchmark whose clients are the members of a crew.
struct Stage {
    bench: Bench,
    crew: Crew,
}

impl Stage {
    /// Creates `members` members; none connects yet.
    fn new(options: &Options, members: u32) -> Result<Self> {
        let common = &options.common;
        anyhow::ensure!(
            members.is_multiple_of(options.rooms),
            "rooms must have as many members each"
        );
        // The fleet has no clients: a crew has those of this scenario.
        let mut bench = Bench::start("rooms", common, Layout::sessions(0))?;
        let what = options.what.to_possible_value();
        let dialect = options.dialect.to_possible_value();
        let name = |value: Option<clap::builder::PossibleValue>| {
            value.map(|value| value.get_name().to_owned()).unwrap_or_default()
        };
        bench.report.target = name(dialect);
        bench.report.set("what", name(what));
        bench.report.set("connections", members);
        bench.report.set("rooms", options.rooms);
        bench.report.set("batch", !options.single);
        bench.report.settings.remove("size_bytes");
        let crew = Crew::new(CrewConfig {
            server: common.server,
            dialect: options.dialect,
            run: bench.target.run().to_owned(),
            members,
            rooms: options.rooms,
            batch: !options.single,
            sources: common.sources,
            tick: common.tick(),
            timeout: common.timeout,
        })?;
        Ok(Self { bench, crew })
    }

    /// Lets members move for a while.
    fn move_for(&mut self, span: Span, hz: f64, duration: Duration) {
        let start_ns = now_ns();
        let end_ns = start_ns + ns(duration);
        self.crew.begin(Pace { span, hz, start_ns, end_ns });
        self.crew.turn(end_ns);
    }

    /// Reads for a while without a move.
    fn rest(&mut self, duration: Duration) {
        self.crew.turn(now_ns() + ns(duration));
    }

    /// Notes everything that must not happen to members that read.
    fn judge(&mut self, seen: &Seen) {
        let report = &mut self.bench.report;
        for (reason, count) in &seen.tally.failures {
            report.problems.push(format!("{count} members did not join: {reason}"));
        }
        let codes = seen.tally.codes();
        report.problem_if(!codes.is_empty(), || {
            format!("the server ended connections (code: number): {codes:?}")
        });
        report.problem_if(seen.tally.out_of_order > 0, || {
            format!("{} moves were older than one that came before", seen.tally.out_of_order)
        });
        report.problem_if(seen.own > 0, || format!("{} moves came back", seen.own));
        report.problem_if(!seen.refused.is_empty(), || {
            format!("the server refused messages: {:?}", seen.refused)
        });
    }

    /// Notes the last moves that members have not got after `patience`.
    fn judge_missing(&mut self, patience: Duration) {
        let missing = self.crew.settle(patience);
        self.bench.report.figure("lost", missing);
        self.bench.report.problem_if(missing > 0, || {
            format!("{missing} times a member does not have the last move of another")
        });
    }

    /// Notes the server's CPU time since `start` in cores.
    fn note_cores(&mut self, name: &str, start: &crate::bench::Moment) {
        let spent = self.bench.spent_since(start);
        if !self.bench.server.is_empty() {
            self.bench.report.ratio(name, spent.server as f64, spent.elapsed as f64);
        }
    }
}

/// Notes what members saw of moves in a phase of `duration`.
fn note_moves(report: &mut Report, prefix: &str, seen: &Seen, duration: Duration) {
    let seconds = duration.as_secs_f64();
    report.quantiles(&format!("{prefix}move"), &seen.tally.latency);
    for (name, amount) in [
        ("deliveries", seen.moves),
        ("coalesced", seen.coalesced),
        ("messages", seen.messages),
        ("bytes", seen.tally.bytes),
    ] {
        report.ratio(&format!("{prefix}{name}_per_s"), amount as f64, seconds);
    }
    report.figure(&format!("{prefix}repeated"), seen.tally.repeated);
}

/// Longest wait for the last moves.
const LATE: Duration = Duration::from_secs(5);
/// The same for a member that has begun to read again: TCP asks ever more rarely whether it does.
const RESUMED: Duration = Duration::from_secs(20);
/// Time in which the server becomes quiet.
const QUIET: Duration = Duration::from_secs(3);
/// For arithmetic with bytes and nanoseconds.
const SECOND: f64 = NS_PER_SECOND as f64;
