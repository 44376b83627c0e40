//! A topic as server-sent events, for workers that follow it over HTTP.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{Stream, stream};
use http::{HeaderValue, Response, header};
use tracing::debug;

use crate::{
    gateway::Gateway,
    http::{Body, rejection::Rejection, upgrade},
    hub::{
        Sink, Subscription, message,
        tap::{Tap, TapEntry},
    },
};

/// What may wait for a follower; beyond it the stream ends with an `overflow` event.
pub(super) const FOLLOWER_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A comment is sent when nothing else was for this long, so that proxies keep the stream open.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The last event of a follower that is too slow.
pub(super) const OVERFLOW: Bytes =
    Bytes::from_static(b"event: overflow\ndata: the follower is too slow\n\n");

/// Most entries of a log that are read at once; further ones when these have been sent.
const PAGE_ENTRIES: usize = 100;

/// Answers with a stream of `topic`'s messages, after those of `logs` in turn.
///
/// The topic is subscribed first, so nothing is missed in between; what was appended in that
/// moment is in the log or in the stream, never in both.
pub async fn follow(
    gateway: &Arc<Gateway>,
    topic: String,
    logs: VecDeque<String>,
) -> Result<Response<Body>, Rejection> {
    let tap = Tap::new(FOLLOWER_BYTES_MAX);
    let sink = Sink::Tap(Arc::clone(&tap));
    // Redis trims whole nodes, so there may be somewhat more than the configured number.
    let left = gateway.config.sessions.up_log_entries_max.saturating_mul(2);
    let mut log = Some(Logs { keys: logs, after: String::new(), left });
    let (subscription, kept) = upgrade::deadline(gateway, async {
        let subscription = gateway.hub.subscribe([(topic.into(), sink)]).await?;
        let kept = match &mut log {
            Some(log) => log.page(gateway).await?,
            None => VecDeque::new(),
        };
        Ok((subscription, kept))
    })
    .await?;
    let gateway = Arc::clone(gateway);
    let follower = Follower { gateway, tap, kept, log, over: false, _subscription: subscription };
    Ok(response(stream::unfold(follower, Follower::next)))
}

/// An answer of server-sent events.
pub(super) fn response(
    events: impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static,
) -> Response<Body> {
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // nginx would hold the stream back in its buffer.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

struct Follower {
    gateway: Arc<Gateway>,
    tap: Arc<Tap>,
    kept: VecDeque<Bytes>,
    /// What is not read yet.
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
            match upgrade::deadline(&self.gateway, log.page(&self.gateway)).await {
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
            entry = self.tap.next_entry() => match entry {
                Some(TapEntry::Message(payload, _)) => event(None, &payload),
                Some(TapEntry::Gap(gap)) => gap_event(gap),
                // A follower is neither told its position nor does it have a logic.
                Some(TapEntry::Position(_) | TapEntry::Event(..)) => Bytes::from_static(b":\n\n"),
                Some(TapEntry::End(_)) => return None,
                None => {
                    self.over = true;
                    OVERFLOW
                }
            },
            () = tokio::time::sleep(KEEP_ALIVE) => Bytes::from_static(b":\n\n"),
            () = self.gateway.followers_end.cancelled() => return None,
        };
        Some((Ok(chunk), self))
    }
}

/// Logs that are being read from their starts to their ends.
struct Logs {
    keys: VecDeque<String>,
    /// The last entry that was read.
    after: String,
    /// Most entries that are still read.
    left: u64,
}

impl Logs {
    /// The next entries as events; none at the end.
    async fn page(&mut self, gateway: &Gateway) -> Result<VecDeque<Bytes>, Rejection> {
        let count = page_entries(gateway.config.limits.max_message_bytes);
        let count = count.min(usize::try_from(self.left).unwrap_or(usize::MAX));
        while let Some(key) = self.keys.front().filter(|_| count > 0) {
            let entries = gateway.store.read_log(key, &self.after, count).await?;
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

/// Tells that messages may be missing here, as clients of sessions are told.
fn gap_event(gap: Duration) -> Bytes {
    Bytes::from(format!("event: bus_recovered\ndata: {{\"gap_ms\":{}}}\n\n", gap.as_millis()))
}

/// Clients choose how large entries are: a page is no more than what may wait anyway, or one entry.
fn page_entries(entry_bytes_max: usize) -> usize {
    (FOLLOWER_BYTES_MAX / entry_bytes_max.max(1)).clamp(1, PAGE_ENTRIES)
}

/// An event of a payload, in which every line gets its own `data:` as the format wants.
pub(super) fn event(id: Option<&str>, payload: &[u8]) -> Bytes {
    let text = String::from_utf8_lossy(payload);
    let mut event = String::with_capacity(text.len() + 32);
    if let Some(id) = id {
        event.push_str("id: ");
        event.push_str(id);
        event.push('\n');
    }
    event.push_str("event: message\n");
    message::push_data(&mut event, &text);
    Bytes::from(event)
}

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
