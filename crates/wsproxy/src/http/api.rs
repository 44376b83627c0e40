//! `/api/v1`: for workers that prefer HTTP to Redis.

mod events;
mod history;
mod publishing;
mod raw;
mod sessions;

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, FromRequestParts, Path, State, rejection::BytesRejection},
    response::{IntoResponse, Response},
    routing::get,
};
use bytes::Bytes;
use http::{StatusCode, header, request::Parts};
use serde::de::DeserializeOwned;
use serde_json::json;
use tracing::{debug, warn};
use wsproxy_proto::{disconnect, names::Id};

use crate::{
    auth::api_keys::Found,
    config::api_key::{Scope, Scopes},
    gateway::Gateway,
    http::{credentials, rejection::Rejection, upgrade},
};

/// The description of these routes, which a test compares with them.
pub const OPENAPI: &str = include_str!("../../openapi.json");

/// The routes of the API: method, path as OpenAPI writes it. A test compares them with [`OPENAPI`].
pub const ROUTES: &[(&str, &str)] = &[
    ("post", "/api/v1/sessions/{session_id}/token"),
    ("post", "/api/v1/sessions/{session_id}/messages"),
    ("post", "/api/v1/sessions/{session_id}/close"),
    ("get", "/api/v1/sessions/{session_id}/upstream"),
    ("get", "/api/v1/sessions/events"),
    ("get", "/api/v1/agents/{agent_id}/sessions/events"),
    ("get", "/api/v1/sessions/{session_id}/history"),
    ("post", "/api/v1/sessions/{session_id}/streams/{stream_id}"),
    ("post", "/api/v1/events/broadcast"),
    ("post", "/api/v1/events/users/{user_id}"),
    ("post", "/api/v1/events/connections/{connection_id}"),
    ("post", "/api/v1/events/batch"),
    ("get", "/api/v1/events/history"),
    ("get", "/api/v1/events/users/{user_id}/presence"),
    ("post", "/api/v1/events/disconnect"),
    ("get", "/api/v1/info"),
    ("get", "/api/v1/openapi.json"),
];

/// The worker API.
pub fn router(gateway: Arc<Gateway>) -> Router {
    let limit = DefaultBodyLimit::max(gateway.config.limits.max_message_bytes);
    Router::new()
        .merge(sessions::router())
        .merge(events::router())
        .route("/api/v1/info", get(info))
        .route("/api/v1/openapi.json", get(openapi))
        .method_not_allowed_fallback(method_not_allowed)
        .layer(limit)
        .with_state(gateway)
}

/// A worker that showed an API key whose scopes allow the route.
pub(super) struct Worker {
    scopes: Scopes,
}

impl Worker {
    /// Checks a scope that the route alone does not need.
    ///
    /// # Errors
    /// The worker's key lacks it.
    pub(super) fn check(&self, scope: Scope) -> Result<(), Rejection> {
        if self.scopes.has(scope) { Ok(()) } else { Err(missing_scope(scope)) }
    }
}

impl FromRequestParts<Arc<Gateway>> for Worker {
    type Rejection = Rejection;

    async fn from_request_parts(
        parts: &mut Parts,
        gateway: &Arc<Gateway>,
    ) -> Result<Self, Rejection> {
        let (method, path) = (&parts.method, parts.uri.path());
        let found = find_key(gateway, parts);
        let found = found.inspect_err(|rejection| log_refusal(gateway, parts, None, rejection))?;
        let (entry, scope) = (found.entry(), scope_of(path));
        if found.scopes().has(scope) {
            entry.accepted.add(1);
            debug!(key = %found, %method, path, "A worker called the API.");
            return Ok(Self { scopes: found.scopes() });
        }
        entry.refused.add(1);
        gateway.metrics.error("api_key");
        let rejection = missing_scope(scope);
        log_refusal(gateway, parts, Some(found), &rejection);
        Err(rejection)
    }
}

/// The scope that a route needs: that of its family. What belongs to none concerns the instance.
fn scope_of(path: &str) -> Scope {
    let mut segments = path.strip_prefix("/api/v1/").unwrap_or_default().split('/');
    match (segments.next(), segments.nth(1), segments.next()) {
        // The older path of the announcements of sessions.
        (Some("agents"), Some("sessions"), Some("events")) => Scope::Sessions,
        (Some("sessions"), ..) => Scope::Sessions,
        (Some("events"), ..) => Scope::Events,
        (Some("rooms"), ..) => Scope::Rooms,
        (Some("agents"), ..) => Scope::Agents,
        _ => Scope::Admin,
    }
}

/// Whether a request shows an API key, whatever its scopes. A wrong one leaves a trace in the log.
pub(super) fn shows_key(gateway: &Gateway, parts: &Parts) -> bool {
    let found = find_key(gateway, parts);
    if let Err(rejection) = &found
        && rejection.status == StatusCode::FORBIDDEN
    {
        log_refusal(gateway, parts, None, rejection);
    }
    found.is_ok_and(|found| {
        found.entry().accepted.add(1);
        true
    })
}

/// The key that a request shows.
fn find_key<'a>(gateway: &'a Gateway, parts: &Parts) -> Result<Found<'a>, Rejection> {
    let shown = credentials::from_authorization(&parts.headers)?
        .ok_or_else(|| Rejection::missing_credentials("An API key is needed."))?;
    gateway.api_keys.find(shown.as_bytes()).ok_or_else(|| {
        gateway.metrics.error("api_key");
        Rejection::invalid_token("The API key is not known.")
    })
}

