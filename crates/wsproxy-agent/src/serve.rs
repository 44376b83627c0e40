//! One stream: its request to the upstream, and the answer back to the lane.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use http::StatusCode;
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming};
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;
use wsproxy_conn::lane::{AcceptedStream, StreamAcceptor, StreamReader, StreamWriter, WriteError};
use wsproxy_proto::tunnel::{
    code::Code,
    event::Request,
    frame::{Head, Source},
    headers::Headers,
};

use crate::{
    access::Record,
    answer,
    compression::Compressor,
    config::Service,
    failure::Failure,
    metrics::Counters,
    request::RequestHead,
    upgraded,
    upstream::{
        Connection, Exchange, Upstream,
        body::{BodyProgress, RequestBody},
        failed,
    },
};

/// Everything that a stream needs, for all lanes of the process.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) service: Service,
    pub(crate) upstream: Upstream,
    pub(crate) tasks: TaskTracker,
    /// Streams in flight.
    pub(crate) streams: AtomicU32,
    pub(crate) counters: Counters,
}

impl Server {
    /// Serves the streams of a lane, each in a task of its own, until the lane has ended.
    pub(crate) async fn serve(self: Arc<Self>, mut acceptor: StreamAcceptor) {
        while let Some(stream) = acceptor.accept().await {
            let server = Arc::clone(&self);
            // On the heap by itself: the runtime moves a task's future several times.
            self.tasks.spawn(Box::pin(async move { server.serve_stream(stream).await }));
        }
    }

    async fn serve_stream(&self, stream: AcceptedStream) {
        let counted = Counted::new(&self.streams);
        let AcceptedStream { request, body, mut answer } = stream;
        let number = answer.number();
        let mut record = Record::new(&request);
        let served = self.answer(&request, body, &mut answer, &mut record).await;
        let code = served.as_ref().err().map(Failure::code);
        let connection = match served {
            Ok(connection) => connection,
            Err(failure) => {
                if let Some(reset) = failure.reset(record.has_head()) {
                    answer.reset(&reset);
                }
                tracing::debug!(stream = number, ?failure, "A stream got no whole answer.");
                None
            }
        };
        record.write(&self.service.cluster, number, code);
        record.count(&self.counters, code);
        drop(counted);
        if let Some(connection) = connection {
            self.upstream.keep(connection);
        }
    }

    /// Answers a request. Returns the connection where it can take another one.
    async fn answer(
        &self,
        request: &Request,
        body: StreamReader,
        answer: &mut StreamWriter,
        record: &mut Record,
    ) -> Result<Option<Connection>, Failure> {
        let head = RequestHead::read(request, &self.service)?;
        let may_compress = head.takes_gzip;
        let (body, raw) = match (request.end, request.upgrade) {
            (true, _) => (RequestBody::empty(), None),
            (false, true) => (RequestBody::empty(), Some(body)),
            (false, false) => (RequestBody::new(body, head.length), None),
        };
        let progress = body.progress();
        let exchange = self.exchange(request, head, body, answer).await;
        let mut exchange = exchange.inspect_err(|_| note_up(record, &progress))?;
        let is_upgraded = exchange.response.status() == StatusCode::SWITCHING_PROTOCOLS;
        if is_upgraded && !request.upgrade {
            let message = "the upstream switched protocols without being asked";
            return Err(Failure::new(Code::UpstreamProtocol, message));
        }
        let end = !is_upgraded && hyper::body::Body::is_end_stream(exchange.response.body());
        let takes_gzip = may_compress && !end;
        let compressor = Compressor::of(&mut exchange.response, takes_gzip);
        let block = answer::header_block(&exchange.response, &self.service.host)?;
        let status = exchange.response.status().as_u16();
        let head = Head { end, status, source: Source::Upstream, headers: block.headers() };
        answer.send_head(&head).map_err(unwritten)?;
        record.answered(status);
        if is_upgraded {
            let upgraded = hyper::upgrade::on(&mut exchange.response).await;
            let upgraded = upgraded.map_err(|error| failed(&error))?;
            let up = raw.ok_or_else(|| Failure::new(Code::Protocol, "OPEN ended an upgrade"))?;
            upgraded::carry(upgraded, up, answer, record).await?;
            return Ok(None);
        }
        // Of a request for an upgrade that is refused, the client's bytes are of no use.
        drop(raw);
        let Exchange { mut response, connection } = exchange;
        let sent = match end {
            true => Ok(()),
            false => pass_body(response.body_mut(), compressor, answer, record).await,
        };
        note_up(record, &progress);
        sent?;
        // An upstream that answered before it read the body gets no more of it.
        Ok(progress.is_whole().then_some(connection))
    }

