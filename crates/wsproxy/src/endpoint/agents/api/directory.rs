//! Connected agents over HTTP, and the order to disconnect one. Knows no call.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Extension, Json,
    extract::{
        Query, State,
        rejection::{BytesRejection, QueryRejection},
    },
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    core::Core,
    endpoint::agents::{
        Agents,
        presence::{Presence, control::Order},
    },
    http::{
        api::{PathId, Worker, check_close, optional_json},
        handshake,
        rejection::Rejection,
    },
    registry::agents::ConnectedAgent,
    store::command::StoreError,
};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListQuery {
    cursor: Option<String>,
}

/// A page of the list.
#[derive(Debug, Serialize)]
pub(super) struct List {
    agents: Vec<Value>,
    /// Connected agents of each instance.
    servers: BTreeMap<Box<str>, u64>,
    cursor: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct DisconnectRequest {
    reason: Option<String>,
}

/// Lists connected agents of all instances, page by page.
pub(super) async fn list(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(agents): Extension<Arc<Agents>>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Json<List>, Rejection> {
    let presence = presence_of(&agents)?;
    let Query(ListQuery { cursor }) =
        query.map_err(|error| Rejection::bad_request(error.body_text()))?;
    let listed = handshake::deadline(&core, async {
        let registry = &presence.registry;
        let page = registry.list(cursor.as_deref(), PAGE).await.map_err(|error| match error {
            StoreError::Refused(_) if cursor.is_some() => {
                Rejection::bad_request("cursor is none of a list.").because(error)
            }
            error => error.into(),
        })?;
        Ok((page, registry.counts().await?))
    });
    let (page, servers) = listed.await?;
    let agents = page.agents.into_iter().map(described).collect();
    Ok(Json(List { agents, servers, cursor: page.cursor }))
}

/// Describes the connected agent of a user.
pub(super) async fn find(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(agents): Extension<Arc<Agents>>,
    PathId(user): PathId,
) -> Result<Json<Value>, Rejection> {
    let presence = presence_of(&agents)?;
    let found = handshake::deadline(&core, async { Ok(presence.registry.find(&user).await?) });
    match found.await? {
        Some(agent) => Ok(Json(described(agent))),
        None => Err(Rejection::not_found(format!("No agent of {user} is connected."))),
    }
}

/// Ends the connection of a user's agent, wherever it is.
pub(super) async fn disconnect(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(agents): Extension<Arc<Agents>>,
    PathId(user): PathId,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, Rejection> {
    let presence = presence_of(&agents)?;
    let DisconnectRequest { reason } = optional_json(body)?;
    check_close(None, reason.as_deref())?;
    order(&core, presence, &Order::disconnect(user, reason)).await
}

/// Tells all instances an order, and answers with their number.
///
/// # Errors
/// 503, 504: other instances may not have the order. It may be repeated.
pub(super) async fn order(
    core: &Core,
    presence: &Presence,
    order: &Order,
) -> Result<Json<Value>, Rejection> {
    let told = handshake::deadline(core, async { Ok(presence.order(order).await?) });
    Ok(Json(json!({ "instances": told.await? })))
}

/// Returns what instances know about each other's agents.
///
/// # Errors
/// 404: this instance serves no agents.
pub(super) fn presence_of(agents: &Agents) -> Result<&Arc<Presence>, Rejection> {
    agents.presence.as_ref().ok_or_else(super::not_served)
}

pub(super) fn described(agent: ConnectedAgent) -> Value {
    let ConnectedAgent { user, server, record } = agent;
    json!({
        "user_id": user.as_str(),
        "server_id": server,
        "connection_id": record.connection,
        "connected_at": record.connected_at,
        "platform": record.platform,
        "version": record.version,
    })
}

/// Entries of a page, about.
const PAGE: usize = 500;
