//! Handshakes: the same steps, deadline and refusals for WebSockets and event streams. Knows no endpoint family: a
//! family brings its profile, its credentials and its logic.
//!
//! 1. [`Opening::begin`]: the limits, the form of the request, its origin.
//! 2. The family checks the credentials, and [`Opening::admit`]s the client to a seat.
//! 3. The family subscribes the client ([`resume::subscribe`]) with the sinks of [`Admitted`].
//! 4. [`Admitted::accept`]: the answer, and the connection behind it.

use std::{net::IpAddr, sync::Arc};

use futures_util::FutureExt as _;
use http::{HeaderMap, Request, Response};
use hyper::body::{Body as _, Incoming};
use tracing::warn;
use uuid::Uuid;
use wsproxy_conn::{Profile, clock};

use crate::{
    client::Client,
    config::{EventIds, OnBusLoss},
    core::{Core, admission::Seat, caller::Caller},
    http::{
        Body,
        handshake::{
            address::RemotePeer,
            credentials::Protocols,
            resume::{PendingReplay, ResumeRequest, Subscribed},
        },
        rejection::Rejection,
    },
    hub::{
        form::{Form, Ids},
        sink::Sink,
        subscription::Subscription,
    },
    logic::Logic,
    registry::Transport,
    telemetry::family::Family,
    traces::{Trace, Value},
};

pub mod address;
pub mod bare;
mod connection;
pub mod credentials;
pub mod event_stream;
pub mod origin;
pub mod resume;
pub(crate) mod websocket;

/// A handshake whose credentials are not checked yet. It has no seat among the connections, so that clients without
/// valid credentials cannot keep others out.
pub struct Opening {
    /// Seat among the handshakes.
    seat: Seat,
    prepared: Prepared,
}

/// A handshake with valid credentials and a seat among the connections.
pub struct Admitted {
    seat: Seat,
    prepared: Prepared,
}

/// Parts of a connection that are made before the credentials are checked.
struct Prepared {
    family: Family,
    client: Client,
    answer: Answer,
    caller: Arc<Caller>,
    trace: Trace,
    /// Seat of the socket, which is held as long as the connection.
    socket_seat: Option<Arc<Seat>>,
}

/// Answer to an accepted request.
enum Answer {
    /// `101`
    WebSocket(websocket::WebSocketAnswer),
    /// `200`, and a body that lasts as long as the connection.
    EventStream(event_stream::EventStreamAnswer),
}

impl Opening {
    /// Checks the limits, the form of the request and its origin. The request decides between a WebSocket and an event
    /// stream.
    ///
    /// # Errors
    /// 400, 403, 405, 426, 429, 503.
    pub fn begin(
        core: &Core,
        request: &mut Request<Incoming>,
        family: Family,
        profile: &Arc<Profile>,
    ) -> Result<Self, Rejection> {
        if !event_stream::is_asked(core, request.headers()) {
            return Self::begin_websocket(core, request, (family, profile), Protocols::COMMON);
        }
        count_attempt(core, client_address(core, request)?)?;
        let seat = take_seat(core)?;
        event_stream::check_method(request)?;
        check_common(core, request)?;
        let (client, answer) = event_stream::EventStreamAnswer::prepare(core, request, profile)?;
        let prepared = Prepared::new(request, family, client, Answer::EventStream(answer));
        Ok(Self { seat, prepared })
    }

    /// As [`Self::begin`], for a family without event streams.
    ///
    /// # Errors
    /// 400, 403, 405, 426, 429, 503.
    pub fn begin_websocket(
        core: &Core,
        request: &mut Request<Incoming>,
        shared: (Family, &Arc<Profile>),
        protocols: Protocols,
    ) -> Result<Self, Rejection> {
        count_attempt(core, client_address(core, request)?)?;
        Self::begin_counted(core, request, shared, protocols)
    }

    /// As [`Self::begin_websocket`], for a family that counts attempts itself.
    ///
    /// # Errors
    /// 400, 403, 405, 426, 503.
    pub fn begin_counted(
        core: &Core,
        request: &mut Request<Incoming>,
        (family, profile): (Family, &Arc<Profile>),
        protocols: Protocols,
    ) -> Result<Self, Rejection> {
        let seat = take_seat(core)?;
        let upgrade = websocket::read_upgrade(request)?;
        check_common(core, request)?;
        let (client, answer) =
            websocket::WebSocketAnswer::prepare(core, request, upgrade, profile, protocols);
        let prepared = Prepared::new(request, family, client, Answer::WebSocket(answer));
        Ok(Self { seat, prepared })
    }

