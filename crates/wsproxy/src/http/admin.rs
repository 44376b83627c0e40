//! `/health`, `/ready`, `/metrics`: for load balancers, supervisors and scrapers.

use std::sync::Arc;

use axum::{Json, Router, extract::State, routing::get};
use http::{HeaderMap, Response, StatusCode, header};
use serde_json::json;

use crate::{
    bus::{Status, not_done::NotDone},
    gateway::Gateway,
    http::{Body, api},
    registry::Totals,
    telemetry::time,
};

/// The admin routes.
pub fn router(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .method_not_allowed_fallback(api::method_not_allowed)
        .with_state(gateway)
}

/// Health of the event endpoint, for the port of its clients too; nothing where it is not served.
pub fn events(gateway: &Arc<Gateway>) -> Router {
    if gateway.registry.is_none() {
        return Router::new();
    }
    Router::new()
        .route("/ws/health", get(events_health))
        .method_not_allowed_fallback(api::method_not_allowed)
        .with_state(Arc::clone(gateway))
}

/// How many are connected, over all instances? Tells counts only, since nobody is asked who they are.
async fn events_health(
    State(gateway): State<Arc<Gateway>>,
) -> (StatusCode, Json<serde_json::Value>) {
    let status = gateway.bus.status();
    let healthy = is_whole(&status) && !gateway.is_draining();
    let connections = match &gateway.registry {
        Some(registry) => registry.totals().await,
        None => Totals::default(),
    };
    let body = json!({
        "status": if healthy { "healthy" } else { "degraded" },
        "timestamp": time::rfc3339(),
        "connections": connections,
        "redis": { "connected": status.connected, "pubsub_connected": status.subscribed },
    });
    (if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, Json(body))
}

/// Is the process alive, and does it reach its bus?
async fn health(State(gateway): State<Arc<Gateway>>) -> (StatusCode, Json<serde_json::Value>) {
    let status = gateway.bus.status();
    let healthy = is_whole(&status);
    let body = json!({
        "status": if healthy { "ok" } else { "degraded" },
        "server_id": &*gateway.server_id,
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": gateway.uptime().as_secs(),
        "bus": {
            "kind": gateway.bus.kind(),
            "connected": status.connected,
            "subscribed": status.subscribed,
            "channels": status.channels,
            "writable": status.refusal.is_none(),
            "error": status.last_error.as_deref().or_else(|| status.refusal.map(NotDone::reason)),
        },
    });
    (if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, Json(body))
}

/// Whether everything that a client may ask for can be done.
fn is_whole(status: &Status) -> bool {
    status.connected && status.subscribed && status.refusal.is_none()
}

/// Should clients be sent here?
async fn ready(State(gateway): State<Arc<Gateway>>) -> (StatusCode, Json<serde_json::Value>) {
    let status = gateway.bus.status();
    let reason = if gateway.is_draining() {
        Some("draining")
    } else if !status.connected || !status.subscribed {
        Some("bus")
    } else if status.refusal.is_some() {
        Some("bus_refuses_writes")
    } else if gateway.places.taken() >= gateway.places.max() {
        Some("full")
    } else {
        None
    };
    match reason {
        None => (StatusCode::OK, Json(json!({ "ready": true }))),
        Some(reason) => {
            let body = json!({ "ready": false, "reason": reason });
            (StatusCode::SERVICE_UNAVAILABLE, Json(body))
        }
    }
}

async fn metrics(State(gateway): State<Arc<Gateway>>, headers: HeaderMap) -> Response<Body> {
    let wants_json = headers
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("application/json"));
    let (kind, body) = if wants_json {
        ("application/json", gateway.metrics.json())
    } else {
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", gateway.metrics.text())
    };
    let mut response = Response::new(Body::from(body));
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}
