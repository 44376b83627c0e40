//! `/health`, `/ready`, `/metrics`: for load balancers, supervisors and scrapers.

use std::sync::Arc;

use axum::{Json, Router, extract::State, routing::get};
use http::{HeaderValue, Response, StatusCode, header, request::Parts};
use serde_json::{Map, Value, json};

use crate::{
    bus::status::Status,
    config::api_key::Scope,
    core::Core,
    http::{Body, api},
    store::not_done::NotDone,
    telemetry::{
        metrics::format::{self, Format},
        report::Health,
    },
};

/// Clients to which `/health`, `/ready` and `/metrics` show more than a probe or a scraper needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Details {
    /// All clients: only the operator's network reaches this port.
    Always,
    /// Workers that show an API key.
    WithKey,
    /// No client: the details are on the admin port.
    Never,
}

/// Routes `/health` and `/ready`, which every port serves.
pub fn probes(core: &Arc<Core>, details: Details) -> Router {
    Router::new()
        .route("/health", get(async move |core, parts| health(core, details, parts)))
        .route("/ready", get(async move |core| ready(core, details)))
        .method_not_allowed_fallback(api::method_not_allowed)
        .with_state(Arc::clone(core))
}

/// Route `/metrics`.
pub fn metrics(core: &Arc<Core>, details: Details) -> Router {
    Router::new()
        .route("/metrics", get(async move |core, parts| all_metrics(core, details, parts)))
        .method_not_allowed_fallback(api::method_not_allowed)
        .with_state(Arc::clone(core))
}

impl Details {
    /// Returns whether a client is told details of one family, for which a key needs the family's scope.
    pub(crate) fn of_family_are_for(self, core: &Core, parts: &Parts, scope: Scope) -> bool {
        match self {
            Self::Always => true,
            Self::WithKey => api::shows_scope(core, parts, scope),
            Self::Never => false,
        }
    }

    /// Returns whether a client is told details.
    fn are_for(self, core: &Core, parts: &Parts) -> bool {
        match self {
            Self::Always => true,
            Self::WithKey => api::shows_key(core, parts),
            Self::Never => false,
        }
    }
}

/// Answers `/health`: 200 while the bus works, and what the families need; 503 otherwise.
fn health(
    State(core): State<Arc<Core>>,
    details: Details,
    parts: Parts,
) -> (StatusCode, Json<Value>) {
    let status = core.bus.status();
    let Health { is_degraded, members, details: more } = core.reports.health();
    let healthy = is_whole(&status) && !is_degraded;
    let mut body = json!({ "status": if healthy { "healthy" } else { "degraded" } });
    let mut add = |members: Map<String, Value>| {
        members.into_iter().for_each(|(name, value)| body[name] = value);
    };
    if details != Details::Never {
        add(members);
    }
    if details.are_for(&core, &parts) {
        add(more);
        body["server_id"] = (*core.server_id).into();
        body["version"] = env!("CARGO_PKG_VERSION").into();
        body["uptime_seconds"] = core.uptime().as_secs().into();
        body["bus"] = bus_members(&core);
    }
    (if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, Json(body))
}

/// Returns the state of the bus for operators.
pub(super) fn bus_members(core: &Core) -> Value {
    let status = core.bus.status();
    json!({
        "kind": core.bus.kind(),
        "connected": status.connected,
        "subscribed": status.subscribed,
        "channels": status.channels,
        "writable": status.refusal.is_none(),
        "away": status.away,
        "error": status.last_error.as_deref().or_else(|| status.refusal.map(NotDone::reason)),
    })
}

/// Returns whether the bus is connected, subscribed and accepts writes, and no part of it is away.
pub(crate) fn is_whole(status: &Status) -> bool {
    status.connected && status.subscribed && status.refusal.is_none() && status.away.is_none()
}

/// Answers `/ready`: 200 while the instance takes new clients, 503 otherwise. While a part of a Redis Cluster is away the
/// instance takes clients, since those of the other parts can be served, and the answer names the part.
fn ready(State(core): State<Arc<Core>>, details: Details) -> (StatusCode, Json<Value>) {
    let status = core.bus.status();
    let reason = if core.is_draining() {
        Some("draining")
    } else if !status.connected || !status.subscribed {
        Some("bus")
    } else if status.refusal.is_some() {
        Some("bus_refuses_writes")
    } else if core.seats.is_full() || core.sockets.is_full() {
        Some("full")
    } else if core.handshakes.is_full() {
        Some("handshakes")
    } else {
        None
    };
    match reason {
        None => {
            let mut body = json!({ "ready": true });
            if let Some(away) = status.away.filter(|_| details != Details::Never) {
                body["away"] = away.into();
            }
            (StatusCode::OK, Json(body))
        }
        Some(_) if details == Details::Never => {
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "ready": false })))
        }
        Some(reason) => {
            let body = json!({ "ready": false, "reason": reason });
            (StatusCode::SERVICE_UNAVAILABLE, Json(body))
        }
    }
}

fn all_metrics(State(core): State<Arc<Core>>, details: Details, parts: Parts) -> Response<Body> {
    let format = Format::wanted(&parts.headers);
    let mut text = format.write(core.metrics.text());
    if format == Format::Json {
        let beside = core.reports.overview(details.are_for(&core, &parts));
        text = format::with_members(text, beside);
    }
    let mut response = Response::new(Body::from(text));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
    headers.insert(header::VARY, HeaderValue::from_static("Accept"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
