//! Streams of an agent's session announcements as server-sent events, for workers without Redis.
//!
//! If announcements are kept, the stream is read from the log, and each event has its entry's id. A
//! message on the channel only says that the log has grown. So a follower that reconnects with the id of
//! its last entry misses nothing. A loss of the bus or a slow reader makes no gap.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{FutureExt, stream};
use http::{HeaderMap, Response};
use tokio::time::{Instant, sleep_until};
use tracing::debug;
use wsproxy_proto::names::Id;

use crate::{
    core::Core,
    endpoint::session::Sessions,
    http::{
        Body,
        follow::{self, FOLLOWER_BYTES_MAX, KEEP_ALIVE},
        handshake,
        rejection::Rejection,
    },
    hub::{
        follower::{Followed, FollowerQueue},
        form::sse::COMMENT,
        sink::Sink,
        subscription::Subscription,
    },
    store::command::StoreError,
};

/// The position at which a follower begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// The next announcement.
    Now,
    /// The oldest announcement that is kept.
    Oldest,
    /// The announcement after this entry.
    After(EntryId),
}

/// The id of a log entry, in the form of Redis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EntryId {
    milliseconds: u64,
    sequence: u64,
}

impl Start {
    /// Reads the header `Last-Event-ID` and the parameters `after` and `log`. The header wins: an
    /// `EventSource` reconnects with its old URL and a new header.
    ///
    /// # Errors
    /// 400: the header or `after` is not an id.
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

    /// Returns the id before this one, so that a read after it includes this one. Empty for the lowest id.
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
/// 400: a position, but announcements are not kept. 503: the bus or the store is away. 504: it is slow.
pub async fn follow(
    sessions: &Sessions,
    core: &Arc<Core>,
    agent: &Id,
    start: Start,
) -> Result<Response<Body>, Rejection> {
    let topic = core.names.agent_sessions(agent);
    if sessions.log.is_none() {
        return match start {
            Start::Now => follow::follow(core, topic, VecDeque::new(), 0).await,
            _ => Err(Rejection::bad_request(
                "Announcements are not kept: sessions.events_log is off.",
            )),
        };
    }
    let queue = FollowerQueue::new(FOLLOWER_BYTES_MAX);
    let sink = Sink::Follower(Arc::clone(&queue));
    let mut log = AgentLog::new(core.names.agent_sessions_log(agent), start);
    let (subscription, ready) = handshake::deadline(core, async {
        // Subscribe first: an entry that is appended after the read below then causes another read.
        let subscription = core.hub.subscribe([(topic.into(), sink)]).await?;
        if start == Start::Now {
            log.after = core.store.log_end(&log.key).await?.as_deref().and_then(EntryId::parse);
        }
        let ready = log.page(core).await?;
        Ok((subscription, ready))
    })
    .await?;
    let look_at = (!ready.is_empty()).then(Instant::now);
    let core = Arc::clone(core);
    let follower = AnnouncementFollower {
        core,
        queue,
        ready,
        log,
        look_at,
        over: false,
        _subscription: subscription,
    };
    Ok(follow::response(stream::unfold(follower, AnnouncementFollower::next)))
}

struct AnnouncementFollower {
    core: Arc<Core>,
    queue: Arc<FollowerQueue>,
    /// Events that were read and are not sent yet.
    ready: VecDeque<Bytes>,
    log: AgentLog,
    /// Time of the next read of the log; `None`: the next message on the channel.
    look_at: Option<Instant>,
    over: bool,
    _subscription: Subscription,
}

impl AnnouncementFollower {
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
                () = self.core.followers_end.cancelled() => return None,
                () = sleep_until(look_at), if self.look_at.is_some() => self.look().await,
                entry = self.queue.next() => self.take(entry),
                () = sleep_until(keep_alive) => {
                    // Read the log too: pub/sub may have lost a message.
                    self.look_at = Some(Instant::now());
                    return Some((Ok(COMMENT), self));
                }
            }
        }
    }

    /// Notes that the channel has messages, or that the follower is too slow.
    fn take(&mut self, entry: Option<Followed>) {
        let mut next = Some(entry);
        while let Some(entry) = next {
            match entry {
                Some(Followed::Message(_) | Followed::Gap(_)) => {
                    self.look_at = Some(Instant::now())
                }
                None => {
                    self.over = true;
                    self.ready.push_back(follow::OVERFLOW);
                    return;
                }
            }
            // Many messages cause a single read.
            next = self.queue.next().now_or_never();
        }
    }

    async fn look(&mut self) {
        self.look_at = None;
        match handshake::deadline(&self.core, self.log.page(&self.core)).await {
            Ok(page) => {
                // Read on until a page is empty.
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

/// Reader of an agent's log.
struct AgentLog {
    key: String,
    /// Id of the last entry that was read.
    after: Option<EntryId>,
    /// The log was read at least once: if it is empty now, the follower has missed no entry.
    has_read: bool,
    /// The log held the last entry at the latest read. If the entry is gone at the next one, later ones may be gone
    /// too.
    is_held: bool,
}

impl AgentLog {
    fn new(key: String, start: Start) -> Self {
        let after = match start {
            Start::After(id) => Some(id),
            Start::Now | Start::Oldest => None,
        };
        Self { key, after, has_read: start == Start::Now, is_held: true }
    }

    /// Reads the next page as events; an empty page is the end. The page begins with `history_lost` if
    /// entries may be missing.
    ///
    /// # Errors
    /// 500, 503: the store did not answer the read.
    async fn page(&mut self, core: &Core) -> Result<VecDeque<Bytes>, Rejection> {
        let mut events = VecDeque::new();
        let entries = loop {
            let from = self.after.map_or_else(String::new, EntryId::predecessor);
            let mut entries = core.store.read_log(&self.key, &from, PAGE_ENTRIES).await?;
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
                None if self.is_another_life(core, after).await? => {
                    events.push_back(lost("unknown"));
                    self.after = None;
                }
                None => {
                    if !self.has_read {
                        events.push_back(lost("trimmed"));
                    }
                    // The follower has read all entries, or knows that it missed some.
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

    /// Returns whether the log ends before the last entry that was read: Redis was emptied and its clock set back.
    async fn is_another_life(&self, core: &Core, after: EntryId) -> Result<bool, StoreError> {
        let end = core.store.log_end(&self.key).await?;
        Ok(end.as_deref().and_then(EntryId::parse).is_some_and(|end| end < after))
    }
}

/// Makes the event that tells a follower of possibly missing announcements.
fn lost(reason: &str) -> Bytes {
    Bytes::from(format!("event: history_lost\ndata: {{\"reason\":\"{reason}\"}}\n\n"))
}

/// Upper bound of the log entries in one read. The next read waits until these are sent.
const PAGE_ENTRIES: usize = 200;

/// Pause after the log could not be read.
const RETRY: Duration = Duration::from_secs(1);

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
