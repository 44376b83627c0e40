//! Status and last_seen of agents, written behind in batches. Never on the path of a connection.

use std::time::SystemTime;

use hashbrown::{HashMap, hash_map::EntryRef};
use parking_lot::Mutex;
use tokio::sync::Notify;
use wsproxy_proto::names::Id;

use crate::database::{
    metrics::Operation,
    pool::{Access, Connection},
    sql::{Dialect, Value, to_millis},
    statement::Statement,
};

/// State of a user's agent in the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AgentStatus {
    Connected,
    Disconnected,
}

/// Changes that wait to be written. Invariant: of each user the newest change; of each kind at most [`WAITING_MAX`]
/// users. A change beyond it is refused, and the caller counts it.
#[derive(Debug, Default)]
pub(super) struct StatusQueue {
    /// Guards everything; held for a look-up, or while a batch is taken.
    waiting: Mutex<Waiting>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Changes of status.
    changed: Changes,
    /// Agents that gave a sign of life; written once a minute, as connected.
    seen: Changes,
}

/// Changes by user.
#[derive(Debug, Default)]
struct Changes(HashMap<Id, Change, foldhash::fast::RandomState>);

/// A change of a user's row.
#[derive(Debug, Clone, Copy)]
struct Change {
    status: AgentStatus,
    at: SystemTime,
}

/// Changes that are written together.
#[derive(Debug, Default)]
pub(super) struct Batch(Vec<(Id, Change)>);

impl AgentStatus {
    /// Returns the value of the column.
    const fn label(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Disconnected => "disconnected",
        }
    }
}

impl StatusQueue {
    /// Notes a change. Returns `false` if there was no room.
    #[must_use]
    pub(super) fn change(&self, user: &Id, status: AgentStatus) -> bool {
        let change = Change { status, at: SystemTime::now() };
        let (has_room, was_empty) = {
            let Waiting { changed, seen } = &mut *self.waiting.lock();
            seen.0.remove(user);
            let was_empty = changed.0.is_empty();
            (changed.put(user, change), was_empty)
        };
        if was_empty {
            self.filled.notify_one();
        }
        has_room
    }

    /// Notes a sign of life. Returns `false` if there was no room.
    #[must_use]
    pub(super) fn see(&self, user: &Id) -> bool {
        let change = Change { status: AgentStatus::Connected, at: SystemTime::now() };
        let Waiting { changed, seen } = &mut *self.waiting.lock();
        changed.0.contains_key(user) || seen.put(user, change)
    }

    /// Drops a sign of life, and a change to connected. A change to disconnected stays.
    pub(super) fn forget(&self, user: &Id) {
        let Waiting { changed, seen } = &mut *self.waiting.lock();
        seen.0.remove(user);
        if changed.0.get(user).is_some_and(|change| change.status == AgentStatus::Connected) {
            changed.0.remove(user);
        }
    }

    /// Resolves once after a change of status came into the empty queue.
    pub(super) async fn changed(&self) {
        self.filled.notified().await;
    }

    /// Takes a batch: changes of status, then signs of life where they are wanted.
    pub(super) fn take(&self, with_seen: bool) -> Batch {
        let Waiting { changed, seen } = &mut *self.waiting.lock();
        let from = if changed.0.is_empty() && with_seen { seen } else { changed };
        let mut batch = Vec::with_capacity(from.0.len().min(BATCH));
        batch.extend(from.0.extract_if(|_, _| true).take(BATCH));
        if from.0.is_empty() {
            from.0.shrink_to(BATCH);
        }
        Batch(batch)
    }

    /// Gives back a batch that was not written; newer changes win. Returns the number of changes without room.
    pub(super) fn put_back(&self, batch: Batch) -> u64 {
        let Waiting { changed, seen } = &mut *self.waiting.lock();
        let mut lost = 0;
        for (user, change) in batch.0 {
            if !changed.0.contains_key(&user) && !seen.0.contains_key(&user) {
                lost += u64::from(!changed.put(&user, change));
            }
        }
        lost
    }

    /// Returns the number of changes of status that wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.lock().changed.0.len()
    }
}

impl Changes {
    /// Puts a change where the former one of the same user was. Returns `false` if there was no room.
    fn put(&mut self, user: &Id, change: Change) -> bool {
        let is_full = self.0.len() >= WAITING_MAX;
        match self.0.entry_ref(user) {
            EntryRef::Occupied(mut entry) => drop(entry.insert(change)),
            EntryRef::Vacant(_) if is_full => return false,
            EntryRef::Vacant(entry) => drop(entry.insert(change)),
        }
        true
    }
}

impl Batch {
    /// Returns the number of changes.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether there is no change.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    async fn write_one_by_one(&self, connection: &mut Connection) -> Result<(), sqlx::Error> {
        let at = connection.dialect().utc("$3");
        let sql = format!(
            "UPDATE agent_credentials SET status = $2, last_seen = {at} WHERE user_id = $1"
        );
        for (user, change) in &self.0 {
            let status = Value::Text(change.status.label());
            let values =
                [Value::Text(user.as_str()), status, Value::Number(Some(to_millis(change.at)))];
            connection.execute(sql.as_str(), &values).await?;
        }
        Ok(())
    }
}

