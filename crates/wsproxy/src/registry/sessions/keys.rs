//! The keys of session logs in Redis: a log for each agent, and the sessions that an instance has open.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use wsproxy_proto::names::{Id, Names};

use crate::{
    redis::{reply::integer, words::milliseconds},
    registry::{
        Transport,
        commands::Commands,
        lease,
        sessions::{SessionLogLimits, SessionRecord},
    },
    store::command::StoreError,
    traces::Handover,
};

/// Commands on logs and sessions.
#[derive(Clone)]
pub(super) struct SessionKeys {
    commands: Commands,
    names: Names,
    /// Arguments of the scripts.
    entries_max: String,
    log_ttl: String,
    sessions_ttl: String,
}

/// A session in the hash of its instance.
#[derive(Debug, Serialize, Deserialize)]
struct StoredRecord<'a> {
    agent_id: &'a str,
    session_id: &'a str,
    transport: Transport,
    opened: &'a str,
    /// Set if its `opened` is in the log.
    announced: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    traceparent: Option<Box<str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tracestate: Option<Box<str>>,
}

impl SessionRecord {
    /// Returns the value in the hash.
    pub(super) fn store(&self, announced: bool) -> Result<Bytes, StoreError> {
        let stored = StoredRecord {
            agent_id: self.agent.as_str(),
            session_id: self.session.as_str(),
            transport: self.transport,
            opened: &self.opened,
            announced,
            traceparent: self.trace.as_ref().map(|trace| trace.traceparent.clone()),
            tracestate: self
                .trace
                .as_ref()
                .and_then(|trace| trace.state.as_deref().map(Into::into)),
        };
        let json = serde_json::to_vec(&stored);
        json.map(Into::into).map_err(|error| StoreError::Refused(error.to_string()))
    }

    /// Reads a value of the hash, and whether its `opened` is in the log. `None`: no gateway wrote it.
    pub(super) fn read(value: &[u8]) -> Option<(Self, bool)> {
        let stored: StoredRecord<'_> = serde_json::from_slice(value).ok()?;
        let state = stored.tracestate.map(Into::into);
        let trace = stored.traceparent.map(|traceparent| Box::new(Handover { traceparent, state }));
        let record = Self {
            agent: Id::parse(stored.agent_id).ok()?,
            session: Id::parse(stored.session_id).ok()?,
            transport: stored.transport,
            opened: stored.opened.into(),
            trace,
        };
        Some((record, stored.announced))
    }
}

impl SessionKeys {
    pub(super) fn new(
        commands: Commands,
        lease: &lease::LeaseSettings,
        limits: SessionLogLimits,
    ) -> Self {
        // The hash of a lost instance must live until another instance looks.
        let sessions_ttl = limits.ttl.max(lease.timing.lease * 4);
        Self {
            commands,
            names: lease.names.clone(),
            entries_max: limits.entries_max.max(1).to_string(),
            log_ttl: milliseconds(limits.ttl).to_string(),
            sessions_ttl: milliseconds(sessions_ttl).to_string(),
        }
    }

    /// Appends announcements to the log of an agent and publishes them.
    pub(super) async fn append(&self, agent: &Id, payloads: Vec<Bytes>) -> Result<(), StoreError> {
        let channel = self.names.agent_sessions(agent);
        let fixed = [&channel, &self.entries_max, &self.log_ttl];
        let fixed = fixed.into_iter().map(|word| Bytes::copy_from_slice(word.as_bytes()));
        let log = self.names.agent_sessions_log(agent);
        self.commands.run(ANNOUNCE, &log, fixed.chain(payloads)).await.map(drop)
    }

    /// Enters sessions of an instance and removes others, together.
    pub(super) async fn change(
        &self,
        server: &str,
        entered: impl ExactSizeIterator<Item = (Uuid, Bytes)>,
        left: impl Iterator<Item = Uuid>,
    ) -> Result<(), StoreError> {
        let name = |connection: Uuid| Bytes::from(connection.to_string());
        let entered = entered.map(|(connection, value)| (name(connection), value));
        let key = self.key(server);
        self.commands.change_hash(&key, &self.sessions_ttl, entered, left.map(name)).await
    }

