//! The agents of this instance, and the changes that the shared registry does not have yet; without IO.

use std::{collections::BTreeMap, ops::Bound, sync::Arc, time::SystemTime};

use uuid::Uuid;

use crate::registry::{agents::AgentRecord, changes::Changes};

/// The state that the registry should have of this instance.
///
/// Invariant: `changes` names users with an agent here, and users without one that Redis may know of. Both are bounded
/// by the connections that an instance may hold; an agent that came and went before it was written leaves nothing.
pub(super) struct LocalAgents {
    /// Agents by user. Boxed, since a tree leaves half of its slots empty.
    agents: BTreeMap<Arc<str>, Box<Agent>>,
    pub(super) changes: Changes<Arc<str>>,
}

struct Agent {
    connection: Uuid,
    connected: SystemTime,
    platform: Option<Box<str>>,
    version: Option<Box<str>>,
    /// Set once Redis may have an entry of the user.
    known: bool,
}

/// A change on its way to Redis.
pub(super) struct Write {
    pub(super) user: Arc<str>,
    /// The new record; `None`: the user has no agent here.
    pub(super) record: Option<AgentRecord>,
}

impl LocalAgents {
    pub(super) fn new(shared: bool) -> Self {
        Self { agents: BTreeMap::new(), changes: Changes::new(shared) }
    }

    /// Adds an agent in place of an older one, and returns whether there is something to write.
    pub(super) fn join(&mut self, user: Arc<str>, connection: Uuid) -> bool {
        // A removal that waits is of an entry that Redis has.
        let is_leaving = || self.changes.contains(&user);
        let known = self.agents.get(&user).map_or_else(is_leaving, |agent| agent.known);
        let connected = SystemTime::now();
        let agent = Agent { connection, connected, platform: None, version: None, known };
        self.agents.insert(Arc::clone(&user), agent.into());
        self.changes.put(user, ())
    }

    /// Sets what an agent says about itself, and returns whether there is something to write.
    pub(super) fn describe(
        &mut self,
        user: &Arc<str>,
        connection: Uuid,
        platform: Option<&str>,
        version: Option<&str>,
    ) -> bool {
        let agent = self.agents.get_mut(user).filter(|agent| agent.connection == connection);
        let Some(agent) = agent else { return false };
        let cut = |text: &str| text[..text.floor_char_boundary(WORD_BYTES_MAX)].into();
        let told = (platform.map(cut), version.map(cut));
        if (&agent.platform, &agent.version) == (&told.0, &told.1) {
            return false;
        }
        (agent.platform, agent.version) = told;
        self.changes.put(Arc::clone(user), ())
    }

    /// Removes an agent, and returns whether there is something to write; `None`: a newer connection here has replaced
    /// it.
    pub(super) fn leave(&mut self, user: &Arc<str>, connection: Uuid) -> Option<bool> {
        self.agents.get(user).filter(|agent| agent.connection == connection)?;
        if self.agents.remove(user)?.known {
            return Some(self.changes.put(Arc::clone(user), ()));
        }
        self.changes.cancel(user);
        Some(false)
    }

    pub(super) fn len(&self) -> usize {
        self.agents.len()
    }

    /// Takes at most `count` changes, which Redis may have from now on.
    pub(super) fn take(&mut self, count: usize) -> Vec<Write> {
        let write = |(user, ()): (Arc<str>, ())| {
            let agent = self.agents.get_mut(&user);
            let record = agent.map(|agent| {
                agent.known = true;
                agent.record()
            });
            Write { user, record }
        };
        self.changes.take(count).into_iter().map(write).collect()
    }

    /// Puts back changes that may or may not have been written.
    pub(super) fn give_back(&mut self, writes: Vec<Write>) {
        self.changes.give_back(writes.into_iter().map(|write| (write.user, ())));
    }

    /// Marks every agent to be written again, since Redis has lost its data.
    pub(super) fn rewrite_all(&mut self) {
        for user in self.agents.keys() {
            self.changes.put(Arc::clone(user), ());
        }
    }

    /// Returns whether an agent of a user is here.
    pub(super) fn has(&self, user: &str) -> bool {
        self.agents.contains_key(user)
    }

    /// Marks entries for removal that Redis has under this instance's name without an agent here.
    pub(super) fn remove_strays(&mut self, users: impl Iterator<Item = Arc<str>>) {
        for user in users {
            self.changes.put(user, ());
        }
    }

    /// Returns the record of a user's agent.
    pub(super) fn record(&self, user: &str) -> Option<AgentRecord> {
        self.agents.get(user).map(|agent| agent.record())
    }

