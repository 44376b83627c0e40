//! Users' agents in the worker API: calls of tools, who is connected, disconnects, secrets.

use std::sync::Arc;

use axum::{
    Extension, Router,
    routing::{get, post},
};

use crate::{
    core::Core,
    endpoint::agents::{Agents, relay::Relay},
    http::rejection::Rejection,
};

mod answer;
mod calls;
mod credentials;
mod directory;
mod hearing;
pub mod kept;
mod stream;

/// Makes the routes of agents.
pub fn router(agents: &Arc<Agents>) -> Router<Arc<Core>> {
    Router::new()
        .route("/api/v1/agents", get(directory::list))
        .route("/api/v1/agents/{user_id}", get(directory::find).delete(credentials::remove))
        .route("/api/v1/agents/{user_id}/secrets", post(credentials::add))
        .route("/api/v1/agents/{user_id}/disconnect", post(directory::disconnect))
        .route("/api/v1/agents/{user_id}/calls", post(calls::call))
        .route(
            "/api/v1/agents/{user_id}/calls/{request_id}",
            get(calls::outcome).delete(calls::cancel),
        )
        .layer(Extension(Arc::clone(agents)))
}

/// Returns the relay of calls.
///
/// # Errors
/// 404: this instance serves no agents.
fn relay_of(agents: &Agents) -> Result<&Arc<Relay>, Rejection> {
    agents.relay.as_ref().ok_or_else(not_served)
}

fn not_served() -> Rejection {
    Rejection::not_found("This instance serves no agents: endpoints.agents is off.")
}

/// The routes of the family in the worker API: method, and path in OpenAPI's form.
pub const ROUTES: &[(&str, &str)] = &[
    ("get", "/api/v1/agents"),
    ("get", "/api/v1/agents/{user_id}"),
    ("delete", "/api/v1/agents/{user_id}"),
    ("post", "/api/v1/agents/{user_id}/disconnect"),
    ("post", "/api/v1/agents/{user_id}/secrets"),
    ("post", "/api/v1/agents/{user_id}/calls"),
    ("get", "/api/v1/agents/{user_id}/calls/{request_id}"),
    ("delete", "/api/v1/agents/{user_id}/calls/{request_id}"),
];
