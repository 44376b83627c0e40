//! From a request to a driven connection: one order, one deadline, one kind of refusal.

use std::{net::IpAddr, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use hyper::{
    body::{Body as _, Incoming},
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use percent_encoding::percent_decode_str;
use secrecy::ExposeSecret;
use tokio::net::UnixStream;
use tracing::{debug, warn};
use uuid::Uuid;
use wsproxy_conn::{Driver, Link, Profile, Socket, clock};
use wsproxy_proto::{
    disconnect::Disconnect,
    names::Id,
    ws::{
        deflate::{self, Params},
        handshake::{self, Upgrade},
    },
};

use crate::{
    auth::{self, session::WrongToken},
    config::EventIds,
    endpoint::{
        Logic,
        caller::Caller,
        echo::Echo,
        session::{CONTROL, SessionLogic},
    },
    gateway::Gateway,
    http::{
        Body, address,
        admission::Place,
        credentials,
        line::LineSocket,
        listener::RemoteAddress,
        origin,
        peer::{Marks, Peer},
        rejection::Rejection,
        resume::{self, Opened, Resume, Wanted},
    },
    hub::{Form, Ids, Sink, Subscription},
    registry::{Entry, Transport},
    store::StoreError,
    telemetry::metrics::{Active, Endpoint},
};

/// A handshake that passed the limits, before its endpoint has looked at it.
pub(super) struct Handshake {
    upgrade: Upgrade,
    deflate: Option<(Params, String)>,
    protocol: Option<&'static str>,
    on_upgrade: OnUpgrade,
    /// The place of its socket, which stays taken after the upgrade.
    socket_place: Option<Arc<Place>>,
    pub(super) link: Arc<Link>,
}

impl Handshake {
    /// Where the client finds the ids of messages.
    pub(super) fn ids(&self, config: EventIds) -> Ids {
        match config {
            _ if self.protocol == Some(credentials::ENVELOPE_PROTOCOL) => Ids::Envelope,
            EventIds::Json => Ids::Json,
            EventIds::None => Ids::Hidden,
        }
    }
}

/// Opens a client of a session: contract section 3. The answer is `101` or a refusal.
pub async fn session(
    gateway: &Arc<Gateway>,
    mut request: Request<Incoming>,
    (agent, session): (&str, &str),
) -> Result<Response<Body>, Rejection> {
    let agent = id("agent_id", agent)?;
    let session = id("session_id", session)?;
    let (handshake, waiting) = begin(gateway, &mut request, &gateway.session_profile)?;
    let token = credentials::find(request.headers(), request.uri().query(), "token")?;
    let resume = Resume::read(request.headers(), request.uri().query())?;
    let caller = caller(&mut request);
    drop(request);
    let token = token.expose_secret().as_bytes();
    let [client, handler] = sinks(gateway, &handshake);
    let connection = handshake.link.id();
    let transport = Transport::WebSocket;
    let path = (&agent, &session);
    let entrance = Entrance { path, token, client, handler, connection, transport };
    let (opened, place) = entrance.enter(gateway, &resume, waiting).await?;
    debug!(session_id = %session, connection_id = %connection, "Authenticated and subscribed.");
    let endpoint = Arc::clone(&gateway.sessions);
    let logic = SessionLogic::new(endpoint, agent, session, connection, transport, caller);
    Ok(accept(gateway, Endpoint::Sessions, (handshake, place), Some(opened), None, logic))
}

/// A client before the door of its session.
pub struct Entrance<'a> {
    /// The agent and the session of its path.
    pub path: (&'a Id, &'a Id),
    /// What it shows.
    pub token: &'a [u8],
    /// Where its messages go.
    pub client: Sink,
    /// Where its worker's commands go.
    pub handler: Sink,
    /// Its connection.
    pub connection: Uuid,
    /// How it wants to be connected.
    pub transport: Transport,
}

impl Entrance<'_> {
    /// Token, subscriptions, what was missed, and the token again: in this order.
    ///
    /// # Errors
    /// Why it may not enter, or cannot.
    pub async fn enter(
        self,
        gateway: &Gateway,
        resume: &Resume,
        waiting: Waiting,
    ) -> Result<(Opened, Place), Rejection> {
        let Self { path: (agent, session), token, client, handler, connection, transport } = self;
        let is_for_event_streams = auth::session::is_for_event_streams(token);
        if is_for_event_streams && transport != Transport::Sse {
            // Before the store is asked, so that the answer says nothing about the token's value.
            let message = "A token that begins with sse. opens event streams only.";
            return Err(Rejection::invalid_token(message).because("an event stream's token"));
        }
        let key = gateway.names.session_auth(session);
        let opening = async {
            let stored = load_token(gateway, &key, (agent, token)).await?;
            let place = waiting.enter(gateway)?;
            let reserved = reserve(gateway, session, handler)?;
            let wanted = Wanted {
                client,
                topics: vec![gateway.names.session_down(session).into()],
                reserved: Some(reserved),
                streams_of: Some(session.clone()),
                counted_as: gateway.names.session_down(session),
            };
            let hello = resume.hello(connection);
            let histories = gateway.session_histories.as_ref();
            let opened = resume::open(gateway, histories, wanted, resume, hello).await?;
            if is_for_event_streams {
                // A worker that removes the token and then closes the session reaches this client too: here, or
                // by the subscription that has just been confirmed.
                load_token(gateway, &key, (agent, token)).await?;
            }
            Ok((stored, opened, place))
        };
        let (stored, opened, place) = deadline(gateway, opening).await?;
        // Last, so that whatever fails before leaves the token for the next try.
        if !is_for_event_streams && !consume(gateway, &key, &stored).await? {
            return Err(wrong_token(gateway, &key, WrongToken::Missing));
        }
        Ok((opened, place))
    }
}

