//! The service behind the tunnel: answers of any size and pace, and notes of which requests came and when they ended.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use clap::Args;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::time::{Interval, interval, sleep};

use super::Buffers;
use super::marks::{Mark, Marks};

/// Options of the service.
#[derive(Debug, Args)]
pub struct Upstream {
    /// Address to listen at.
    #[arg(long)]
    listen: SocketAddr,
}

/// Serves until it is killed.
///
/// | path | answer |
/// |---|---|
/// | `/bytes/N` | N bytes with their length |
/// | `/small` | 200 bytes |
/// | `/sink` | the number of bytes of the request, once all are there |
/// | `/hold/MS` | nothing for that long, then a short answer |
/// | `/endless`, `/lines/MS`, `/idle` | chunks without end: as fast as they are taken, 100 bytes at that interval, none |
/// | `/times/ID` | when the request that said `?id=ID` began and ended |
/// | `/post/ID`, `/posts/ID`, `/posts` | counts a POST; how often it came; how many came, and how many of them twice |
///
/// # Errors
/// The address cannot be bound.
pub fn serve(options: &Upstream) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        // Stalled readers must not be hidden in megabytes on this side of the way.
        let buffers = Buffers { receive: None, send: Some(SEND_BYTES) };
        let listener = super::listen(options.listen, buffers)?;
        let marks = Marks::default();
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let marks = marks.clone();
            tokio::spawn(async move {
                let respond = |request: Request<Incoming>| {
                    let marks = marks.clone();
                    async move { Ok::<_, Infallible>(answer(request, &marks).await) }
                };
                // A client that leaves is no error here.
                let _ = http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service_fn(respond))
                    .await;
            });
        }
    })
}

async fn answer(request: Request<Incoming>, marks: &Marks) -> Response<Feed> {
    let path = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or_default();
    let id = query.split('&').find_map(|part| part.strip_prefix("id=")?.parse().ok());
    let mark = id.and_then(|id| marks.start(id));
    let mut parts = path.trim_start_matches('/').splitn(2, '/');
    let name = parts.next().unwrap_or_default();
    let number: u64 = parts.next().and_then(|part| part.parse().ok()).unwrap_or_default();
    let feed = match name {
        "bytes" => Feed::new(Kind::Left(number)),
        "small" => Feed::new(Kind::Left(SMALL_BYTES)),
        "sink" => Feed::text(&sink(request.into_body()).await.to_string()),
        "hold" => {
            sleep(Duration::from_millis(number)).await;
            Feed::text("held\n")
        }
        "endless" => Feed::new(Kind::Endless),
        "lines" => Feed::new(Kind::Lines(interval(Duration::from_millis(number.max(1))))),
        "idle" => Feed::new(Kind::Idle),
        "times" => Feed::text(&marks.times(number)),
        "post" => {
            marks.count(number);
            sink(request.into_body()).await;
            Feed::text("counted\n")
        }
        "posts" if path.len() > "/posts/".len() => Feed::text(&marks.posts(number).to_string()),
        "posts" => Feed::text(&marks.totals()),
        "healthz" => Feed::text("ok\n"),
        _ => {
            let mut response = Response::new(Feed::text("not found\n"));
            *response.status_mut() = StatusCode::NOT_FOUND;
            return response;
        }
    };
    Response::new(Feed { _mark: mark, ..feed })
}

async fn sink(mut body: Incoming) -> u64 {
    let mut bytes = 0;
    while let Some(Ok(frame)) = body.frame().await {
        bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
    }
    bytes
}

/// The body of an answer.
struct Feed {
    kind: Kind,
    /// Notes the end when it is dropped.
    _mark: Option<Mark>,
}

enum Kind {
    /// This many bytes.
    Left(u64),
    /// This text.
    Text(Bytes),
    /// Bytes as fast as they are taken.
    Endless,
    /// A line at each tick.
    Lines(Interval),
    /// Nothing, and no end.
    Idle,
}

impl Feed {
    fn new(kind: Kind) -> Self {
        Self { kind, _mark: None }
    }

    fn text(text: &str) -> Self {
        Self::new(Kind::Text(Bytes::copy_from_slice(text.as_bytes())))
    }
}

impl Body for Feed {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let bytes = match &mut self.get_mut().kind {
            Kind::Left(0) => return Poll::Ready(None),
            Kind::Left(left) => {
                let bytes = (*left).min(CHUNK.len() as u64);
                *left -= bytes;
                Bytes::from_static(&CHUNK[..bytes as usize])
            }
            Kind::Text(text) if text.is_empty() => return Poll::Ready(None),
            Kind::Text(text) => std::mem::take(text),
            Kind::Endless => Bytes::from_static(CHUNK),
            Kind::Lines(interval) => {
                ready!(interval.poll_tick(context));
                Bytes::from_static(&CHUNK[..LINE_BYTES])
            }
            Kind::Idle => return Poll::Pending,
        };
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Left(left) => *left == 0,
            Kind::Text(text) => text.is_empty(),
            Kind::Endless | Kind::Lines(_) | Kind::Idle => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Left(left) => SizeHint::with_exact(*left),
            Kind::Text(text) => SizeHint::with_exact(text.len() as u64),
            Kind::Endless | Kind::Lines(_) | Kind::Idle => SizeHint::default(),
        }
    }
}

static CHUNK: &[u8] = &[b'x'; 64 * 1024];
const SEND_BYTES: u32 = 256 * 1024;
const SMALL_BYTES: u64 = 200;
const LINE_BYTES: usize = 100;