    /// Removes sessions of an instance that have not changed.
    pub(super) async fn remove_equal(
        &self,
        server: &str,
        entries: impl Iterator<Item = (Bytes, Bytes)>,
    ) -> Result<(), StoreError> {
        self.commands.remove_equal(&self.key(server), entries).await
    }

    /// Reads a piece of the sessions of an instance, and the cursor of the next piece.
    pub(super) async fn scan(
        &self,
        server: &str,
        cursor: &Bytes,
    ) -> Result<(Bytes, Vec<(Bytes, Bytes)>), StoreError> {
        self.commands.scan(&self.key(server), cursor).await
    }

    /// Returns the number of sessions that Redis has of an instance, and renews their time to live.
    pub(super) async fn keep(&self, server: &str) -> Result<u64, StoreError> {
        self.commands.keep_hash(&self.key(server), &self.sessions_ttl).await
    }

    /// Returns the number of sessions that Redis has of an instance.
    pub(super) async fn len(&self, server: &str) -> Result<u64, StoreError> {
        self.commands.hash_len(&self.key(server)).await
    }

    /// Notes that a reaper is about to announce sessions of an instance as closed.
    pub(super) async fn mark_reaped(&self, server: &str) -> Result<(), StoreError> {
        let key = self.reaped_key(server);
        let ttl = self.sessions_ttl.as_bytes();
        self.commands.call(&[b"SET", key.as_bytes(), b"1", b"PX", ttl]).await.map(drop)
    }

    /// Returns whether a reaper has announced sessions of an instance as closed.
    pub(super) async fn is_reaped(&self, server: &str) -> Result<bool, StoreError> {
        let key = self.reaped_key(server);
        Ok(integer(&self.commands.call(&[b"EXISTS", key.as_bytes()]).await?)? > 0)
    }

    /// Removes the note of a reaper, see [`Self::is_reaped`].
    pub(super) async fn clear_reaped(&self, server: &str) -> Result<(), StoreError> {
        let key = self.reaped_key(server);
        self.commands.call(&[b"DEL", key.as_bytes()]).await.map(drop)
    }

    /// Returns the number of connections to Redis so far.
    pub(super) fn connections_made(&self) -> u64 {
        self.commands.connections_made()
    }

    fn reaped_key(&self, server: &str) -> String {
        self.names.server_reaped(server)
    }

    fn key(&self, server: &str) -> String {
        self.names.server_sessions(server)
    }
}

/// Key: log. Arguments: channel, most entries, TTL, announcements. A follower that the channel wakes finds
/// the announcement in the log, so the log comes first.
const ANNOUNCE: &str = "\
local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
for i=4,#ARGV do redis.call('XADD',KEYS[1],'MAXLEN',ARGV[2],'*','data',ARGV[i]) end \
redis.call('XTRIM',KEYS[1],'MINID',string.format('%.0f',math.max(now-ARGV[3],0))) \
redis.call('PEXPIRE',KEYS[1],ARGV[3]) \
for i=4,#ARGV do redis.call('PUBLISH',ARGV[1],ARGV[i]) end \
return #ARGV-3";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_session_is_read_back() {
        let record = SessionRecord {
            agent: Id::parse("a-1").unwrap(),
            session: Id::parse("s@1").unwrap(),
            transport: Transport::WebSocket,
            opened: "2026-11-28T00:00:00.000Z".into(),
            trace: None,
        };
        let handover = Handover { traceparent: "00-1-2-01".into(), state: Some("a=\"b\"".into()) };
        let traced = SessionRecord { trace: Some(Box::new(handover)), ..record.clone() };
        for record in [record, traced] {
            for announced in [false, true] {
                let stored = record.store(announced).unwrap();
                assert_eq!(SessionRecord::read(&stored), Some((record.clone(), announced)));
            }
        }
        for odd in [
            "",
            "{}",
            r#"{"agent_id":"a:b","session_id":"s","transport":"sse","opened":"","announced":true}"#,
        ] {
            assert_eq!(SessionRecord::read(odd.as_bytes()), None, "{odd}");
        }
    }
}
