//! The answer `200` with a stream of server-sent events as its body.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, header};
use hyper::body::Incoming;
use uuid::Uuid;
use wsproxy_conn::Profile;
use wsproxy_proto::disconnect::Disconnect;

use crate::{
    client::{Client, event_stream_outbox::EventStreamOutbox, gzip::Deflation},
    core::{Core, socket::SharedSocket},
    http::{
        Body,
        detached::Detached,
        handshake::{Accepted, event_stream::body::EventStream},
        rejection::Rejection,
    },
    logic::Logic,
};

mod body;

/// Returns whether a request wants an event stream rather than a WebSocket. It must name `text/event-stream`; `*/*` is
/// not enough. Other upgrades are ignored: Java's client offers HTTP/2 with every request.
#[must_use]
pub fn is_asked(core: &Core, headers: &HeaderMap) -> bool {
    core.config.sse.enabled
        && !lists(headers, &header::UPGRADE, "websocket")
        && lists(headers, &header::ACCEPT, "text/event-stream")
}

/// Checks the method of a request for an event stream.
///
/// # Errors
/// 405.
pub(super) fn check_method(request: &Request<Incoming>) -> Result<(), Rejection> {
    if request.method() == Method::GET {
        return Ok(());
    }
    Err(Rejection::method_not_allowed("An event stream is asked for with GET."))
}

/// Parts of the answer that depend on the request.
pub(super) struct EventStreamAnswer {
    outbox: Arc<EventStreamOutbox>,
    socket: Arc<SharedSocket>,
    profile: Arc<Profile>,
}

impl EventStreamAnswer {
    /// Chooses the compression, and makes the client's outbox.
    ///
    /// # Errors
    /// 500: the listener set no socket.
    pub(super) fn prepare(
        core: &Core,
        request: &mut Request<Incoming>,
        profile: &Arc<Profile>,
    ) -> Result<(Client, Self), Rejection> {
        let compression = &core.config.compression;
        let gzip = core.config.sse.compression
            && lists(request.headers(), &header::ACCEPT_ENCODING, "gzip");
        let gzip = gzip.then_some(Deflation {
            level: compression.level,
            from_bytes: compression.threshold_bytes,
        });
        let socket = request.extensions_mut().remove::<Arc<SharedSocket>>();
        let socket = socket.ok_or_else(|| Rejection::internal("The socket is unknown."))?;
        let (id, runtime) = (Uuid::now_v7(), Arc::clone(&core.runtime));
        let outbox = EventStreamOutbox::new(id, profile.send_buffer_bytes, runtime, gzip);
        let client = Client::EventStream(Arc::clone(&outbox));
        Ok((client, Self { outbox, socket, profile: Arc::clone(profile) }))
    }

    /// Answers with the stream as the body.
    pub(super) fn accept<L: Logic>(
        self,
        core: &Arc<Core>,
        accepted: Accepted<L>,
    ) -> Response<Body> {
        let Self { outbox, socket, profile } = self;
        // The listener's shorter bound is for plain answers. An event stream is bounded like a WebSocket.
        socket.set_unacknowledged_max(core.config.heartbeat.timeout);
        let registered = core.event_streams.add(&outbox);
        if core.is_closing() {
            // The drain may have listed the connections before this one was added.
            outbox.finish(&Disconnect::RESTART);
        }
        let stream = EventStream::open(core, Arc::clone(&outbox), &profile, registered, accepted);
        let mut response = Response::new(Body::new(stream));
        let headers = response.headers_mut();
        for (name, value) in HEADERS {
            headers.insert(name, HeaderValue::from_static(value));
        }
        if outbox.gzip().is_some() {
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        response.extensions_mut().insert(Detached { profile, outbox });
        response
    }
}

/// Returns whether a `name` header lists `wanted`, with a weight other than 0.
fn lists(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|element| {
        let mut parts = element.split(';').map(str::trim);
        let is_wanted = parts.next().is_some_and(|value| value.eq_ignore_ascii_case(wanted));
        let weight = parts.find_map(|part| part.strip_prefix(['q', 'Q'])?.strip_prefix('='));
        is_wanted && weight.is_none_or(|weight| weight.parse() != Ok(0.0_f32))
    })
}

/// Value of `Cache-Control`: caches must not store the answer. `no-transform` keeps proxies that compress (Caddy,
/// Traefik) from holding events back until their buffer is full.
pub const CACHE_CONTROL: &str = "no-store, no-transform";

/// Headers of an event stream: no cache stores it, no proxy buffers it, and its socket serves no further request.
const HEADERS: [(HeaderName, &str); 5] = [
    (header::CONTENT_TYPE, "text/event-stream"),
    (header::CACHE_CONTROL, CACHE_CONTROL),
    (header::VARY, "Accept, Accept-Encoding"),
    (header::CONNECTION, "close"),
    // Without this header nginx buffers the stream.
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
