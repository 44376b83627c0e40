//! The last ended connections and refused handshakes of an instance, for operators who ask for a reason. Knows no family.

use std::{collections::VecDeque, net::IpAddr};

use parking_lot::Mutex;
use serde::Serialize;
use uuid::Uuid;
use wsproxy_conn::End;

use crate::telemetry::{family::Family, time};

/// Ids of a client, by which an operator finds it. No credential is among them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Who<'a> {
    /// The session.
    pub session: Option<&'a str>,
    /// The agent id in a session's path.
    pub agent: Option<&'a str>,
    /// The user.
    pub user: Option<&'a str>,
    /// The room.
    pub room: Option<&'a str>,
    /// The client's name in a room.
    pub client: Option<&'a str>,
    /// Address of the client.
    pub address: Option<IpAddr>,
}

impl Who<'_> {
    const fn is_named(&self) -> bool {
        self.session.is_some() || self.user.is_some() || self.room.is_some()
    }
}

/// Kept ids of a client.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct KeptIds {
    /// The session.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_id: Option<Box<str>>,
    /// The agent id in a session's path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<Box<str>>,
    /// The user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_id: Option<Box<str>>,
    /// The room.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub room_id: Option<Box<str>>,
    /// The client's name in a room.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_id: Option<Box<str>>,
    /// Address of the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
}

/// A connection that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Time of the end, in milliseconds since 1970.
    pub at: u64,
    /// Endpoint family.
    pub family: Family,
    /// Id of the connection, whose first bits are the time of its opening.
    pub connection: Uuid,
    /// Ids of the client.
    pub ids: KeptIds,
    /// Label of the entry in the table of endings.
    pub reason: &'static str,
    /// Close code.
    pub code: u16,
    /// The client closed first.
    pub by_client: bool,
    /// Messages that went to the client.
    pub messages_out: u64,
}

/// A handshake that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Time of the refusal, in milliseconds since 1970.
    pub at: u64,
    /// Endpoint family.
    pub family: Family,
    /// Ids of the client. A client that was refused may not be the user that it named.
    pub ids: KeptIds,
    /// Status of the answer.
    pub status: u16,
    /// Code of the refusal.
    pub code: &'static str,
    /// Words for the client.
    pub message: Box<str>,
    /// Error inside the gateway, as the log has it.
    pub cause: Option<Box<str>>,
}

/// The words of a refusal.
#[derive(Debug, Clone, Copy)]
pub struct Refusal<'a> {
    /// Status of the answer.
    pub status: u16,
    /// Code of the refusal.
    pub code: &'static str,
    /// Words for the client.
    pub message: &'a str,
    /// Error inside the gateway, as the log has it.
    pub cause: Option<&'a str>,
}

/// The memory of an instance for ends and refusals. The two have separate bounds, so that a flood of refusals removes
/// no end.
#[derive(Debug, Default)]
pub struct Recent {
    ends: Mutex<Kept<Ended>>,
    refusals: Mutex<Kept<Refused>>,
}

/// The newest entries of one kind.
///
/// Invariant: holds at most [`ENTRIES_MAX`] entries and [`BYTES_MAX`] bytes. A new entry removes the oldest ones.
#[derive(Debug)]
struct Kept<T> {
    entries: VecDeque<T>,
    bytes: usize,
}

/// An entry whose bytes are counted.
trait Counted {
    fn bytes(&self) -> usize;
}

impl Recent {
    /// Keeps the end of a connection with an id.
    pub fn ended(&self, family: Family, connection: Uuid, who: Who<'_>, end: End, sent: u64) {
        if !who.is_named() {
            return;
        }
        let entry = Ended {
            at: now_ms(),
            family,
            connection,
            ids: who.into(),
            reason: end.why.label,
            code: end.code,
            by_client: end.by_peer,
            messages_out: sent,
        };
        self.ends.lock().push(entry);
    }

    /// Keeps the refusal of a handshake that named an id.
    pub fn refused(&self, family: Family, who: Who<'_>, refusal: Refusal<'_>) {
        if !who.is_named() {
            return;
        }
        let Refusal { status, code, message, cause } = refusal;
        let (message, cause) = (cut(message), cause.map(cut));
        let entry = Refused { at: now_ms(), family, ids: who.into(), status, code, message, cause };
        self.refusals.lock().push(entry);
    }

    /// Returns at most `most` of the newest ends that `is_wanted` chooses, the newest first.
    pub fn ends(&self, most: usize, is_wanted: impl Fn(&Ended) -> bool) -> Vec<Ended> {
        self.ends.lock().newest(most, is_wanted)
    }

    /// Returns at most `most` of the newest refusals that `is_wanted` chooses, the newest first.
    pub fn refusals(&self, most: usize, is_wanted: impl Fn(&Refused) -> bool) -> Vec<Refused> {
        self.refusals.lock().newest(most, is_wanted)
    }
}

