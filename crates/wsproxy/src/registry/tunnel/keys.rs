//! The lanes of instances as Redis has them: a hash for each cluster, by agent, and a hash for each instance, by which its
//! lanes are found when it is lost.

use std::{borrow::Cow, sync::Arc};

use bytes::Bytes;
use futures_util::future::try_join_all;
use wsproxy_proto::names::{Id, Names};

use crate::{
    redis::{
        reply::{integer, odd_reply, text},
        resp::Reply,
        script,
        words::milliseconds,
    },
    registry::{
        commands::Commands,
        lease::{HASH_TTL_MIN, LeaseSettings},
        tunnel::{
            AGENTS_MAX, AnnouncedLane, Announcement, LaneEvent, LaneRecord, Successor,
            local::{Entered, Entry, Write},
        },
    },
    store::command::StoreError,
};

/// Commands on the hashes of lanes.
#[derive(Clone)]
pub(super) struct LaneKeys {
    commands: Commands,
    names: Names,
    server_id: Arc<str>,
    /// Milliseconds for which a hash lives that no instance renews.
    ttl: String,
}

/// A field of an instance's hash: a lane, and its process with the number of the connection.
pub(super) type Field = (Bytes, Bytes);

/// The process of a lane and the number of its connection; empty: any lane of the instance.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Identity<'a> {
    pub(super) boot_id: &'a str,
    pub(super) number: &'a str,
}

impl LaneKeys {
    pub(super) fn new(commands: Commands, settings: &LeaseSettings) -> Self {
        // The hashes of a lost instance must live until another instance looks.
        let ttl = (settings.timing.lease * 4).max(HASH_TTL_MIN);
        Self {
            commands,
            names: settings.names.clone(),
            server_id: Arc::clone(&settings.server_id),
            ttl: milliseconds(ttl).to_string(),
        }
    }

    /// Returns the number of lanes that Redis has of this instance, and renews their time to live.
    pub(super) async fn count_own(&self) -> Result<u64, StoreError> {
        self.commands.keep_hash(&self.names.server_tunnels(&self.server_id), &self.ttl).await
    }

    /// Renews the time to live of clusters' lanes. Returns those of which Redis has nothing.
    pub(super) async fn keep(&self, clusters: Vec<Id>) -> Result<Vec<Id>, StoreError> {
        let kept = clusters.into_iter().map(async |cluster| {
            let key = self.names.tunnel_lanes(&cluster);
            let reply = self.commands.call(&["PEXPIRE", &key, &self.ttl]).await?;
            Ok((integer(&reply)? == 0).then_some(cluster))
        });
        Ok(try_join_all(kept).await?.into_iter().flatten().collect())
    }

    /// Enters this instance's lanes into its own hash: before the hash of their cluster, so that a lane is found when the
    /// instance is lost.
    pub(super) async fn enter_own(&self, writes: &[Write]) -> Result<(), StoreError> {
        let entered: Vec<_> = writes.iter().filter_map(own_field).collect();
        let key = self.names.server_tunnels(&self.server_id);
        let none = std::iter::empty();
        self.commands.change_hash(&key, &self.ttl, entered.into_iter(), none).await
    }

    /// Removes lanes of this instance from its own hash.
    pub(super) async fn leave_own(&self, writes: &[Write]) -> Result<(), StoreError> {
        let left = writes.iter().filter(|write| write.entry.is_none());
        let left = left.map(|write| Bytes::copy_from_slice(write.key.as_bytes()));
        let key = self.names.server_tunnels(&self.server_id);
        self.commands.change_hash(&key, &self.ttl, std::iter::empty(), left).await
    }

