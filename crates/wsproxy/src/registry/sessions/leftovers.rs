//! Announces the ends of sessions whose instance is lost; done by another instance, or by a later run with the same
//! name.

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt, join_all};
use hashbrown::HashMap;
use uuid::Uuid;
use wsproxy_proto::{disconnect::Disconnect, names::Id};

use crate::{
    registry::{
        commands::{Commands, SCAN_START},
        lease::{self, LeasedState, LostInstance},
        sessions::{SessionRecord, keys::SessionKeys},
    },
    store::command::StoreError,
    telemetry::time,
};

/// Announces the sessions of a lost instance as closed.
pub(in crate::registry) struct Leftovers {
    keys: SessionKeys,
}

/// A field of an instance's hash and its value.
type Field = (Bytes, Bytes);

/// The result of announcing some sessions.
pub(super) struct Announced {
    /// Sessions whose end is in a log now.
    pub(super) count: u64,
    /// Refusal of a log whose sessions stay in the hash.
    pub(super) refused: Option<StoreError>,
}

impl Leftovers {
    pub(in crate::registry) fn new(commands: Commands, settings: &lease::LeaseSettings) -> Self {
        Self { keys: SessionKeys::new(commands, settings, settings.announcements) }
    }

    async fn clean_up(&self, lost: &LostInstance<'_>) -> Result<bool, StoreError> {
        let mut marked = false;
        for _ in 0..WALKS_MAX {
            let mut refused = None;
            let mut cursor = SCAN_START;
            loop {
                let (next, entries) = self.keys.scan(lost.server, &cursor).await?;
                if !entries.is_empty() {
                    // Commands that the instance had on their way may still enter sessions again that are
                    // announced as closed here. So the hash alone does not show it that they were.
                    if !std::mem::replace(&mut marked, true) {
                        self.keys.mark_reaped(lost.server).await?;
                    }
                    // After the look at the hash: a session that a revived instance enters from now on is not in
                    // `entries`, and it enters none while it sees the reaper's claim.
                    if !lost.is_certain().await? {
                        return Ok(false);
                    }
                    let announced = announce_lost(&self.keys, lost.server, entries).await?;
                    lost.counters.sessions_reaped.add(announced.count);
                    refused = refused.or(announced.refused);
                }
                if next == SCAN_START {
                    break;
                }
                cursor = next;
            }
            if let Some(refused) = refused {
                return Err(refused);
            }
            if self.keys.len(lost.server).await? == 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl LeasedState for Leftovers {
    fn clean<'a>(&'a self, lost: &'a LostInstance<'a>) -> BoxFuture<'a, Result<bool, StoreError>> {
        self.clean_up(lost).boxed()
    }

    fn is_clean<'a>(&'a self, server: &'a str) -> BoxFuture<'a, Result<bool, StoreError>> {
        async move { Ok(self.keys.len(server).await? == 0) }.boxed()
    }
}

/// Announces sessions as closed, and then removes them from the hash. After a crash in between they are
/// announced again. A log that refuses does not delay the others.
pub(super) async fn announce_lost(
    keys: &SessionKeys,
    server: &str,
    entries: Vec<Field>,
) -> Result<Announced, StoreError> {
    let mut agents: HashMap<Id, (Vec<Field>, Vec<Bytes>)> = HashMap::new();
    let mut done = Vec::new();
    for entry in entries {
        match announcements(server, &entry) {
            Some((agent, words)) => {
                let (entries, payloads) = agents.entry(agent).or_default();
                entries.push(entry);
                payloads.extend(words);
            }
            // No gateway wrote this entry, so no worker waits for its end.
            None => done.push(entry),
        }
    }
    let appends = agents
        .into_iter()
        .map(async |(agent, (entries, payloads))| (keys.append(&agent, payloads).await, entries));
    let mut announced = Announced { count: 0, refused: None };
    let mut lost = None;
    for (result, entries) in join_all(appends).await {
        match result {
            Ok(()) => {
                announced.count += entries.len() as u64;
                done.extend(entries);
            }
            Err(error) if error.is_answer() => announced.refused = Some(error),
            Err(error) => lost = Some(error),
        }
    }
    keys.remove_equal(server, done.into_iter()).await?;
    lost.map_or(Ok(announced), Err)
}

/// Returns the announcements of a session that are missing, and its agent.
fn announcements(server: &str, (name, value): &Field) -> Option<(Id, Vec<Bytes>)> {
    let connection = Uuid::try_parse_ascii(name).ok()?;
    let (record, is_announced) = SessionRecord::read(value)?;
    let opened = record.announcement("opened", connection, server, &record.opened);
    let mut closed = record.announcement("closed", connection, server, &time::rfc3339());
    closed["reason"] = Disconnect::SERVER_LOST.label.into();
    closed["code"] = Disconnect::SERVER_LOST.code.into();
    let words = [(!is_announced).then_some(opened), Some(closed)];
    let words = words.into_iter().flatten().map(|word| word.to_string().into()).collect();
    Some((record.agent, words))
}

/// Upper bound of walks over the sessions of one instance: a walk may miss sessions that move.
const WALKS_MAX: usize = 10;
