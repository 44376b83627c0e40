//! Knowledge of one instance about a client that an operator looks for: its connections here, its last ends and refusals.

use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;
use wsproxy_proto::names::Id;

use crate::{
    client::Client,
    core::{
        Core,
        recent::{Ended, KeptIds, Refused},
    },
    endpoint::{
        Families,
        console::words::{self, Words},
        rooms::Here,
    },
    http::rejection::Rejection,
    registry::Presence,
    telemetry::family::Family,
};

/// Kind of the id that an operator looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    /// A session.
    Session,
    /// A user: of events, of rooms, or of an agent.
    User,
    /// A room.
    Room,
    /// The agent of a user.
    Agent,
    /// A connection.
    Connection,
}

impl Kind {
    /// Returns the word for logs.
    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::User => "user",
            Self::Room => "room",
            Self::Agent => "agent",
            Self::Connection => "connection",
        }
    }
}

/// Subject that an operator looks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Subject {
    /// A session.
    Session(Id),
    /// A user.
    User(Id),
    /// A room.
    Room(Id),
    /// The agent of a user.
    Agent(Id),
    /// A connection.
    Connection(Uuid),
}

impl Subject {
    /// Reads a kind and an id.
    ///
    /// # Errors
    /// 400: the id is malformed.
    pub(super) fn read(kind: Kind, id: &str) -> Result<Self, Rejection> {
        if kind == Kind::Connection {
            let id = Uuid::parse_str(id);
            return id.map(Self::Connection).map_err(|_| {
                Rejection::bad_id("The id of a connection is a UUID, as the log has it.")
            });
        }
        let id = Id::parse(id).map_err(|error| Rejection::bad_id(format!("id {error}.")))?;
        Ok(match kind {
            Kind::Session => Self::Session(id),
            Kind::Room => Self::Room(id),
            Kind::Agent => Self::Agent(id),
            Kind::User | Kind::Connection => Self::User(id),
        })
    }

    /// Returns the kind and the id, for another instance.
    pub(super) fn parts(&self) -> (Kind, String) {
        match self {
            Self::Session(id) => (Kind::Session, id.to_string()),
            Self::User(id) => (Kind::User, id.to_string()),
            Self::Room(id) => (Kind::Room, id.to_string()),
            Self::Agent(id) => (Kind::Agent, id.to_string()),
            Self::Connection(id) => (Kind::Connection, id.to_string()),
        }
    }

    fn is_of(&self, family: Family, ids: &KeptIds) -> bool {
        let is = |known: &Option<Box<str>>, id: &Id| known.as_deref() == Some(id.as_str());
        match self {
            Self::Session(id) => is(&ids.session_id, id),
            Self::User(id) => is(&ids.user_id, id),
            Self::Room(id) => is(&ids.room_id, id),
            Self::Agent(id) => family == Family::Agents && is(&ids.user_id, id),
            Self::Connection(_) => false,
        }
    }
}

/// Returns what this instance knows of a subject: connections, ends and refusals, the newest first.
pub(super) fn look(core: &Core, families: &Families, subject: &Subject) -> Value {
    let mut connections = connections(core, families, subject);
    let is_cut = connections.len() > ROWS_MAX;
    connections.truncate(ROWS_MAX);
    let is_end = |end: &Ended| match subject {
        Subject::Connection(id) => end.connection == *id,
        subject => subject.is_of(end.family, &end.ids),
    };
    let ends = core.recent.ends(ROWS_MAX, is_end);
    let refusals = core.recent.refusals(ROWS_MAX, |one| subject.is_of(one.family, &one.ids));
    json!({
        "server_id": &*core.server_id,
        "connections": connections,
        "ends": ends.iter().map(|end| ended(core, end)).collect::<Value>(),
        "refusals": refusals.iter().map(|one| refused(core, one)).collect::<Value>(),
        "truncated": is_cut,
    })
}

/// Returns the newest ends that were no polite closes, and the newest refusals, in the order of their times. Those of one
/// reason are one row, that of the newest, with the number and the clients of the others in `more`: a fault of the network
/// ends thousands at once, and must not hide everything else.
pub(super) fn latest(core: &Core, most: usize) -> Vec<Value> {
    let ends = core.recent.ends(LATEST_MAX, |end| !end.by_client && end.reason != "normal");
    let refusals = core.recent.refusals(LATEST_MAX, |_| true);
    let ends = ends.iter().map(Past::End);
    let mut all: Vec<_> = ends.chain(refusals.iter().map(Past::Refusal)).collect();
    all.sort_by_key(|one| std::cmp::Reverse(one.at()));
    let mut groups: Vec<Vec<Past<'_>>> = Vec::new();
    for one in all {
        match groups.iter().position(|group| group[0].kind() == one.kind()) {
            Some(at) => groups[at].push(one),
            None if groups.len() < most => groups.push(vec![one]),
            None => {}
        }
    }
    groups.iter().map(|group| one_row(core, group)).collect()
}

