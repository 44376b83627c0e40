//! `/api/v1`: for workers that prefer HTTP to Redis.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, FromRequestParts, Path, Query, State, rejection::BytesRejection},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use http::{StatusCode, header, request::Parts};
use secrecy::ExposeSecret;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::json;
use tokio::sync::oneshot;
use uuid::Uuid;
use wsproxy_proto::{disconnect, names::Id};

use crate::{
    auth,
    bus::{Keep, Outcome, Publish, Receipt},
    gateway::Gateway,
    http::{Body, credentials, follow, rejection::Rejection, upgrade},
};

/// The description of these routes, which a test compares with them.
pub const OPENAPI: &str = include_str!("../../openapi.json");

/// Longest life of a token that the API makes, in seconds.
const TOKEN_TTL_MAX: u64 = 24 * 3600;

/// The routes of the API: method, path as OpenAPI writes it. A test compares them with [`OPENAPI`].
pub const ROUTES: &[(&str, &str)] = &[
    ("post", "/api/v1/sessions/{session_id}/token"),
    ("post", "/api/v1/sessions/{session_id}/messages"),
    ("post", "/api/v1/sessions/{session_id}/close"),
    ("get", "/api/v1/sessions/{session_id}/upstream"),
    ("get", "/api/v1/agents/{agent_id}/sessions/events"),
    ("get", "/api/v1/info"),
    ("get", "/api/v1/openapi.json"),
];

/// The worker API.
pub fn router(gateway: Arc<Gateway>) -> Router {
    let limit = DefaultBodyLimit::max(gateway.config.limits.max_message_bytes);
    Router::new()
        .route("/api/v1/sessions/{session_id}/token", post(create_token))
        .route("/api/v1/sessions/{session_id}/messages", post(publish_message))
        .route("/api/v1/sessions/{session_id}/close", post(close_session))
        .route("/api/v1/sessions/{session_id}/upstream", get(follow_upstream))
        .route("/api/v1/agents/{agent_id}/sessions/events", get(follow_sessions))
        .route("/api/v1/info", get(info))
        .route("/api/v1/openapi.json", get(openapi))
        .method_not_allowed_fallback(method_not_allowed)
        .layer(limit)
        .with_state(gateway)
}

/// A worker that showed one of the API keys.
struct Worker;

impl FromRequestParts<Arc<Gateway>> for Worker {
    type Rejection = Rejection;

    async fn from_request_parts(
        parts: &mut Parts,
        gateway: &Arc<Gateway>,
    ) -> Result<Self, Rejection> {
        let key = credentials::from_authorization(&parts.headers)?
            .ok_or_else(|| Rejection::missing_credentials("An API key is needed."))?;
        // Every key is compared, so that the time does not tell which one is close.
        let known = gateway.config.api.keys.iter().fold(false, |known, candidate| {
            auth::equal(candidate.expose_secret().as_bytes(), key.as_bytes()) | known
        });
        if known {
            Ok(Self)
        } else {
            gateway.metrics.error("api_key");
            Err(Rejection::invalid_token("The API key is not known."))
        }
    }
}

/// The id in the path of a route that has one.
struct PathId(Id);

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

impl IntoResponse for Rejection {
    fn into_response(self) -> Response {
        self.response()
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenRequest {
    ttl_seconds: Option<u64>,
}

async fn create_token(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    PathId(session): PathId,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let request: TokenRequest = optional_json(body)?;
    let ttl = match request.ttl_seconds {
        None => gateway.config.sessions.token_ttl,
        Some(seconds @ 1..=TOKEN_TTL_MAX) => std::time::Duration::from_secs(seconds),
        Some(_) => {
            return Err(Rejection::bad_request(format!(
                "ttl_seconds must be 1 to {TOKEN_TTL_MAX}."
            )));
        }
    };
    let key = gateway.names.session_auth(&session);
    let token =
        upgrade::deadline(&gateway, async { Ok(auth::issue(&gateway.store, &key, ttl).await?) })
            .await?;
    let body =
        json!({ "session_id": session.as_str(), "token": token, "expires_in": ttl.as_secs() });
    Ok((StatusCode::CREATED, [(header::CACHE_CONTROL, "no-store")], Json(body)).into_response())
}

async fn publish_message(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    PathId(session): PathId,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let payload = read(body)?;
    publish(&gateway, gateway.names.session_down(&session), payload).await
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct CloseRequest {
    code: Option<u16>,
    reason: Option<String>,
    connection_id: Option<Uuid>,
}

async fn close_session(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    PathId(session): PathId,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let request: CloseRequest = optional_json(body)?;
    if let Some(code) = request.code
        && !disconnect::is_sendable(code)
    {
        return Err(Rejection::bad_request(format!("{code} is no close code that may be sent.")));
    }
    let command = json!({
        "op": "close",
        "code": request.code,
        "reason": request.reason,
        "connection_id": request.connection_id,
    });
    publish(&gateway, gateway.names.session_control(&session), command.to_string().into()).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FollowQuery {
    #[serde(default)]
    log: bool,
}

async fn follow_upstream(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    PathId(session): PathId,
    query: Result<Query<FollowQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<http::Response<Body>, Rejection> {
    let Query(query) = query.map_err(|error| Rejection::bad_request(error.body_text()))?;
    let log = query.log.then(|| gateway.names.session_up_log(&session));
    follow::follow(&gateway, gateway.names.session_up(&session), log).await
}

async fn follow_sessions(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    PathId(agent): PathId,
) -> Result<http::Response<Body>, Rejection> {
    follow::follow(&gateway, gateway.names.agent_sessions(&agent), None).await
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

/// Publishes and waits for the number of receivers.
async fn publish(
    gateway: &Gateway,
    channel: String,
    payload: Bytes,
) -> Result<Response, Rejection> {
    let (sender, receiver) = oneshot::channel();
    let receipt = Arc::new(Waiter(parking_lot::Mutex::new(Some(sender))));
    let message =
        Publish { channel: channel.into(), payload, keep: Keep::Nothing, receipt: Some(receipt) };
    let outcome = upgrade::deadline(gateway, async {
        gateway.bus.publishable().await;
        gateway.hub.publish(message)?;
        receiver.await.map_err(|_| Rejection::bus_unavailable("The bus was lost."))
    });
    match outcome.await? {
        Outcome::Received(receivers) => Ok(Json(json!({ "receivers": receivers })).into_response()),
        Outcome::Stored { receivers, id, duplicate } => {
            let body = json!({ "receivers": receivers, "event_id": id.to_string(), "duplicate": duplicate });
            Ok(Json(body).into_response())
        }
        Outcome::Kept => Ok(Json(json!({ "receivers": 0 })).into_response()),
        Outcome::Lost => {
            Err(Rejection::bus_unavailable("The bus was lost; the message may not have arrived."))
        }
    }
}

/// Somebody who awaits an outcome.
struct Waiter(parking_lot::Mutex<Option<oneshot::Sender<Outcome>>>);

impl Receipt for Waiter {
    fn published(&self, outcome: Outcome) {
        if let Some(sender) = self.0.lock().take() {
            // Whoever waited may have given up at its deadline.
            let _ = sender.send(outcome);
        }
    }
}

fn read(body: Result<Bytes, BytesRejection>) -> Result<Bytes, Rejection> {
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
