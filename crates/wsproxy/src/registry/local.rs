//! The connections of this instance, and what the shared registry does not know of them yet; without IO.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::Bound,
    sync::Arc,
    time::SystemTime,
};

use hashbrown::{HashMap, HashSet};
use uuid::Uuid;

use crate::registry::{Joining, Peer, Presence, Record, Transport};

/// What should be in the registry for this instance.
///
/// Invariant: `changes` holds at most one change for every connection that is here, and one for
/// every connection that is not but that Redis may know of. Both are bounded by the connections that
/// an instance may hold; a connection that came and went before it was written leaves nothing.
#[derive(Default)]
pub(super) struct Local {
    /// By id, which is by age, so that a walk can go on where it stopped.
    /// Boxed, since half of a tree's places are empty.
    members: BTreeMap<Uuid, Box<Member>>,
    by_user: BTreeSet<(Arc<str>, Uuid)>,
    by_token: BTreeSet<(Arc<str>, Uuid)>,
    changes: HashMap<Uuid, Change>,
    /// Changes were taken, and it is not known yet whether they are in Redis.
    writing: bool,
    /// What clients call themselves: many the same. Holds at most `USER_AGENTS_MAX`.
    user_agents: HashSet<Arc<str>>,
    /// Whether somebody takes the changes.
    shared: bool,
    /// How far the walk is that renews entries.
    renewed: Uuid,
}

struct Member {
    user: Arc<str>,
    token: Option<Arc<str>>,
    issued_at: Option<u64>,
    peer: Peer,
    connected: SystemTime,
    transport: Transport,
    address: Option<IpAddr>,
    user_agent: Option<Arc<str>>,
    /// Redis may know of it.
    known: bool,
}

enum Change {
    Join,
    Leave(Arc<str>),
}

/// A change on its way to Redis.
pub(super) struct Write {
    pub(super) connection: Uuid,
    pub(super) user: Arc<str>,
    /// What is kept of it; `None`: it left.
    pub(super) record: Option<Record>,
}

impl Local {
    pub(super) fn new(shared: bool) -> Self {
        Self { shared, ..Self::default() }
    }

