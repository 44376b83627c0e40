//! The accept loop: sockets in, requests out, and every way in which a stranger can waste our time bounded.

use std::{
    convert::Infallible,
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
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
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::http::{
    Body,
    lasting::{self, Lasting},
    line::{Line, LineSocket},
    routes::Routes,
    sockets::{Silence, Sockets},
    upgrade,
};

/// Connections that the kernel completes while we are busy.
const BACKLOG: i32 = 4096;

/// After an error that lasts (no descriptors left), the loop rests so long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// An error that lasts is logged again after so long; the counter has every one.
const WARN_EVERY: Duration = Duration::from_secs(10);

/// The answer to those who come when even the places for refusing are taken.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n\
x-content-type-options: nosniff\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 104\r\n\r\n\
{\"error\":{\"code\":\"full\",\"message\":\"The instance holds as many connections as it may.\",\"retryable\":true}}";

/// Where a request came from, as an extension of the request.
#[derive(Debug, Clone, Copy)]
pub struct RemoteAddress(pub IpAddr);

/// Listens on `address`.
///
/// # Errors
/// The address is in use, or not ours.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Where this machine reaches a listener that may be bound to all addresses.
#[must_use]
pub fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

/// Accepts until `stop`. `sockets` bounds all connections of this listener, those that have not
/// sent a request yet included: these give way to new ones.
pub async fn run(
    listener: TcpListener,
    routes: Routes,
    sockets: Arc<Sockets>,
    stop: CancellationToken,
) {
    let mut warned = None;
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, address)) => accept(stream, address, &routes, &sockets, &stop),
            Err(error) if is_of_one_connection(&error) => {
                debug!(%error, "A client left before it was accepted.");
            }
            Err(error) => {
                routes.gateway().metrics.error("accept");
                if warned.is_none_or(|at: Instant| at.elapsed() > WARN_EVERY) {
                    warned = Some(Instant::now());
                    warn!(%error, "Accepting failed; trying again.");
                }
                // Where it is for want of descriptors a silent socket has one to give.
                if sockets.close_oldest() {
                    routes.gateway().metrics.error("silent_socket");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn accept(
    stream: TcpStream,
    address: SocketAddr,
    routes: &Routes,
    sockets: &Arc<Sockets>,
    stop: &CancellationToken,
) {
    let gateway = routes.gateway();
    let Some((place, gave_way)) = sockets.take() else {
        gateway.metrics.handshake(None, "full");
        upgrade::tell_full(gateway);
        return refuse(stream);
    };
    // Hyper writes heads and bodies in one go; what follows an upgrade sets its own options.
    let _ = stream.set_nodelay(true);
    // Who asks and never reads the answers would hold a place for ever: hyper waits to write.
    #[cfg(target_os = "linux")]
    let _ = socket2::SockRef::from(&stream)
        .set_tcp_user_timeout(Some(gateway.config.server.header_timeout));
    let (place, line) = (Arc::new(place), Line::new(stream));
    let peer = address.ip().to_canonical();
    // Our own proxies come from few addresses with the sockets of many clients.
    let is_proxy = gateway.config.server.trusted_proxies.iter().any(|net| net.contains(&peer));
    let (silence, was_full) = sockets.watch((!is_proxy).then_some(peer), &line);
    if gave_way || was_full {
        gateway.metrics.error("silent_socket");
    }
    let (routes, stop, gateway) = (routes.clone(), stop.clone(), Arc::clone(gateway));
    let tasks = gateway.tasks.clone();
    tasks.spawn(async move {
        let server = &gateway.config.server;
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(server.header_timeout)
            .max_buf_size(server.header_bytes_max.max(8192))
            .max_headers(128)
            .half_close(false);
        let asked = Arc::clone(&line);
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(RemoteAddress(address.ip()));
            // An upgraded socket keeps its place by taking this along.
            request.extensions_mut().insert(Arc::clone(&place));
            request.extensions_mut().insert(Arc::clone(&asked));
            answer(routes.clone(), request, Arc::clone(&asked), Arc::clone(&silence))
        });
        let socket = LineSocket(Arc::clone(&line));
        let connection = builder.serve_connection(socket, service).with_upgrades();
        let mut connection = std::pin::pin!(connection);
        let result = tokio::select! {
            result = connection.as_mut() => result,
            () = line.wait_taken() => return,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    result = connection => result,
                    () = line.wait_taken() => return,
                }
            }
        };
        if let Err(error) = result
            && line.is_at_fault(error.is_timeout())
        {
            let kind = if error.is_timeout() { "slow_request" } else { "bad_request" };
            gateway.metrics.error(kind);
            debug!(%error, address = %address.ip(), kind, "A client's request failed.");
        }
    });
}

/// Answers a request; one whose answer lasts takes the socket along.
async fn answer(
    routes: Routes,
    request: Request<Incoming>,
    line: Arc<Line>,
    silence: Arc<Silence>,
) -> Result<Response<Body>, Infallible> {
    if !silence.end() {
        // The socket was closed just now, for another one.
        return std::future::pending().await;
    }
    let version = request.version();
    let gateway = Arc::clone(routes.gateway());
    let mut response = routes.serve(request).await?;
    // A body is never what a browser guesses that it might be.
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let tasks = &gateway.tasks;
    let Some(Lasting(profile)) = response.extensions().get().cloned() else {
        // An upgrade and a body without end are no silence.
        let is_over = response.status() != StatusCode::SWITCHING_PROTOCOLS
            && response.body().size_hint().exact().is_some();
        if is_over {
            line.answered();
            if silence.begin() {
                gateway.metrics.error("silent_socket");
            }
        }
        return Ok(response);
    };
    if let Some(stream) = line.take() {
        tasks.spawn(lasting::write(stream, line, version, profile, response));
    }
    // The HTTP connection is dropped now, and this with it.
    std::future::pending().await
}

/// Answers and closes at once: sockets that waited to be written to would need descriptors which others were
/// promised. A new socket has room for the answer.
fn refuse(stream: TcpStream) {
    if let Ok(mut stream) = stream.into_std() {
        let _ = stream.write(FULL);
    }
}

/// Errors of `accept` that concern one client and not the listener.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_all_addresses_is_reached_on_the_loopback() {
        let of = |text: &str| reachable(text.parse().unwrap()).to_string();
        assert_eq!(of("0.0.0.0:80"), "127.0.0.1:80");
        assert_eq!(of("[::]:80"), "[::1]:80");
        assert_eq!(of("192.0.2.1:80"), "192.0.2.1:80");
    }
}
