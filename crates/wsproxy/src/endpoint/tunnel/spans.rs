//! Begins of the spans of proxied requests. Knows no path, no query and no credential: none reaches a span.

use http::{HeaderMap, Method};

use crate::{
    core::caller::Caller,
    traces::{Asker, RootSpan, Trace, Tracer, Value},
};

/// Begins the span of a client's request.
pub(super) fn of_client(
    tracer: &Tracer,
    headers: &HeaderMap,
    method: &Method,
    caller: &Caller,
) -> RootSpan {
    let span = tracer.begin(headers, Asker::Client);
    describe(span.trace(), "proxied request", method);
    if let Some(address) = caller.address {
        span.trace().add("client.address", || Value::text(&address.to_string()));
    }
    if let Some(name) = &caller.user_agent {
        span.trace().add("user_agent.original", || Value::text(name));
    }
    span
}

/// Begins the span of a request that another instance brings.
pub(super) fn of_peer(tracer: &Tracer, headers: &HeaderMap, method: &Method) -> RootSpan {
    let span = tracer.begin(headers, Asker::Instance);
    describe(span.trace(), "forwarded request", method);
    span
}

fn describe(trace: &Trace, name: &'static str, method: &Method) {
    if trace.is_recorded() {
        let method = Value::text(method.as_str());
        let route = Value::Word("/clusters/{cluster_id}/proxy/{path}");
        trace.describe(name, [("http.request.method", Some(method)), ("http.route", Some(route))]);
    }
}
