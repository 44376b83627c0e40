//! Body of a request on its way from the lane to the upstream. Knows no connection.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use hyper::body::{Body, Frame, SizeHint};
use wsproxy_conn::{
    clock,
    lane::{Received, StreamReader},
};

/// Body of a request. Clones are for further tries: all of them read the same bytes, so that only one may be used once
/// a byte was taken.
#[derive(Debug, Clone, Default)]
pub(crate) struct RequestBody {
    /// Lock: held for one read, by the task of the connection that sends the body. `None`: there is no body.
    reader: Option<Arc<Mutex<StreamReader>>>,
    progress: Arc<BodyProgress>,
    /// Length of the body, where it is told.
    length: Option<u64>,
}

/// Part of a body that was taken from the lane.
#[derive(Debug)]
pub(crate) struct BodyProgress {
    bytes: AtomicU64,
    is_taken: AtomicBool,
    is_whole: AtomicBool,
    /// Whether the upstream takes more than the client has sent.
    is_awaited: AtomicBool,
    /// Whether the client may hold the body back, until the upstream asks for it.
    is_held: AtomicBool,
    /// Time of the last progress.
    last: AtomicU64,
}

impl Default for BodyProgress {
    fn default() -> Self {
        Self {
            bytes: AtomicU64::default(),
            is_taken: AtomicBool::default(),
            is_whole: AtomicBool::default(),
            is_awaited: AtomicBool::default(),
            is_held: AtomicBool::default(),
            last: AtomicU64::new(clock::now().0),
        }
    }
}

impl BodyProgress {
    /// Returns the bytes that were taken.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// Returns whether the body was taken to its end.
    pub(crate) fn is_whole(&self) -> bool {
        self.is_whole.load(Relaxed)
    }

    /// Notes that the client waits for a head with status 100 before it sends the body.
    pub(crate) fn hold(&self) {
        self.is_held.store(true, Relaxed);
    }

    /// Notes that the client was asked for the body.
    pub(crate) fn release(&self) {
        self.is_held.store(false, Relaxed);
        self.note();
    }

    /// Waits until the upstream owes the next step for `max`: an answer to the whole body, or the reading of what the
    /// client has sent. Time in which the client owes bytes does not count.
    pub(crate) async fn upstream_is_late(&self, max: Duration) {
        let mut left = max;
        while !left.is_zero() {
            // A byte costs no work on the timer, which is set again only here.
            tokio::time::sleep(left).await;
            left = max.saturating_sub(self.upstream_owes_for());
        }
    }

    /// Returns the time for which the upstream owes the next step.
    fn upstream_owes_for(&self) -> Duration {
        let is_of_client = self.is_awaited.load(Relaxed) && !self.is_held.load(Relaxed);
        if is_of_client && !self.is_whole() {
            return Duration::ZERO;
        }
        Duration::from_micros(clock::now().0.saturating_sub(self.last.load(Relaxed)))
    }

    fn note(&self) {
        self.last.store(clock::now().0, Relaxed);
    }
}

impl RequestBody {
    /// Returns no body.
    pub(crate) fn empty() -> Self {
        let body = Self::default();
        body.progress.is_whole.store(true, Relaxed);
        body
    }

    /// Returns the body that comes from the lane.
    pub(crate) fn new(reader: StreamReader, length: Option<u64>) -> Self {
        Self { reader: Some(Arc::new(Mutex::new(reader))), progress: Arc::default(), length }
    }

    /// Returns the progress, which outlives the body.
    pub(crate) fn progress(&self) -> Arc<BodyProgress> {
        Arc::clone(&self.progress)
    }

    /// Returns whether something of the body was taken, so that it cannot be sent again.
    pub(crate) fn is_taken(&self) -> bool {
        self.progress.is_taken.load(Relaxed)
    }

    fn take(&self, received: Received) -> Option<Frame<Bytes>> {
        let progress = &self.progress;
        progress.is_taken.store(true, Relaxed);
        progress.release();
        match received {
            Received::Data(bytes) => {
                let before = progress.bytes.fetch_add(bytes.len() as u64, Relaxed);
                if self.length.is_some_and(|length| before + bytes.len() as u64 >= length) {
                    progress.is_whole.store(true, Relaxed);
                }
                Some(Frame::data(bytes))
            }
            Received::Trailers(trailers) => {
                progress.is_whole.store(true, Relaxed);
                let mut map = HeaderMap::new();
                for (name, value) in trailers.iter() {
                    let name = HeaderName::from_bytes(name);
                    if let (Ok(name), Ok(value)) = (name, HeaderValue::from_maybe_shared(value)) {
                        map.append(name, value);
                    }
                }
                Some(Frame::trailers(map))
            }
            Received::End => {
                progress.is_whole.store(true, Relaxed);
                None
            }
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BrokenBody;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokenBody>>> {
        let Some(reader) = &self.reader else { return Poll::Ready(None) };
        let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
        let polled = reader.poll_read(cx);
        self.progress.is_awaited.store(polled.is_pending(), Relaxed);
        let Poll::Ready(received) = polled else { return Poll::Pending };
        Poll::Ready(match received {
            Ok(received) => self.take(received).map(Ok),
            Err(_) => Some(Err(BrokenBody)),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.reader.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        match (&self.reader, self.length) {
            (None, _) => SizeHint::with_exact(0),
            (Some(_), Some(length)) => SizeHint::with_exact(length),
            (Some(_), None) => SizeHint::new(),
        }
    }
}

/// The stream ended before its body was whole.
#[derive(Debug, thiserror::Error)]
#[error("the body of the request was not whole")]
pub(crate) struct BrokenBody;
