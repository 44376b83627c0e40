//! The announcements of an agent's sessions as server-sent events, for workers without Redis.
//!
//! Where they are kept, the log is what is sent, each entry with its id; the channel only says when to
//! look. So a follower that comes back with the id of its last entry misses nothing, and neither a loss
//! of the bus nor a slow reader makes a hole.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{FutureExt, stream};
use http::{HeaderMap, Response};
use tokio::time::{Instant, sleep_until};
use tracing::debug;
use wsproxy_proto::names::Id;

use crate::{
    gateway::Gateway,
    http::{
        Body,
        follow::{self, FOLLOWER_BYTES_MAX, KEEP_ALIVE},
        rejection::Rejection,
        upgrade,
    },
    hub::{
        Sink, Subscription,
        tap::{Tap, TapEntry},
    },
    store::StoreError,
};

/// Entries of the log that are read at once; further ones when these have been sent.
const PAGE_ENTRIES: usize = 200;

/// Pause after the log could not be read.
const RETRY: Duration = Duration::from_secs(1);

/// Where a follower begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// With the next announcement.
    Now,
    /// With the oldest one that is kept.
    Oldest,
    /// Behind this one.
    After(EntryId),
}

/// The id of an entry of a log, as Redis makes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EntryId {
    milliseconds: u64,
    sequence: u64,
}

impl Start {
    /// Reads the header `Last-Event-ID`, which an `EventSource` sends when it reconnects and which
    /// therefore is the newer one, and the parameters `after` and `log`.
    ///
    /// # Errors
    /// `400`: one of them is no id.
    pub fn read(headers: &HeaderMap, after: Option<&str>, log: bool) -> Result<Self, Rejection> {
        let header = headers.get("last-event-id").map(|value| value.to_str().unwrap_or("?"));
        match header.filter(|id| !id.is_empty()).or(after) {
            Some("0" | "0-0") => Ok(Self::Oldest),
            Some(text) => EntryId::parse(text).map(Self::After).ok_or_else(|| {
                Rejection::bad_request("after must be 0 or the id of an announcement.")
            }),
            None if log => Ok(Self::Oldest),
            None => Ok(Self::Now),
        }
    }
}

impl EntryId {
    fn parse(text: &str) -> Option<Self> {
        let (milliseconds, sequence) = text.split_once('-')?;
        let number = |text: &str| {
            let is_plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            is_plain.then(|| text.parse().ok())?
        };
        Some(Self { milliseconds: number(milliseconds)?, sequence: number(sequence)? })
    }

    /// The id before this one, so that reading behind it includes this one. Empty: there is none.
    fn predecessor(self) -> String {
        match self {
            Self { milliseconds: 0, sequence: 0 } => String::new(),
            Self { milliseconds, sequence: 0 } => format!("{}-{}", milliseconds - 1, u64::MAX),
            Self { milliseconds, sequence } => format!("{milliseconds}-{}", sequence - 1),
        }
    }
}

/// Answers with a stream of an agent's announcements.
///
/// # Errors
/// `400`: a position is given, but nothing is kept here. Otherwise those of the bus and the store.
pub async fn follow(
    gateway: &Arc<Gateway>,
    agent: &Id,
    start: Start,
) -> Result<Response<Body>, Rejection> {
    let topic = gateway.names.agent_sessions(agent);
    if gateway.session_log.is_none() {
        return match start {
            Start::Now => follow::follow(gateway, topic, VecDeque::new()).await,
            _ => Err(Rejection::bad_request(
                "Announcements are not kept: sessions.events_log is off.",
            )),
        };
    }
    let tap = Tap::new(FOLLOWER_BYTES_MAX);
    let sink = Sink::Tap(Arc::clone(&tap));
    let mut log = Log::new(gateway.names.agent_sessions_log(agent), start);
    let (subscription, ready) = upgrade::deadline(gateway, async {
        // First, so that what is appended from now on is read or has us look again.
        let subscription = gateway.hub.subscribe([(topic.into(), sink)]).await?;
        if start == Start::Now {
            log.after = gateway.store.log_end(&log.key).await?.as_deref().and_then(EntryId::parse);
        }
        let ready = log.page(gateway).await?;
        Ok((subscription, ready))
    })
    .await?;
    let look_at = (!ready.is_empty()).then(Instant::now);
    let gateway = Arc::clone(gateway);
    let follower =
        Follower { gateway, tap, ready, log, look_at, over: false, _subscription: subscription };
    Ok(follow::response(stream::unfold(follower, Follower::next)))
}

struct Follower {
    gateway: Arc<Gateway>,
    tap: Arc<Tap>,
    /// Events that were read and are not sent yet.
    ready: VecDeque<Bytes>,
    log: Log,
    /// When the log is read again; `None`: when the channel says so.
    look_at: Option<Instant>,
    over: bool,
    _subscription: Subscription,
}

