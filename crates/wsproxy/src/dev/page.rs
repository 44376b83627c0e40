//! The routes of the development page: its files, tokens for every visitor, and a cut of connections.

use std::{net::IpAddr, sync::Arc};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Request, State, rejection::BytesRejection},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{self, HOST, ORIGIN},
};
use serde::Deserialize;
use serde_json::json;
use uuid::Uuid;
use wsproxy_proto::names::Id;

use super::{AGENT, OWN_AGENT, open_session, worker::DemoWorker};
use crate::{
    config::host::Authority,
    http::{api, host, path, rejection::Rejection},
};

/// Returns the routes `/` and `/dev/…`, with those of `rooms`. Pages of this gateway can read `api_key`.
pub(super) fn router(worker: Arc<DemoWorker>, rooms: Router, api_key: String) -> Router {
    let bind = worker.core().config.server.bind;
    let guard = middleware::from_fn(move |request, next| guard(bind, request, next));
    Router::new()
        .route("/", get(async || file("text/html", include_str!("page.html"))))
        .route("/dev/page.js", get(async || file("text/javascript", include_str!("page.js"))))
        .route("/dev/common.js", get(async || file("text/javascript", include_str!("common.js"))))
        .route("/dev/page.css", get(async || file("text/css", include_str!("page.css"))))
        .route("/favicon.ico", get(async || StatusCode::NO_CONTENT))
        .route("/dev/key", get(async move || Json(json!({ "api_key": api_key }))))
        .route("/dev/session", post(session))
        .route("/dev/cut", post(cut))
        .with_state(worker)
        .merge(rooms)
        .method_not_allowed_fallback(api::method_not_allowed)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(guard)
}

/// Makes a session id that cannot be guessed.
pub(super) fn new_session() -> Id {
    let id = Uuid::new_v4().to_string();
    Id::parse(&id).unwrap_or_else(|error| unreachable!("a UUID {error}"))
}

/// Lets only pages of this gateway call it. A foreign page can point its own host name to this machine (DNS
/// rebinding), but the browser still sends that name.
async fn guard(bind: IpAddr, request: Request, next: Next) -> Response {
    let mut response = if is_own_page(request.headers(), bind) {
        next.run(request).await
    } else {
        Rejection::origin_not_allowed("Only pages of this core, by its address, may do this.")
            .response()
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

fn is_own_page(headers: &HeaderMap, bind: IpAddr) -> bool {
    let mut hosts = headers.get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return false };
    let Some(own) = host.to_str().ok().and_then(Authority::parse) else { return false };
    let origin = headers.get(ORIGIN).map(|origin| {
        let origin = origin.to_str().unwrap_or_default();
        origin.split_once("://").and_then(|(_, place)| Authority::parse(place))
    });
    host::is_local(&own, bind) && origin.is_none_or(|origin| origin == Some(own))
}

pub(super) fn file(kind: &str, text: &'static str) -> Response {
    ([(header::CONTENT_TYPE, format!("{kind}; charset=utf-8"))], text).into_response()
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct SessionRequest {
    session_id: Option<String>,
    /// `demo`, or `mine` for a session that the demo worker leaves to another worker.
    agent_id: Option<String>,
    /// Set for a token that opens event streams until it expires, as an `EventSource` needs it.
    #[serde(default)]
    event_stream: bool,
}

/// Issues a token; a real application has its login here.
async fn session(
    State(worker): State<Arc<DemoWorker>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let SessionRequest { session_id, agent_id, event_stream } = api::optional_json(body)?;
    let session = match session_id {
        Some(id) => path::parse_id("session_id", &id)?,
        None => new_session(),
    };
    let agent = match agent_id.as_deref() {
        None | Some(AGENT) => AGENT,
        Some(OWN_AGENT) => OWN_AGENT,
        Some(_) => {
            let allowed = format!("agent_id must be {AGENT} or {OWN_AGENT}.");
            return Err(Rejection::bad_request(allowed));
        }
    };
    let token = open_session(&worker, agent, &session, event_stream).await?;
    let body = json!({ "agent_id": agent, "session_id": session.as_str(), "token": token });
    Ok((StatusCode::CREATED, Json(body)).into_response())
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct CutRequest {
    session_id: Option<String>,
}

/// Drops the session's TCP connections without a close frame, as a lost network does.
async fn cut(
    State(worker): State<Arc<DemoWorker>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let id = api::optional_json::<CutRequest>(body)?.session_id;
    let id = id.ok_or_else(|| Rejection::bad_request("session_id is missing."))?;
    let wanted = worker.connections(&path::parse_id("session_id", &id)?);
    let links = worker.core().runtime.links();
    let cut = links.iter().filter(|link| wanted.contains(&link.id()));
    let count = cut.inspect(|link| link.abort()).count();
    Ok(Json(json!({ "cut": count })).into_response())
}

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Largest body of a request to `/dev/…`.
const BODY_BYTES_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    fn passes(host: &str, origin: Option<&str>, bind: IpAddr) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(HOST, host.parse().unwrap());
        if let Some(origin) = origin {
            headers.insert(ORIGIN, origin.parse().unwrap());
        }
        is_own_page(&headers, bind)
    }

    #[test]
    fn a_name_that_leads_here_is_not_this_page() {
        let local = Ipv4Addr::LOCALHOST.into();
        for host in ["localhost:8080", "LOCALHOST", "127.0.0.1:8080", "[::1]:8080"] {
            assert!(passes(host, None, local), "{host}");
        }
        for host in ["evil.example", "evil.example:8080", "localhost.evil.example", "", "192.0.2.1"]
        {
            assert!(!passes(host, None, local), "{host}");
        }
        assert!(passes("192.0.2.1:80", None, "192.0.2.1".parse().unwrap()));
        assert!(passes("192.0.2.1:80", None, Ipv6Addr::UNSPECIFIED.into()));
        assert!(!passes("evil.example", None, Ipv6Addr::UNSPECIFIED.into()));
        assert!(!is_own_page(&HeaderMap::new(), local));
    }

    #[test]
    fn a_foreign_page_cannot_ask() {
        let local = Ipv4Addr::LOCALHOST.into();
        assert!(passes("localhost:8080", Some("http://localhost:8080"), local));
        for origin in
            ["http://evil.example", "null", "http://localhost:9090", "http://127.0.0.1:8080"]
        {
            assert!(!passes("localhost:8080", Some(origin), local), "{origin}");
        }
    }
}
