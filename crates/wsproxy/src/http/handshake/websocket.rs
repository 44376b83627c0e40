//! The answer `101`, and the task that drives the WebSocket behind it.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use hyper::{body::Incoming, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tracing::{debug, warn};
use uuid::Uuid;
use wsproxy_conn::{Driver, Link, Profile, Socket, clock};
use wsproxy_proto::{
    disconnect::Disconnect,
    ws::{
        deflate::{self, Params},
        handshake::{self, Upgrade},
    },
};

use crate::{
    client::Client,
    core::{Core, socket::HttpSocket},
    http::{
        Body,
        handshake::{
            Accepted,
            connection::Connection,
            credentials::{self, Protocols},
        },
        rejection::Rejection,
    },
    logic::Logic,
};

/// Parts of the answer that depend on the request.
pub(super) struct WebSocketAnswer {
    upgrade: Upgrade,
    deflate: Option<(Params, String)>,
    protocol: Option<&'static str>,
    on_upgrade: OnUpgrade,
    link: Arc<Link>,
}

/// Checks the form of a request for a WebSocket.
///
/// # Errors
/// 400, 405, 426.
pub(super) fn read_upgrade(request: &Request<Incoming>) -> Result<Upgrade, Rejection> {
    Ok(handshake::read_upgrade(request.method(), request.version(), request.headers())?)
}

impl WebSocketAnswer {
    /// Chooses the subprotocol and the compression, and makes the link.
    pub(super) fn prepare(
        core: &Core,
        request: &mut Request<Incoming>,
        upgrade: Upgrade,
        profile: &Arc<Profile>,
        protocols: Protocols,
    ) -> (Client, Self) {
        let compression = &core.config.compression;
        let policy = deflate::Policy {
            client_context_takeover: compression.client_context_takeover,
            ..deflate::Policy::default()
        };
        let deflate =
            compression.enabled.then(|| deflate::negotiate(request.headers(), &policy)).flatten();
        let window_bits = deflate.as_ref().map(|(params, _)| params.server_max_window_bits);
        let (profile, runtime) = (Arc::clone(profile), Arc::clone(&core.runtime));
        let link = Link::new(Uuid::now_v7(), window_bits, profile, runtime, clock::now());
        let client = Client::WebSocket(Arc::clone(&link));
        let protocol = protocols.select(request.headers());
        let on_upgrade = hyper::upgrade::on(&mut *request);
        (client, Self { upgrade, deflate, protocol, on_upgrade, link })
    }

    /// Returns whether each message to the client begins with a line for its id.
    pub(super) fn has_envelope(&self) -> bool {
        self.protocol == Some(credentials::ENVELOPE_PROTOCOL)
    }

    /// Returns whether the subprotocol of newer users' agents is selected.
    pub(super) fn is_agent_protocol(&self) -> bool {
        self.protocol == Some(credentials::AGENT_PROTOCOL)
    }

    /// Answers, and spawns the task that takes over the socket.
    pub(super) fn accept<L: Logic>(
        self,
        core: &Arc<Core>,
        accepted: Accepted<L>,
    ) -> Response<Body> {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        insert(headers, header::SEC_WEBSOCKET_ACCEPT, &self.upgrade.accept);
        if let Some(protocol) = self.protocol {
            insert(headers, header::SEC_WEBSOCKET_PROTOCOL, protocol);
        }
        // Messages of a family without topics have no ids.
        let envelope = self.has_envelope() && accepted.held.subscription.is_some();
        let params = self.deflate.map(|(params, answer)| {
            insert(headers, header::SEC_WEBSOCKET_EXTENSIONS, &answer);
            params
        });
        let (link, owner) = (self.link, Arc::clone(core));
        core.tasks.spawn(async move {
            let id = link.id();
            let Some((socket, leftover)) = take_socket(self.on_upgrade, id).await else { return };
            if let Err(error) = socket.prepare(owner.config.heartbeat.timeout) {
                debug!(connection_id = %id, %error, "The client left during the handshake.");
                return;
            }
            let connection = Connection::open(&owner, &link, envelope, accepted);
            let driver = Driver::new(Arc::clone(&link), socket, params, connection, &leftover);
            if owner.is_closing() {
                // The drain may have listed the connections before this one was added.
                link.finish(&Disconnect::RESTART, clock::now());
            }
            // The driver gets a task of its own, since this task's future is much larger and would stay allocated.
            owner.tasks.spawn(driver);
        });
        response
    }
}

pub(super) fn insert(headers: &mut HeaderMap, name: header::HeaderName, value: &str) {
    match HeaderValue::from_str(value) {
        Ok(value) => drop(headers.insert(name, value)),
        Err(error) => warn!(%error, "A response header is malformed."),
    }
}

/// Takes the raw socket from hyper, with the bytes that hyper has read beyond the request's head.
pub(crate) async fn take_socket(on_upgrade: OnUpgrade, id: Uuid) -> Option<(Socket, Bytes)> {
    let upgraded = match on_upgrade.await {
        Ok(upgraded) => upgraded,
        Err(error) => {
            debug!(connection_id = %id, %error, "The client left during the handshake.");
            return None;
        }
    };
    let taken = match upgraded.downcast::<HttpSocket>() {
        Ok(parts) => parts.io.0.take().map(|socket| (socket, parts.read_buf)),
        Err(upgraded) => {
            let parts = upgraded.downcast::<TokioIo<UnixStream>>().ok();
            parts.map(|parts| (parts.io.into_inner().into(), parts.read_buf))
        }
    };
    if taken.is_none() {
        warn!(connection_id = %id, "The connection is of an unknown kind.");
    }
    taken
}
