//! A plain proxy on the HTTP library of the gateway, to compare with: no rules, no deadlines, no limits.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use clap::Args;
use http_body_util::{Either, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::SendRequest;
use hyper::header::{CONNECTION, HOST, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpStream;

use super::Buffers;

/// Options of the proxy.
#[derive(Debug, Args)]
pub struct Proxy {
    /// Address to listen at.
    #[arg(long)]
    listen: SocketAddr,
    /// Address of the service.
    #[arg(long)]
    to: SocketAddr,
}

/// Serves until it is killed.
///
/// # Errors
/// The address cannot be bound.
pub fn serve(options: &Proxy) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = super::listen(options.listen, Buffers::default())?;
        let pool = Arc::new(Pool { to: options.to, idle: Mutex::default() });
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let pool = pool.clone();
            tokio::spawn(async move {
                let respond = |request: Request<Incoming>| {
                    let pool = pool.clone();
                    async move { Ok::<_, hyper::Error>(forward(request, pool).await) }
                };
                // A client that leaves is no error here.
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service_fn(respond))
                    .await;
            });
        }
    })
}

type Answer = Response<Either<Returning, Full<Bytes>>>;

async fn forward(mut request: Request<Incoming>, pool: Arc<Pool>) -> Answer {
    request.headers_mut().remove(CONNECTION);
    if let Ok(host) = HeaderValue::from_str(&pool.to.to_string()) {
        request.headers_mut().insert(HOST, host);
    }
    match pool.send(request).await {
        Ok((sender, mut response)) => {
            response.headers_mut().remove(CONNECTION);
            response.map(|body| Either::Left(Returning::new(body, sender, pool)))
        }
        Err(error) => {
            let text = Bytes::from(format!("{error:#}\n"));
            let mut response = Response::new(Either::Right(Full::new(text)));
            *response.status_mut() = StatusCode::BAD_GATEWAY;
            response
        }
    }
}

/// Connections to the service. Invariant: at most [`IDLE_MAX`] wait for a request; a further one is closed.
struct Pool {
    to: SocketAddr,
    idle: Mutex<Vec<SendRequest<Incoming>>>,
}

impl Pool {
    /// Sends a request on a connection that is idle, or on a new one.
    async fn send(
        &self,
        request: Request<Incoming>,
    ) -> Result<(SendRequest<Incoming>, Response<Incoming>)> {
        loop {
            let idle = self.idle.lock().pop();
            let Some(mut sender) = idle else { break };
            // Its last answer may have ended early, and the connection with it.
            if sender.ready().await.is_ok() {
                let response = sender.send_request(request).await?;
                return Ok((sender, response));
            }
        }
        let stream = TcpStream::connect(self.to).await.context("no service")?;
        stream.set_nodelay(true)?;
        let io = TokioIo::new(stream);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
        tokio::spawn(connection);
        let response = sender.send_request(request).await?;
        Ok((sender, response))
    }
}

/// The body of an answer, which gives its connection back at its end.
struct Returning {
    body: Incoming,
    sender: Option<SendRequest<Incoming>>,
    pool: Arc<Pool>,
    ended: bool,
}

impl Returning {
    fn new(body: Incoming, sender: SendRequest<Incoming>, pool: Arc<Pool>) -> Self {
        Self { body, sender: Some(sender), pool, ended: false }
    }
}

impl Body for Returning {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        self.ended |= matches!(frame, Poll::Ready(None));
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Returning {
    fn drop(&mut self) {
        let mut idle = self.pool.idle.lock();
        // A body that is left early ends its connection, which must not wait for the next request.
        if let Some(sender) = self.sender.take()
            && (self.ended || self.body.is_end_stream())
            && idle.len() < IDLE_MAX
        {
            idle.push(sender);
        }
    }
}

const IDLE_MAX: usize = 1024;
