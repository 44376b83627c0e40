//! Users' agents in the worker API: calls of tools, who is connected, disconnects, secrets.

use std::sync::Arc;

use axum::{
    Extension, Json, Router,
    response::Response,
    routing::{get, post},
};
use serde_json::Value;
use wsproxy_proto::names::Id;

use crate::{
    core::Core,
    endpoint::agents::{Agents, presence::control::Order, relay::Relay},
    http::{api::Worker, handshake, rejection::Rejection},
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

/// Ends the connection of a user's agent, wherever it is. Returns the number of instances that were told.
///
/// # Errors
/// 404: this instance serves no agents. 503, 504: other instances may not have the order. It may be repeated.
pub(in crate::endpoint) async fn end(
    (agents, core): (&Agents, &Core),
    user: Id,
    reason: Option<String>,
) -> Result<Value, Rejection> {
    let presence = directory::presence_of(agents)?;
    let Json(told) = directory::order(core, presence, &Order::disconnect(user, reason)).await?;
    Ok(told)
}

/// Calls a tool of a user's agent once. `message` is the body of a call.
///
/// # Errors
/// 400: the message is no call. 404: this instance serves no agents.
pub(in crate::endpoint) async fn send(
    (agents, core): (&Agents, &Core),
    user: Id,
    message: &[u8],
    worker: &Worker,
) -> Result<Response, Rejection> {
    calls::call_once((agents, core), user, message, worker).await
}

/// Returns the connected agent of a user, as operators see it.
///
/// # Errors
/// 503, 504: the store did not answer.
pub(in crate::endpoint) async fn find(
    agents: &Agents,
    core: &Core,
    user: &Id,
) -> Result<Option<Value>, Rejection> {
    let Some(presence) = &agents.presence else { return Ok(None) };
    let found = handshake::deadline(core, async { Ok(presence.registry.find(user).await?) });
    Ok(found.await?.map(directory::described))
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
