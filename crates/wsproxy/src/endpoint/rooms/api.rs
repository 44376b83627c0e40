//! Rooms in the worker API: messages without a sender, lists of rooms and members, and members who are sent away.

use std::sync::Arc;

use axum::{
    Extension, Json, Router,
    extract::{
        FromRequestParts, Query, State,
        rejection::{BytesRejection, QueryRejection},
    },
    response::Response,
    routing::{get, post},
};
use bytes::Bytes;
use http::{HeaderMap, header, request::Parts};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::info;
use wsproxy_proto::{
    names::Id,
    rooms::{
        check::{self, Refused},
        stamp, text,
        wire::{self, Connection},
    },
};

use crate::{
    bus::publish::Keep,
    config::rooms::Validate,
    core::Core,
    endpoint::rooms::{Rooms, check_room_id, keeper::lookup::Listed},
    http::{
        api::{
            PathId, Worker, check_close, optional_json,
            publishing::{self, Outgoing},
            read,
        },
        handshake,
        rejection::Rejection,
    },
    registry::rooms::RoomRegistry,
    traces::Trace,
};

/// Makes the routes of rooms.
pub fn router(rooms: &Arc<Rooms>) -> Router<Arc<Core>> {
    Router::new()
        .route("/api/v1/rooms", get(list))
        .route("/api/v1/rooms/{room_id}/members", get(members))
        .route("/api/v1/rooms/{room_id}/messages", post(publish))
        .route("/api/v1/rooms/{room_id}/kick", post(kick))
        .route("/api/v1/rooms/{room_id}/close", post(close))
        .layer(Extension(Arc::clone(rooms)))
}

/// Extracts the id of a room from the path of a route.
pub(super) struct RoomId(pub(super) Id);

impl FromRequestParts<Arc<Core>> for RoomId {
    type Rejection = Rejection;

