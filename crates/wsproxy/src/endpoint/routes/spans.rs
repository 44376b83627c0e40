//! The names and attributes of requests' spans. Knows no credentials and no query: neither reaches a span.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};

use crate::{
    core::caller::Caller,
    endpoint::{self, Endpoint, routes::shown},
    http::rejection::RefusalCode,
    telemetry::family::Family,
    traces::{Asker, RootSpan, TRACEPARENT, Trace, Tracer, Value},
};

/// Begins the span of a handshake.
pub(super) fn handshake<B>(
    tracer: &Tracer,
    target: Endpoint<'_>,
    request: &Request<B>,
    caller: &Caller,
    is_events: bool,
) -> RootSpan {
    let span = tracer.begin(request.headers(), Asker::Client);
    let trace = span.trace();
    if trace.is_recorded() {
        let path = request.uri().path();
        let route = match target {
            Endpoint::Session(..) => Value::Word("/{agent_id}/ws/{session_id}"),
            Endpoint::Events => Value::Word("/ws"),
            Endpoint::Room(_) => Value::Word("/ws/{room_id}"),
            // The path is a setting, and has no variable part.
            Endpoint::Agents => Value::text(path),
            Endpoint::Lane(_) => Value::Word("/clusters/{cluster_id}/connect"),
            Endpoint::Echo => Value::Word("/echo"),
        };
        describe(trace, name_of(target.family()).into(), Some(route), request, caller);
        trace.add("wsproxy.endpoint", || target.family().label().into());
        let transport = if is_events { "sse" } else { "websocket" };
        trace.add("wsproxy.transport", || transport.into());
        trace.enter("parse");
    }
    span
}

/// Begins the span of a call of the worker API; an empty one for other requests.
pub(super) fn call<B>(tracer: &Tracer, request: &Request<B>, caller: &Caller) -> RootSpan {
    let path = request.uri().path();
    if !tracer.is_on() || !path.starts_with("/api/v1/") {
        return RootSpan::default();
    }
    let span = tracer.begin(request.headers(), Asker::Worker);
    if span.trace().is_recorded() {
        let method = request.method().as_str();
        let route = route_of(method, path);
        // A name is never a word of the caller's, of which there would be any number.
        let unknown = Cow::Borrowed("unknown route");
        let name = route.map_or(unknown, |route| Cow::Owned(format!("{method} {route}")));
        describe(span.trace(), name, route.map(Value::Word), request, caller);
    }
    span
}

/// Ends the span of a call, and names it to the worker.
pub(super) fn answer_call<B>(span: RootSpan, response: &mut Response<B>) {
    if let Some(context) = span.trace().context() {
        add_header(response.headers_mut(), &context.to_string());
    }
    let code = response.extensions().get::<RefusalCode>().map(|code| code.0);
    span.end(response.status(), code);
}

fn add_header(headers: &mut HeaderMap, traceparent: &str) {
    if let Ok(value) = HeaderValue::from_str(traceparent) {
        headers.insert(HeaderName::from_static(TRACEPARENT), value);
    }
}

fn describe<B>(
    trace: &Trace,
    name: Cow<'static, str>,
    route: Option<Value>,
    request: &Request<B>,
    caller: &Caller,
) {
    let address = caller.address.map(|address| Value::text(&address.to_string()));
    let attributes = [
        ("http.request.method", Some(Value::text(request.method().as_str()))),
        ("http.route", route),
        ("url.path", Some(Value::text(shown(request.uri().path())))),
        ("client.address", address),
        ("user_agent.original", caller.user_agent.as_deref().map(Value::text)),
    ];
    trace.describe(name, attributes);
}

const fn name_of(family: Family) -> &'static str {
    match family {
        Family::Sessions => "handshake sessions",
        Family::Events => "handshake events",
        Family::Rooms => "handshake rooms",
        Family::Agents => "handshake agents",
        Family::Tunnel => "handshake tunnel",
        Family::Echo => "handshake echo",
    }
}

/// Returns the route of a path of the worker API, as the API's description writes it.
fn route_of(method: &str, path: &str) -> Option<&'static str> {
    let is_variable = |segment: &&str| segment.starts_with('{');
    let fits = |route: &&&'static str| {
        let mut segments = path.split('/');
        let all = route.split('/').all(|wanted| {
            segments.next().is_some_and(|given| is_variable(&wanted) || wanted == given)
        });
        all && segments.next().is_none()
    };
    let routes = endpoint::api_routes().filter(|(known, _)| known.eq_ignore_ascii_case(method));
    let routes = routes.map(|(_, route)| route).filter(fits);
    routes.min_by_key(|route| route.split('/').filter(is_variable).count()).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_have_the_route_of_the_description() {
        for (method, path, route) in [
            ("POST", "/api/v1/sessions/s-1/messages", "/api/v1/sessions/{session_id}/messages"),
            ("GET", "/api/v1/sessions/events", "/api/v1/sessions/events"),
            ("GET", "/api/v1/info", "/api/v1/info"),
        ] {
            assert_eq!(route_of(method, path), Some(route));
        }
        for (method, path) in
            [("PUT", "/api/v1/info"), ("GET", "/api/v1/sessions/s-1/messages"), ("GET", "/api/v1/")]
        {
            assert_eq!(route_of(method, path), None, "{method} {path}");
        }
    }
}