/// A place among the connections of a session: every one of them has its handler at the topic of its commands.
fn reserve(gateway: &Gateway, session: &Id, handler: Sink) -> Result<Subscription, Rejection> {
    let control = gateway.names.session_control(session).into();
    let most = match gateway.config.limits.connections_per_session {
        0 => usize::MAX,
        most => most,
    };
    gateway.hub.reserve(control, handler, most).ok_or_else(|| {
        Rejection::too_many_connections("The session has as many connections as it may.")
    })
}

/// What the store holds of a session's token, if `token` opens the path of `agent` with it.
async fn load_token(
    gateway: &Gateway,
    key: &str,
    (agent, token): (&Id, &[u8]),
) -> Result<Bytes, Rejection> {
    let stored = gateway.store.load(key).await?.unwrap_or_default();
    let checked = auth::session::check(&stored, token, agent);
    checked.map_err(|cause| wrong_token(gateway, key, cause))?;
    Ok(stored)
}

/// The cause is for the log: who shows a token is not told what is wrong with it. The key and the place are named since
/// a worker that stores tokens elsewhere, or with another prefix, has them all refused.
fn wrong_token(gateway: &Gateway, key: &str, cause: WrongToken) -> Rejection {
    let place = gateway.bus.place();
    Rejection::invalid_token("The token is wrong, expired, used or for another path.")
        .because(format!("{cause} (key {key}, {place})"))
}

/// Uses up a token; `false` where another handshake was faster. Both transports come through here, and the store
/// compares and removes in one step, so of any number of handshakes with one token exactly one wins.
///
/// Outside the handshake's deadline: given up after it was sent, the token could be gone without
/// a connection. A store that does not answer at all is found by its own watchdog.
async fn consume(gateway: &Gateway, key: &str, stored: &[u8]) -> Result<bool, Rejection> {
    let answer = gateway.store.take_if_equal(key, stored);
    match tokio::time::timeout(gateway.config.redis.response_timeout, answer).await {
        Ok(taken) => taken.map_err(not_consumed),
        Err(_) => Err(Rejection::deadline("The store did not answer in time.")),
    }
}

/// Refusal of a handshake whose token the store did not use up, or perhaps did.
///
/// Invariant: whoever is refused with 503 still has the token, since proxies take such a request to the next instance.
fn not_consumed(error: StoreError) -> Rejection {
    match error {
        StoreError::Lost(cause) => {
            Rejection::deadline("The store was lost before it answered.").because(cause)
        }
        error => error.into(),
    }
}

/// For messages, and for commands.
fn sinks(gateway: &Gateway, handshake: &Handshake) -> [Sink; 2] {
    let config = &gateway.config.sessions;
    let link = &handshake.link;
    let ids = handshake.ids(config.event_ids);
    let client = Sink::Client {
        link: Arc::clone(link),
        form: Form { frames: config.down_frames, ids, acks: false },
        on_loss: config.on_bus_loss,
    };
    let handler = Sink::Handler { link: Arc::clone(link), tag: CONTROL };
    [client, handler]
}