    /// Says whether there is something to write.
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
            peer: joining.peer,
            connected: SystemTime::now(),
            transport: joining.transport,
            address: joining.address,
            user_agent: joining.user_agent.map(|text| self.user_agent(&text)),
            known: false,
        };
        self.members.insert(connection, member.into());
        if self.shared {
            self.changes.insert(connection, Change::Join);
        }
        self.shared
    }

    /// One text for all who call themselves the same.
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

    /// Says whether there is something to write.
    pub(super) fn leave(&mut self, connection: Uuid) -> bool {
        let Some(member) = self.members.remove(&connection) else { return false };
        self.by_user.remove(&(Arc::clone(&member.user), connection));
        if let Some(token) = member.token {
            self.by_token.remove(&(token, connection));
        }
        if member.known {
            self.changes.insert(connection, Change::Leave(member.user));
        } else {
            self.changes.remove(&connection);
        }
        member.known
    }

    pub(super) fn is_of(&self, connection: Uuid, user: &str) -> bool {
        self.members.get(&connection).is_some_and(|member| &*member.user == user)
    }

    /// The connection goes on with another token.
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

    pub(super) fn has_changes(&self) -> bool {
        !self.changes.is_empty()
    }

    /// Whether Redis has taken every change.
    pub(super) fn is_written(&self) -> bool {
        self.changes.is_empty() && !self.writing
    }

    /// Redis has answered to what was taken.
    pub(super) fn written(&mut self) {
        self.writing = false;
    }

    /// At most `count` changes, which Redis may know of from now on.
    pub(super) fn take(&mut self, server: &str, count: usize) -> Vec<Write> {
        let changes: Vec<_> = self.changes.extract_if(|_, _| true).take(count).collect();
        if self.changes.is_empty() {
            self.changes.shrink_to(CHANGES_KEPT);
        }
        let write = |(connection, change)| match change {
            Change::Leave(user) => Some(Write { connection, user, record: None }),
            Change::Join => {
                let member = self.members.get_mut(&connection)?;
                member.known = true;
                let record = Some(member.record(server));
                Some(Write { connection, user: Arc::clone(&member.user), record })
            }
        };
        let writes: Vec<_> = changes.into_iter().filter_map(write).collect();
        self.writing = !writes.is_empty();
        writes
    }

    /// They may or may not have been written. What changed since then is newer.
    pub(super) fn give_back(&mut self, writes: Vec<Write>) {
        self.writing = false;
        for Write { connection, user, .. } in writes {
            let change = match self.members.contains_key(&connection) {
                true => Change::Join,
                false => Change::Leave(user),
            };
            self.changes.entry(connection).or_insert(change);
        }
    }

    /// Redis has lost what it knew: everything is written again.
    pub(super) fn rewrite_all(&mut self) {
        for connection in self.members.keys() {
            self.changes.entry(*connection).or_insert(Change::Join);
        }
    }

    /// The next `count` of all, in turn, are written again, so that they do not expire.
    pub(super) fn rewrite_some(&mut self, count: usize) {
        let from = (Bound::Excluded(self.renewed), Bound::Unbounded);
        let mut last = None;
        for connection in self.members.range(from).map(|(id, _)| *id).take(count) {
            self.changes.entry(connection).or_insert(Change::Join);
            last = Some(connection);
        }
        // At the end it begins again.
        self.renewed = last.unwrap_or_default();
    }

    /// Entries that Redis has under our name; those that are not ours are removed.
    pub(super) fn remove_strays(&mut self, found: Vec<(Uuid, Arc<str>)>) -> usize {
        let before = self.changes.len();
        for (connection, user) in found {
            if !self.members.contains_key(&connection) {
                self.changes.entry(connection).or_insert(Change::Leave(user));
            }
        }
        self.changes.len() - before
    }

    /// The connections of a user.
    pub(super) fn of_user(&self, user: &str) -> impl Iterator<Item = Uuid> {
        of(&self.by_user, user)
    }

    pub(super) fn peers_of_user(&self, user: &str) -> Vec<Peer> {
        self.peers(of(&self.by_user, user))
    }

    /// Those of a user's connections whose token was made up to then, or who knows when.
    pub(super) fn peers_issued(&self, user: &str, until: u64) -> Vec<Peer> {
        let issued = |id: &Uuid| {
            let member = self.members.get(id);
            member.is_some_and(|member| member.issued_at.is_none_or(|at| at <= until))
        };
        self.peers(of(&self.by_user, user).filter(issued))
    }

    pub(super) fn peers_of_token(&self, token: &str) -> Vec<Peer> {
        self.peers(of(&self.by_token, token))
    }

    pub(super) fn peer(&self, connection: Uuid) -> Vec<Peer> {
        self.peers(std::iter::once(connection))
    }

    fn peers(&self, ids: impl Iterator<Item = Uuid>) -> Vec<Peer> {
        ids.filter_map(|id| Some(self.members.get(&id)?.peer.clone())).collect()
    }

    /// The users that have connections here, each once.
    pub(super) fn users(&self) -> Vec<Arc<str>> {
        names(&self.by_user)
    }

    /// The named tokens that connections here were opened with, each once.
    pub(super) fn tokens(&self) -> Vec<Arc<str>> {
        names(&self.by_token)
    }

    /// The connections of a user as everybody may see them.
    pub(super) fn presence(&self, server: &str, user: &str) -> Vec<Presence> {
        let presence = |id| {
            let member = self.members.get(&id)?;
            Some(Presence { connection_id: id, record: member.record(server) })
        };
        self.of_user(user).filter_map(presence).collect()
    }
}

impl Member {
    fn record(&self, server: &str) -> Record {
        Record {
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

/// Browsers name themselves in 100 to 200 bytes; more tells nobody more.
const USER_AGENT_BYTES_MAX: usize = 200;

/// Clients that each call themselves something else cost their own memory only.
const USER_AGENTS_MAX: usize = 256;

/// Room for so many changes stays after a burst.
const CHANGES_KEPT: usize = 256;
