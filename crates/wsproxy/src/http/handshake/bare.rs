//! The handshake of a WebSocket whose messages are no client's: checked and counted as all others, then handed over. Knows
//! no logic.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::{body::Incoming, upgrade::OnUpgrade};
use uuid::Uuid;
use wsproxy_conn::Socket;
use wsproxy_proto::ws::handshake::{Upgrade, subprotocols};

use crate::{
    core::{Core, admission::Seat, caller::Caller},
    http::{
        Body,
        handshake::{check_common, client_address, count_attempt, full, take_seat, websocket},
        rejection::Rejection,
    },
};

/// A handshake whose credentials are not checked yet, with a seat among the handshakes.
pub struct BareOpening {
    seat: Seat,
    prepared: Prepared,
}

/// A handshake with valid credentials, and a seat among the connections.
pub struct BareAdmitted {
    seat: Seat,
    prepared: Prepared,
}

/// The socket of an accepted handshake, once the answer is written.
pub struct BareSocket {
    on_upgrade: OnUpgrade,
    id: Uuid,
    held: Held,
}

/// Seats of a connection, which holds them until its end.
pub struct Held {
    _seat: Seat,
    _socket_seat: Option<Arc<Seat>>,
}

struct Prepared {
    upgrade: Upgrade,
    protocol: &'static str,
    on_upgrade: OnUpgrade,
    id: Uuid,
    caller: Arc<Caller>,
    socket_seat: Option<Arc<Seat>>,
}

impl BareOpening {
    /// Checks the limits, the form of the request, its origin, and that the client speaks `protocol`.
    ///
    /// # Errors
    /// 400, 403, 405, 426, 429, 503.
    pub fn begin(
        core: &Core,
        request: &mut Request<Incoming>,
        protocol: &'static str,
    ) -> Result<Self, Rejection> {
        count_attempt(core, client_address(core, request)?)?;
        let seat = take_seat(core)?;
        let upgrade = websocket::read_upgrade(request)?;
        check_common(core, request)?;
        if !subprotocols(request.headers()).any(|offered| offered == protocol) {
            let message = format!("The subprotocol {protocol} is needed.");
            return Err(Rejection::upgrade_required(message));
        }
        let on_upgrade = hyper::upgrade::on(&mut *request);
        let extensions = request.extensions_mut();
        let (socket_seat, caller) = (extensions.remove(), extensions.remove().unwrap_or_default());
        let id = Uuid::now_v7();
        let prepared = Prepared { upgrade, protocol, on_upgrade, id, caller, socket_seat };
        Ok(Self { seat, prepared })
    }

    /// Takes a seat among the connections, now that the credentials are checked.
    ///
    /// # Errors
    /// 503: no seat is left.
    pub fn admit(self, core: &Core) -> Result<BareAdmitted, Rejection> {
        drop(self.seat);
        let seat = core.seats.take().ok_or_else(|| full(core))?;
        Ok(BareAdmitted { seat, prepared: self.prepared })
    }
}

impl BareAdmitted {
    /// Returns the id of the connection.
    #[must_use]
    pub const fn id(&self) -> Uuid {
        self.prepared.id
    }

    /// Returns the client's address and the names that it gave itself.
    #[must_use]
    pub const fn caller(&self) -> &Arc<Caller> {
        &self.prepared.caller
    }

    /// Answers `101`.
    #[must_use]
    pub fn accept(self) -> (Response<Body>, BareSocket) {
        let Prepared { upgrade, protocol, on_upgrade, id, socket_seat, .. } = self.prepared;
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
        websocket::insert(headers, header::SEC_WEBSOCKET_ACCEPT, &upgrade.accept);
        let held = Held { _seat: self.seat, _socket_seat: socket_seat };
        (response, BareSocket { on_upgrade, id, held })
    }
}

impl BareSocket {
    /// Takes the socket, with the bytes that came behind the request's head. `None`: the client left.
    pub async fn take(self) -> Option<(Socket, Bytes, Held)> {
        let (socket, leftover) = websocket::take_socket(self.on_upgrade, self.id).await?;
        Some((socket, leftover, self.held))
    }
}
