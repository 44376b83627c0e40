//! The PROXY protocol of a listener: the header before everything else, from trusted proxies only.

use std::{
    future::{Future, poll_fn},
    io::{self, ErrorKind},
    time::Duration,
};

use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use wsproxy_proto::proxy_header::{Look, ProxyHeader, ProxyHeaderError, is_header, look};

use crate::{
    config::peer::Peer,
    core::{Core, socket::SharedSocket},
};

/// Reason why a socket is of no use.
enum Fault {
    /// The peer's header breaks the rules, or is missing.
    Bad(ProxyHeaderError),
    /// The peer sent a header and may not.
    Untrusted,
    /// The peer sent no whole header in time.
    Timeout,
    /// The socket was closed, by the peer or for another one.
    Gone(io::Error),
}

/// Reads the header of a trusted proxy, and returns the peer that it speaks for. Any other peer must send none, and stays
/// itself. `None`: the socket was refused, or is of no use any more.
pub(super) async fn read_peer(
    core: &Core,
    socket: &SharedSocket,
    peer: Peer,
    stop: &CancellationToken,
) -> Option<Peer> {
    let server = &core.config.server;
    let is_trusted = peer.is_trusted(&server.trusted_proxies);
    let reading = async {
        if is_trusted { header(socket, peer).await } else { no_header(socket, peer).await }
    };
    let read = tokio::select! {
        read = in_time(server.header_timeout, reading) => read,
        () = socket.wait_taken() => Err(Fault::Gone(ErrorKind::NotConnected.into())),
        () = stop.cancelled() => return None,
    };
    let (outcome, fault) = match read {
        Ok((outcome, peer)) => {
            core.metrics.proxy_header(outcome);
            return Some(peer);
        }
        Err(Fault::Gone(error)) => {
            debug!(%peer, %error, "A socket ended before its PROXY header.");
            core.metrics.proxy_header(if socket.is_taken() { "displaced" } else { "left" });
            return None;
        }
        Err(Fault::Timeout) if !is_trusted => ("left", None),
        Err(Fault::Timeout) => {
            ("timeout", Some("the PROXY header did not come in time".to_owned()))
        }
        Err(Fault::Untrusted) => ("untrusted", Some(NOT_TRUSTED.to_owned())),
        Err(Fault::Bad(error)) => (label(error), Some(error.to_string())),
    };
    core.metrics.proxy_header(outcome);
    let error = fault?;
    if let Some(left_out) = core.lines.pass("proxy header") {
        warn!(%peer, outcome, error, left_out, "A connection was refused: PROXY protocol.");
    }
    core.metrics.error("bad_request");
    if let Some(socket) = socket.take() {
        super::answer_at_once(socket, super::bad_request(&error).as_bytes());
    }
    None
}

async fn in_time<T>(
    most: Duration,
    reading: impl Future<Output = Result<T, Fault>>,
) -> Result<T, Fault> {
    tokio::time::timeout(most, reading).await.unwrap_or(Err(Fault::Timeout))
}

/// Reads the header of a trusted proxy out of the socket. What follows the header stays there.
async fn header(socket: &SharedSocket, peer: Peer) -> Result<(&'static str, Peer), Fault> {
    let mut bytes = Vec::new();
    loop {
        let taken = bytes.len();
        let count = poll_fn(|cx| socket.poll_peek(cx, &mut bytes)).await.map_err(Fault::Gone)?;
        let (header, length) = match look(&bytes).map_err(Fault::Bad)? {
            Look::Partial => {
                // All of them belong to the header. Once they are read, the socket tells of further ones or of its end.
                socket.skip(count).map_err(Fault::Gone)?;
                continue;
            }
            Look::Whole(header, length) => (header, length),
        };
        socket.skip(length - taken).map_err(Fault::Gone)?;
        return Ok(match header {
            ProxyHeader::Client(address) => ("client", Peer::of(address.ip())),
            ProxyHeader::Socket => ("local", peer),
        });
    }
}

/// Waits until the first bytes of a peer show that they are no header. They stay in the socket.
async fn no_header(socket: &SharedSocket, peer: Peer) -> Result<(&'static str, Peer), Fault> {
    let mut pause = LOOK_AGAIN;
    loop {
        let mut bytes = Vec::new();
        poll_fn(|cx| socket.poll_peek(cx, &mut bytes)).await.map_err(Fault::Gone)?;
        match is_header(&bytes) {
            Some(true) => return Err(Fault::Untrusted),
            Some(false) => return Ok(("none", peer)),
            // A few bytes that could begin both. The socket stays readable, so it cannot tell of further ones. Each pause
            // is twice as long, so that thousands of such clients that wait cost no CPU.
            None => tokio::time::sleep(pause).await,
        }
        pause *= 2;
    }
}

const fn label(error: ProxyHeaderError) -> &'static str {
    match error {
        ProxyHeaderError::Missing => "missing",
        ProxyHeaderError::Malformed(_) => "malformed",
        ProxyHeaderError::TooLong => "too_long",
        ProxyHeaderError::Checksum => "checksum",
    }
}

const NOT_TRUSTED: &str =
    "there is a PROXY header, and its sender is not among the trusted proxies of this port";

/// First pause between two looks at the first few bytes of a peer.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