impl Statement for Batch {
    type Answer = ();
    const OPERATION: Operation = Operation::Status;
    const ACCESS: Access = Access::Write;

    async fn run(&self, connection: &mut Connection) -> Result<(), sqlx::Error> {
        if connection.dialect() == Dialect::Sqlite {
            connection.begin().await?;
            let result = self.write_one_by_one(connection).await;
            return connection.end(result).await;
        }
        let Connection::Postgres(connection) = connection else { return Ok(()) };
        let users: Vec<_> = self.0.iter().map(|(user, _)| user.as_str().to_owned()).collect();
        let statuses: Vec<_> =
            self.0.iter().map(|(_, change)| change.status.label().to_owned()).collect();
        let times: Vec<_> = self.0.iter().map(|(_, change)| to_millis(change.at)).collect();
        let query = sqlx::query(POSTGRES_UPDATE).bind(users).bind(statuses).bind(times);
        query.execute(&mut **connection).await.map(drop)
    }
}

/// Upper bound of users whose changes wait.
const WAITING_MAX: usize = 200_000;

/// Most changes that are written together.
const BATCH: usize = 1000;

/// Rows are locked in the order of users, so that two instances never wait for each other.
const POSTGRES_UPDATE: &str = "WITH change AS (\
    SELECT * FROM unnest($1::text[], $2::text[], $3::int8[]) AS t(user_id, status, at)), \
    held AS (SELECT c.user_id FROM agent_credentials c JOIN change USING (user_id) \
    ORDER BY c.user_id FOR UPDATE OF c) \
    UPDATE agent_credentials c SET status = change.status, \
    last_seen = to_timestamp(change.at::float8 / 1000) AT TIME ZONE 'UTC' \
    FROM change JOIN held USING (user_id) WHERE c.user_id = change.user_id";

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> Id {
        Id::parse(text).unwrap()
    }

    fn take(queue: &StatusQueue, with_seen: bool) -> Vec<(String, AgentStatus)> {
        let batch = queue.take(with_seen);
        batch.0.iter().map(|(user, change)| (user.as_str().to_owned(), change.status)).collect()
    }

    #[test]
    fn the_newest_change_of_a_user_is_written() {
        let queue = StatusQueue::default();
        assert!(queue.change(&id("a"), AgentStatus::Connected));
        assert!(queue.change(&id("a"), AgentStatus::Disconnected));
        assert_eq!(take(&queue, false), [("a".into(), AgentStatus::Disconnected)]);
        assert!(queue.take(true).is_empty());
    }

    #[test]
    fn signs_of_life_wait_for_the_minute_and_never_hide_an_end() {
        let queue = StatusQueue::default();
        assert!(queue.see(&id("a")));
        assert!(queue.take(false).is_empty());
        assert!(queue.change(&id("a"), AgentStatus::Disconnected));
        assert!(queue.see(&id("a")));
        assert_eq!(take(&queue, true), [("a".into(), AgentStatus::Disconnected)]);
        assert!(queue.see(&id("b")));
        assert_eq!(take(&queue, true), [("b".into(), AgentStatus::Connected)]);
    }

    #[test]
    fn an_ended_connection_leaves_no_sign_of_life_but_its_end() {
        let queue = StatusQueue::default();
        assert!(queue.see(&id("a")));
        assert!(queue.change(&id("b"), AgentStatus::Connected));
        assert!(queue.change(&id("c"), AgentStatus::Disconnected));
        ["a", "b", "c"].iter().for_each(|user| queue.forget(&id(user)));
        assert_eq!(take(&queue, true), [("c".into(), AgentStatus::Disconnected)]);
        assert!(queue.take(true).is_empty());
    }

    #[test]
    fn a_batch_that_comes_back_yields_to_newer_changes() {
        let queue = StatusQueue::default();
        assert!(queue.change(&id("a"), AgentStatus::Connected));
        assert!(queue.change(&id("b"), AgentStatus::Connected));
        let batch = queue.take(false);
        assert!(queue.change(&id("a"), AgentStatus::Disconnected));
        assert_eq!(queue.put_back(batch), 0);
        let mut batch = take(&queue, false);
        batch.sort_by(|a, b| a.0.cmp(&b.0));
        let [a, b] = [AgentStatus::Disconnected, AgentStatus::Connected];
        assert_eq!(batch, [("a".into(), a), ("b".into(), b)]);
    }

    #[test]
    fn a_full_queue_refuses_new_users_only() {
        let queue = StatusQueue::default();
        for n in 0..WAITING_MAX {
            assert!(queue.change(&id(&n.to_string()), AgentStatus::Connected));
        }
        assert!(!queue.change(&id("x"), AgentStatus::Connected));
        assert!(queue.change(&id("7"), AgentStatus::Disconnected));
        assert_eq!(queue.take(false).len(), BATCH);
        assert!(queue.change(&id("x"), AgentStatus::Connected));
    }
}