/// Opens a connection to the echo, which needs no credentials.
pub fn echo(
    gateway: &Arc<Gateway>,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Rejection> {
    let (handshake, waiting) = begin(gateway, &mut request, &gateway.echo_profile)?;
    let place = waiting.enter(gateway)?;
    Ok(accept(gateway, Endpoint::Echo, (handshake, place), None, None, Echo))
}

/// The limits: how often an address may try, and how many there may be.
///
/// # Errors
/// One of them is reached, or the instance is about to end.
pub fn admit<B>(gateway: &Gateway, request: &Request<B>) -> Result<Waiting, Rejection> {
    let address = client_address(gateway, request)?;
    if gateway.is_closing() {
        return Err(Rejection::draining("The instance is about to restart."));
    }
    let now = clock::now();
    gateway.attempts.take(address, now.0.saturating_mul(1000)).map_err(Rejection::too_often)?;
    if gateway.places.is_full() {
        return Err(full(gateway));
    }
    gateway.handshakes.take().map(Waiting).ok_or_else(|| {
        Rejection::too_many_handshakes("Too many connections are being opened. Try again soon.")
    })
}

/// A handshake whose credentials are not checked yet. It has no place among the connections, so that those who
/// have no right to one, or wait long for a verdict, cannot keep others out.
pub struct Waiting(Place);

impl Waiting {
    /// The credentials are good: it takes a place among the connections.
    ///
    /// # Errors
    /// There is none left.
    pub fn enter(self, gateway: &Gateway) -> Result<Place, Rejection> {
        drop(self.0);
        gateway.places.take().ok_or_else(|| full(gateway))
    }
}

fn full(gateway: &Gateway) -> Rejection {
    tell_full(gateway);
    Rejection::full("The instance holds as many connections as it may.")
}

/// The operator is told that somebody was refused a place.
pub(super) fn tell_full(gateway: &Gateway) {
    let max = gateway.places.max();
    if let Some(left_out) = gateway.lines.pass("instance full") {
        warn!(max, left_out, "A connection was refused: the instance is full.");
    }
}

/// What [`crate::http::routes`] has read of a client.
pub(super) fn caller(request: &mut Request<Incoming>) -> Arc<Caller> {
    request.extensions_mut().remove().unwrap_or_default()
}

/// What no request for a connection may have.
///
/// # Errors
/// It has.
pub fn check_form(request: &Request<Incoming>) -> Result<(), Rejection> {
    if !request.body().is_end_stream() {
        // Its bytes would be taken for frames, and a proxy in front may see them otherwise.
        return Err(Rejection::bad_request("A request for a connection has no body."));
    }
    Ok(())
}

/// Limits, then the form of the request.
pub(super) fn begin(
    gateway: &Gateway,
    request: &mut Request<Incoming>,
    profile: &Arc<Profile>,
) -> Result<(Handshake, Waiting), Rejection> {
    let waiting = admit(gateway, request)?;
    let upgrade = handshake::read_upgrade(request.method(), request.version(), request.headers())?;
    check_form(request)?;
    origin::check(request.headers(), &gateway.config.server.allowed_origins)?;
    let compression = &gateway.config.compression;
    let policy = deflate::Policy {
        client_context_takeover: compression.client_context_takeover,
        ..deflate::Policy::default()
    };
    let deflate =
        compression.enabled.then(|| deflate::negotiate(request.headers(), &policy)).flatten();
    let window_bits = deflate.as_ref().map(|(params, _)| params.server_max_window_bits);
    let (profile, runtime) = (Arc::clone(profile), Arc::clone(&gateway.runtime));
    let handshake = Handshake {
        upgrade,
        deflate,
        protocol: credentials::select_protocol(request.headers()),
        on_upgrade: hyper::upgrade::on(&mut *request),
        socket_place: request.extensions_mut().remove(),
        link: Link::new(Uuid::now_v7(), window_bits, profile, runtime, clock::now()),
    };
    Ok((handshake, waiting))
}

/// Where the client is, behind our own proxies.
pub fn client_address<B>(gateway: &Gateway, request: &Request<B>) -> Result<IpAddr, Rejection> {
    address_of(gateway, request.headers(), request.extensions())
}

/// The same for a request in parts.
pub fn address_of(
    gateway: &Gateway,
    headers: &HeaderMap,
    extensions: &http::Extensions,
) -> Result<IpAddr, Rejection> {
    let peer = extensions.get::<RemoteAddress>();
    let peer = peer.ok_or_else(|| Rejection::internal("The peer's address is unknown."))?;
    let server = &gateway.config.server;
    Ok(address::client(peer.0, headers, &server.trusted_proxies, server.forwarded_header))
}

/// What lasts exactly as long as its connection.
pub struct Held {
    _subscription: Option<Subscription>,
    _place: Place,
    _socket_place: Option<Arc<Place>>,
    _active: Active,
}

/// The answer `101`, and the task that takes over behind it.
pub(super) fn accept<L: Logic>(
    gateway: &Arc<Gateway>,
    label: Endpoint,
    (handshake, place): (Handshake, Place),
    opened: Option<Opened>,
    registered: Option<Entry>,
    logic: L,
) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    insert(headers, header::SEC_WEBSOCKET_ACCEPT, &handshake.upgrade.accept);
    if let Some(protocol) = handshake.protocol {
        insert(headers, header::SEC_WEBSOCKET_PROTOCOL, protocol);
    }
    let params = handshake.deflate.map(|(params, answer)| {
        insert(headers, header::SEC_WEBSOCKET_EXTENSIONS, &answer);
        params
    });
    let (link, on_upgrade) = (handshake.link, handshake.on_upgrade);
    let socket_place = handshake.socket_place;
    // An endpoint without topics has no ids.
    let envelope = handshake.protocol == Some(credentials::ENVELOPE_PROTOCOL) && opened.is_some();
    let owner = Arc::clone(gateway);
    gateway.tasks.spawn(async move {
        let upgraded = match on_upgrade.await {
            Ok(upgraded) => upgraded,
            Err(error) => {
                debug!(connection_id = %link.id(), %error, "The client left during the handshake.");
                return;
            }
        };
        let Some((socket, leftover)) = socket_of(upgraded) else {
            warn!(connection_id = %link.id(), "The connection is of an unknown kind.");
            return;
        };
        if let Err(error) = socket.prepare(owner.config.heartbeat.timeout) {
            debug!(connection_id = %link.id(), %error, "The client left during the handshake.");
            return;
        }
        let (subscription, unread) = opened.map_or((None, None), Opened::parts);
        let awaits = unread.map(|replay| resume::in_frame(&owner, replay, &link));
        let held = Held {
            _subscription: subscription,
            _place: place,
            _socket_place: socket_place,
            _active: owner.metrics.opened(label),
        };
        let marks = Marks { envelope, registered: registered.map(Arc::new) };
        let peer = Peer::open(&owner, label, &link, held, awaits, marks, logic);
        let driver = Driver::new(Arc::clone(&link), socket, params, peer, &leftover);
        if owner.is_closing() {
            // The look around for connections to close may have been before this one came.
            link.finish(&Disconnect::RESTART, clock::now());
        }
        // A task of its own: it is all that stays, and much smaller than this one.
        owner.tasks.spawn(driver);
    });
    response
}