/// Logs a refused call, never with the secret that was shown.
fn log_refusal(gateway: &Gateway, parts: &Parts, found: Option<Found<'_>>, rejection: &Rejection) {
    let Some(left_out) = gateway.api_failures.pass() else { return };
    let address = upgrade::address_of(gateway, &parts.headers, &parts.extensions).ok();
    warn!(
        key = found.map(tracing::field::display),
        code = rejection.code,
        address = address.map(tracing::field::display),
        method = %parts.method,
        path = line_of(parts.uri.path()),
        left_out,
        "A call of the API was refused."
    );
}

/// So much of a path goes to the log.
fn line_of(path: &str) -> &str {
    &path[..path.floor_char_boundary(LOGGED_PATH_BYTES_MAX)]
}

fn missing_scope(scope: Scope) -> Rejection {
    let make = match scope {
        Scope::Sessions => Rejection::missing_scope_sessions,
        Scope::Events => Rejection::missing_scope_events,
        Scope::Rooms => Rejection::missing_scope_rooms,
        Scope::Agents => Rejection::missing_scope_agents,
        Scope::Admin => Rejection::missing_scope_admin,
    };
    make(format!("The API key lacks the scope {}.", scope.label()))
}

const LOGGED_PATH_BYTES_MAX: usize = 256;

/// The id in the path of a route that has one.
pub(super) struct PathId(Id);

impl FromRequestParts<Arc<Gateway>> for PathId {
    type Rejection = Rejection;

    async fn from_request_parts(
        parts: &mut Parts,
        gateway: &Arc<Gateway>,
    ) -> Result<Self, Rejection> {
        let path = Path::<String>::from_request_parts(parts, gateway).await;
        let Path(text) = path.map_err(|_| Rejection::bad_id("The id in the path is not UTF-8."))?;
        let id = Id::parse(&text);
        id.map(Self).map_err(|error| Rejection::bad_id(format!("The id in the path {error}.")))
    }
}

/// Whether a client can be told this when its connection ends.
fn check_close(code: Option<u16>, reason: Option<&str>) -> Result<(), Rejection> {
    if let Some(code) = code.filter(|code| !disconnect::is_sendable(*code)) {
        let why = format!("{code} is no close code that may be sent.");
        return Err(Rejection::bad_request(why));
    }
    if reason.is_some_and(|reason| reason.len() > REASON_BYTES_MAX) {
        let why = format!("reason has at most {REASON_BYTES_MAX} bytes.");
        return Err(Rejection::bad_request(why));
    }
    Ok(())
}

/// Longest reason that fits into a close frame.
const REASON_BYTES_MAX: usize = 123;

impl IntoResponse for Rejection {
    fn into_response(self) -> Response {
        self.response()
    }
}

async fn info(_worker: Worker, State(gateway): State<Arc<Gateway>>) -> Json<serde_json::Value> {
    let status = gateway.bus.status();
    Json(json!({
        "server_id": &*gateway.server_id,
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": gateway.uptime().as_secs(),
        "connections": { "active": gateway.places.taken(), "max": gateway.places.max() },
        "bus": {
            "kind": gateway.bus.kind(),
            "connected": status.connected,
            "channels": status.channels,
        },
    }))
}

async fn openapi() -> ([(header::HeaderName, &'static str); 1], &'static str) {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI)
}

/// The answer to a method that a path does not have.
pub(crate) async fn method_not_allowed() -> Rejection {
    Rejection::method_not_allowed("This path has other methods.")
}

pub(super) fn read(body: Result<Bytes, BytesRejection>) -> Result<Bytes, Rejection> {
    body.map_err(|error| match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Rejection::too_large("The body is too large."),
        _ => Rejection::bad_request(error.body_text()),
    })
}

/// The JSON of a body; the default where there is none.
pub(crate) fn optional_json<T: DeserializeOwned + Default>(
    body: Result<Bytes, BytesRejection>,
) -> Result<T, Rejection> {
    let body = read(body)?;
    if body.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(&body).map_err(|error| Rejection::bad_request(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::rejection::{CODES, NOT_DONE};

    #[test]
    fn every_route_has_the_scope_of_its_family() {
        for (path, scope) in [
            ("/api/v1/sessions/s/token", Scope::Sessions),
            ("/api/v1/sessions/events", Scope::Sessions),
            ("/api/v1/agents/a/sessions/events", Scope::Sessions),
            ("/api/v1/agents/u/tools", Scope::Agents),
            ("/api/v1/events/batch", Scope::Events),
            ("/api/v1/rooms/r", Scope::Rooms),
            ("/api/v1/info", Scope::Admin),
            ("/api/v1/", Scope::Admin),
            ("/", Scope::Admin),
        ] {
            assert_eq!(scope_of(path), scope, "{path}");
        }
    }

    #[test]
    fn the_document_lists_every_error_code() {
        let document: serde_json::Value = serde_json::from_str(OPENAPI).unwrap();
        let code = "/components/schemas/Error/properties/error/properties/code/enum";
        let listed = document.pointer(code).unwrap().as_array().unwrap();
        let mut listed: Vec<_> = listed.iter().map(|code| code.as_str().unwrap()).collect();
        let mut given = [CODES, &[NOT_DONE]].concat();
        listed.sort_unstable();
        given.sort_unstable();
        assert_eq!(listed, given);
    }

    #[test]
    fn the_document_describes_exactly_these_routes() {
        let document: serde_json::Value = serde_json::from_str(OPENAPI).unwrap();
        let mut described: Vec<_> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .filter(|(path, _)| path.starts_with("/api/"))
            .flat_map(|(path, item)| {
                let methods = item.as_object().unwrap().keys();
                methods.filter(|m| *m != "parameters").map(move |m| (m.clone(), path.clone()))
            })
            .collect();
        let mut served: Vec<_> =
            ROUTES.iter().map(|(m, p)| ((*m).to_owned(), (*p).to_owned())).collect();
        described.sort();
        served.sort();
        assert_eq!(described, served);
    }
}
