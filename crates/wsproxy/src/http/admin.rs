//! `/health`, `/ready`, `/metrics`: for load balancers, supervisors and scrapers.

use std::sync::Arc;

use axum::{Json, Router, extract::State, routing::get};
use http::{HeaderMap, HeaderValue, Response, StatusCode, header, request::Parts};
use serde_json::json;

use crate::{
    bus::{Status, not_done::NotDone},
    gateway::Gateway,
    http::{Body, api},
    registry::Totals,
    telemetry::{metrics::format::Format, time},
};

/// Who is told more of the instance than a probe needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Details {
    /// Everybody: strangers do not reach this port.
    Always,
    /// Workers, who show a key of the API.
    WithKey,
    /// Nobody: there is another port for that.
    Never,
}

/// `/health` and `/ready`, which every port answers.
pub fn probes(gateway: &Arc<Gateway>, details: Details) -> Router {
    Router::new()
        .route("/health", get(async move |gateway, parts| health(gateway, details, parts)))
        .route("/ready", get(async move |gateway| ready(gateway, details)))
        .method_not_allowed_fallback(api::method_not_allowed)
        .with_state(Arc::clone(gateway))
}

/// `/metrics`.
pub fn metrics(gateway: &Arc<Gateway>) -> Router {
    Router::new()
        .route("/metrics", get(all_metrics))
        .method_not_allowed_fallback(api::method_not_allowed)
        .with_state(Arc::clone(gateway))
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
fn health(
    State(gateway): State<Arc<Gateway>>,
    details: Details,
    parts: Parts,
) -> (StatusCode, Json<serde_json::Value>) {
    let status = gateway.bus.status();
    let healthy = is_whole(&status);
    let mut body = json!({ "status": if healthy { "healthy" } else { "degraded" } });
    let is_told = match details {
        Details::Always => true,
        Details::WithKey => api::shows_key(&gateway, &parts),
        Details::Never => false,
    };
    if is_told {
        body["server_id"] = (*gateway.server_id).into();
        body["version"] = env!("CARGO_PKG_VERSION").into();
        body["uptime_seconds"] = gateway.uptime().as_secs().into();
        body["bus"] = json!({
            "kind": gateway.bus.kind(),
            "connected": status.connected,
            "subscribed": status.subscribed,
            "channels": status.channels,
            "writable": status.refusal.is_none(),
            "error": status.last_error.as_deref().or_else(|| status.refusal.map(NotDone::reason)),
        });
    }
    (if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, Json(body))
}

/// Whether everything that a client may ask for can be done.
fn is_whole(status: &Status) -> bool {
    status.connected && status.subscribed && status.refusal.is_none()
}

/// Should clients be sent here?
fn ready(
    State(gateway): State<Arc<Gateway>>,
    details: Details,
) -> (StatusCode, Json<serde_json::Value>) {
    let status = gateway.bus.status();
    let reason = if gateway.is_draining() {
        Some("draining")
    } else if !status.connected || !status.subscribed {
        Some("bus")
    } else if status.refusal.is_some() {
        Some("bus_refuses_writes")
    } else if gateway.places.is_full() || gateway.sockets.is_full() {
        Some("full")
    } else if gateway.handshakes.is_full() {
        Some("handshakes")
    } else {
        None
    };
    match reason {
        None => (StatusCode::OK, Json(json!({ "ready": true }))),
        Some(_) if details == Details::Never => {
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "ready": false })))
        }
        Some(reason) => {
            let body = json!({ "ready": false, "reason": reason });
            (StatusCode::SERVICE_UNAVAILABLE, Json(body))
        }
    }
}

async fn all_metrics(State(gateway): State<Arc<Gateway>>, headers: HeaderMap) -> Response<Body> {
    let format = Format::wanted(&headers);
    let mut response = Response::new(Body::from(format.write(gateway.metrics.text())));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
    headers.insert(header::VARY, HeaderValue::from_static("Accept"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
