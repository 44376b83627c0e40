//! The command line: a scenario and its options.

use std::net::SocketAddr;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};

use crate::bench::LimitServer;
use crate::limit;
use crate::options::Common;
use crate::remote::{self, Generator};
use crate::report::Report;
use crate::scenario::{
    agent_ends, agents, agents_lost, churn, cluster, connect, drain, echo, fanout, history, idle,
    outage, resume, rooms, scale, sessions, slow, tunnel,
};
use crate::target::Kind;
use crate::tunnel::proxy::{self, Proxy};
use crate::tunnel::relay::{self, Relay};
use crate::tunnel::upstream::{self, Upstream};

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
    /// HTTP requests through a tunnel, or through what stands in its place.
    Tunnel(tunnel::Options),
    /// The HTTP service behind a tunnel.
    Upstream(Upstream),
    /// A plain HTTP proxy.
    Proxy(Proxy),
    /// A link with a delay and a rate, for TCP connections.
    Relay(Relay),
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
        /// Subscribe each client's session on this Redis, instead of sending every message to all clients.
        #[arg(long)]
        redis: Option<SocketAddr>,
    },
    #[command(flatten)]
    Scenario(Scenario),
}

#[derive(Debug, Subcommand)]
enum Scenario {
    /// Complete handshakes per second.
    Connect(connect::Options),
    /// Memory of an idle connection, before and after a burst.
    Idle(idle::Options),
    /// Messages from a client up to a worker and back down.
    Echo(echo::Options),
    /// Each message to all connections of one session.
    Fanout(fanout::Options),
    /// Each message to one of many sessions.
    Sessions(sessions::Options),
    /// Some clients stop reading: the effect on the others.
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
    /// As many clients as the host holds, over many instances.
    Scale(scale::Options),
    /// Users' agents: memory, heartbeats, calls of tools.
    Agents(agents::Options),
    /// Users' agents that are replaced, revoked or killed.
    AgentEnds(agent_ends::Options),
    /// An instance is killed; all its agents connect to another one.
    AgentsLost(agents_lost::Options),
    /// Members of rooms: moves, joins, leaves, memory.
    Rooms(rooms::Options),
}

/// Runs the command; true when no message was lost and nothing failed.
pub fn run(cli: Cli) -> Result<bool> {
    match cli.command {
        Command::Scenario(scenario) => finish(&scenario),
        Command::Generator(generator) => remote::serve(&generator).map(|()| true),
        Command::Tunnel(options) => tell(&tunnel::run(&options)?, options.json),
        Command::Upstream(options) => upstream::serve(&options).map(|()| true),
        Command::Proxy(options) => proxy::serve(&options).map(|()| true),
        Command::Relay(options) => relay::serve(&options).map(|()| true),
        Command::Limit { what: LimitCommand::Serve { redis } } => {
            limit::serve(redis)?;
            Ok(true)
        }
        Command::Limit { what: LimitCommand::Scenario(mut scenario) } => {
            if matches!(scenario, Scenario::Echo(_)) {
                bail!("the raw limit has no way up");
            }
            use Scenario::{
                AgentEnds, Agents, AgentsLost, Cluster, History, Outage, Resume, Rooms, Scale,
            };
            if matches!(scenario, History(_) | Resume(_) | Outage(_)) {
                bail!("the raw limit keeps no history");
            }
            let of_instances = matches!(scenario, Cluster(_) | Scale(_));
            if of_instances
                || matches!(scenario, Agents(_) | AgentEnds(_) | AgentsLost(_) | Rooms(_))
            {
                bail!("the raw limit knows no users");
            }
            // Many sessions come through Redis as they do for a real server; messages to all clients go to
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
        Scenario::Scale(options) => scale::run(options)?,
        Scenario::Agents(options) => agents::run(options)?,
        Scenario::AgentEnds(options) => agent_ends::run(options)?,
        Scenario::AgentsLost(options) => agents_lost::run(options)?,
        Scenario::Rooms(options) => rooms::run(options)?,
    };
    tell(&report, scenario.common().json)
}

fn tell(report: &Report, json: bool) -> Result<bool> {
    if json {
        println!("{}", serde_json::to_string_pretty(report)?);
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
            Self::Scale(options) => &options.common,
            Self::Agents(options) => &options.common,
            Self::AgentEnds(options) => &options.common,
            Self::AgentsLost(options) => &options.common,
            Self::Rooms(options) => &options.common,
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
            Self::Scale(options) => &mut options.common,
            Self::Agents(options) => &mut options.common,
            Self::AgentEnds(options) => &mut options.common,
            Self::AgentsLost(options) => &mut options.common,
            Self::Rooms(options) => &mut options.common,
        }
    }
}
