//! The connections of this instance, and the changes that the shared registry does not have yet; without IO.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::Bound,
    sync::Arc,
    time::SystemTime,
};

use hashbrown::HashSet;
use uuid::Uuid;

use crate::{
    client::Client,
    registry::{ConnectionRecord, Joining, Presence, Transport, changes::Changes},
};

/// The state that the registry should have of this instance.
///
/// Invariant: `changes` holds at most one change for every connection that is here, and one for
/// every connection that is not but that Redis may know of. Both are bounded by the connections that
/// an instance may hold; a connection that came and went before it was written leaves nothing.
pub(super) struct Local {
    /// Connections by id, hence by age, so that a walk can go on where it stopped. Boxed, since a tree leaves half
    /// of its slots empty.
    members: BTreeMap<Uuid, Box<Member>>,
    by_user: BTreeSet<(Arc<str>, Uuid)>,
    by_token: BTreeSet<(Arc<str>, Uuid)>,
    pub(super) changes: Changes<Uuid, Change>,
    /// `User-Agent`s of clients, shared, since many are equal. Holds at most `USER_AGENTS_MAX`.
    user_agents: HashSet<Arc<str>>,
    /// The connection that was renewed last.
    renewed: Uuid,
}

struct Member {
    user: Arc<str>,
    token: Option<Arc<str>>,
    issued_at: Option<u64>,
    client: Client,
    connected: SystemTime,
    transport: Transport,
    address: Option<IpAddr>,
    user_agent: Option<Arc<str>>,
    /// Set once Redis may have the connection.
    known: bool,
}

/// A change of a connection's entry.
pub(super) enum Change {
    Join,
    Leave(Arc<str>),
}

/// A change on its way to Redis.
pub(super) struct Write {
    pub(super) connection: Uuid,
    pub(super) user: Arc<str>,
    /// The record of the connection; `None`: it has left.
    pub(super) record: Option<ConnectionRecord>,
}

impl Local {
    pub(super) fn new(shared: bool) -> Self {
        Self {
            members: BTreeMap::new(),
            by_user: BTreeSet::new(),
            by_token: BTreeSet::new(),
            changes: Changes::new(shared),
            user_agents: HashSet::new(),
            renewed: Uuid::nil(),
        }
    }

    /// Adds a connection, and returns whether there is something to write.
    pub(super) fn join(&mut self, joining: Joining) -> bool {
        let connection = joining.connection;
        let user: Arc<str> = joining.user.as_str().into();
        let token: Option<Arc<str>> = joining.token.map(Into::into);
        self.by_user.insert((Arc::clone(&user), connection));
        if let Some(token) = &token {
            self.by_token.insert((Arc::clone(token), connection));
        }
        let member = Member {
            user,
            token,
            issued_at: joining.issued_at,
            client: joining.client,
            connected: SystemTime::now(),
            transport: joining.transport,
            address: joining.address,
            user_agent: joining.user_agent.map(|text| self.user_agent(&text)),
            known: false,
        };
        self.members.insert(connection, member.into());
        self.changes.put(connection, Change::Join)
    }

    /// Returns the text that all clients with the same `User-Agent` share.
    fn user_agent(&mut self, text: &str) -> Arc<str> {
        let text = &text[..text.floor_char_boundary(USER_AGENT_BYTES_MAX)];
        if let Some(known) = self.user_agents.get(text) {
            return Arc::clone(known);
        }
        let text: Arc<str> = text.into();
        if self.user_agents.len() < USER_AGENTS_MAX {
            self.user_agents.insert(Arc::clone(&text));
        }
        text
    }

    /// Removes a connection, and returns whether there is something to write.
    pub(super) fn leave(&mut self, connection: Uuid) -> bool {
        let Some(member) = self.members.remove(&connection) else { return false };
        self.by_user.remove(&(Arc::clone(&member.user), connection));
        if let Some(token) = member.token {
            self.by_token.remove(&(token, connection));
        }
        if member.known {
            return self.changes.put(connection, Change::Leave(member.user));
        }
        self.changes.cancel(&connection);
        false
    }

    pub(super) fn is_of(&self, connection: Uuid, user: &str) -> bool {
        self.members.get(&connection).is_some_and(|member| &*member.user == user)
    }

