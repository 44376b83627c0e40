//! TLS of a listener: the handshake of each accepted socket, within its time and beside a bounded number of others.

use std::{
    future::poll_fn,
    io::{self, ErrorKind::InvalidData},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use tracing::debug;

use crate::{
    core::{
        Core,
        admission::Seat,
        socket::{HANDSHAKE, SharedSocket},
        sockets::{Silence, Sockets},
    },
    tls::pair::TlsPair,
};

/// TLS of one listener.
///
/// Invariant: at most `tls.handshakes_max` sockets are in the handshake. Beyond that the oldest of them is closed for a
/// new one, so that clients who begin a handshake and stay silent keep no other client out.
#[derive(Debug)]
pub struct TlsListener {
    pair: Arc<TlsPair>,
    handshakes: Arc<Sockets>,
    time_max: Duration,
}

/// Place of a socket among those in the handshake. Dropping it frees the place.
pub(super) struct Place {
    _seat: Seat,
    _silence: Arc<Silence>,
}

/// Treatment of the requests on a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opened {
    /// They are served.
    Served,
    /// The client does not speak TLS, as the listener does. It gets an answer that says so.
    NotTls,
}

impl TlsListener {
    /// Shows `pair` to clients, at most `handshakes_max` at once, each for `time_max`.
    #[must_use]
    pub fn new(pair: Arc<TlsPair>, handshakes_max: usize, time_max: Duration) -> Self {
        Self { pair, handshakes: Sockets::new(handshakes_max), time_max }
    }

    /// Takes a place for the handshake of a new socket; `None` if none is left. Also returns whether another socket was
    /// closed for it. `address` is that of [`Sockets::watch`].
    pub(super) fn place(
        &self,
        address: Option<IpAddr>,
        socket: &Arc<SharedSocket>,
    ) -> Option<(Place, bool)> {
        let (seat, gave_way) = self.handshakes.take()?;
        let (silence, was_full) = self.handshakes.watch(address, socket);
        Some((Place { _seat: seat, _silence: silence }, gave_way || was_full))
    }

    /// Goes through a handshake, and counts its outcome. `None` if the socket is of no use any more.
    pub(super) async fn open(&self, core: &Core, socket: &SharedSocket) -> Option<Opened> {
        let result = tokio::select! {
            result = tokio::time::timeout(self.time_max, self.handshake(socket)) => result,
            () = socket.wait_taken() => Ok(Err(io::ErrorKind::NotConnected.into())),
        };
        let (outcome, opened) = match &result {
            Ok(Ok(outcome @ "not_tls")) => (*outcome, Some(Opened::NotTls)),
            Ok(Ok(outcome)) => (*outcome, Some(Opened::Served)),
            Ok(Err(_)) if socket.is_taken() => ("displaced", None),
            Ok(Err(error)) if error.kind() == InvalidData => ("refused", None),
            Ok(Err(_)) => ("left", None),
            Err(_) => ("timeout", None),
        };
        if let Ok(Err(error)) = result {
            debug!(%error, outcome, "A TLS handshake failed.");
        }
        core.metrics.tls_handshake(outcome);
        opened
    }

    async fn handshake(&self, socket: &SharedSocket) -> io::Result<&'static str> {
        match poll_fn(|cx| socket.poll_first_byte(cx)).await? {
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
            Some(HANDSHAKE) => {}
            Some(_) => return Ok("not_tls"),
        }
        // Only now: a client that sends nothing costs no memory for TLS.
        socket.encrypt(self.pair.config())?;
        let is_resumed = poll_fn(|cx| socket.poll_handshake(cx)).await?;
        Ok(if is_resumed { "resumed" } else { "full" })
    }
}
