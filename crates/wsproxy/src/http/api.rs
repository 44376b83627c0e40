//! The HTTP API `/api/v1` for workers that do not use Redis. Names no endpoint family beyond its scopes.

pub(crate) mod history;
pub(crate) mod publishing;
pub(crate) mod raw;

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
    core::Core,
    http::{
        admin,
        handshake::{self, credentials},
        rejection::Rejection,
    },
    traces::{Trace, Value},
};

/// The worker API: the routes of `families`, and those that concern the instance.
pub fn router(core: Arc<Core>, families: Router<Arc<Core>>) -> Router {
    let limit = DefaultBodyLimit::max(core.config.limits.max_message_bytes);
    families
        .route("/api/v1/info", get(info))
        .route("/api/v1/openapi.json", get(openapi))
        .method_not_allowed_fallback(method_not_allowed)
        .layer(limit)
        .with_state(core)
}

/// A worker that showed an API key whose scopes allow the route.
pub(crate) struct Worker {
    scopes: Scopes,
    /// Name of the key.
    pub(crate) name: Box<str>,
    /// Span of the call.
    pub(crate) trace: Trace,
}

impl Worker {
    /// Checks a scope that the route alone does not need.
    ///
    /// # Errors
    /// 403: the worker's key lacks the scope.
    pub(crate) fn check(&self, scope: Scope) -> Result<(), Rejection> {
        if self.scopes.has(scope) { Ok(()) } else { Err(missing_scope(scope)) }
    }
}

impl FromRequestParts<Arc<Core>> for Worker {
    type Rejection = Rejection;

    async fn from_request_parts(parts: &mut Parts, core: &Arc<Core>) -> Result<Self, Rejection> {
        let (method, path) = (&parts.method, parts.uri.path());
        let found = find_key(core, parts);
        let found = found.inspect_err(|rejection| log_refusal(core, parts, None, rejection))?;
        let scope = scope_of(path);
        if found.scopes().has(scope) {
            found.calls().accepted.add(1);
            debug!(key = %found, %method, path, "A worker called the API.");
            let name: Box<str> = found.to_string().into();
            let trace = parts.extensions.get::<Trace>().cloned().unwrap_or_default();
            trace.trust();
            trace.add("wsproxy.api_key", || Value::text(&name));
            return Ok(Self { scopes: found.scopes(), name, trace });
        }
        found.calls().refused.add(1);
        core.metrics.error("api_key");
        let rejection = missing_scope(scope);
        log_refusal(core, parts, Some(found), &rejection);
        Err(rejection)
    }
}

/// Returns the scope of the route's family; [`Scope::Admin`] for routes that concern the instance.
fn scope_of(path: &str) -> Scope {
    let mut segments = path.strip_prefix("/api/v1/").unwrap_or_default().split('/');
    match (segments.next(), segments.nth(1), segments.next()) {
        // Older path of the session announcements.
        (Some("agents"), Some("sessions"), Some("events")) => Scope::Sessions,
        (Some("sessions"), ..) => Scope::Sessions,
        (Some("events"), ..) => Scope::Events,
        (Some("rooms"), ..) => Scope::Rooms,
        (Some("agents"), ..) => Scope::Agents,
        _ => Scope::Admin,
    }
}

/// Returns whether a request shows a valid API key, with any scopes. Logs a wrong key.
pub(crate) fn shows_key(core: &Core, parts: &Parts) -> bool {
    let found = find_key(core, parts);
    if let Err(rejection) = &found
        && rejection.status == StatusCode::FORBIDDEN
    {
        log_refusal(core, parts, None, rejection);
    }
    found.is_ok_and(|found| {
        found.calls().accepted.add(1);
        true
    })
}

/// Returns whether a request shows an API key with a scope. Logs a key that is wrong or lacks the scope.
pub(crate) fn shows_scope(core: &Core, parts: &Parts, scope: Scope) -> bool {
    let found = match find_key(core, parts) {
        Ok(found) => found,
        Err(rejection) => {
            if rejection.status == StatusCode::FORBIDDEN {
                log_refusal(core, parts, None, &rejection);
            }
            return false;
        }
    };
    let has_scope = found.scopes().has(scope);
    if has_scope {
        found.calls().accepted.add(1);
    } else {
        found.calls().refused.add(1);
        core.metrics.error("api_key");
        log_refusal(core, parts, Some(found), &missing_scope(scope));
    }
    has_scope
}

