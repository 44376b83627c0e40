//! From a request for server-sent events to their stream: the same order as a WebSocket's handshake.

pub mod open;
pub mod stream;

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, header};
use hyper::body::Incoming;
use secrecy::ExposeSecret;
use tracing::debug;
use uuid::Uuid;
use wsproxy_conn::Profile;

use crate::{
    config::OnBusLoss,
    endpoint::{
        Logic,
        session::{CONTROL, SessionLogic},
    },
    gateway::Gateway,
    http::{
        Body,
        admission::Place,
        credentials,
        lasting::Lasting,
        line::Line,
        origin,
        rejection::Rejection,
        resume::{Opened, Resume},
        upgrade::{self, Waiting},
    },
    hub::{Sink, gzip::Deflation, tap::Tap},
    registry::{Entry, Peer, Transport},
    telemetry::metrics::Endpoint,
};

use self::stream::{EventStream, Held};

/// Whether a request wants events rather than a WebSocket: it says so, and `*/*` does not.
#[must_use]
pub fn is_asked(gateway: &Gateway, headers: &HeaderMap) -> bool {
    gateway.config.sse.enabled
        && !headers.contains_key(header::UPGRADE)
        && lists(headers, &header::ACCEPT, "text/event-stream")
}

/// A request for events that passed the limits, before its endpoint has looked at it.
pub struct Opening {
    id: Uuid,
    tap: Arc<Tap>,
    resume: Resume,
    /// The place of its socket.
    socket_place: Option<Arc<Place>>,
    line: Arc<Line>,
    profile: Arc<Profile>,
}

impl Opening {
    /// Limits, then the form of the request, then its origin.
    ///
    /// # Errors
    /// How to refuse it.
    pub fn begin(
        gateway: &Gateway,
        request: &mut Request<Incoming>,
        profile: &Arc<Profile>,
    ) -> Result<(Self, Waiting), Rejection> {
        let waiting = upgrade::admit(gateway, request)?;
        if request.method() != Method::GET {
            return Err(Rejection::method_not_allowed("An event stream is asked for with GET."));
        }
        upgrade::check_form(request)?;
        origin::check(request.headers(), &gateway.config.server.allowed_origins)?;
        let resume = Resume::read(request.headers(), request.uri().query())?;
        if resume.in_frame {
            return Err(Rejection::bad_request("resume=frame needs a WebSocket."));
        }
        let compression = &gateway.config.compression;
        let gzip = gateway.config.sse.compression
            && lists(request.headers(), &header::ACCEPT_ENCODING, "gzip");
        let gzip = gzip.then_some(Deflation {
            level: compression.level,
            from_bytes: compression.threshold_bytes,
        });
        let socket_place = request.extensions_mut().remove();
        let line = request.extensions_mut().remove::<Arc<Line>>();
        let line = line.ok_or_else(|| Rejection::internal("The socket is unknown."))?;
        let runtime = Arc::clone(&gateway.runtime);
        let tap = Tap::of_client(profile.send_buffer_bytes, runtime, gzip);
        let (id, profile) = (Uuid::now_v7(), Arc::clone(profile));
        Ok((Self { id, tap, resume, socket_place, line, profile }, waiting))
    }

    /// The connection's id.
    #[must_use]
    pub const fn id(&self) -> Uuid {
        self.id
    }

    /// What the request says about where its client was.
    #[must_use]
    pub const fn resume(&self) -> &Resume {
        &self.resume
    }

    /// How the client is sent away.
    #[must_use]
    pub fn peer(&self) -> Peer {
        Peer::Stream(Arc::clone(&self.tap))
    }

    /// Where messages for the client go.
    #[must_use]
    pub fn client(&self, on_loss: OnBusLoss) -> Sink {
        Sink::EventStream { tap: Arc::clone(&self.tap), on_loss }
    }

    /// Where messages for the endpoint's logic go.
    #[must_use]
    pub fn handler(&self, tag: u8) -> Sink {
        Sink::StreamHandler { tap: Arc::clone(&self.tap), tag }
    }

