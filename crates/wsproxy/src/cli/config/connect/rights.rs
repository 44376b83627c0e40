//! The rights of the user of Redis. Each command that an instance sends is put into a transaction that is thrown away:
//! Redis checks the rights when it takes a command in, so that nothing is done.

use wsproxy_proto::names::{Id, Names};

use super::Finding;
use crate::{
    config::{Config, NoReceiver, endpoints::EndpointsConfig},
    redis::{
        address::RedisServers,
        trial::{self, Trial, TrialAnswer, TrialFault},
    },
};

/// Examines the rights for the families that are served.
pub(super) async fn examine(
    trial: &mut Trial,
    config: &Config,
) -> Result<Vec<Finding>, TrialFault> {
    if let TrialAnswer::Error(error) = trial.ask(&["MULTI"]).await? {
        let what = format!("the rights of the user cannot be checked: {error}");
        let advice = "grant +multi and +discard to the user for this check";
        return Ok(vec![Finding::warning(PART, what, advice)]);
    }
    let (mut lacks, mut refused, mut count) = (Vec::new(), None, 0);
    for words in commands(config) {
        count += 1;
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        match trial.ask(&words).await? {
            TrialAnswer::Error(error) if error.starts_with("NOPERM") => {
                lacks.push(words[..words.len().min(2)].join(" "));
            }
            // Rights are judged first, so that the user has this one.
            TrialAnswer::Error(error) if ELSEWHERE.iter().any(|code| error.starts_with(code)) => {}
            TrialAnswer::Error(error) => refused = Some((words.join(" "), error)),
            _ => {}
        }
    }
    trial.ask(&["DISCARD"]).await?;
    let mut findings = Vec::new();
    if let Some((command, error)) = refused {
        let what = format!("Redis refuses {command}: {error}");
        findings.push(Finding::error(PART, what, "see the log of Redis"));
    }
    if lacks.is_empty() {
        findings.push(Finding::ok(PART, format!("the user has all rights: {count} were tried")));
    } else {
        lacks.truncate(TOLD_MAX);
        let what = format!("the user may not: {}", lacks.join("; "));
        let advice =
            "grant these commands, keys (~) and channels (&) with ACL SETUSER: docs/deploy/redis";
        findings.push(Finding::error(PART, what, advice));
    }
    Ok(findings)
}

/// Returns commands with names as an instance uses them.
fn commands(config: &Config) -> Vec<Vec<String>> {
    let names = Names::new(&config.redis.channel_prefix);
    let server = config.server.server_id.as_deref().unwrap_or("wsproxy-check");
    let mut table = Table(Vec::new());
    let probe = names.probe(server);
    table.channel(&probe);
    table.add(&["PING"]);
    if matches!(trial::servers(&config.redis), Ok(RedisServers::Cluster { .. })) {
        table.cluster(&probe);
    }
    let Ok(id) = Id::parse("wsproxy-check") else { return table.0 };
    let EndpointsConfig { sessions, events, rooms, agents, tunnel, .. } = config.endpoints;
    if sessions {
        table.add(&["SUBSCRIBE", &names.session_down(&id), &names.session_control(&id)]);
        table.add(&["PUBLISH", &names.session_up(&id), ""]);
        table.add(&["PUBLISH", &names.agent_sessions(&id), ""]);
        table.key(&names.session_auth(&id));
        if config.sessions.history {
            table.log(&names.log(&names.session_down(&id)));
        }
        if config.sessions.no_receiver == NoReceiver::Queue {
            table.log(&names.session_up_log(&id));
        }
        if config.sessions.events_log {
            table.log(&names.agent_sessions_log(&id));
        }
    }
    if events {
        for channel in [names.events_broadcast(), names.events_user(&id), names.events_control()] {
            table.add(&["SUBSCRIBE", &channel]);
        }
        table.add(&["SUBSCRIBE", &names.events_connection("wsproxy-check")]);
        for channel in [names.events_up(), names.events_acks(), names.events_user(&id)] {
            table.add(&["PUBLISH", &channel, ""]);
        }
        table.hash(&names.server_connections(server));
        if config.events.history {
            table.log(&names.log(&names.events_broadcast()));
        }
    }
    if rooms {
        table.channel(&names.room(&id));
        table.hash(&names.room_members(&id));
        table.hash(&names.room_meta(&id));
    }
    if agents {
        table.channel(&names.agent_commands(&id));
        for channel in [names.agents_events(), names.response(&id)] {
            table.add(&["PUBLISH", &channel, ""]);
        }
        table.add(&["SUBSCRIBE", &names.agents_control()]);
        table.add(&["PUBSUB", "NUMSUB", &names.agent_commands(&id)]);
        table.key(&names.agent_server(&id));
        table.key(&names.agent_status(&id));
    }
    if tunnel {
        table.tunnel(&names, &id, server);
    }
    if events || rooms || agents || tunnel || config.sessions.events_log {
        table.key(&names.server_lease(server));
        table.add(&["ZADD", &names.servers(), "0", server]);
        table.add(&["ZREM", &names.servers(), server]);
    }
    table.0
}