    /// Sends a request and waits for the final head, no longer than the gateway and the client do. The gateway ends a
    /// request whose client sends no more of the body.
    async fn exchange(
        &self,
        request: &Request,
        head: RequestHead,
        body: RequestBody,
        answer: &mut StreamWriter,
    ) -> Result<Exchange, Failure> {
        let went_on = request.expect.then(Arc::<Notify>::default);
        let progress = body.progress();
        if request.expect {
            progress.hold();
        }
        let again = || RequestHead::read(request, &self.service);
        let sending = self.upstream.send(head, again, body, request.retried, went_on.as_ref());
        let deadline = async {
            match request.head_ms {
                0 => std::future::pending().await,
                ms => progress.upstream_is_late(Duration::from_millis(ms.into())).await,
            }
        };
        let went_on = async {
            match &went_on {
                Some(went_on) => went_on.notified().await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(sending, deadline, went_on);
        let mut has_gone_on = false;
        loop {
            tokio::select! {
                biased;
                _ = answer.gone() => return Err(Failure::Gone),
                () = &mut went_on, if !has_gone_on => {
                    has_gone_on = true;
                    progress.release();
                    let (source, headers) = (Source::Upstream, Headers::EMPTY);
                    let head = Head { end: false, status: 100, source, headers };
                    answer.send_head(&head).map_err(unwritten)?;
                }
                sent = &mut sending => return sent,
                () = &mut deadline => {
                    let message = "the upstream sent no head in time";
                    return Err(Failure::new(Code::UpstreamTimeout, message));
                }
            }
        }
    }
}

/// Passes the body of an answer on, each piece as it comes.
async fn pass_body(
    body: &mut Incoming,
    mut compressor: Option<Compressor>,
    answer: &mut StreamWriter,
    record: &Record,
) -> Result<(), Failure> {
    loop {
        // A client that left while the upstream sends is found by the next write.
        let frame = tokio::select! {
            biased;
            frame = body.frame() => frame,
            _ = answer.gone() => return Err(Failure::Gone),
        };
        let frame = frame.transpose().map_err(|error| failed(&error))?;
        let trailers = match frame.map(Frame::into_data) {
            Some(Ok(bytes)) => {
                let bytes = match &mut compressor {
                    Some(compressor) => compressor.piece(&bytes),
                    None => bytes,
                };
                record.add_down(bytes.len());
                answer.write(bytes).await.map_err(unwritten)?;
                if !hyper::body::Body::is_end_stream(body) {
                    continue;
                }
                None
            }
            Some(Err(frame)) => frame.into_trailers().ok(),
            None => None,
        };
        if let Some(compressor) = compressor {
            let last = compressor.finish();
            record.add_down(last.len());
            answer.write(last).await.map_err(unwritten)?;
        }
        let Some(trailers) = trailers else { return answer.finish().map_err(unwritten) };
        let block = answer::trailer_block(&trailers)?;
        return answer.finish_with_trailers(block.headers()).map_err(unwritten);
    }
}

fn note_up(record: &Record, progress: &BodyProgress) {
    record.add_up(usize::try_from(progress.bytes()).unwrap_or(usize::MAX));
}

fn unwritten(error: WriteError) -> Failure {
    match error {
        WriteError::Ended(_) | WriteError::Stopped => Failure::Gone,
        WriteError::HeadTooLarge => answer::too_large(),
        WriteError::Order => Failure::new(Code::Protocol, "the answer was out of order"),
    }
}

/// One stream in flight.
struct Counted<'a>(&'a AtomicU32);

impl<'a> Counted<'a> {
    fn new(streams: &'a AtomicU32) -> Self {
        streams.fetch_add(1, Relaxed);
        Self(streams)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
