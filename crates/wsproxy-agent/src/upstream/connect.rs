//! Opens a connection to the upstream: TCP, and TLS where the upstream has it.

use std::{sync::Arc, time::Duration};

use socket2::{SockRef, TcpKeepalive};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;
use wsproxy_proto::tunnel::code::Code;

use super::wire::UpstreamSocket;
use crate::{config::UpstreamConfig, failure::Failure};

/// Opens a connection within [`CONNECT_TIMEOUT`].
///
/// # Errors
/// [`Code::UpstreamConnect`], [`Code::UpstreamTls`]; no byte of a request was sent.
pub(super) async fn open(config: &UpstreamConfig) -> Result<UpstreamSocket, Failure> {
    let late = |code| Failure::new(code, "the upstream was not connected in time");
    let started = tokio::time::Instant::now();
    let connect = TcpStream::connect((&*config.host, config.port));
    let stream = timeout(CONNECT_TIMEOUT, connect).await;
    let stream = stream.map_err(|_| late(Code::UpstreamConnect))?.map_err(|error| {
        let message = format!("the upstream cannot be connected: {error}");
        Failure::new(Code::UpstreamConnect, message)
    })?;
    // Options that a kernel refuses cost speed or memory, and no correctness.
    let _ = stream.set_nodelay(true);
    let socket = SockRef::from(&stream);
    let _ = socket.set_recv_buffer_size(RECEIVE_BYTES);
    // An idle watch of a host that vanished would stay for ever.
    let _ =
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(ALIVE).with_interval(ALIVE / 4));
    let Some(tls) = &config.tls else { return Ok(UpstreamSocket::Plain(stream)) };
    let connector = TlsConnector::from(Arc::clone(&tls.client));
    let handshake = connector.connect(tls.name.clone(), stream);
    let left = CONNECT_TIMEOUT.saturating_sub(started.elapsed());
    let stream = timeout(left, handshake).await.map_err(|_| late(Code::UpstreamTls))?;
    let stream = stream.map_err(|error| {
        let message = format!("TLS to the upstream failed: {error}");
        Failure::new(Code::UpstreamTls, message)
    })?;
    Ok(UpstreamSocket::Tls(Box::new(stream)))
}

/// Time for TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Time without a byte after which the kernel asks whether the upstream's host is there.
const ALIVE: Duration = Duration::from_secs(60);

/// Upper bound of the bytes of an answer that wait in the kernel for a reader that stalls.
const RECEIVE_BYTES: usize = 128 << 10;
