//! What a browser must be told before a page of another origin may read an answer.

use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};

use crate::{
    config::origin::OriginRule,
    http::{Body, origin},
};

/// What a page of the request's origin may do with the answer.
#[derive(Debug)]
pub struct Grant {
    origin: HeaderValue,
    /// It may send cookies and the like, since the operator named it.
    credentials: bool,
}

impl Grant {
    /// `None` where the request is not a page's, or not one of a page that may connect.
    #[must_use]
    pub fn of(headers: &HeaderMap, allowed: &[OriginRule]) -> Option<Self> {
        let origin = headers.get(header::ORIGIN)?;
        origin::check(headers, allowed).ok()?;
        let credentials = origin::is_listed(origin, allowed);
        Some(Self { origin: origin.clone(), credentials })
    }

    /// Puts it on the answer, be that a refusal: without it the page could not even see the status, nor how long to wait.
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

/// Whether a request only asks what a page may send.
#[must_use]
pub fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    *method == Method::OPTIONS
        && headers.contains_key(header::ORIGIN)
        && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// The answer to that; the grant comes on top.
#[must_use]
pub fn preflight() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    for (name, value) in PREFLIGHT {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// What a client of an event stream sends that a page may not send unasked, and for how long that is remembered. Tools
/// that trace pages (OpenTelemetry, Sentry) add headers of their own to every request of a page.
const PREFLIGHT: [(HeaderName, &str); 3] = [
    (header::ACCESS_CONTROL_ALLOW_METHODS, "GET"),
    (
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        "Authorization, Cache-Control, Last-Event-ID, traceparent, tracestate, baggage, sentry-trace",
    ),
    (header::ACCESS_CONTROL_MAX_AGE, "600"),
];
