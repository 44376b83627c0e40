//! The command line: which scenario, against what, how much of it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand};

use crate::bench::LimitServer;
use crate::limit;
use crate::remote::{self, Generator};
use crate::report::Report;
use crate::scenario::{
    churn, cluster, connect, drain, echo, fanout, history, idle, outage, resume, sessions, slow,
};
use crate::target::Kind;

/// Puts load on a WebSocket gateway and measures what it costs.
#[derive(Debug, Parser)]
#[command(version, about, args_override_self = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Scenario(Scenario),
    /// Part of the clients of another command, which tells it what to do.
    #[command(hide = true)]
    Generator(Generator),
    /// The raw limit: a bare write loop, measured with the same clients.
    Limit {
        #[command(subcommand)]
        what: LimitCommand,
    },
}

#[derive(Debug, Subcommand)]
#[expect(clippy::large_enum_variant, reason = "there is one, and it is read once")]
enum LimitCommand {
    /// Runs the bare server alone, until it is killed.
    Serve {
        /// Subscribe each client's session on this Redis, instead of sending every message to everybody.
        #[arg(long)]
        redis: Option<SocketAddr>,
    },
    #[command(flatten)]
    Scenario(Scenario),
}

#[derive(Debug, Subcommand)]
enum Scenario {
    /// How many complete handshakes per second.
    Connect(connect::Options),
    /// How much memory an idle connection keeps, before and after a burst.
    Idle(idle::Options),
    /// From a client up to a worker and back down.
    Echo(echo::Options),
    /// Each message to all connections of one session.
    Fanout(fanout::Options),
    /// Each message to one of many sessions.
    Sessions(sessions::Options),
    /// Some clients stop reading: what the others notice.
    Slow(slow::Options),
    /// Clients come and go.
    Churn(churn::Options),
    /// The server is told to end.
    Drain(drain::Options),
    /// Messages with history beside plain ones.
    History(history::Options),
    /// An instance is killed; all its clients continue at another one.
    Resume(resume::Options),
    /// Redis is killed under load and comes back with its data.
    Outage(outage::Options),
    /// Users at the event endpoint of several instances.
    Cluster(cluster::Options),
}

/// What every scenario needs to know.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Where the server listens.
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub server: SocketAddr,
    /// What kind of server it is.
    #[arg(long, value_enum, default_value = "wsproxy")]
    pub target: Kind,
    /// Path of a client's WebSocket, with {id} and {agent}; the kind's own by default.
    #[arg(long, default_value = "")]
    pub path: String,
    /// Where messages are published: Redis, or the HTTP side of a server that has one.
    #[arg(long, default_value = "127.0.0.1:6379")]
    pub publish: SocketAddr,
    /// Processes of the server, with whatever they started; needed for CPU and memory.
    #[arg(long, value_delimiter = ',')]
    pub pid: Vec<u32>,
    /// How many clients.
    #[arg(short = 'n', long, default_value_t = 1_000)]
    pub connections: u32,
    /// Threads that share the clients.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: u32,
    /// Source addresses, from 127.0.0.1 up.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=250))]
    pub sources: u32,
    /// Handshakes at once and thread.
    #[arg(long, default_value_t = 64)]
    pub in_flight: u32,
    /// Payload bytes of a message.
    #[arg(long, default_value_t = 200)]
    pub size: usize,
    /// Seconds of the measured phase.
    #[arg(long, default_value = "10", value_parser = seconds)]
    pub duration: Duration,
    /// Seconds of the same load before it.
    #[arg(long, default_value = "2", value_parser = seconds)]
    pub warmup: Duration,
    /// Seconds without any progress after which a phase has failed.
    #[arg(long, default_value = "30", value_parser = seconds)]
    pub timeout: Duration,
    /// How often due messages are sent, in microseconds.
    #[arg(long, default_value_t = 250, value_parser = clap::value_parser!(u64).range(50..=1_000_000))]
    pub tick_us: u64,
    /// Results as JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

impl Common {
    /// How often due messages are sent.
    #[must_use]
    pub fn tick(&self) -> Duration {
        Duration::from_micros(self.tick_us)
    }
}

/// Runs what was asked for; true when nothing was lost and nothing failed.
pub fn run(cli: Cli) -> Result<bool> {
    match cli.command {
        Command::Scenario(scenario) => finish(&scenario),
        Command::Generator(generator) => remote::serve(&generator).map(|()| true),
        Command::Limit { what: LimitCommand::Serve { redis } } => {
            limit::serve(redis)?;
            Ok(true)
        }
        Command::Limit { what: LimitCommand::Scenario(mut scenario) } => {
            if matches!(scenario, Scenario::Echo(_)) {
                bail!("the raw limit has no way up");
            }
            use Scenario::{Cluster, History, Outage, Resume};
            if matches!(scenario, History(_) | Resume(_) | Outage(_) | Cluster(_)) {
                bail!("the raw limit keeps no history and knows no users");
            }
            // Many sessions come through Redis as they do for a real server; what goes to everybody goes to
            // the bare loop directly.
            let through_redis = !matches!(scenario, Scenario::Fanout(_));
            let common = scenario.common_mut();
            let limit = LimitServer::start(through_redis.then_some(common.publish))?;
            common.server = limit.server;
            common.target = Kind::Plain;
            if !through_redis {
                common.target = Kind::Raw;
                common.publish = limit.publish;
            }
            common.pid = vec![limit.pid()];
            finish(&scenario)
        }
    }
}

fn finish(scenario: &Scenario) -> Result<bool> {
    let report: Report = match scenario {
        Scenario::Connect(options) => connect::run(options)?,
        Scenario::Idle(options) => idle::run(options)?,
        Scenario::Echo(options) => echo::run(options)?,
        Scenario::Fanout(options) => fanout::run(options)?,
        Scenario::Sessions(options) => sessions::run(options)?,
        Scenario::Slow(options) => slow::run(options)?,
        Scenario::Churn(options) => churn::run(options)?,
        Scenario::Drain(options) => drain::run(options)?,
        Scenario::History(options) => history::run(options)?,
        Scenario::Resume(options) => resume::run(options)?,
        Scenario::Outage(options) => outage::run(options)?,
        Scenario::Cluster(options) => cluster::run(options)?,
    };
    if scenario.common().json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.table());
    }
    Ok(report.is_good())
}

impl Scenario {
    fn common(&self) -> &Common {
        match self {
            Self::Connect(options) => &options.common,
            Self::Idle(options) => &options.common,
            Self::Echo(options) => &options.common,
            Self::Fanout(options) => &options.common,
            Self::Sessions(options) => &options.common,
            Self::Slow(options) => &options.common,
            Self::Churn(options) => &options.common,
            Self::Drain(options) => &options.common,
            Self::History(options) => &options.common,
            Self::Resume(options) => &options.common,
            Self::Outage(options) => &options.common,
            Self::Cluster(options) => &options.common,
        }
    }

    fn common_mut(&mut self) -> &mut Common {
        match self {
            Self::Connect(options) => &mut options.common,
            Self::Idle(options) => &mut options.common,
            Self::Echo(options) => &mut options.common,
            Self::Fanout(options) => &mut options.common,
            Self::Sessions(options) => &mut options.common,
            Self::Slow(options) => &mut options.common,
            Self::Churn(options) => &mut options.common,
            Self::Drain(options) => &mut options.common,
            Self::History(options) => &mut options.common,
            Self::Resume(options) => &mut options.common,
            Self::Outage(options) => &mut options.common,
            Self::Cluster(options) => &mut options.common,
        }
    }
}

/// Seconds, with a fraction if need be.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text} is not a number of seconds"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