    /// Returns the id of the connection.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.prepared.client.id()
    }

    /// Returns the client's address and the names that it gave itself.
    #[must_use]
    pub const fn caller(&self) -> &Arc<Caller> {
        &self.prepared.caller
    }

    /// Returns whether the subprotocol of newer users' agents is selected.
    #[must_use]
    pub fn is_agent_protocol(&self) -> bool {
        matches!(&self.prepared.answer, Answer::WebSocket(answer) if answer.is_agent_protocol())
    }

    /// Returns the span of the handshake.
    #[must_use]
    pub const fn trace(&self) -> &Trace {
        &self.prepared.trace
    }

    /// Returns the transport that the client asks for.
    #[must_use]
    pub const fn transport(&self) -> Transport {
        self.prepared.transport()
    }

    /// Reads the position from which the client wants to continue.
    ///
    /// # Errors
    /// 400: a malformed position, or `resume=frame` for an event stream, whose client cannot send a message.
    pub fn resume(&self, request: &Request<Incoming>) -> Result<ResumeRequest, Rejection> {
        let resume = ResumeRequest::read(request.headers(), request.uri().query())?;
        if resume.in_frame && self.transport() == Transport::Sse {
            return Err(Rejection::bad_request("resume=frame needs a WebSocket."));
        }
        Ok(resume)
    }

    /// Takes a seat among the connections, now that the credentials are checked.
    ///
    /// # Errors
    /// 503: no seat is left.
    pub fn admit(self, core: &Core) -> Result<Admitted, Rejection> {
        drop(self.seat);
        let seat = core.seats.take().ok_or_else(|| full(core))?;
        Ok(Admitted { seat, prepared: self.prepared })
    }
}

impl Admitted {
    /// Returns the handle to the client.
    #[must_use]
    pub const fn client(&self) -> &Client {
        &self.prepared.client
    }

    /// Returns the connection's id.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.prepared.client.id()
    }

    /// Returns the connection's transport.
    #[must_use]
    pub const fn transport(&self) -> Transport {
        self.prepared.transport()
    }

    /// Returns the client's address and the names that it gave itself.
    #[must_use]
    pub const fn caller(&self) -> &Arc<Caller> {
        &self.prepared.caller
    }

    /// Returns the span of the handshake.
    #[must_use]
    pub const fn trace(&self) -> &Trace {
        &self.prepared.trace
    }

    /// Returns the form in which messages to the client carry their ids.
    #[must_use]
    pub fn ids(&self, config: EventIds) -> Ids {
        match (&self.prepared.answer, config) {
            (Answer::WebSocket(answer), _) if answer.has_envelope() => Ids::Envelope,
            (_, EventIds::Json) => Ids::Json,
            (_, EventIds::None) => Ids::Hidden,
        }
    }

    /// Makes the sink of messages to the client.
    #[must_use]
    pub fn client_sink(&self, form: Form, on_loss: OnBusLoss) -> Sink {
        Sink::Client { client: self.client().clone(), form, on_loss }
    }

    /// Makes the sink of messages to the logic, which get `tag` as events.
    #[must_use]
    pub fn handler_sink(&self, tag: u8) -> Sink {
        Sink::Handler { client: self.client().clone(), tag }
    }

    /// Answers, and opens the connection with this logic. `subscribed` is `None` in a family without topics.
    pub fn accept<L: Logic>(
        self,
        core: &Arc<Core>,
        subscribed: Option<Subscribed>,
        logic: L,
        server: L::Server,
    ) -> Response<Body> {
        let Self { seat, prepared } = self;
        prepared.trace.enter("accept");
        let (subscription, pending) = subscribed.map_or((None, None), Subscribed::parts);
        let held =
            ConnectionGuards { _seat: seat, _socket_seat: prepared.socket_seat, subscription };
        let accepted = Accepted { family: prepared.family, held, pending, logic, server };
        match prepared.answer {
            Answer::WebSocket(answer) => answer.accept(core, accepted),
            Answer::EventStream(answer) => answer.accept(core, accepted),
        }
    }
}

impl Prepared {
    fn new(
        request: &mut Request<Incoming>,
        family: Family,
        client: Client,
        answer: Answer,
    ) -> Self {
        let extensions = request.extensions_mut();
        let socket_seat = extensions.remove();
        let caller = extensions.remove().unwrap_or_default();
        let trace: Trace = extensions.remove().unwrap_or_default();
        trace.add("wsproxy.connection_id", || Value::text(&client.id().to_string()));
        Self { family, client, answer, caller, trace, socket_seat }
    }