struct Table(Vec<Vec<String>>);

impl Table {
    /// Adds the commands of the tunnel.
    fn tunnel(&mut self, names: &Names, id: &Id, server: &str) {
        self.channel(&names.tunnel_events());
        self.hash(&names.tunnel_lanes(id));
        self.hash(&names.server_tunnels(server));
        for hash in [names.tunnel_lanes(id), names.server_tunnels(server)] {
            self.add(&["HGET", &hash, "f"]);
            self.add(&["HLEN", &hash]);
        }
        self.add(&["HSCAN", &names.server_tunnels(server), "0"]);
        self.add(&["GET", &names.tunnel_auth(id)]);
        self.add(&["TIME"]);
    }

    fn add(&mut self, words: &[&str]) {
        self.0.push(words.iter().map(|word| (*word).to_owned()).collect());
    }

    /// Adds what only the nodes of a Cluster are asked.
    fn cluster(&mut self, channel: &str) {
        for words in [["CLUSTER", "NODES"], ["CLUSTER", "LINKS"]] {
            self.add(&words);
        }
        self.add(&["ASKING"]);
        self.add(&["ROLE"]);
        self.add(&["PUBSUB", "NUMSUB", channel]);
        self.add(&["SCRIPT", "LOAD", "return 0"]);
    }

    fn channel(&mut self, name: &str) {
        self.add(&["SUBSCRIBE", name]);
        self.add(&["PUBLISH", name, ""]);
    }

    fn key(&mut self, name: &str) {
        self.add(&["GET", name]);
        self.add(&["SET", name, "", "PX", "1"]);
        self.add(&["DEL", name]);
        self.add(&["EXISTS", name]);
        self.script(name);
    }

    fn hash(&mut self, name: &str) {
        self.add(&["HSET", name, "f", "v"]);
        self.add(&["HGETALL", name]);
        self.add(&["HDEL", name, "f"]);
        self.add(&["PEXPIRE", name, "1"]);
        self.script(name);
    }

    fn log(&mut self, name: &str) {
        self.add(&["XADD", name, "*", "f", "v"]);
        self.add(&["XRANGE", name, "-", "+"]);
        self.add(&["XREVRANGE", name, "+", "-"]);
        self.add(&["PEXPIRE", name, "1"]);
        self.script(name);
    }

    fn script(&mut self, key: &str) {
        self.add(&["EVALSHA", "0000000000000000000000000000000000000000", "1", key]);
        self.add(&["EVAL", "return 0", "1", key]);
    }
}

const PART: &str = "redis";

/// Errors of a server that takes this command from this user, though not here or now.
const ELSEWHERE: [&str; 5] = ["READONLY", "MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN"];

/// Missing rights that are told.
const TOLD_MAX: usize = 12;
