//! Body of an answer on its way to the client. Knows no head.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http::Version;
use hyper::body::{Body, Frame};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use wsproxy_conn::{
    clock,
    lane::{Received, StreamReader},
};
use wsproxy_proto::tunnel::event::End;

use super::{Answered, Ask, Client, Uploading, cancel, ends};
use crate::{
    core::Core,
    endpoint::tunnel::{
        Tunnel,
        access::Access,
        cache::Collector,
        deadlines::{Idle, Progress},
        headers::trailers,
        lanes::Place,
        refusal::{Code, Refusal},
    },
    http::listener::Answering,
};

/// Body of an answer. Dropping it before its end resets the stream.
pub(super) struct AnswerBody {
    tunnel: Arc<Tunnel>,
    core: Arc<Core>,
    access: Arc<Access>,
    /// Copy of an answer that may be kept.
    collector: Option<Collector>,
    /// Bytes that are still to come, where the head says so.
    left: Option<u64>,
    /// The stream, until its end.
    answer: Option<StreamReader>,
    /// Upload of the request's body, which ends with a broken answer.
    uploading: Option<Uploading>,
    progress: Progress,
    idle: Option<Idle>,
    accepts_trailers: bool,
    answering: Option<Answering>,
    /// The client takes the end of the connection for the end of the body.
    closes_at_end: bool,
    place: Option<Arc<Place>>,
}

impl AnswerBody {
    /// Makes the body of an answer. `left`: its length, where the head says so.
    pub(super) fn new(
        (tunnel, core): (&Arc<Tunnel>, &Arc<Core>),
        answered: Answered,
        ask: &Ask,
        client: &Client,
        (left, collector): (Option<u64>, Option<Collector>),
    ) -> Self {
        let Answered { answer, uploading, progress, place, .. } = answered;
        Self {
            tunnel: Arc::clone(tunnel),
            core: Arc::clone(core),
            access: Arc::clone(&ask.access),
            collector,
            left,
            answer: Some(answer),
            uploading,
            idle: ask.deadlines.idle.map(|max| Idle::new(&progress, max)),
            progress,
            accepts_trailers: ask.accepts_trailers,
            answering: client.answering.clone(),
            closes_at_end: client.version < Version::HTTP_11,
            place: Some(place),
        }
    }

    /// Ends the body: the library for HTTP closes the connection at an error, and the client misses bytes.
    fn break_off(&mut self, refusal: Refusal) -> Poll<Option<Result<Frame<Bytes>, Refusal>>> {
        self.access.failed(refusal.code);
        self.collector = None;
        if let Some(answering) = self.answering.take().filter(|_| self.closes_at_end) {
            answering.socket().reset_at_end();
        }
        self.finish();
        Poll::Ready(Some(Err(refusal)))
    }

    fn finish(&mut self) {
        (self.answer, self.uploading, self.place) = (None, None, None);
    }

    /// Completes an answer of which the client has all bytes, once the agent has said so too.
    fn complete_in_background(&mut self) {
        let Some(mut answer) = self.answer.take() else { return };
        let place = self.place.take();
        self.complete();
        let at_once = answer.poll_read(&mut Context::from_waker(Waker::noop()));
        if matches!(at_once, Poll::Ready(Ok(Received::End))) {
            return;
        }
        self.core.tasks.spawn(async move {
            let end = async { while let Ok(Received::Data(_)) = answer.read().await {} };
            let _ = timeout(END_TIMEOUT, end).await;
            drop((answer, place));
        });
    }

    fn complete(&mut self) {
        self.access.complete();
        if self.collector.take().is_some_and(|collector| collector.finish(clock::now())) {
            self.tunnel.counters.cache_stored.add(1);
        }
        // The upstream may still read the body of the request.
        drop(self.uploading.take().map(AbortOnDropHandle::detach));
        if let Some(answering) = self.answering.take() {
            answering.is_over();
        }
        self.finish();
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        // The library for HTTP asks for no body where there is none, such as behind HEAD.
        if let Some(answering) = self.answering.take() {
            answering.is_over();
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Refusal;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Refusal>>> {
        let this = &mut *self;
        let Some(answer) = &mut this.answer else { return Poll::Ready(None) };
        match answer.poll_read(cx) {
            Poll::Ready(Ok(Received::Data(bytes))) => {
                this.progress.note();
                this.access.sent(bytes.len());
                if let Some(collector) = &mut this.collector {
                    collector.push(&bytes);
                }
                this.left = this.left.map(|left| left.saturating_sub(bytes.len() as u64));
                if this.left == Some(0) {
                    // The library for HTTP does not ask for what comes behind.
                    this.complete_in_background();
                }
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Poll::Ready(Ok(Received::Trailers(block))) => {
                // Trailers are not kept.
                this.collector = None;
                this.complete();
                let block = this.accepts_trailers.then(|| trailers::of_answer(block.headers()));
                Poll::Ready(block.map(|block| Ok(Frame::trailers(block))))
            }
            Poll::Ready(Ok(Received::End)) => {
                this.complete();
                Poll::Ready(None)
            }
            Poll::Ready(Err(end)) => {
                if let End::Reset(reset) = &end {
                    this.tunnel.counters.reset(reset.code);
                }
                this.break_off(ends::refusal(&end, this.core.is_closing()))
            }
            Poll::Pending => {
                let is_over = this.idle.as_mut().is_some_and(|idle| idle.poll_over(cx).is_ready());
                if !is_over {
                    return Poll::Pending;
                }
                if let Some(answer) = this.answer.take() {
                    cancel(answer);
                }
                this.break_off(Refusal::new(Code::GatewayTimeout))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.answer.is_none()
    }
}

/// Time for an agent to end a stream of which the client has all bytes.
const END_TIMEOUT: Duration = Duration::from_secs(5);