    const fn transport(&self) -> Transport {
        match self.answer {
            Answer::WebSocket(_) => Transport::WebSocket,
            Answer::EventStream(_) => Transport::Sse,
        }
    }
}

/// An accepted client, before its connection exists.
struct Accepted<L: Logic> {
    family: Family,
    held: ConnectionGuards,
    /// Replay that waits for the position in the client's first message.
    pending: Option<PendingReplay>,
    logic: L,
    server: L::Server,
}

/// Guards that a connection holds until its end.
struct ConnectionGuards {
    subscription: Option<Subscription>,
    _seat: Seat,
    _socket_seat: Option<Arc<Seat>>,
}

/// Bounds the time of all work on the bus and the store in a handshake or a call of the worker API.
///
/// # Errors
/// 503: the bus is away. 504: the bus is slow. Also the errors of `work`.
pub fn deadline<T>(
    core: &Core,
    work: impl Future<Output = Result<T, Rejection>>,
) -> impl Future<Output = Result<T, Rejection>> {
    // The future of an async function would have room for `work` twice.
    tokio::time::timeout(core.config.server.handshake_timeout, work).map(|done| match done {
        Ok(result) => result,
        // 504 would blame a slow bus, but the bus is known to be away.
        Err(_) if !core.bus.status().connected => {
            Err(Rejection::bus_unavailable("The bus cannot be reached."))
        }
        Err(_) => Err(Rejection::deadline("The bus did not answer in time.")),
    })
}

/// Returns the client's address, behind trusted proxies.
///
/// # Errors
/// 500: the listener set no address.
pub fn client_address<B>(core: &Core, request: &Request<B>) -> Result<IpAddr, Rejection> {
    address_of(core, request.headers(), request.extensions())
}

/// As [`client_address`], for the parts of a request.
///
/// # Errors
/// As [`client_address`].
pub fn address_of(
    core: &Core,
    headers: &HeaderMap,
    extensions: &http::Extensions,
) -> Result<IpAddr, Rejection> {
    let peer = extensions.get::<RemotePeer>();
    let peer = peer.ok_or_else(|| Rejection::internal("The peer's address is unknown."))?;
    let server = &core.config.server;
    Ok(address::client(peer.0, headers, &server.trusted_proxies, server.forwarded_header))
}

/// Logs a warning for the operator: a client was refused because every seat is taken.
pub(super) fn tell_full(core: &Core) {
    let max = core.seats.max();
    if let Some(left_out) = core.lines.pass("instance full") {
        warn!(max, left_out, "A connection was refused: the instance is full.");
    }
}

/// Counts an attempt of a client's address.
///
/// # Errors
/// 429: too many attempts from the address. 503: the instance is closing.
fn count_attempt(core: &Core, address: IpAddr) -> Result<(), Rejection> {
    check_open(core)?;
    let now = clock::now();
    core.attempts.take(address, now.0.saturating_mul(1000)).map_err(Rejection::too_often)
}

/// Takes a seat among the handshakes.
///
/// # Errors
/// 503: the instance is full or closing, or too many handshakes wait.
fn take_seat(core: &Core) -> Result<Seat, Rejection> {
    check_open(core)?;
    if core.seats.is_full() {
        return Err(full(core));
    }
    core.handshakes.take().ok_or_else(|| {
        Rejection::too_many_handshakes("Too many connections are being opened. Try again soon.")
    })
}

/// Checks that the instance still accepts connections.
///
/// # Errors
/// 503: it does not.
fn check_open(core: &Core) -> Result<(), Rejection> {
    match core.is_closing() {
        true => Err(Rejection::draining("The instance is about to restart.")),
        false => Ok(()),
    }
}

fn full(core: &Core) -> Rejection {
    tell_full(core);
    Rejection::full("The instance holds as many connections as it may.")
}

/// Rejects a request with a body, and pages of origins that may not connect.
///
/// # Errors
/// 400, 403.
fn check_common(core: &Core, request: &Request<Incoming>) -> Result<(), Rejection> {
    if !request.body().is_end_stream() {
        // The gateway would read the body as frames, a proxy as a body: the two would see different requests.
        return Err(Rejection::bad_request("A request for a connection has no body."));
    }
    origin::check(request.headers(), &core.allowed_origins.rules())
}