/// An end or a refusal.
enum Past<'a> {
    End(&'a Ended),
    Refusal(&'a Refused),
}

impl Past<'_> {
    fn at(&self) -> u64 {
        match self {
            Self::End(end) => end.at,
            Self::Refusal(one) => one.at,
        }
    }

    fn ids(&self) -> &KeptIds {
        match self {
            Self::End(end) => &end.ids,
            Self::Refusal(one) => &one.ids,
        }
    }

    /// Returns the family and the reason. Two with the same are told in one row.
    fn kind(&self) -> (Family, &str, &str) {
        match self {
            Self::End(end) => (end.family, "end", end.reason),
            Self::Refusal(one) => (one.family, one.code, &one.message),
        }
    }
}

/// Returns the row of the newest of a group, with the others in `more`.
fn one_row(core: &Core, group: &[Past<'_>]) -> Value {
    let mut row = match &group[0] {
        Past::End(end) => ended(core, end),
        Past::Refusal(one) => refused(core, one),
    };
    let [_, others @ .., oldest] = group else { return row };
    let mut clients: Vec<Value> = Vec::new();
    for one in others.iter().chain([oldest]) {
        let ids = one.ids();
        let client = json!({
            "session_id": ids.session_id,
            "user_id": ids.user_id.as_ref().filter(|_| ids.session_id.is_none()),
        });
        let is_named = ids.session_id.is_some() || ids.user_id.is_some();
        if is_named && clients.len() < CLIENTS_MAX && !clients.contains(&client) {
            clients.push(client);
        }
    }
    row["more"] =
        json!({ "count": group.len() - 1, "since": rfc3339(oldest.at()), "clients": clients });
    row
}

fn connections(core: &Core, families: &Families, subject: &Subject) -> Vec<Value> {
    match subject {
        Subject::Session(id) => {
            let ids = || KeptIds { session_id: Some(id.as_str().into()), ..KeptIds::default() };
            let clients = core.hub.clients_of(&core.names.session_control(id));
            let clients = clients.iter().take(LOOKED_AT_MAX);
            clients.map(|one| connected(core, Family::Sessions, one, ids())).collect()
        }
        Subject::User(id) => {
            let mut all = of_user(core, families, id);
            all.extend(in_rooms(core, families.rooms.here_of(id, LOOKED_AT_MAX)));
            all.extend(of_agent(core, families, id));
            all
        }
        Subject::Room(id) => in_rooms(core, families.rooms.here(id, LOOKED_AT_MAX)),
        Subject::Agent(id) => of_agent(core, families, id),
        Subject::Connection(id) => {
            let links = core.runtime.links().into_iter().map(Client::WebSocket);
            let streams = core.event_streams.list().into_iter().map(Client::EventStream);
            let found = links.chain(streams).filter(|client| client.id() == *id);
            found.map(|client| described(core, None, &client, &KeptIds::default())).collect()
        }
    }
}

fn of_user(core: &Core, families: &Families, user: &Id) -> Vec<Value> {
    let here = families.events.registry.as_ref().map(|registry| registry.here(user));
    let of = |(presence, client): (Presence, Client)| {
        let address = presence.record.address;
        let ids = KeptIds { user_id: Some(user.as_str().into()), address, ..KeptIds::default() };
        connected(core, Family::Events, &client, ids)
    };
    here.unwrap_or_default().into_iter().take(LOOKED_AT_MAX).map(of).collect()
}

fn of_agent(core: &Core, families: &Families, user: &Id) -> Vec<Value> {
    let inboxes = families.agents.connections.of(user);
    let clients = inboxes.iter().filter_map(|inbox| inbox.client());
    let ids = || KeptIds { user_id: Some(user.as_str().into()), ..KeptIds::default() };
    let clients = clients.take(LOOKED_AT_MAX);
    clients.map(|client| connected(core, Family::Agents, &client, ids())).collect()
}

fn in_rooms(core: &Core, members: Vec<Here>) -> Vec<Value> {
    let of = |member: Here| {
        let ids = KeptIds {
            room_id: Some(member.room.as_str().into()),
            user_id: Some(member.user.as_str().into()),
            client_id: Some(member.client.as_str().into()),
            ..KeptIds::default()
        };
        connected(core, Family::Rooms, &Client::WebSocket(member.link), ids)
    };
    members.into_iter().map(of).collect()
}

fn connected(core: &Core, family: Family, client: &Client, ids: KeptIds) -> Value {
    described(core, Some(family), client, &ids)
}

fn described(core: &Core, family: Option<Family>, client: &Client, ids: &KeptIds) -> Value {
    let transport = match client {
        Client::WebSocket(_) => "websocket",
        Client::EventStream(_) => "sse",
    };
    let row = json!({
        "server_id": &*core.server_id,
        "endpoint": family.map(Family::label),
        "connection_id": client.id(),
        "since": opened(client.id()).map(rfc3339),
        "transport": transport,
        "waiting_bytes": client.waiting_bytes(),
        "waiting_bytes_max": client.buffer_bytes_max(),
        "closing": client.is_closing(),
    });
    with_ids(row, ids)
}

fn ended(core: &Core, end: &Ended) -> Value {
    let Words { what, advice } = words::of_end(end.reason, end.by_client);
    let by = match end.reason {
        _ if end.by_client => "client",
        "gone" => "network",
        "backend" | "revoked" => "worker",
        _ => "gateway",
    };
    let opened = opened(end.connection);
    let row = json!({
        "kind": "end",
        "server_id": &*core.server_id,
        "endpoint": end.family.label(),
        "at": rfc3339(end.at),
        "connection_id": end.connection,
        "since": opened.map(rfc3339),
        "duration_ms": opened.map(|opened| end.at.saturating_sub(opened)),
        "reason": end.reason,
        "code": end.code,
        "by": by,
        "what": what,
        "advice": advice,
        "messages_out": end.messages_out,
    });
    with_ids(row, &end.ids)
}

fn refused(core: &Core, one: &Refused) -> Value {
    let (what, advice) = match one.code {
        "invalid_token" => words::of_token(&one.message, one.cause.as_deref()),
        code => {
            let Words { what, advice } = words::of_refusal(code);
            (what.to_owned(), advice)
        }
    };
    let row = json!({
        "kind": "refusal",
        "server_id": &*core.server_id,
        "endpoint": one.family.label(),
        "at": rfc3339(one.at),
        "status": one.status,
        "code": one.code,
        "message": one.message,
        "error": one.cause,
        "what": what,
        "advice": advice,
    });
    with_ids(row, &one.ids)
}

fn with_ids(mut row: Value, ids: &KeptIds) -> Value {
    if let (Value::Object(row), Ok(Value::Object(ids))) = (&mut row, serde_json::to_value(ids)) {
        row.extend(ids);
    }
    row
}

/// Returns the time of a connection's opening, which its id begins with, in milliseconds since 1970.
fn opened(connection: Uuid) -> Option<u64> {
    let (seconds, nanos) = connection.get_timestamp()?.to_unix();
    Some(seconds * 1000 + u64::from(nanos / 1_000_000))
}

fn rfc3339(ms: u64) -> String {
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(ms)).to_string()
}

