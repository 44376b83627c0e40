//! Cross-origin headers (CORS), without which a browser does not let a page of another origin read an answer.

use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};

use crate::{
    config::origin::OriginRule,
    http::{Body, handshake::origin},
};

/// Permission for pages of the request's origin.
#[derive(Debug)]
pub struct Grant {
    origin: HeaderValue,
    /// The page may send cookies: the operator listed its origin.
    credentials: bool,
}

impl Grant {
    /// Returns the permission; `None` if the request names no origin, or one that may not connect.
    #[must_use]
    pub fn of(headers: &HeaderMap, allowed: &[OriginRule]) -> Option<Self> {
        let origin = headers.get(header::ORIGIN)?;
        origin::check(headers, allowed).ok()?;
        let credentials = origin::is_listed(origin, allowed);
        Some(Self { origin: origin.clone(), credentials })
    }

    /// Adds the permission to an answer. Refusals need it too: without it a page sees neither status nor `Retry-After`.
    pub fn apply(self, headers: &mut HeaderMap) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, self.origin);
        if self.credentials {
            let yes = HeaderValue::from_static("true");
            headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, yes);
        }
        let exposed = HeaderValue::from_static("Retry-After");
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
    }
}

/// Returns whether a request is a preflight: a browser asks which methods and headers a page may send.
#[must_use]
pub fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    *method == Method::OPTIONS
        && headers.contains_key(header::ORIGIN)
        && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// Answers a preflight. The caller adds the [`Grant`].
#[must_use]
pub fn preflight() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    for (name, value) in PREFLIGHT {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Methods and headers that pages may send, and the seconds for which a browser remembers them. Tracing tools
/// (OpenTelemetry, Sentry) add their own headers to every request of a page.
const PREFLIGHT: [(HeaderName, &str); 3] = [
    (header::ACCESS_CONTROL_ALLOW_METHODS, "GET"),
    (
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        "Authorization, Cache-Control, Last-Event-ID, traceparent, tracestate, baggage, sentry-trace",
    ),
    (header::ACCESS_CONTROL_MAX_AGE, "600"),
];