    /// Replaces the token of a connection.
    pub(super) fn renew(&mut self, connection: Uuid, token: Option<&str>, issued_at: Option<u64>) {
        let Some(member) = self.members.get_mut(&connection) else { return };
        if let Some(old) = member.token.take() {
            self.by_token.remove(&(old, connection));
        }
        member.issued_at = issued_at;
        if let Some(token) = token {
            let token: Arc<str> = token.into();
            self.by_token.insert((Arc::clone(&token), connection));
            member.token = Some(token);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// Takes at most `count` changes, which Redis may have from now on.
    pub(super) fn take(&mut self, server: &str, count: usize) -> Vec<Write> {
        let write = |(connection, change)| match change {
            Change::Leave(user) => Some(Write { connection, user, record: None }),
            Change::Join => {
                let member = self.members.get_mut(&connection)?;
                member.known = true;
                let record = Some(member.record(server));
                Some(Write { connection, user: Arc::clone(&member.user), record })
            }
        };
        self.changes.take(count).into_iter().filter_map(write).collect()
    }

    /// Puts back changes that may or may not have been written, unless newer ones replace them.
    pub(super) fn give_back(&mut self, writes: Vec<Write>) {
        let change =
            |Write { connection, user, .. }: Write| match self.members.contains_key(&connection) {
                true => (connection, Change::Join),
                false => (connection, Change::Leave(user)),
            };
        self.changes.give_back(writes.into_iter().map(change));
    }

    /// Marks every connection to be written again, since Redis has lost its data.
    pub(super) fn rewrite_all(&mut self) {
        for connection in self.members.keys() {
            self.changes.put_if_absent(*connection, Change::Join);
        }
    }

    /// Marks the next `count` connections, in turn, to be written again, so that their entries do not expire.
    pub(super) fn rewrite_some(&mut self, count: usize) {
        let from = (Bound::Excluded(self.renewed), Bound::Unbounded);
        let mut last = None;
        for connection in self.members.range(from).map(|(id, _)| *id).take(count) {
            self.changes.put_if_absent(connection, Change::Join);
            last = Some(connection);
        }
        // The walk begins again at its end.
        self.renewed = last.unwrap_or_default();
    }

    /// Marks the entries for removal that Redis has under this instance's name without a connection here. Returns their
    /// number.
    pub(super) fn remove_strays(&mut self, found: Vec<(Uuid, Arc<str>)>) -> usize {
        let mut strays = 0;
        for (connection, user) in found {
            let is_stray = !self.members.contains_key(&connection);
            strays += usize::from(
                is_stray && self.changes.put_if_absent(connection, Change::Leave(user)),
            );
        }
        strays
    }

    /// Returns the connections of a user.
    pub(super) fn of_user(&self, user: &str) -> impl Iterator<Item = Uuid> {
        of(&self.by_user, user)
    }

    pub(super) fn clients_of_user(&self, user: &str) -> Vec<Client> {
        self.clients(of(&self.by_user, user))
    }

    /// Returns the user's connections whose token has `iat <= until` or no `iat`.
    pub(super) fn clients_issued(&self, user: &str, until: u64) -> Vec<Client> {
        let issued = |id: &Uuid| {
            let member = self.members.get(id);
            member.is_some_and(|member| member.issued_at.is_none_or(|at| at <= until))
        };
        self.clients(of(&self.by_user, user).filter(issued))
    }

    pub(super) fn clients_of_token(&self, token: &str) -> Vec<Client> {
        self.clients(of(&self.by_token, token))
    }

    pub(super) fn client(&self, connection: Uuid) -> Vec<Client> {
        self.clients(std::iter::once(connection))
    }

    fn clients(&self, ids: impl Iterator<Item = Uuid>) -> Vec<Client> {
        ids.filter_map(|id| Some(self.members.get(&id)?.client.clone())).collect()
    }

    /// Returns the users with connections here, each once.
    pub(super) fn users(&self) -> Vec<Arc<str>> {
        names(&self.by_user)
    }

    /// Returns the names of the tokens of connections here, each once.
    pub(super) fn tokens(&self) -> Vec<Arc<str>> {
        names(&self.by_token)
    }

    /// Returns the connections of a user as workers see them.
    pub(super) fn presence(&self, server: &str, user: &str) -> Vec<Presence> {
        let presence = |id| {
            let member = self.members.get(&id)?;
            Some(Presence { connection_id: id, record: member.record(server) })
        };
        self.of_user(user).filter_map(presence).collect()
    }
}

impl Member {
    fn record(&self, server: &str) -> ConnectionRecord {
        ConnectionRecord {
            server_id: server.into(),
            connected_at: humantime::format_rfc3339_millis(self.connected).to_string().into(),
            transport: self.transport,
            address: self.address,
            user_agent: self.user_agent.as_deref().map(Into::into),
        }
    }
}

fn of(index: &BTreeSet<(Arc<str>, Uuid)>, name: &str) -> impl Iterator<Item = Uuid> {
    let name: Arc<str> = name.into();
    let range = (Arc::clone(&name), Uuid::nil())..=(name, Uuid::max());
    index.range(range).map(|(_, connection)| *connection)
}

fn names(index: &BTreeSet<(Arc<str>, Uuid)>) -> Vec<Arc<str>> {
    let mut names: Vec<_> = index.iter().map(|(name, _)| Arc::clone(name)).collect();
    names.dedup();
    names
}

/// Longest kept `User-Agent`: browsers send 100 to 200 bytes.
const USER_AGENT_BYTES_MAX: usize = 200;

/// Upper bound of shared `User-Agent`s; further clients keep one each.
const USER_AGENTS_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use wsproxy_conn::{clock::Micros, runtime::Runtime};
    use wsproxy_proto::names::Id;

    use super::*;
    use crate::client::event_stream_outbox::EventStreamOutbox;

    fn id(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    fn joining(number: u128, user: &str, token: Option<&str>, issued_at: Option<u64>) -> Joining {
        let runtime = Runtime::new(1024, Micros(0));
        let outbox = EventStreamOutbox::new(id(number), 1024, runtime, None);
        Joining {
            connection: id(number),
            user: Id::parse(user).unwrap(),
            client: Client::EventStream(outbox),
            token: token.map(Into::into),
            issued_at,
            address: None,
            user_agent: None,
            transport: Transport::Sse,
        }
    }

    fn ids(clients: &[Client]) -> Vec<Uuid> {
        clients.iter().map(Client::id).collect()
    }

    /// Connections and whether they joined, by id.
    fn taken(local: &mut Local) -> Vec<(Uuid, bool)> {
        let mut writes: Vec<_> = local
            .take("i", 100)
            .iter()
            .map(|write| (write.connection, write.record.is_some()))
            .collect();
        writes.sort_unstable();
        writes
    }

    #[test]
    fn a_short_lived_connection_is_never_written() {
        let mut local = Local::new(true);
        assert!(local.join(joining(1, "u", None, None)));
        assert!(!local.leave(id(1)), "there is nothing to write");
        assert!(local.changes.is_written() && taken(&mut local).is_empty());
        assert!(!local.leave(id(1)), "it has left already");
    }

    #[test]
    fn a_written_connection_that_leaves_is_removed() {
        let mut local = Local::new(true);
        local.join(joining(1, "u", None, None));
        assert_eq!(taken(&mut local), [(id(1), true)]);
        assert!(!local.changes.is_written(), "no answer yet");
        local.changes.answered();
        assert!(local.changes.is_written() && local.leave(id(1)));
        assert_eq!(taken(&mut local), [(id(1), false)]);
    }

    #[test]
    fn writes_in_doubt_are_repeated_with_present_state() {
        let mut local = Local::new(true);
        local.join(joining(1, "u", None, None));
        local.join(joining(2, "u", None, None));
        let writes = local.take("i", 100);
        local.leave(id(1));
        local.give_back(writes);
        assert_eq!(taken(&mut local), [(id(1), false), (id(2), true)]);
    }

    #[test]
    fn an_instance_alone_writes_nothing() {
        let mut local = Local::new(false);
        assert!(!local.join(joining(1, "u", None, None)));
        assert!(local.changes.is_written());
        assert_eq!(local.presence("i", "u")[0].connection_id, id(1));
    }

    #[test]
    fn connections_are_found_by_user_token_and_issue() {
        let mut local = Local::new(true);
        local.join(joining(1, "a", Some("t"), Some(10)));
        local.join(joining(2, "a", None, None));
        local.join(joining(3, "ab", Some("t"), Some(5)));
        assert_eq!(ids(&local.clients_of_user("a")), [id(1), id(2)]);
        assert_eq!(ids(&local.clients_of_token("t")), [id(1), id(3)]);
        assert_eq!(ids(&local.clients_issued("a", 9)), [id(2)], "its token does not say when");
        assert_eq!(ids(&local.clients_issued("a", 10)), [id(1), id(2)]);
        assert_eq!(local.users().iter().map(|user| &**user).collect::<Vec<_>>(), ["a", "ab"]);
        local.renew(id(1), Some("t2"), Some(20));
        assert_eq!(ids(&local.clients_of_token("t")), [id(3)]);
        assert_eq!(ids(&local.clients_issued("a", 10)), [id(2)]);
        assert_eq!(local.tokens().iter().map(|token| &**token).collect::<Vec<_>>(), ["t", "t2"]);
    }

    #[test]
    fn renewals_go_round_and_strays_are_removed() {
        let mut local = Local::new(true);
        for n in 1..=3 {
            local.join(joining(n, "u", None, None));
        }
        taken(&mut local);
        local.changes.answered();
        let mut round = || {
            local.rewrite_some(2);
            taken(&mut local)
        };
        assert_eq!(round(), [(id(1), true), (id(2), true)]);
        assert_eq!(round(), [(id(3), true)]);
        assert_eq!(round(), [], "the end is noticed");
        assert_eq!(round(), [(id(1), true), (id(2), true)], "it begins again");
        let found = vec![(id(1), "u".into()), (id(9), "u".into())];
        assert_eq!(local.remove_strays(found), 1);
        assert_eq!(taken(&mut local), [(id(9), false)]);
    }

    #[test]
    fn equal_user_agents_share_one_text() {
        let mut local = Local::new(true);
        let long = "ü".repeat(USER_AGENT_BYTES_MAX);
        for n in 1..=2 {
            let user_agent = Some(long.clone());
            local.join(Joining { user_agent, ..joining(n, "u", None, None) });
        }
        assert_eq!(local.user_agents.len(), 1);
        let record = &local.presence("i", "u")[0].record;
        assert_eq!(record.user_agent.as_ref().unwrap().len(), USER_AGENT_BYTES_MAX);
    }
}
