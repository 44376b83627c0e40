//! Streams of a topic's messages for workers, as server-sent events over HTTP.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{Stream, stream};
use http::{HeaderValue, Response, header};
use tracing::debug;

use crate::{
    core::Core,
    http::{
        Body,
        handshake::{self, event_stream::CACHE_CONTROL},
        rejection::Rejection,
    },
    hub::{
        follower::{Followed, FollowerQueue},
        form::sse::{self, COMMENT},
        sink::Sink,
        subscription::Subscription,
    },
};

/// Answers with a stream: the entries of `logs`, of which each holds about `entries_max`, then the messages of `topic`.
///
/// The topic is subscribed before the logs are read, so that no message is missed. A message that
/// is appended meanwhile is in a log or in the stream, never in both.
///
/// # Errors
/// 503: the bus or the store is away. 504: it is slow.
pub async fn follow(
    core: &Arc<Core>,
    topic: String,
    logs: VecDeque<String>,
    entries_max: u64,
) -> Result<Response<Body>, Rejection> {
    let queue = FollowerQueue::new(FOLLOWER_BYTES_MAX);
    let sink = Sink::Follower(Arc::clone(&queue));
    // Redis trims whole nodes, so a log may hold somewhat more.
    let left = entries_max.saturating_mul(2);
    let mut log = Some(Logs { keys: logs, after: String::new(), left });
    let (subscription, kept) = handshake::deadline(core, async {
        let subscription = core.hub.subscribe([(topic.into(), sink)]).await?;
        let kept = match &mut log {
            Some(log) => log.page(core).await?,
            None => VecDeque::new(),
        };
        Ok((subscription, kept))
    })
    .await?;
    let core = Arc::clone(core);
    let follower = Follower { core, queue, kept, log, over: false, _subscription: subscription };
    Ok(response(stream::unfold(follower, Follower::next)))
}

/// Makes an answer of server-sent events.
pub(crate) fn response(
    events: impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static,
) -> Response<Body> {
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(CACHE_CONTROL));
    // Without this header nginx buffers the stream.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    // The listener does not see the end of such a body, and takes no further request on its socket.
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

struct Follower {
    core: Arc<Core>,
    queue: Arc<FollowerQueue>,
    kept: VecDeque<Bytes>,
    /// Logs that are not read to their ends yet.
    log: Option<Logs>,
    over: bool,
    _subscription: Subscription,
}

impl Follower {
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        if self.over {
            return None;
        }
        if let Some(log) = self.log.as_mut().filter(|_| self.kept.is_empty()) {
            match handshake::deadline(&self.core, log.page(&self.core)).await {
                Ok(page) if page.is_empty() => self.log = None,
                Ok(page) => self.kept = page,
                Err(error) => {
                    debug!(%error, "A follower's log cannot be read on.");
                    return None;
                }
            }
        }
        if let Some(kept) = self.kept.pop_front() {
            return Some((Ok(kept), self));
        }
        let chunk = tokio::select! {
            entry = self.queue.next() => match entry {
                Some(Followed::Message(payload)) => event(None, &payload),
                Some(Followed::Gap(gap)) => gap_event(gap),
                None => {
                    self.over = true;
                    OVERFLOW
                }
            },
            () = tokio::time::sleep(KEEP_ALIVE) => COMMENT,
            () = self.core.followers_end.cancelled() => return None,
        };
        Some((Ok(chunk), self))
    }
}

/// Logs that are read one after the other, page by page.
struct Logs {
    keys: VecDeque<String>,
    /// Id of the last entry that was read.
    after: String,
    /// Upper bound of the entries still to read: a log that grows meanwhile must not keep the follower from live
    /// messages.
    left: u64,
}

impl Logs {
    /// Reads the next page as events; an empty page is the end.
    ///
    /// # Errors
    /// 500, 503: the store did not answer the read.
    async fn page(&mut self, core: &Core) -> Result<VecDeque<Bytes>, Rejection> {
        let count = page_entries(core.config.limits.max_message_bytes);
        let count = count.min(usize::try_from(self.left).unwrap_or(usize::MAX));
        while let Some(key) = self.keys.front().filter(|_| count > 0) {
            let entries = core.store.read_log(key, &self.after, count).await?;
            if let Some(last) = entries.last() {
                self.left -= entries.len() as u64;
                self.after.clone_from(&last.id);
                return Ok(entries.iter().map(|one| event(Some(&one.id), &one.data)).collect());
            }
            self.keys.pop_front();
            self.after.clear();
        }
        Ok(VecDeque::new())
    }
}

/// Makes the event `bus_recovered`, which tells a follower that messages may be missing.
fn gap_event(gap: Duration) -> Bytes {
    Bytes::from(format!("event: bus_recovered\ndata: {{\"gap_ms\":{}}}\n\n", gap.as_millis()))
}

/// Returns the number of entries that are read at a time. They fit into [`FOLLOWER_BYTES_MAX`], unless it is one.
fn page_entries(entry_bytes_max: usize) -> usize {
    (FOLLOWER_BYTES_MAX / entry_bytes_max.max(1)).clamp(1, PAGE_ENTRIES)
}

/// Makes an event of a payload. Every line gets its own `data:`, so that a payload cannot forge an event.
pub(crate) fn event(id: Option<&str>, payload: &[u8]) -> Bytes {
    let text = String::from_utf8_lossy(payload);
    let mut event = String::with_capacity(text.len() + 32);
    if let Some(id) = id {
        event.push_str("id: ");
        event.push_str(id);
        event.push('\n');
    }
    event.push_str("event: message\n");
    sse::push_data(&mut event, &text);
    Bytes::from(event)
}

/// Upper bound of the bytes that wait for a follower. Beyond it the stream ends with an `overflow` event.
pub(crate) const FOLLOWER_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Silence after which a comment is sent, so that proxies keep the stream open.
pub(crate) const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The last event of a follower that is too slow.
pub(crate) const OVERFLOW: Bytes =
    Bytes::from_static(b"event: overflow\ndata: the follower is too slow\n\n");

/// Upper bound of the log entries in one read. The next read waits until these are sent.
const PAGE_ENTRIES: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_entries_of_a_page_fit_into_what_may_wait() {
        assert_eq!([1, 1 << 20, 16 << 20].map(page_entries), [PAGE_ENTRIES, 4, 1]);
    }

    #[test]
    fn a_payload_cannot_forge_an_event() {
        let text = event(None, b"{\"a\":1}\n\nevent: message\ndata: forged");
        let expected =
            "event: message\ndata: {\"a\":1}\ndata: \ndata: event: message\ndata: data: forged\n\n";
        assert_eq!(text, expected);
        assert_eq!(event(None, b"1\r\n2\r3"), "event: message\ndata: 1\ndata: 2\ndata: 3\n\n");
        assert_eq!(event(Some("1-0"), b"1"), "id: 1-0\nevent: message\ndata: 1\n\n");
    }
}
