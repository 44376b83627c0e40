//! The part of the development page that shows rooms: its files, names for visitors, and a cut of their connections.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    Json, Router,
    extract::{State, rejection::BytesRejection},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use http::StatusCode;
use serde::Deserialize;
use serde_json::json;
use wsproxy_proto::names::Id;

use super::page::file;
use crate::{
    auth::sign,
    config::rooms::Development,
    core::Core,
    endpoint::rooms::Rooms,
    http::{api, path, rejection::Rejection},
};

/// Returns the routes `/dev/rooms…`.
pub(super) fn router(core: &Arc<Core>, rooms: &Arc<Rooms>) -> Router {
    Router::new()
        .route("/dev/rooms", get(async || file("text/html", include_str!("rooms.html"))))
        .route("/dev/room.js", get(async || file("text/javascript", include_str!("room.js"))))
        .route("/dev/rooms.js", get(async || file("text/javascript", include_str!("rooms.js"))))
        .route("/dev/rooms.css", get(async || file("text/css", include_str!("rooms.css"))))
        .route("/dev/rooms/member", post(member))
        .route("/dev/rooms/cut", post(cut))
        .with_state((Arc::clone(core), Arc::clone(rooms)))
}

type Stage = State<(Arc<Core>, Arc<Rooms>)>;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemberRequest {
    user_id: String,
}

/// Issues a token, where clients cannot name themselves; a real application has its login here.
async fn member(
    State((core, rooms)): Stage,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let MemberRequest { user_id } = api::optional_json(body)?;
    let user = path::parse_id("user_id", &user_id)?;
    let token = match rooms.config.development {
        Development::Off => {
            let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
            let token = sign::sign(&core.config.jwt, &user, now, TOKEN_TTL, Vec::new());
            Some(token.map_err(Rejection::internal)?)
        }
        Development::Loopback | Development::Anywhere => None,
    };
    let grace = u64::try_from(rooms.config.leave_grace.as_millis()).unwrap_or(u64::MAX);
    let body = json!({ "user_id": user.as_str(), "token": token, "leave_grace_ms": grace });
    Ok((StatusCode::CREATED, Json(body)).into_response())
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct CutRequest {
    room_id: String,
    client_id: String,
}

/// Drops a member's TCP connection without a close frame, as a lost network does.
async fn cut(
    State((_, rooms)): Stage,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let CutRequest { room_id, client_id } = api::optional_json(body)?;
    let room: Id = path::parse_id("room_id", &room_id)?;
    let client = path::parse_id("client_id", &client_id)?;
    Ok(Json(json!({ "cut": u8::from(rooms.cut(&room, &client)) })).into_response())
}

/// Lifetime of a token. The page comes back with a new one.
const TOKEN_TTL: Duration = Duration::from_secs(3600);
