//! `/ws/health`: the health of the event family, also on the clients' port.

use std::sync::Arc;

use axum::{Extension, Json, Router, extract::State, routing::get};
use http::StatusCode;
use serde_json::json;

use crate::{
    core::Core,
    endpoint::events::Events,
    http::{admin, api},
    registry::Totals,
    telemetry::time,
};

/// Makes the route; none if events are not served.
pub fn router(events: &Arc<Events>) -> Router<Arc<Core>> {
    if events.registry.is_none() {
        return Router::new();
    }
    Router::new()
        .route("/ws/health", get(health))
        .layer(Extension(Arc::clone(events)))
        .method_not_allowed_fallback(api::method_not_allowed)
}

/// Answers with counts over all instances. It names no connection, since the client shows no credentials.
async fn health(
    State(core): State<Arc<Core>>,
    Extension(events): Extension<Arc<Events>>,
) -> (StatusCode, Json<serde_json::Value>) {
    let status = core.bus.status();
    let healthy = admin::is_whole(&status) && !core.is_draining();
    let connections = match &events.registry {
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