fn insert(headers: &mut HeaderMap, name: header::HeaderName, value: &str) {
    match HeaderValue::from_str(value) {
        Ok(value) => drop(headers.insert(name, value)),
        Err(error) => warn!(%error, "A response header is malformed."),
    }
}

/// The raw socket under hyper, and what hyper has read beyond the request head.
fn socket_of(upgraded: hyper::upgrade::Upgraded) -> Option<(Socket, Bytes)> {
    match upgraded.downcast::<LineSocket>() {
        Ok(parts) => Some((parts.io.0.take()?.into(), parts.read_buf)),
        Err(upgraded) => {
            let parts = upgraded.downcast::<TokioIo<UnixStream>>().ok()?;
            Some((parts.io.into_inner().into(), parts.read_buf))
        }
    }
}

/// The one deadline of all bus and store work of a handshake.
pub async fn deadline<T>(
    gateway: &Gateway,
    work: impl Future<Output = Result<T, Rejection>>,
) -> Result<T, Rejection> {
    let timeout = gateway.config.server.handshake_timeout;
    match tokio::time::timeout(timeout, work).await {
        Ok(result) => result,
        // A bus that is known to be away is not slow: that is another status.
        Err(_) if !gateway.bus.status().connected => {
            Err(Rejection::bus_unavailable("The bus cannot be reached."))
        }
        Err(_) => Err(Rejection::deadline("The bus did not answer in time.")),
    }
}

/// An id from the path.
pub fn id(name: &str, raw: &str) -> Result<Id, Rejection> {
    let text = percent_decode_str(raw)
        .decode_utf8()
        .map_err(|_| Rejection::bad_id(format!("{name} is not UTF-8.")))?;
    Id::parse(&text).map_err(|error| Rejection::bad_id(format!("{name} {error}.")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_in_doubt_is_refused_with_504_not_503() {
        let lost = not_consumed(StoreError::Lost("cut".into()));
        assert_eq!((lost.status, lost.code), (StatusCode::GATEWAY_TIMEOUT, "deadline"));
        let kept = not_consumed(StoreError::Full);
        assert_eq!((kept.status, kept.code), (StatusCode::SERVICE_UNAVAILABLE, "not_done"));
    }
}