impl Follower {
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        let keep_alive = Instant::now() + KEEP_ALIVE;
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some((Ok(event), self));
            }
            if self.over {
                return None;
            }
            let look_at = self.look_at.unwrap_or(keep_alive);
            tokio::select! {
                () = self.gateway.followers_end.cancelled() => return None,
                () = sleep_until(look_at), if self.look_at.is_some() => self.look().await,
                entry = self.tap.next_entry() => self.take(entry)?,
                () = sleep_until(keep_alive) => {
                    // Also a look: a channel promises nothing.
                    self.look_at = Some(Instant::now());
                    return Some((Ok(Bytes::from_static(b":\n\n")), self));
                }
            }
        }
    }

    /// Notes what the channel says. `None`: the stream is over.
    fn take(&mut self, entry: Option<TapEntry>) -> Option<()> {
        let mut next = Some(entry);
        while let Some(entry) = next {
            match entry {
                Some(TapEntry::Message(..) | TapEntry::Gap(_)) => {
                    self.look_at = Some(Instant::now())
                }
                Some(TapEntry::Position(_) | TapEntry::Event(..)) => {}
                Some(TapEntry::End(_)) => return None,
                None => {
                    self.over = true;
                    self.ready.push_back(follow::OVERFLOW);
                    return Some(());
                }
            }
            // Many messages are one look.
            next = self.tap.next_entry().now_or_never();
        }
        Some(())
    }

    async fn look(&mut self) {
        self.look_at = None;
        match upgrade::deadline(&self.gateway, self.log.page(&self.gateway)).await {
            Ok(page) => {
                // There may be more; an empty page ends it.
                self.look_at = (!page.is_empty()).then(Instant::now);
                self.ready = page;
            }
            Err(error) => {
                debug!(%error, "A follower's log cannot be read now.");
                self.look_at = Some(Instant::now() + RETRY);
            }
        }
    }
}

/// The log of an agent, read from somewhere on.
struct Log {
    key: String,
    /// The last entry that was read; `None`: none.
    after: Option<EntryId>,
    /// Whether anything was read, so that an empty log has lost nothing that was not read.
    has_read: bool,
    /// Whether the last entry should still be there: if it is not, later ones may have been removed too.
    is_held: bool,
}

impl Log {
    fn new(key: String, start: Start) -> Self {
        let after = match start {
            Start::After(id) => Some(id),
            Start::Now | Start::Oldest => None,
        };
        Self { key, after, has_read: start == Start::Now, is_held: true }
    }

    /// The next entries as events; none at the end. Begins with a `history_lost` where entries may be
    /// missing.
    async fn page(&mut self, gateway: &Gateway) -> Result<VecDeque<Bytes>, Rejection> {
        let mut events = VecDeque::new();
        let entries = loop {
            let from = self.after.map_or_else(String::new, EntryId::predecessor);
            let mut entries = gateway.store.read_log(&self.key, &from, PAGE_ENTRIES).await?;
            let first = entries.first().map(|entry| EntryId::parse(&entry.id));
            let Some(after) = self.after else { break entries };
            match first {
                Some(first) if first == Some(after) => {
                    entries.remove(0);
                    self.is_held = true;
                    break entries;
                }
                Some(_) => {
                    if self.is_held {
                        events.push_back(lost("trimmed"));
                    }
                    break entries;
                }
                None if self.is_another_life(gateway, after).await? => {
                    events.push_back(lost("unknown"));
                    self.after = None;
                }
                None => {
                    if !self.has_read {
                        events.push_back(lost("trimmed"));
                    }
                    // All that was in it has been read, or was told of.
                    self.is_held = false;
                    break entries;
                }
            }
        };
        self.has_read = true;
        if let Some(last) = entries.last() {
            self.after = EntryId::parse(&last.id);
            self.is_held = true;
        }
        events.extend(entries.iter().map(|entry| follow::event(Some(&entry.id), &entry.data)));
        Ok(events)
    }

    /// Whether the log is newer than what was read of it: Redis was emptied and its clock set back.
    async fn is_another_life(&self, gateway: &Gateway, after: EntryId) -> Result<bool, StoreError> {
        let end = gateway.store.log_end(&self.key).await?;
        Ok(end.as_deref().and_then(EntryId::parse).is_some_and(|end| end < after))
    }
}

/// Tells that announcements may be missing here.
fn lost(reason: &str) -> Bytes {
    Bytes::from(format!("event: history_lost\ndata: {{\"reason\":\"{reason}\"}}\n\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_newer_than_the_parameter() {
        let mut headers = HeaderMap::new();
        assert_eq!(Start::read(&headers, None, false).unwrap(), Start::Now);
        assert_eq!(Start::read(&headers, None, true).unwrap(), Start::Oldest);
        assert_eq!(Start::read(&headers, Some("0"), false).unwrap(), Start::Oldest);
        let id = |milliseconds, sequence| Start::After(EntryId { milliseconds, sequence });
        assert_eq!(Start::read(&headers, Some("5-1"), true).unwrap(), id(5, 1));
        headers.insert("last-event-id", "7-0".parse().unwrap());
        assert_eq!(Start::read(&headers, Some("5-1"), false).unwrap(), id(7, 0));
        for odd in ["x", "5", "5-", "-5", "+5-1", "5-1-1", "99999999999999999999-0"] {
            headers.insert("last-event-id", odd.parse().unwrap());
            assert!(Start::read(&headers, None, false).is_err(), "{odd}");
        }
    }

    #[test]
    fn an_id_is_behind_its_predecessor_only() {
        let before = |text| EntryId::parse(text).unwrap().predecessor();
        assert_eq!(before("5-3"), "5-2");
        assert_eq!(before("5-0"), format!("4-{}", u64::MAX));
        assert_eq!(before("0-0"), "");
    }
}
