//! Body of another instance's answer on its way to the client. A broken one stays broken.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::Version;
use hyper::body::{Body, Frame, Incoming};

use super::body::Held;
use crate::{
    endpoint::tunnel::{
        access::Access,
        deadlines::{Idle, Progress},
        exchange::{Ask, Client},
        refusal::{Code, Refusal},
    },
    http::listener::Answering,
};

/// Body of an answer. Dropping it closes the connection to the other instance.
pub(super) struct PeerAnswer {
    body: Option<Incoming>,
    access: Arc<Access>,
    progress: Progress,
    idle: Option<Idle>,
    /// Body of the request, while the other instance has not asked for it.
    held: Option<Arc<Held>>,
    answering: Option<Answering>,
    /// The client takes the end of the connection for the end of the body.
    closes_at_end: bool,
}

impl PeerAnswer {
    pub(super) fn new(body: Incoming, ask: &Ask, client: &Client, held: Option<Arc<Held>>) -> Self {
        let progress = Progress::default();
        Self {
            body: Some(body),
            access: Arc::clone(&ask.access),
            // The other instance has the same limit, and says more.
            idle: ask.deadlines.idle.map(|max| Idle::new(&progress, max + super::forward::LATER)),
            progress,
            held,
            answering: client.answering.clone(),
            closes_at_end: client.version < Version::HTTP_11,
        }
    }

    fn finish(&mut self) {
        self.body = None;
        // The library waits for the body of the request otherwise, for ever.
        if let Some(held) = self.held.take() {
            drop(held.take_back());
        }
        if let Some(answering) = self.answering.take() {
            answering.is_over();
        }
    }

    fn break_off(&mut self, refusal: Refusal) -> Poll<Option<Result<Frame<Bytes>, Refusal>>> {
        self.access.failed(refusal.code);
        if let Some(answering) = self.answering.take().filter(|_| self.closes_at_end) {
            answering.socket().reset_at_end();
        }
        self.finish();
        Poll::Ready(Some(Err(refusal)))
    }
}

impl Body for PeerAnswer {
    type Data = Bytes;
    type Error = Refusal;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Refusal>>> {
        let this = &mut *self;
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        match Pin::new(body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                this.progress.note();
                this.access.sent(frame.data_ref().map_or(0, Bytes::len));
                if this.is_end_stream() {
                    // The library for HTTP does not ask for what comes behind.
                    this.access.complete();
                    this.finish();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) => {
                this.access.complete();
                this.finish();
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => {
                this.break_off(Refusal::new(Code::LaneLost).caused_by(error))
            }
            Poll::Pending => {
                let is_over = this.idle.as_mut().is_some_and(|idle| idle.poll_over(cx).is_ready());
                if !is_over {
                    return Poll::Pending;
                }
                this.break_off(Refusal::new(Code::GatewayTimeout))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }
}

impl Drop for PeerAnswer {
    fn drop(&mut self) {
        self.finish();
    }
}