    /// Enters lanes into the hashes of their clusters. Returns an answer for each.
    pub(super) async fn enter<'e>(
        &self,
        entries: impl Iterator<Item = &'e Entry>,
        peer: Option<&str>,
    ) -> Vec<Result<Entered, StoreError>> {
        let calls: Vec<_> = entries.map(|entry| self.register_words(entry, peer)).collect();
        if calls.is_empty() {
            return Vec::new();
        }
        let replies = self.commands.run_each(&script::TUNNEL_REGISTER, &calls).await;
        replies.into_iter().map(|reply| entered(&reply?)).collect()
    }

    fn register_words(&self, entry: &Entry, peer: Option<&str>) -> [Cow<'static, str>; 11] {
        let Entry { opening, draining, registration, .. } = entry;
        let record = LaneRecord {
            server_id: (*self.server_id).into(),
            peer: peer.map(Into::into),
            boot_id: opening.boot_id.as_str().into(),
            number: opening.number,
            capabilities: opening.capabilities,
            draining: *draining,
            registration: 0,
        };
        let event = if *draining { LaneEvent::Draining } else { LaneEvent::Connected };
        let value = without_end(&record);
        let lane = AnnouncedLane {
            cluster_id: opening.cluster.as_str().into(),
            agent_id: opening.agent.as_str().into(),
            record,
        };
        [
            "1".into(),
            self.names.tunnel_lanes(&opening.cluster).into(),
            opening.agent.to_string().into(),
            opening.boot_id.to_string().into(),
            opening.number.to_string().into(),
            registration.map(|number| number.to_string()).unwrap_or_default().into(),
            value.into(),
            without_end(&Announcement { event, lane }).into(),
            self.ttl.clone().into(),
            AGENTS_MAX.to_string().into(),
            self.names.tunnel_events().into(),
        ]
    }

    /// Removes lanes of an instance from the hashes of their clusters, unless newer ones have their entries. Returns for
    /// each whether it was there; `None`: no gateway wrote the field.
    pub(super) async fn release<'f>(
        &self,
        server: &str,
        lanes: impl Iterator<Item = (&'f [u8], Identity<'f>)>,
    ) -> Vec<Result<bool, StoreError>> {
        let calls = lanes.map(|(field, identity)| self.release_words(server, field, identity));
        let calls: Vec<Option<_>> = calls.collect();
        let known: Vec<_> = calls.iter().flatten().cloned().collect();
        let mut replies = match known.is_empty() {
            true => Vec::new(),
            false => self.commands.run_each(&script::TUNNEL_RELEASE, &known).await,
        }
        .into_iter();
        let answer = |call: Option<_>| match call.and_then(|_| replies.next()) {
            Some(reply) => Ok(integer(&reply?)? == 1),
            // A field that no gateway wrote names no lane.
            None => Ok(false),
        };
        calls.into_iter().map(answer).collect()
    }

    fn release_words(
        &self,
        server: &str,
        field: &[u8],
        identity: Identity<'_>,
    ) -> Option<[Cow<'static, str>; 8]> {
        let (cluster, agent) = Names::parse_tunnel_lane(field)?;
        let told = serde_json::json!({
            "event": LaneEvent::Lost,
            "cluster_id": cluster.as_str(),
            "agent_id": agent.as_str(),
            "server_id": server,
        });
        Some([
            "1".into(),
            self.names.tunnel_lanes(&cluster).into(),
            agent.to_string().into(),
            server.to_owned().into(),
            identity.boot_id.to_owned().into(),
            identity.number.to_owned().into(),
            without_end(&told).into(),
            self.names.tunnel_events().into(),
        ])
    }

    /// Reads a piece of the lanes of an instance, and the cursor of the next piece.
    pub(super) async fn scan(
        &self,
        server: &str,
        cursor: &Bytes,
    ) -> Result<(Bytes, Vec<Field>), StoreError> {
        self.commands.scan(&self.names.server_tunnels(server), cursor).await
    }

    /// Returns the number of lanes that Redis has of an instance.
    pub(super) async fn len(&self, server: &str) -> Result<u64, StoreError> {
        self.commands.hash_len(&self.names.server_tunnels(server)).await
    }

    /// Removes lanes from an instance's hash that have not changed.
    pub(super) async fn remove_equal(
        &self,
        server: &str,
        fields: impl Iterator<Item = Field>,
    ) -> Result<(), StoreError> {
        self.commands.remove_equal(&self.names.server_tunnels(server), fields).await
    }

    /// Reads the lanes of a cluster, as they were written, and the living instances.
    pub(super) async fn read(
        &self,
        cluster: &Id,
    ) -> Result<(Vec<Field>, Vec<Box<str>>), StoreError> {
        let key = self.names.tunnel_lanes(cluster);
        let words = ["HGETALL", &key];
        let (fields, living) = tokio::try_join!(self.commands.call(&words), self.living())?;
        let Reply::Array(fields) = fields else { return Err(odd_reply()) };
        let field = |field: &[Reply]| match field {
            [Reply::Text(agent), Reply::Text(record)] => Some((agent.clone(), record.clone())),
            _ => None,
        };
        Ok((fields.chunks_exact(2).filter_map(field).collect(), living))
    }

    /// Returns the instances whose leases run.
    pub(super) async fn living(&self) -> Result<Vec<Box<str>>, StoreError> {
        self.commands.living_servers(&self.names).await
    }
}

/// Returns the field of an instance's hash for a lane.
fn own_field(write: &Write) -> Option<Field> {
    let opening = &write.entry.as_ref()?.opening;
    let value = format!("{} {}", opening.boot_id, opening.number);
    Some((Bytes::copy_from_slice(write.key.as_bytes()), value.into()))
}

/// Reads the value of a field that [`own_field`] made.
pub(super) fn identity(value: &[u8]) -> Option<Identity<'_>> {
    let (boot_id, number) = std::str::from_utf8(value).ok()?.split_once(' ')?;
    Some(Identity { boot_id, number })
}

fn entered(reply: &Reply) -> Result<Entered, StoreError> {
    let Reply::Array(parts) = reply else { return Err(odd_reply()) };
    let [state, registration] = &parts[..] else { return Err(odd_reply()) };
    match integer(state)? {
        1 => {
            let registration = text(registration).and_then(|text| text.parse().ok());
            registration.map(Entered::Yes).ok_or_else(odd_reply)
        }
        0 => Ok(Entered::Superseded(Successor::OtherProcess)),
        2 => Ok(Entered::Superseded(Successor::SameProcess)),
        _ => Ok(Entered::Full),
    }
}

/// Writes an object without the brace at its end: the script adds a member.
fn without_end(object: &impl serde::Serialize) -> String {
    let mut json = serde_json::to_string(object).unwrap_or_default();
    json.pop();
    json
}