/// Finds the API key that a request shows.
///
/// # Errors
/// 401: no key, or a malformed one. 403: an unknown key.
fn find_key(core: &Core, parts: &Parts) -> Result<Found, Rejection> {
    let shown = credentials::from_authorization(&parts.headers)?
        .ok_or_else(|| Rejection::missing_credentials("An API key is needed."))?;
    core.api_keys.find(shown.as_bytes()).ok_or_else(|| {
        core.metrics.error("api_key");
        Rejection::invalid_token("The API key is not known.")
    })
}

/// Logs a refused call without the secret that the worker sent.
fn log_refusal(core: &Core, parts: &Parts, found: Option<Found>, rejection: &Rejection) {
    let Some(left_out) = core.api_failures.pass() else { return };
    let address = handshake::address_of(core, &parts.headers, &parts.extensions).ok();
    warn!(
        key = found.map(tracing::field::display),
        code = rejection.code,
        address = address.map(tracing::field::display),
        method = %parts.method,
        path = logged_path(parts.uri.path()),
        left_out,
        "A call of the API was refused."
    );
}

/// Cuts a path to the length that is logged.
fn logged_path(path: &str) -> &str {
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

/// Extracts the id from the path of a route.
pub(crate) struct PathId(pub(crate) Id);

impl FromRequestParts<Arc<Core>> for PathId {
    type Rejection = Rejection;

    async fn from_request_parts(parts: &mut Parts, core: &Arc<Core>) -> Result<Self, Rejection> {
        let path = Path::<String>::from_request_parts(parts, core).await;
        let Path(text) = path.map_err(|_| Rejection::bad_id("The id in the path is not UTF-8."))?;
        let id = Id::parse(&text);
        id.map(Self).map_err(|error| Rejection::bad_id(format!("The id in the path {error}.")))
    }
}

/// Checks the close code and reason that a worker wants a client to get.
///
/// # Errors
/// 400: the code cannot be sent, or the reason is too long.
pub(crate) fn check_close(code: Option<u16>, reason: Option<&str>) -> Result<(), Rejection> {
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

impl IntoResponse for Rejection {
    fn into_response(self) -> Response {
        self.response()
    }
}

async fn info(_worker: Worker, State(core): State<Arc<Core>>) -> Json<serde_json::Value> {
    Json(about(&core))
}

/// Returns what an operator is told of the instance as a whole.
pub(crate) fn about(core: &Core) -> serde_json::Value {
    json!({
        "server_id": &*core.server_id,
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": core.uptime().as_secs(),
        "connections": { "active": core.seats.taken(), "max": core.seats.max() },
        "bus": admin::bus_members(core),
    })
}

async fn openapi() -> ([(header::HeaderName, &'static str); 1], &'static str) {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI)
}

/// Answers a request whose path does not have the method: 405.
pub(crate) async fn method_not_allowed() -> Rejection {
    Rejection::method_not_allowed("This path has other methods.")
}

/// Returns the whole body.
///
/// # Errors
/// 400: the body did not arrive. 413: the body is too large.
pub(crate) fn read(body: Result<Bytes, BytesRejection>) -> Result<Bytes, Rejection> {
    body.map_err(|error| match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Rejection::too_large("The body is too large."),
        _ => Rejection::bad_request(error.body_text()),
    })
}

/// Parses the JSON of a body. An empty body is the default value.
///
/// # Errors
/// 400: the body does not follow the schema. 413: the body is too large.
pub(crate) fn optional_json<T: DeserializeOwned + Default>(
    body: Result<Bytes, BytesRejection>,
) -> Result<T, Rejection> {
    let body = read(body)?;
    if body.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(&body).map_err(|error| Rejection::bad_request(error.to_string()))
}

/// The description of all routes of the API, which a test compares with them.
pub const OPENAPI: &str = include_str!("../../openapi.json");

/// The routes that belong to no family: method, and path in OpenAPI's form.
pub const ROUTES: &[(&str, &str)] =
    &[("get", "/api/v1/info"), ("get", "/api/v1/openapi.json"), ("post", "/api/v1/reload")];

/// Upper bound of a logged path.
const LOGGED_PATH_BYTES_MAX: usize = 256;

/// Upper bound of a reason: a close frame has room for 125 bytes, of which the code takes two.
const REASON_BYTES_MAX: usize = 123;

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
            ("/api/v1/reload", Scope::Admin),
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
        // Two statuses share the code `busy`.
        given.dedup();
        assert_eq!(listed, given);
    }
}
