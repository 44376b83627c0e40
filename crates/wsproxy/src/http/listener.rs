//! The accept loop: accepts sockets, reads requests, and bounds the time and memory that a socket can take.

use std::{
    convert::Infallible,
    io::{self, Read, Write},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::{
    body::{Body as _, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioTimer;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use wsproxy_conn::Socket;
use wsproxy_proto::proxy_header::HEADER_BYTES_MAX;

use crate::{
    config::peer::Peer,
    core::{
        Core,
        admission::Seat,
        socket::{HttpSocket, SharedSocket},
        sockets::{Silence, Sockets},
    },
    http::{
        Body,
        detached::{self, Detached},
        handshake::{self, address::RemotePeer},
        listener::{
            open::{Listener, is_of_one_connection},
            tls::{Opened, TlsListener},
        },
        rejection::Rejection,
    },
};

pub mod open;
mod proxy_protocol;
pub mod socket_file;
pub mod tls;

/// The service that answers the requests of a listener.
pub trait Service: Clone + Send + 'static {
    /// The instance.
    fn core(&self) -> &Arc<Core>;
    /// Answers a request.
    ///
    /// # Errors
    /// Never: a refusal is an answer.
    fn serve(
        self,
        request: Request<Incoming>,
    ) -> impl Future<Output = Result<Response<Body>, Infallible>> + Send;
}

/// Parts of a listener beside its socket.
#[derive(Debug, Clone)]
pub struct Listening {
    /// Bound of the accepted sockets, including those that have sent no request yet. Such silent sockets give way to
    /// new ones.
    pub sockets: Arc<Sockets>,
    /// Encryption; `None`: the listener speaks plain HTTP.
    pub tls: Option<Arc<TlsListener>>,
    /// Whether trusted proxies begin each connection with a header of the PROXY protocol.
    pub proxy_protocol: bool,
    /// Time for the head of a request, from the end of the one before.
    pub header_timeout: Duration,
    /// Limits of the head of a request.
    pub head: HeadLimits,
    /// Cancelled when no further socket is accepted.
    pub accepting: CancellationToken,
    /// Cancelled when no further request is answered on the sockets that there are.
    pub answering: CancellationToken,
}

/// Limits of the head of a request. One beyond them is answered with 431 by the library for HTTP, without a body.
#[derive(Debug, Clone, Copy)]
pub struct HeadLimits {
    /// Most bytes.
    pub bytes: usize,
    /// Most headers.
    pub headers: usize,
}

impl HeadLimits {
    /// Returns the limits of clients. `bytes`: `server.header_bytes_max`.
    #[must_use]
    pub fn of_clients(bytes: usize) -> Self {
        Self { bytes, headers: 128 }
    }
}

/// A request whose answer may take long. Its socket is not silent until the answer is over.
#[derive(Clone)]
pub struct Answering {
    core: Arc<Core>,
    shared: Arc<SharedSocket>,
    silence: Arc<Silence>,
}

impl Answering {
    /// Notes that the answer is over: the socket waits for a further request, and may give way to another one.
    pub fn is_over(&self) {
        self.shared.answered();
        if self.silence.begin() {
            self.core.metrics.error("silent_socket");
        }
    }

    /// Returns the socket.
    #[must_use]
    pub const fn socket(&self) -> &Arc<SharedSocket> {
        &self.shared
    }
}

/// Accepts sockets until the end of `accepting`, and then those that wait in the kernel.
pub async fn run(listener: Listener, service: impl Service, listening: Listening) {
    let mut warned = None;
    loop {
        let accepted = tokio::select! {
            () = listening.accepting.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((socket, peer)) => accept(socket, peer, &service, &listening),
            Err(error) if is_of_one_connection(&error) => {
                debug!(%error, "A client left before it was accepted.");
            }
            Err(error) => {
                service.core().metrics.error("accept");
                if warned.is_none_or(|at: Instant| at.elapsed() > WARN_EVERY) {
                    warned = Some(Instant::now());
                    warn!(%error, "Accepting failed; trying again.");
                }
                // If descriptors are lacking, closing a silent socket frees one.
                if listening.sockets.close_oldest() {
                    service.core().metrics.error("silent_socket");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    let closed = listener.close(|socket, peer| accept(socket, peer, &service, &listening));
    if let Err(error) = closed {
        service.core().metrics.error("accept");
        warn!(%error, "The last clients that came to a closing listener are refused.");
    }
}

fn accept(socket: Socket, peer: Peer, service: &impl Service, listening: &Listening) {
    let core = service.core();
    let Listening { sockets, tls, .. } = listening;
    let Some((seat, gave_way)) = sockets.take() else {
        core.metrics.handshake(None, "full");
        handshake::tell_full(core);
        // A client that expects TLS could not read the answer.
        return if tls.is_none() {
            answer_at_once(socket, FULL)
        };
    };
    // Hyper writes head and body at once, so Nagle's delay gains nothing. It waits without limit to write: a client that
    // never reads its answers would hold a seat for ever. WebSockets set their own options.
    let _ = socket.prepare(core.config.server.header_timeout);
    let (seat, shared) = (Arc::new(seat), SharedSocket::new(socket));
    let (silence, was_full) = sockets.watch(share_of(core, peer), &shared);
    if gave_way || was_full {
        core.metrics.error("silent_socket");
    }
    let (service, core) = (service.clone(), Arc::clone(core));
    let mut accepted = AcceptedSocket { shared, seat, silence, peer };
    if !listening.proxy_protocol {
        return accepted.open(service, core, listening);
    }
    let (listening, tasks) = (listening.clone(), core.tasks.clone());
    tasks.spawn(async move {
        let AcceptedSocket { shared, peer, .. } = &accepted;
        let read = proxy_protocol::read_peer(&core, shared, *peer, &listening.answering).await;
        if let Some(peer) = read {
            accepted.come_from(peer, &core, &listening.sockets);
            accepted.open(service, core, &listening);
        }
    });
}

/// Returns the address whose share of silent sockets counts a socket. A trusted proxy brings the sockets of many clients
/// from one address, so it has no share of its own.
fn share_of(core: &Core, peer: Peer) -> Option<IpAddr> {
    let is_proxy = peer.is_trusted(&core.config.server.trusted_proxies);
    (!is_proxy).then_some(peer.address())
}

/// A socket that a listener accepted.
struct AcceptedSocket {
    shared: Arc<SharedSocket>,
    seat: Arc<Seat>,
    silence: Arc<Silence>,
    peer: Peer,
}

impl AcceptedSocket {
    /// Notes the peer that a proxy speaks for.
    fn come_from(&mut self, peer: Peer, core: &Core, sockets: &Arc<Sockets>) {
        if self.peer == peer {
            return;
        }
        let (silence, gave_way) = sockets.watch(share_of(core, peer), &self.shared);
        (self.peer, self.silence) = (peer, silence);
        if gave_way {
            core.metrics.error("silent_socket");
        }
    }

    /// Goes through the handshake of TLS where the listener encrypts, and then serves the client, on tasks of the
    /// socket's own.
    fn open(self, service: impl Service, core: Arc<Core>, listening: &Listening) {
        let (stop, tasks) = (listening.answering.clone(), core.tasks.clone());
        let limits = (listening.header_timeout, listening.head);
        let Some(tls) = &listening.tls else {
            tasks.spawn(self.serve(service, core, Opened::Served, limits, stop));
            return;
        };
        let Some((place, gave_way)) = tls.place(share_of(&core, self.peer), &self.shared) else {
            return core.metrics.tls_handshake("displaced");
        };
        if gave_way {
            core.metrics.error("silent_socket");
        }
        let tls = Arc::clone(tls);
        tasks.spawn(async move {
            let opened = tokio::select! {
                opened = tls.open(&core, &self.shared) => opened,
                () = stop.cancelled() => None,
            };
            drop(place);
            if let Some(opened) = opened {
                // A task of its own, since this task's future would stay allocated.
                let tasks = core.tasks.clone();
                tasks.spawn(self.serve(service, core, opened, limits, stop));
            }
        });
    }

    /// Answers the requests of the client until one of both sides ends the connection, or an answer takes the socket.
    async fn serve(
        self,
        service: impl Service,
        core: Arc<Core>,
        opened: Opened,
        (header_timeout, head): (Duration, HeadLimits),
        stop: CancellationToken,
    ) {
        let Self { shared, seat, silence, peer } = self;
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(header_timeout)
            .max_header_size(head.bytes)
            .max_buf_size(head.bytes.max(BUFFER_BYTES))
            .max_headers(head.headers)
            .half_close(false);
        let (asked, owner) = (Arc::clone(&shared), Arc::clone(&core));
        let answering = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(RemotePeer(peer));
            // A WebSocket takes the seat along and keeps it.
            request.extensions_mut().insert(Arc::clone(&seat));
            let (core, shared, silence) =
                (Arc::clone(&owner), Arc::clone(&asked), Arc::clone(&silence));
            request.extensions_mut().insert(Arc::clone(&shared));
            let answering = Answering { core, shared, silence };
            request.extensions_mut().insert(answering.clone());
            answer(service.clone(), request, opened, answering)
        });
        let socket = HttpSocket(Arc::clone(&shared));
        let connection = builder.serve_connection(socket, answering).with_upgrades();
        let mut connection = std::pin::pin!(connection);
        let result = tokio::select! {
            result = connection.as_mut() => result,
            () = shared.wait_taken() => return,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    result = connection => result,
                    () = shared.wait_taken() => return,
                }
            }
        };
        if shared.greeted_in_tls() {
            core.metrics.error("tls_to_plain");
            if let Some(left_out) = core.lines.pass("tls to a plain port") {
                warn!(
                    %peer,
                    left_out,
                    "A client speaks TLS to a port that does not: it must use ws:// or http://, or [tls] must be set."
                );
            }
        } else if let Err(error) = result
            && shared.is_at_fault(error.is_timeout())
        {
            let kind = if error.is_timeout() { "slow_request" } else { "bad_request" };
            core.metrics.error(kind);
            debug!(%error, %peer, kind, "A client's request failed.");
        }
    }
}

/// Answers a request. A detached answer takes the socket out of the HTTP connection.
async fn answer(
    service: impl Service,
    request: Request<Incoming>,
    opened: Opened,
    answering: Answering,
) -> Result<Response<Body>, Infallible> {
    let Answering { core, shared, silence } = &answering;
    if !silence.end() {
        // The socket has just been closed to make room for another one.
        return std::future::pending().await;
    }
    if opened == Opened::NotTls {
        let told = Rejection::tls_required("This port speaks TLS: use https:// or wss://.");
        let mut response = told.response();
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        return Ok(response);
    }
    let version = request.version();
    let mut response = service.serve(request).await?;
    silence.answered();
    // Browsers must not guess a content type.
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let tasks = &core.tasks;
    let Some(detached) = response.extensions().get::<Detached>().cloned() else {
        // WebSockets and endless bodies are not silent: their sockets must not give way.
        let is_over = response.status() != StatusCode::SWITCHING_PROTOCOLS
            && response.body().size_hint().exact().is_some();
        if is_over {
            answering.is_over();
        }
        return Ok(response);
    };
    if let Some(stream) = shared.take() {
        tasks.spawn(detached::write(stream, version, detached, response));
    }
    // Never returns: `accept` sees that the stream was taken, and drops the HTTP connection with this future in it.
    std::future::pending().await
}

/// Writes an answer and closes the socket at once, so that it does not use up a descriptor which a seat needs. One write
/// is enough: the send buffer of a new socket is empty.
fn answer_at_once(socket: Socket, answer: &[u8]) {
    fn exchange(mut stream: impl Read + Write, answer: &[u8]) -> io::Result<usize> {
        // The kernel resets a socket that closes with unread bytes, and the client may then lose the answer.
        let _ = stream.read(&mut [0; HEADER_BYTES_MAX]);
        stream.write(answer)
    }
    // The runtime does not know yet that the socket takes bytes, so it is written without the runtime.
    let _ = match socket {
        Socket::Tcp(stream) => stream.into_std().and_then(|stream| exchange(stream, answer)),
        Socket::Unix(socket) => {
            socket.into_inner().into_std().and_then(|stream| exchange(stream, answer))
        }
        Socket::Tls(_) => Ok(0),
    };
}

/// Returns an answer to a connection that does not begin as it has to. `why` needs no escapes in JSON.
fn bad_request(why: &str) -> String {
    let body = format!(
        "{{\"error\":{{\"code\":\"bad_request\",\"message\":\"Refused: {why}.\",\"retryable\":false}}}}"
    );
    let length = body.len();
    format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nx-content-type-options: nosniff\r\n\
         connection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

/// Upper bound of the read buffer and of the write buffer of an HTTP connection, in bytes. Bodies pass in pieces of this
/// size, with a system call each. A buffer is allocated when there are bytes for it: an idle connection has none. A client
/// that stops reading keeps a full one: 1,000 of them took 84 MiB with 16 KiB, 134 to 150 MiB with 48 KiB, and 158 MiB
/// with 64 KiB.
const BUFFER_BYTES: usize = 48 << 10;

/// Pause after an error that lasts, such as a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Interval at which an error that lasts is logged again. The counter counts every error.
const WARN_EVERY: Duration = Duration::from_secs(10);

/// Answer to a client for which not even a socket seat is left.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n\
x-content-type-options: nosniff\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 104\r\n\r\n\
{\"error\":{\"code\":\"full\",\"message\":\"The instance holds as many connections as it may.\",\"retryable\":true}}";