    /// The answer `200`, and the stream that is its body.
    pub fn answer<L: Logic>(
        self,
        gateway: &Arc<Gateway>,
        label: Endpoint,
        (opened, place): (Opened, Place),
        entry: Option<Entry>,
        logic: L,
    ) -> Response<Body> {
        // The listener's patience is that for requests; this is no request any more.
        self.line.be_patient(gateway.config.heartbeat.timeout);
        let (subscription, _) = opened.parts();
        let registered = gateway.event_streams.add(self.id, &self.tap, self.line);
        let held = Held {
            _subscription: subscription,
            _registered: registered,
            _place: place,
            _socket_place: self.socket_place,
            _entry: entry,
            _active: gateway.metrics.opened(label),
            _active_stream: gateway.metrics.opened_stream(label),
        };
        if gateway.is_draining() {
            // The look around for connections to close may have been before this one came.
            self.tap.end(&wsproxy_proto::disconnect::Disconnect::RESTART);
        }
        let is_gzip = self.tap.gzip().is_some();
        let stream =
            EventStream::open(gateway, (self.id, label), &self.profile, self.tap, held, logic);
        let mut response = Response::new(Body::new(stream));
        response.extensions_mut().insert(Lasting(self.profile));
        let headers = response.headers_mut();
        for (name, value) in HEADERS {
            headers.insert(name, HeaderValue::from_static(value));
        }
        if is_gzip {
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        response
    }
}

/// Opens a client of a session that only listens.
///
/// # Errors
/// How to refuse it.
pub async fn session(
    gateway: &Arc<Gateway>,
    mut request: Request<Incoming>,
    (agent, session): (&str, &str),
) -> Result<Response<Body>, Rejection> {
    let agent = upgrade::id("agent_id", agent)?;
    let session = upgrade::id("session_id", session)?;
    let (opening, waiting) = Opening::begin(gateway, &mut request, &gateway.session_profile)?;
    let token = credentials::find(request.headers(), request.uri().query(), "token")?;
    let caller = upgrade::caller(&mut request);
    drop(request);
    let token = token.expose_secret().as_bytes();
    let config = &gateway.config.sessions;
    let entrance = upgrade::Entrance {
        path: (&agent, &session),
        token,
        client: opening.client(config.on_bus_loss),
        handler: opening.handler(CONTROL),
        connection: opening.id(),
        transport: Transport::Sse,
    };
    let opened = entrance.enter(gateway, opening.resume(), waiting).await?;
    debug!(session_id = %session, connection_id = %opening.id(), "Authenticated and subscribed.");
    let endpoint = Arc::clone(&gateway.sessions);
    let logic = SessionLogic::new(endpoint, agent, session, opening.id(), Transport::Sse, caller);
    Ok(opening.answer(gateway, Endpoint::Sessions, opened, None, logic))
}

/// Whether one of the comma-separated elements of any `name` header is `wanted`, unless with weight 0.
fn lists(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|element| {
        let mut parts = element.split(';').map(str::trim);
        let is_wanted = parts.next().is_some_and(|value| value.eq_ignore_ascii_case(wanted));
        let weight = parts.find_map(|part| part.strip_prefix(['q', 'Q'])?.strip_prefix('='));
        is_wanted && weight.is_none_or(|weight| weight.parse() != Ok(0.0_f32))
    })
}

/// An answer that nobody keeps and no proxy holds back; its socket carries nothing else after it.
const HEADERS: [(HeaderName, &str); 5] = [
    (header::CONTENT_TYPE, "text/event-stream"),
    (header::CACHE_CONTROL, "no-store"),
    (header::VARY, "Accept, Accept-Encoding"),
    (header::CONNECTION, "close"),
    // nginx would keep the stream in its buffer.
    (HeaderName::from_static("x-accel-buffering"), "no"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn accepts(values: &[&str]) -> bool {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::ACCEPT, value.parse().unwrap());
        }
        lists(&headers, &header::ACCEPT, "text/event-stream")
    }

    #[test]
    fn only_who_names_events_gets_them() {
        assert!(accepts(&["text/event-stream"]));
        assert!(accepts(&["application/json, Text/Event-Stream ; charset=utf-8;q=0.5"]));
        assert!(accepts(&["text/html", "text/event-stream"]));
        for other in
            ["*/*", "text/*", "", "text/event-streams", "text/event-stream;q=0", "text/html"]
        {
            assert!(!accepts(&[other]), "{other}");
        }
        assert!(!accepts(&[]));
    }
}
