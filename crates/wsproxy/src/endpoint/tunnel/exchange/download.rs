//! Body of an answer on its way to the client, from a lane or from another instance. A broken one stays broken. Knows no
//! head.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode, Version, header};
use hyper::body::{Body, Frame, Incoming};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use wsproxy_conn::{
    clock,
    lane::{Received, StreamReader},
};
use wsproxy_proto::tunnel::event::End;

use super::{Ask, Client, Uploading, cancel, ends};
use crate::{
    core::Core,
    endpoint::tunnel::{
        Tunnel,
        access::Access,
        cache::Collector,
        deadlines::{Idle, Progress},
        headers::trailers,
        lanes::Place,
        peers::body::Held,
        refusal::{Code, Refusal},
    },
    http::listener::Answering,
};

/// Body of an answer. Dropping it before its end resets the stream, or closes the connection to the other instance.
pub(in crate::endpoint::tunnel) struct AnswerBody {
    tunnel: Arc<Tunnel>,
    core: Arc<Core>,
    access: Arc<Access>,
    /// Copy of an answer that may be kept.
    collector: Option<Collector>,
    /// Bytes that are still to come, where the head says so.
    left: Option<u64>,
    /// Source of the body, until its end.
    flow: Option<Flow>,
    progress: Progress,
    idle: Option<Idle>,
    answering: Option<Answering>,
    /// The client takes the end of the connection for the end of the body.
    closes_at_end: bool,
}

/// Source of an answer's body.
pub(in crate::endpoint::tunnel) enum Flow {
    /// A stream of a lane.
    Lane {
        /// The stream.
        answer: StreamReader,
        /// Upload of the request's body, which ends with a broken answer.
        uploading: Option<Uploading>,
        /// The client takes trailers.
        accepts_trailers: bool,
        /// Place of the stream.
        place: Arc<Place>,
    },
    /// Another instance.
    Peer {
        /// Body of its answer.
        body: Incoming,
        /// Body of the request.
        held: Option<Arc<Held>>,
    },
}

/// Next part of a body.
enum Part {
    Data(Bytes),
    /// The end, perhaps with trailers for the client.
    End(Option<HeaderMap>),
    Broken(Refusal),
}

impl AnswerBody {
    /// Makes the body of an answer with this head. `later`: time that this instance waits longer than another one for a
    /// body that stands still.
    pub(in crate::endpoint::tunnel) fn new(
        (tunnel, core): (&Arc<Tunnel>, &Arc<Core>),
        (ask, client): (&Ask, &Client),
        (status, headers, may_be_kept): (StatusCode, &HeaderMap, bool),
        flow: Flow,
        (progress, later): (Progress, Duration),
    ) -> Self {
        let keep = ask.keep.clone().filter(|_| may_be_kept);
        let length = headers.get(header::CONTENT_LENGTH);
        progress.note();
        Self {
            tunnel: Arc::clone(tunnel),
            core: Arc::clone(core),
            access: Arc::clone(&ask.access),
            collector: keep.and_then(|(key, ttl)| tunnel.cache.collect(key, ttl, status, headers)),
            left: length.and_then(|length| length.to_str().ok()?.parse().ok()),
            flow: Some(flow),
            idle: ask.deadlines.idle.map(|max| Idle::new(&progress, max + later)),
            progress,
            answering: client.answering.clone(),
            closes_at_end: client.version < Version::HTTP_11,
        }
    }

    /// Ends the body: the library for HTTP closes the connection at an error, and the client misses bytes.
    fn break_off(&mut self, refusal: Refusal) -> Refusal {
        self.access.failed(refusal.code);
        self.collector = None;
        if let Some(answering) = self.answering.take().filter(|_| self.closes_at_end) {
            answering.socket().reset_at_end();
        }
        self.finish();
        refusal
    }

    fn finish(&mut self) {
        if let Some(Flow::Peer { held: Some(held), .. }) = self.flow.take() {
            // The library waits for the body of the request otherwise, for ever.
            drop(held.take_back());
        }
    }