impl<T: Counted + Clone> Kept<T> {
    fn push(&mut self, entry: T) {
        self.bytes += entry.bytes();
        self.entries.push_back(entry);
        while self.entries.len() > ENTRIES_MAX || self.bytes > BYTES_MAX {
            let Some(oldest) = self.entries.pop_front() else { break };
            self.bytes -= oldest.bytes();
        }
    }

    fn newest(&self, most: usize, is_wanted: impl Fn(&T) -> bool) -> Vec<T> {
        self.entries.iter().rev().filter(|entry| is_wanted(entry)).take(most).cloned().collect()
    }
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self { entries: VecDeque::new(), bytes: 0 }
    }
}

impl Counted for Ended {
    fn bytes(&self) -> usize {
        size_of::<Self>() + self.ids.bytes()
    }
}

impl Counted for Refused {
    fn bytes(&self) -> usize {
        let texts = self.message.len() + self.cause.as_deref().map_or(0, str::len);
        size_of::<Self>() + self.ids.bytes() + texts
    }
}

impl KeptIds {
    fn bytes(&self) -> usize {
        let Self { session_id, agent_id, user_id, room_id, client_id, address: _ } = self;
        let ids = [session_id, agent_id, user_id, room_id, client_id];
        ids.into_iter().flatten().map(|id| id.len()).sum()
    }
}

impl From<Who<'_>> for KeptIds {
    fn from(Who { session, agent, user, room, client, address }: Who<'_>) -> Self {
        Self {
            session_id: session.map(Into::into),
            agent_id: agent.map(Into::into),
            user_id: user.map(Into::into),
            room_id: room.map(Into::into),
            client_id: client.map(Into::into),
            address,
        }
    }
}

/// Returns the part of a text that is kept.
fn cut(text: &str) -> Box<str> {
    text[..text.floor_char_boundary(TEXT_BYTES_MAX)].into()
}

/// Returns the present in milliseconds since 1970.
pub fn now_ms() -> u64 {
    u64::try_from(time::since_epoch().as_millis()).unwrap_or(u64::MAX)
}

/// Upper bound of the kept entries of a kind.
const ENTRIES_MAX: usize = 4096;

/// Upper bound of the bytes of a kind.
const BYTES_MAX: usize = 2 * 1024 * 1024;

/// Upper bound of a kept text.
const TEXT_BYTES_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use wsproxy_proto::disconnect::Disconnect;

    use super::*;

    const END: End = End { why: &Disconnect::SLOW, code: 1008, by_peer: false };

    fn user(user: &str) -> Who<'_> {
        Who { user: Some(user), ..Who::default() }
    }

    #[test]
    fn the_newest_ends_are_found_by_id() {
        let recent = Recent::default();
        for (user_id, sent) in [("u-1", 1), ("u-2", 2), ("u-1", 3)] {
            recent.ended(Family::Events, Uuid::now_v7(), user(user_id), END, sent);
        }
        let is_wanted = |end: &Ended| end.ids.user_id.as_deref() == Some("u-1");
        let sent = |most| {
            recent.ends(most, is_wanted).iter().map(|end| end.messages_out).collect::<Vec<_>>()
        };
        assert_eq!(sent(10), [3, 1]);
        assert_eq!(sent(1), [3]);
    }

    #[test]
    fn memory_is_bounded_in_entries_and_bytes() {
        let recent = Recent::default();
        for n in 0..ENTRIES_MAX as u64 + 10 {
            recent.ended(Family::Events, Uuid::now_v7(), user("u"), END, n);
        }
        let kept = recent.ends(usize::MAX, |_| true);
        assert_eq!((kept.len(), kept.last().map(|end| end.messages_out)), (ENTRIES_MAX, Some(10)));
        let long = "x".repeat(10_000);
        for _ in 0..ENTRIES_MAX {
            recent.ended(Family::Events, Uuid::now_v7(), user(&long), END, 0);
        }
        let ends = recent.ends.lock();
        assert!(ends.bytes <= BYTES_MAX && ends.entries.len() > 100, "{}", ends.entries.len());
        assert_eq!(ends.bytes, ends.entries.iter().map(Counted::bytes).sum::<usize>());
    }

    #[test]
    fn a_refusal_without_an_id_is_not_kept() {
        let recent = Recent::default();
        let message = "x".repeat(1000);
        let refusal =
            Refusal { status: 403, code: "invalid_token", message: &message, cause: None };
        recent.refused(Family::Events, Who::default(), refusal);
        recent.refused(Family::Events, user("u-1"), refusal);
        let kept = recent.refusals(10, |_| true);
        assert_eq!(kept.len(), 1);
        assert_eq!(kept[0].message.len(), TEXT_BYTES_MAX);
    }
}