    async fn from_request_parts(parts: &mut Parts, core: &Arc<Core>) -> Result<Self, Rejection> {
        let PathId(id) = PathId::from_request_parts(parts, core).await?;
        check_room_id(&id)?;
        Ok(Self(id))
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListQuery {
    limit: Option<usize>,
}

impl ListQuery {
    /// Returns the longest list that the worker wants.
    ///
    /// # Errors
    /// 400: the query is malformed, or the limit out of range.
    fn limit(query: Result<Query<Self>, QueryRejection>) -> Result<usize, Rejection> {
        let Query(Self { limit }) =
            query.map_err(|error| Rejection::bad_request(error.body_text()))?;
        let limit = limit.unwrap_or(LIST_LENGTH);
        if !(1..=LIST_LENGTH_MAX).contains(&limit) {
            return Err(Rejection::bad_request(format!("limit must be 1 to {LIST_LENGTH_MAX}.")));
        }
        Ok(limit)
    }
}

/// Lists the rooms with members, on all instances.
async fn list(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(rooms): Extension<Arc<Rooms>>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Json<Value>, Rejection> {
    let (registry, limit) = (registry_of(&rooms)?, ListQuery::limit(query)?);
    let listed = handshake::deadline(&core, async {
        let list = registry.rooms(limit).await?;
        let counts = rooms.keeper.counts(&list.rooms).await?;
        Ok((list, counts))
    });
    let (list, counts) = listed.await?;
    // A room stays registered for a moment behind its last member.
    let described = list.rooms.iter().zip(counts).filter(|(_, members)| *members > 0);
    let described: Vec<_> = described
        .map(|(room, members)| json!({ "room_id": room.as_str(), "members": members }))
        .collect();
    Ok(Json(json!({ "rooms": described, "truncated": list.is_cut })))
}

/// Lists the members of a room, on all instances.
async fn members(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(rooms): Extension<Arc<Rooms>>,
    RoomId(room): RoomId,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Json<Value>, Rejection> {
    registry_of(&rooms)?;
    let limit = ListQuery::limit(query)?;
    let members = members_of(&rooms, &core, &room).await?;
    let is_cut = members.len() > limit;
    let described: Vec<_> = members.iter().take(limit).map(described).collect();
    Ok(Json(json!({ "room_id": room.as_str(), "members": described, "truncated": is_cut })))
}

fn described(member: &Listed) -> Value {
    let Listed { client, user, record, .. } = member;
    json!({
        "client_id": client.as_str(),
        "user_id": user,
        "name": record.shown_name(),
        "server_id": record.server,
        "since": record.since,
    })
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PublishQuery {
    to: Option<String>,
}

/// Publishes an envelope without a sender into a room.
async fn publish(
    worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(rooms): Extension<Arc<Rooms>>,
    RoomId(room): RoomId,
    query: Result<Query<PublishQuery>, QueryRejection>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    registry_of(&rooms)?;
    let Query(PublishQuery { to }) =
        query.map_err(|error| Rejection::bad_request(error.body_text()))?;
    let to = to.as_deref().map(Id::parse).transpose();
    let to = to.map_err(|error| Rejection::bad_id(format!("to {error}.")))?;
    let payload = envelope(&rooms, read(body)?, is_binary(&headers), to.as_ref())?;
    let (trace, channel) = (&worker.trace, core.names.room(&room));
    publishing::publish(&core, Outgoing { trace, channel, payload }, Keep::Nothing).await
}

/// Returns whether a body is protobuf rather than JSON.
fn is_binary(headers: &HeaderMap) -> bool {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let content_type = content_type.unwrap_or_default().split(';').next().unwrap_or_default();
    BINARY_TYPES.contains(&content_type.trim().to_ascii_lowercase().as_str())
}

/// Checks a worker's message, and puts the client into it that it is for. Returns the message as it is published.
///
/// # Errors
/// 400: the message is no valid envelope.
fn envelope(
    rooms: &Rooms,
    body: Bytes,
    is_binary: bool,
    to: Option<&Id>,
) -> Result<Bytes, Rejection> {
    if wire::is_reserved(&body) {
        // Instances would take the message for one of another instance.
        return Err(Rejection::bad_request("A message must not begin with the byte FF."));
    }
    let translated = if is_binary { Ok(body.to_vec()) } else { text::to_binary(&body) };
    let checked = translated.and_then(|bytes| check::read(&bytes).map(drop).map(|()| bytes));
    match (checked, to) {
        (Ok(mut envelope), to) => {
            if let Some(to) = to {
                stamp::append_to(to.as_str(), &mut envelope);
            }
            Ok(envelope.into())
        }
        // Messages of other forms go to all members, byte for byte.
        (Err(Refused::NoEnvelope), None) if rooms.config.validate == Validate::Relay => Ok(body),
        (Err(refused), _) => {
            let message = format!("The message is refused: {refused}.");
            Err(Rejection::bad_request(message))
        }
    }
}

/// Members to send away: exactly one of the first two members is given.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct KickRequest {
    client_id: Option<String>,
    user_id: Option<String>,
    reason: Option<String>,
}

/// Ends the membership of one client, or of all clients of a user, in a room.
async fn kick(
    worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(rooms): Extension<Arc<Rooms>>,
    RoomId(room): RoomId,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, Rejection> {
    registry_of(&rooms)?;
    let KickRequest { client_id, user_id, reason } = optional_json(body)?;
    check_close(None, reason.as_deref())?;
    if client_id.is_some() == user_id.is_some() {
        return Err(Rejection::bad_request("Give one of client_id and user_id."));
    }
    for (name, id) in [("client_id", &client_id), ("user_id", &user_id)] {
        if let Some(Err(error)) = id.as_deref().map(Id::parse) {
            return Err(Rejection::bad_id(format!("{name} {error}.")));
        }
    }
    let is_meant = |member: &Listed| match (&client_id, &user_id) {
        (Some(client), _) => *client == *member.client.as_str(),
        (_, user) => user.as_deref() == Some(&*member.user),
    };
    let mut members = members_of(&rooms, &core, &room).await?;
    members.retain(is_meant);
    let told = reason.as_deref().unwrap_or_default();
    let frame = |member: &Listed| wire::kick(rooms.nobody(), member.client.as_str(), told);
    send_away((&rooms, &core), &room, &members, members.iter().map(frame)).await?;
    info!(
        key = &*worker.name,
        room = room.as_str(),
        client_id,
        user_id,
        reason,
        members = members.len(),
        "A worker sent members out of a room."
    );
    Ok(Json(json!({ "members": members.len() })))
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct CloseRequest {
    reason: Option<String>,
}

/// Ends the membership of all clients in a room, and removes its state.
async fn close(
    worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(rooms): Extension<Arc<Rooms>>,
    RoomId(room): RoomId,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, Rejection> {
    registry_of(&rooms)?;
    let CloseRequest { reason } = optional_json(body)?;
    check_close(None, reason.as_deref())?;
    let members = members_of(&rooms, &core, &room).await?;
    let frame = wire::close(rooms.nobody(), reason.as_deref().unwrap_or_default());
    // Told even where no member is found: a client may be about to join.
    send_away((&rooms, &core), &room, &members, [frame]).await?;
    info!(
        key = &*worker.name,
        room = room.as_str(),
        reason,
        members = members.len(),
        "A worker closed a room."
    );
    Ok(Json(json!({ "members": members.len() })))
}

/// Ends the membership of one client, or of all, in a room, and returns the number of members.
///
/// # Errors
/// 404: this instance serves no rooms. 500, 503, 504: as in [`send_away`].
pub(in crate::endpoint) async fn end(
    (rooms, core): (&Rooms, &Core),
    room: &Id,
    client: Option<&Id>,
    reason: &str,
) -> Result<usize, Rejection> {
    registry_of(rooms)?;
    check_room_id(room)?;
    let mut members = members_of(rooms, core, room).await?;
    members.retain(|member| client.is_none_or(|client| member.client == *client));
    let frames = match client {
        Some(client) => vec![wire::kick(rooms.nobody(), client.as_str(), reason)],
        None => vec![wire::close(rooms.nobody(), reason)],
    };
    send_away((rooms, core), room, &members, frames).await?;
    Ok(members.len())
}

/// Publishes an envelope without a sender into a room, or to one client in it. Returns the JSON of the outcome.
///
/// # Errors
/// 400: the message is no valid envelope. 404: this instance serves no rooms. 409, 500, 503, 504: as in
/// [`publishing::publish`].
pub(in crate::endpoint) async fn send(
    (rooms, core, trace): (&Rooms, &Core, &Trace),
    room: &Id,
    client: Option<&Id>,
    message: Bytes,
) -> Result<Value, Rejection> {
    registry_of(rooms)?;
    check_room_id(room)?;
    let payload = envelope(rooms, message, false, client)?;
    let channel = core.names.room(room);
    publishing::outcome(core, Outgoing { trace, channel, payload }, Keep::Nothing).await
}

/// Returns the members of a room on all instances, as they are described to operators.
///
/// # Errors
/// 500, 503, 504: the store did not answer.
pub(in crate::endpoint) async fn list_members(
    rooms: &Rooms,
    core: &Core,
    room: &Id,
    most: usize,
) -> Result<Vec<Value>, Rejection> {
    Ok(members_of(rooms, core, room).await?.iter().take(most).map(described).collect())
}

/// Tells all instances to close connections of members, then removes the members. So a member is gone at once, even one
/// whose connection has ended already, or whose instance was lost.
///
/// # Errors
/// 500, 503, 504: some may be told, or gone. The call may be repeated.
async fn send_away(
    (rooms, core): (&Rooms, &Core),
    room: &Id,
    members: &[Listed],
    frames: impl IntoIterator<Item = Bytes>,
) -> Result<(), Rejection> {
    let done = handshake::deadline(core, async {
        let mut waiting = Vec::new();
        for frame in frames {
            core.bus.publishable().await;
            let channel = core.names.room(room);
            waiting.push(publishing::enqueue(core, channel, frame, Keep::Nothing)?);
        }
        for outcome in waiting {
            publishing::told(outcome.await)?;
        }
        let gone: Vec<_> =
            members.iter().map(|member| (member.client.clone(), member.connection)).collect();
        Ok(rooms.keeper.expel(room, &gone).await?)
    });
    done.await
}

async fn members_of(rooms: &Rooms, core: &Core, room: &Id) -> Result<Vec<Listed>, Rejection> {
    let members = handshake::deadline(core, async { Ok(rooms.keeper.members(room).await?) });
    let mut members = members.await?;
    members.sort_unstable_by(|a, b| a.client.as_str().cmp(b.client.as_str()));
    Ok(members)
}

/// Returns the rooms of all instances.
///
/// # Errors
/// 404: this instance serves no rooms.
fn registry_of(rooms: &Rooms) -> Result<&Arc<RoomRegistry>, Rejection> {
    let not_served =
        || Rejection::not_found("This instance serves no rooms: endpoints.rooms is off.");
    rooms.registry.as_ref().ok_or_else(not_served)
}

impl Rooms {
    /// Returns the origin of messages that no connection of this instance sends.
    pub(super) const fn nobody(&self) -> Connection {
        Connection { server: self.server, number: 0 }
    }
}

/// Content types of protobuf.
const BINARY_TYPES: [&str; 3] =
    ["application/octet-stream", "application/protobuf", "application/x-protobuf"];

/// Length of a list where the worker does not give one.
const LIST_LENGTH: usize = 1000;

/// Upper bound of the length of a list.
const LIST_LENGTH_MAX: usize = 10_000;

/// The routes of the family in the worker API: method, path as OpenAPI writes it.
pub const ROUTES: &[(&str, &str)] = &[
    ("get", "/api/v1/rooms"),
    ("get", "/api/v1/rooms/{room_id}/members"),
    ("post", "/api/v1/rooms/{room_id}/messages"),
    ("post", "/api/v1/rooms/{room_id}/kick"),
    ("post", "/api/v1/rooms/{room_id}/close"),
];