    /// Completes an answer of which the client has all bytes. The agent must have said so too for its stream to end well.
    fn complete_in_background(&mut self) {
        if let Some(Flow::Lane { mut answer, uploading, place, .. }) =
            self.flow.take_if(|flow| matches!(flow, Flow::Lane { .. }))
        {
            drop(uploading.map(AbortOnDropHandle::detach));
            let at_once = answer.poll_read(&mut Context::from_waker(Waker::noop()));
            if !matches!(at_once, Poll::Ready(Ok(Received::End))) {
                self.core.tasks.spawn(async move {
                    let end = async { while let Ok(Received::Data(_)) = answer.read().await {} };
                    let _ = timeout(END_TIMEOUT, end).await;
                    drop((answer, place));
                });
            }
        }
        self.complete();
    }

    fn complete(&mut self) {
        self.access.complete();
        if self.collector.take().is_some_and(|collector| collector.finish(clock::now())) {
            self.tunnel.counters.cache_stored.add(1);
        }
        if let Some(Flow::Lane { uploading, .. }) = &mut self.flow {
            // The upstream may still read the body of the request.
            drop(uploading.take().map(AbortOnDropHandle::detach));
        }
        if let Some(answering) = self.answering.take() {
            answering.is_over();
        }
        self.finish();
    }

    /// Takes a part of the body that has come.
    fn pass(&mut self, part: Part) -> Option<Result<Frame<Bytes>, Refusal>> {
        match part {
            Part::Data(bytes) => {
                self.progress.note();
                self.access.sent(bytes.len());
                if let Some(collector) = &mut self.collector {
                    collector.push(&bytes);
                }
                self.left = self.left.map(|left| left.saturating_sub(bytes.len() as u64));
                if self.left == Some(0) {
                    // The library for HTTP does not ask for what comes behind.
                    self.complete_in_background();
                }
                Some(Ok(Frame::data(bytes)))
            }
            Part::End(trailers) => {
                self.complete();
                trailers.map(|trailers| Ok(Frame::trailers(trailers)))
            }
            Part::Broken(refusal) => Some(Err(self.break_off(refusal))),
        }
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        // The library for HTTP asks for no body where there is none, such as behind HEAD.
        if let Some(answering) = self.answering.take() {
            answering.is_over();
        }
        self.finish();
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
        let Some(flow) = &mut this.flow else { return Poll::Ready(None) };
        let part = match flow {
            Flow::Lane { answer, accepts_trailers, .. } => {
                answer.poll_read(cx).map(|received| match received {
                    Ok(Received::Data(bytes)) => Part::Data(bytes),
                    Ok(Received::Trailers(block)) => {
                        // Trailers are not kept.
                        this.collector = None;
                        let block = accepts_trailers.then(|| trailers::of_answer(block.headers()));
                        Part::End(block)
                    }
                    Ok(Received::End) => Part::End(None),
                    Err(end) => {
                        if let End::Reset(reset) = &end {
                            this.tunnel.counters.reset(reset.code);
                        }
                        Part::Broken(ends::refusal(&end, this.core.is_closing()))
                    }
                })
            }
            Flow::Peer { body, .. } => Pin::new(body).poll_frame(cx).map(|frame| match frame {
                None => Part::End(None),
                Some(Err(error)) => Part::Broken(Refusal::new(Code::LaneLost).caused_by(error)),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) => Part::Data(bytes),
                    Err(frame) => {
                        this.collector = None;
                        Part::End(frame.into_trailers().ok())
                    }
                },
            }),
        };
        match part {
            Poll::Ready(part) => Poll::Ready(this.pass(part)),
            Poll::Pending => {
                let is_over = this.idle.as_mut().is_some_and(|idle| idle.poll_over(cx).is_ready());
                if !is_over {
                    return Poll::Pending;
                }
                if let Some(Flow::Lane { answer, .. }) =
                    this.flow.take_if(|flow| matches!(flow, Flow::Lane { .. }))
                {
                    cancel(answer);
                }
                Poll::Ready(Some(Err(this.break_off(Refusal::new(Code::GatewayTimeout)))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.flow.is_none()
    }
}

/// Time for an agent to end a stream of which the client has all bytes.
const END_TIMEOUT: Duration = Duration::from_secs(5);
