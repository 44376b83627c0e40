//! Answers for operators about users' agents beside the numbers: health, connected users, a log line at intervals. Knows
//! no call.

use serde_json::{Map, Value, json};
use tracing::info;
use wsproxy_proto::agents::outcome::Outcome;

use crate::{
    endpoint::agents::Agents,
    telemetry::{
        metrics::process,
        report::{Health, Reporter},
    },
};

/// Counts of ended calls at the last log line.
#[derive(Debug, Default)]
pub(super) struct Reported([u64; Outcome::ALL.len()]);

impl Reporter for Agents {
    fn health(&self) -> Health {
        let Some(database) = &self.database else { return Health::default() };
        let status = database.status();
        let audit = self.audit.as_ref().map(|audit| audit.status());
        let details = json!({ "database": {
            "kind": status.kind,
            "connected": status.connected,
            "writable": status.writable,
            "audit": {
                "queued": audit.map_or(0, |audit| audit.queued),
                "dropped": audit.map_or(0, |audit| audit.dropped),
            },
        }});
        Health {
            // Without its database the instance refuses every agent; without writes the audit log loses rows.
            is_degraded: !status.connected || !status.writable,
            members: self.known(),
            details: members(details),
        }
    }

    fn overview(&self, details: bool) -> Map<String, Value> {
        if self.database.is_none() {
            return Map::new();
        }
        let mut overview = self.known();
        let memory = process::resident_bytes();
        overview.insert("memory".into(), json!({ "rss": memory }));
        if details {
            let users = self.connections.users(USERS_MAX + 1);
            let is_cut = users.len() > USERS_MAX;
            let users: Vec<_> = users.iter().take(USERS_MAX).map(|user| user.as_str()).collect();
            overview.insert("connectedUsers".into(), json!(users));
            if is_cut {
                overview.insert("connectedUsersTruncated".into(), true.into());
            }
        }
        overview
    }

    fn sum_up(&self) {
        if self.database.is_none() {
            return;
        }
        let counts = Outcome::ALL.map(|outcome| self.counters.calls.of(outcome).count.value());
        let before = std::mem::replace(&mut *self.reported.lock(), Reported(counts));
        let calls = |outcome: Outcome| {
            let at = outcome as usize;
            counts[at] - before.0[at]
        };
        let audit = self.audit.as_ref().map(|audit| audit.status());
        info!(
            connections = self.connected(),
            response = calls(Outcome::Response),
            timeout = calls(Outcome::Timeout),
            agent_offline = calls(Outcome::AgentOffline),
            agent_gone = calls(Outcome::AgentGone),
            cancelled = calls(Outcome::Cancelled),
            busy = calls(Outcome::Busy),
            in_flight = self.in_flight(),
            audit_queued = audit.map(|audit| audit.queued),
            audit_dropped = audit.map(|audit| audit.dropped),
            memory_bytes = process::resident_bytes(),
            "Agents, and their calls since the last such line."
        );
    }
}

impl Agents {
    /// Returns the number of connected agents, handshakes excluded.
    fn connected(&self) -> usize {
        self.presence.as_ref().map_or(0, |presence| presence.registry.len())
    }

    /// Returns the members that `/health` and the metrics share.
    fn known(&self) -> Map<String, Value> {
        members(json!({
            "serverId": &*self.server_id,
            "connections": self.connected(),
            "uptime": self.started.elapsed().as_secs(),
        }))
    }
}

fn members(object: Value) -> Map<String, Value> {
    match object {
        Value::Object(members) => members,
        _ => Map::new(),
    }
}

/// Upper bound of the users that the metrics name.
const USERS_MAX: usize = 1000;