/// Upper bound of the rows of each kind from one instance.
pub(super) const ROWS_MAX: usize = 100;

/// Upper bound of the connections that become rows: one more than are shown tells that there are more. A room may have
/// 100,000 members, whose rows would hold up the connections of this thread.
const LOOKED_AT_MAX: usize = ROWS_MAX + 1;

/// Upper bound of the ends, and of the refusals, that the overview looks at.
const LATEST_MAX: usize = 1_000;

/// Upper bound of the clients that a row of several ends or refusals names.
const CLIENTS_MAX: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_by_their_kind() {
        assert!(Subject::read(Kind::Session, "s-1").is_ok());
        for (kind, id) in [
            (Kind::Session, "<img src=x onerror=alert(1)>"),
            (Kind::User, ""),
            (Kind::Room, "a b"),
            (Kind::Connection, "s-1"),
        ] {
            assert_eq!(Subject::read(kind, id).unwrap_err().code, "bad_id", "{kind:?} {id}");
        }
        let connection = Uuid::now_v7();
        let subject = Subject::read(Kind::Connection, &connection.to_string()).unwrap();
        assert_eq!(subject.parts(), (Kind::Connection, connection.to_string()));
    }

    #[test]
    fn an_id_tells_when_its_connection_was_opened() {
        let ms = opened(Uuid::now_v7()).unwrap();
        assert!(crate::core::recent::now_ms().abs_diff(ms) < 20_000);
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000Z");
    }
}
