//! The table of troubles: counters of losses, errors and refusals, each with words for operators.

use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    core::Core,
    endpoint::{Families, console::samples::Samples},
    telemetry::{family::Family, metrics::readings::Reading},
};

/// A counter that tells of trouble.
#[derive(Debug)]
pub(super) struct Trouble {
    /// Series.
    metric: &'static str,
    /// Label and its values that count; `None`: the whole metric.
    only: Option<(&'static str, &'static [&'static str])>,
    weight: Weight,
    /// Sentence about what happened.
    what: &'static str,
    /// Sentence about what to do.
    advice: &'static str,
    /// Page of the runbooks.
    page: &'static str,
}

/// Weight of a trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Weight {
    /// It lasts now.
    Now,
    /// Messages may be lost.
    Loss,
    /// A part did not do its work.
    Error,
    /// Clients were refused or cut off by a rule.
    Clients,
}

impl Trouble {
    /// Returns whether a reading belongs to the counter.
    pub(super) fn counts(&self, reading: &Reading<'_>) -> bool {
        reading.name == self.metric
            && self.only.is_none_or(|(label, values)| {
                reading.label(label).is_some_and(|value| values.contains(&value))
            })
    }
}

/// Returns what is wrong: what lasts now, then what happened within the hour.
pub(super) fn all(core: &Core, samples: &Samples) -> Vec<Value> {
    let mut found = now(core);
    let counts = TABLE.iter().zip(samples.troubles()).filter(|(_, (count, _))| *count > 0);
    let mut counted: Vec<_> = counts.collect();
    counted.sort_by_key(|(trouble, (_, at))| (trouble.weight, std::cmp::Reverse(*at)));
    found.extend(counted.into_iter().map(|(trouble, (count, at))| {
        let Trouble { metric, only, weight, what, advice, page } = trouble;
        let labels = only.map(|(label, values)| format!("{label}: {}", values.join(", ")));
        json!({
            "weight": weight, "count": count, "last_at": at, "what": what, "advice": advice,
            "page": page, "metric": metric, "labels": labels,
        })
    }));
    found
}

/// Returns the troubles that last.
fn now(core: &Core) -> Vec<Value> {
    let status = core.bus.status();
    let (taken, max) = (core.seats.taken(), core.seats.max());
    let budget = core.config.limits.send_buffers_total_bytes;
    let is_nearly = |part: usize, whole: usize| part.saturating_mul(10) >= whole.saturating_mul(9);
    let agents_are_down =
        core.reports.health().is_degraded && Families::serves(core, Family::Agents);
    let rows = [
        (
            !status.connected,
            "Redis is away.",
            "No client can connect, and messages wait or are refused. Look at Redis, and at the network to it.",
            "redis-is-away",
        ),
        (
            status.connected && !status.subscribed,
            "Redis is connected, but subscriptions are not confirmed.",
            "Clients may miss messages. Does the address lead to one master? Does its ACL allow the channels?",
            "redis-is-away",
        ),
        (
            status.connected && status.refusal.is_some(),
            "Redis refuses writes.",
            "Look at the memory, the replicas and the disk of Redis.",
            "redis-is-away",
        ),
        (
            core.is_draining(),
            "The instance was told to end.",
            "Its clients are sent to other instances. Nothing is to be done.",
            "README",
        ),
        (
            is_nearly(taken, max),
            "The instance is nearly full.",
            "Start another instance, or raise limits.max_connections.",
            "clients-cannot-connect",
        ),
        (
            is_nearly(core.runtime.budget.used(), budget),
            "Messages that wait for slow clients fill the memory that is meant for them.",
            "The slowest clients are cut off. Lower limits.send_buffer_bytes, or raise send_buffers_total_bytes.",
            "clients-are-disconnected",
        ),
        (
            agents_are_down,
            "The database of agents is away.",
            "No agent can connect; connected ones stay. Look at the database.",
            "agents-are-offline",
        ),
    ];
    let lasting = rows.into_iter().filter(|(is_true, ..)| *is_true);
    let told = lasting.map(|(_, what, advice, page)| {
        json!({ "weight": Weight::Now, "what": what, "advice": advice, "page": page })
    });
    told.collect()
}

macro_rules! table {
    ($($weight:ident $metric:literal $([$label:literal: $($value:literal),+])?
        $what:literal $advice:literal $page:literal;)*) => {
        /// All counters that tell of trouble.
        pub(super) const TABLE: &[Trouble] = &[$(Trouble {
            metric: $metric,
            only: table!(@only $($label: $($value),+)?),
            weight: Weight::$weight,
            what: $what,
            advice: $advice,
            page: $page,
        }),*];
    };
    (@only) => { None };
    (@only $label:literal: $($value:literal),+) => { Some(($label, &[$($value),+])) };
}

table! {
    Loss "wsproxy_bus_publishes_lost_total"
        "Messages were on their way to Redis when the connection was lost: they may not have arrived."
        "Look at Redis and the network at that time. Workers that must not lose messages publish with history."
        "messages-do-not-arrive";
    Loss "wsproxy_bus_publishes_refused_full_total"
        "Messages were refused, since the queue to Redis was full."
        "Redis is slower than the clients. Look at its load, or raise redis.publish_queue_bytes."
        "messages-do-not-arrive";
    Loss "wsproxy_bus_publishes_refused_total"
        "Redis refused messages."
        "The label reason says why: memory, replicas, disk or permissions of Redis."
        "redis-is-away";
    Loss "wsproxy_message_errors_total" ["kind": "lost", "refused", "unannounced", "unreported", "dropped", "in_doubt"]
        "Messages, announcements or reports were lost or had no room."
        "See the log lines of that time; mostly Redis was away or slow."
        "messages-do-not-arrive";
    Loss "wsproxy_history_lost_total"
        "Clients were told that messages are missing in their history, and load their state again."
        "Few are normal after a long absence. Many: raise history.entries_max or history.ttl."
        "messages-do-not-arrive";
    Loss "wsproxy_uncaptured_messages_total"
        "Plain messages could not be taken into a history."
        "Give them an id, or publish them with the script."
        "messages-do-not-arrive";
    Loss "wsproxy_messages_unframeable_total"
        "Messages were not UTF-8, and their clients get text only."
        "Correct the worker, or set sessions.down_frames = \"auto\"."
        "messages-do-not-arrive";
    Loss "wsproxy_agent_answers_lost_total"
        "Answers of agents to their callers were lost."
        "Redis took no messages for a while. The callers get a timeout."
        "agents-are-offline";
    Loss "wsproxy_agent_announcements_lost_total"
        "Announcements of connected agents were lost."
        "Redis took no messages for a while."
        "agents-are-offline";
    Loss "wsproxy_session_log_dropped_total"
        "Announcements of sessions did not fit into the queue."
        "Redis was away for long. Workers do not know of some sessions."
        "messages-do-not-arrive";
    Loss "wsproxy_audit_rows_total" ["outcome": "dropped", "refused", "lost"]
        "Rows of the audit log are missing."
        "Look at the database: its speed, its disk, its permissions."
        "agents-are-offline";
    Loss "wsproxy_log_lines_dropped_total"
        "Log lines are missing: standard error did not take them."
        "Look at the program that reads the log."
        "README";
    Loss "wsproxy_messages_unheard_total"
        "Messages of clients reached no worker."
        "Do workers run, and do they listen to the channels of this prefix?"
        "messages-do-not-arrive";
    Error "wsproxy_bus_links_lost_total"
        "Connections to Redis were lost."
        "Look at Redis and the network. The instance has come back by itself unless it says otherwise above."
        "redis-is-away";
    Error "wsproxy_bus_probe_failures_total"
        "Messages to the instance itself did not come back from Redis."
        "The address of Redis may lead to several masters, or to one that hangs."
        "redis-is-away";
    Error "wsproxy_bus_subscribe_errors_total"
        "Redis refused channels."
        "The ACL of Redis must allow the channels of this prefix."
        "redis-is-away";
    Error "wsproxy_disconnects_total" ["reason": "internal"]
        "Connections ended through a fault of the gateway."
        "Report it with the log lines of that time."
        "README";
    Error "wsproxy_handshakes_total" ["outcome": "bus_unavailable", "not_done", "deadline", "internal"]
        "Clients could not connect, since Redis was away or slow."
        "Look at Redis. Clients try again by themselves."
        "clients-cannot-connect";
    Error "wsproxy_handshakes_total" ["outcome": "full", "too_many_handshakes", "room_full"]
        "Clients could not connect, since there was no room."
        "Start another instance, or raise limits.max_connections."
        "clients-cannot-connect";
    Error "wsproxy_handshakes_total" ["outcome": "issuer_unavailable"]
        "Clients could not connect, since the keys of the issuer of tokens could not be fetched."
        "Look at jwt.jwks_url and the network to it."
        "clients-cannot-connect";
    Error "wsproxy_handshakes_total" ["outcome": "database_unavailable"]
        "Agents could not connect, since the database was away."
        "Look at the database."
        "agents-are-offline";
    Error "wsproxy_jwks_fetch_failures_total"
        "The keys of the issuer of tokens could not be fetched. The known keys stay in use."
        "Look at jwt.jwks_url and the network to it."
        "clients-cannot-connect";
    Error "wsproxy_errors_total" ["kind": "accept"]
        "Sockets could not be accepted."
        "Mostly the process has no free descriptors: raise its limit of open files."
        "clients-cannot-connect";
    Error "wsproxy_errors_total" ["kind": "tls_files"]
        "New files of the TLS certificate or key cannot be used. The old ones stay in use."
        "See the log line; correct the files."
        "README";
    Error "wsproxy_errors_total" ["kind": "stream_worker_lost", "stream_end_refused"]
        "Token streams lost their worker, and were ended for it."
        "Workers died or were too slow to renew their lease."
        "messages-do-not-arrive";
    Error "wsproxy_control_errors_total"
        "Commands for connections could not be read."
        "A worker publishes something else on ws:control."
        "README";
    Error "wsproxy_message_errors_total" ["kind": "bad_command", "unreadable"]
        "Messages of workers could not be read."
        "See the log lines; correct the worker."
        "messages-do-not-arrive";
    Error "wsproxy_database_errors_total"
        "Statements on the database failed."
        "Look at the database."
        "agents-are-offline";
    Error "wsproxy_agent_replaced_total" ["where": "flapping"]
        "Agents replaced each other again and again: two machines have one secret."
        "Give each machine a user of its own. The log names the user."
        "agents-are-offline";
    Clients "wsproxy_handshakes_total" ["outcome": "invalid_token", "invalid_credentials", "missing_credentials", "malformed_credentials", "room_forbidden"]
        "Clients were refused for their credentials."
        "Single ones are normal. All of them: a wrong key, prefix or Redis."
        "all-clients-get-403";
    Clients "wsproxy_handshakes_total" ["outcome": "origin_not_allowed", "host_not_allowed"]
        "Pages of other origins were refused."
        "If they are yours, add them to server.allowed_origins."
        "clients-cannot-connect";
    Clients "wsproxy_handshakes_total" ["outcome": "rate_limited", "too_many_connections"]
        "Clients were refused, since they try too often or have too many connections."
        "Behind a proxy, all may have one address: set server.trusted_proxies."
        "clients-cannot-connect";
    Clients "wsproxy_disconnects_total" ["reason": "slow_consumer"]
        "Clients were cut off, since they read too slowly."
        "Find one below to see who. Send less to it, or raise limits.send_buffer_bytes."
        "clients-are-disconnected";
    Clients "wsproxy_disconnects_total" ["reason": "heartbeat_timeout"]
        "Clients were silent for too long, and were taken for dead."
        "Networks that sleep, or clients that answer no ping. All at one interval: a proxy in between."
        "clients-are-disconnected";
    Clients "wsproxy_disconnects_total" ["reason": "rate_limited", "strikes", "too_big", "too_many_fragments", "protocol_error", "unsupported", "not_utf8", "bad_deflate"]
        "Clients broke a rule of the protocol or a limit, and were cut off."
        "Correct the client, or raise the limit in [limits]."
        "clients-are-disconnected";
    Clients "wsproxy_message_errors_total" ["kind": "invalid", "rate_limited"]
        "Messages of clients were not valid, or too many."
        "The client got an error that says why."
        "messages-do-not-arrive";
    Clients "wsproxy_errors_total" ["kind": "api_key"]
        "Calls of the API had an unknown key, or one without the scope."
        "See the log line: it names the address and the path."
        "README";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_the_table_exist() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/runbooks/");
        for Trouble { page, .. } in TABLE {
            assert!(std::path::Path::new(&format!("{folder}{page}.md")).exists(), "{page}");
        }
    }

    #[test]
    fn metrics_of_the_table_are_documented() {
        let page = include_str!("../../../../../docs/reference/metrics.md");
        for Trouble { metric, only, .. } in TABLE {
            let row = page.lines().find(|line| line.starts_with(&format!("| `{metric}`")));
            let row = row.unwrap_or_else(|| panic!("{metric} is not in docs/reference/metrics.md"));
            // Outcomes of handshakes and reasons of ends are in other tables.
            if let Some((label, values)) = only.filter(|_| row.contains("kind")) {
                let missing = values.iter().find(|value| !row.contains(&format!("`{value}`")));
                assert_eq!(missing, None, "{metric} {label}");
            }
        }
    }
}