    /// Returns at most `count` records of users that come after `after`.
    pub(super) fn records(&self, after: &str, count: usize) -> Vec<(Arc<str>, AgentRecord)> {
        let from = (Bound::Excluded(after), Bound::Unbounded);
        let agents = self.agents.range::<str, _>(from).take(count);
        agents.map(|(user, agent)| (Arc::clone(user), agent.record())).collect()
    }
}

impl Agent {
    fn record(&self) -> AgentRecord {
        let connected_at = humantime::format_rfc3339_millis(self.connected).to_string();
        AgentRecord {
            connection: self.connection,
            connected_at: Some(connected_at.into()),
            platform: self.platform.clone(),
            version: self.version.clone(),
        }
    }
}

/// Longest kept platform and version.
const WORD_BYTES_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    /// Users and the connections that Redis gets, in order.
    fn taken(agents: &mut LocalAgents) -> Vec<(String, Option<u128>)> {
        let mut writes: Vec<_> = agents
            .take(100)
            .into_iter()
            .map(|Write { user, record }| {
                (user.to_string(), record.map(|record| record.connection.as_u128()))
            })
            .collect();
        writes.sort();
        writes
    }

    #[test]
    fn a_short_lived_agent_is_never_written() {
        let mut agents = LocalAgents::new(true);
        assert!(agents.join("u".into(), id(1)));
        assert_eq!(agents.leave(&"u".into(), id(1)), Some(false));
        assert!(agents.changes.is_written() && taken(&mut agents).is_empty());
    }

    #[test]
    fn an_entry_is_removed_also_if_a_short_lived_agent_came_before_its_removal() {
        let mut agents = LocalAgents::new(true);
        agents.join("u".into(), id(1));
        assert_eq!(taken(&mut agents), [("u".into(), Some(1))]);
        assert_eq!(agents.leave(&"u".into(), id(1)), Some(true));
        agents.join("u".into(), id(2));
        assert_eq!(agents.leave(&"u".into(), id(2)), Some(true));
        assert_eq!(taken(&mut agents), [("u".into(), None)]);
    }

    #[test]
    fn an_agent_that_replaced_another_stays_when_that_leaves() {
        let mut agents = LocalAgents::new(true);
        agents.join("u".into(), id(1));
        assert_eq!(taken(&mut agents), [("u".into(), Some(1))]);
        assert!(agents.join("u".into(), id(2)));
        assert_eq!(agents.leave(&"u".into(), id(1)), None);
        assert_eq!(taken(&mut agents), [("u".into(), Some(2))]);
        assert_eq!(agents.leave(&"u".into(), id(2)), Some(true));
        assert_eq!(taken(&mut agents), [("u".into(), None)]);
    }

    #[test]
    fn writes_in_doubt_are_repeated_with_present_state() {
        let mut agents = LocalAgents::new(true);
        agents.join("a".into(), id(1));
        agents.join("b".into(), id(2));
        let writes = agents.take(100);
        assert!(!agents.changes.is_written());
        agents.leave(&"a".into(), id(1));
        agents.give_back(writes);
        assert_eq!(taken(&mut agents), [("a".into(), None), ("b".into(), Some(2))]);
        agents.changes.answered();
        assert!(agents.changes.is_written());
        agents.rewrite_all();
        agents.remove_strays(["c".into()].into_iter());
        assert_eq!(taken(&mut agents), [("b".into(), Some(2)), ("c".into(), None)]);
    }

    #[test]
    fn a_description_is_cut_and_written_once() {
        let mut agents = LocalAgents::new(true);
        agents.join("u".into(), id(1));
        taken(&mut agents);
        let long = "ü".repeat(WORD_BYTES_MAX);
        assert!(agents.describe(&"u".into(), id(1), Some("linux"), Some(&long)));
        assert!(!agents.describe(&"u".into(), id(1), Some("linux"), Some(&long)));
        assert!(!agents.describe(&"u".into(), id(2), None, None), "another connection");
        let record = agents.record("u").unwrap();
        assert_eq!(record.platform.as_deref(), Some("linux"));
        assert_eq!(record.version.unwrap().len(), WORD_BYTES_MAX);
    }

    #[test]
    fn records_are_listed_in_pieces() {
        let mut agents = LocalAgents::new(false);
        for (number, user) in ["a", "b", "c"].into_iter().enumerate() {
            assert!(!agents.join(user.into(), id(number as u128)));
        }
        let users = |after, count| {
            agents.records(after, count).into_iter().map(|(user, _)| user.to_string()).collect()
        };
        let (all, rest): (Vec<_>, Vec<_>) = (users("", 9), users("a", 1));
        assert_eq!((all.concat(), rest.concat()), ("abc".into(), "b".into()));
    }
}
