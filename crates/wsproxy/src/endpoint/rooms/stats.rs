//! `/ws/stats` and `/ws/{room_id}/stats`: numbers of rooms, in the shape of an older gateway.

use std::{sync::Arc, time::Duration};

use axum::{Extension, Json, Router, extract::State, routing::get};
use http::request::Parts;
use serde_json::{Value, json};
use tokio::{sync::Mutex, time::Instant};
use wsproxy_proto::names::Id;

use crate::{
    config::api_key::Scope,
    core::Core,
    endpoint::rooms::{Rooms, api::RoomId, counters::Traffic, keeper::lookup::Listed, room::Sizes},
    http::{admin::Details, api, handshake, rejection::Rejection},
    store::command::StoreError,
    telemetry::time,
};

/// Rooms and members of all instances, as they were counted last.
#[derive(Debug, Default)]
pub(super) struct Totals(Mutex<Option<(Instant, Counted)>>);

/// Numbers over all instances.
#[derive(Debug, Clone, Copy, Default)]
struct Counted {
    rooms: usize,
    members: u64,
    /// There are more rooms than were counted.
    is_cut: bool,
}

/// Makes the routes; none if rooms are not served. `details` tells who sees the ids of members.
pub fn router(rooms: &Arc<Rooms>, details: Details) -> Router<Arc<Core>> {
    if rooms.registry.is_none() {
        return Router::new();
    }
    Router::new()
        .route("/ws/stats", get(all))
        .route(
            "/ws/{room_id}/stats",
            get(async move |core, rooms, room, parts| {
                of_room(core, rooms, room, details, parts).await
            }),
        )
        .layer(Extension(Arc::clone(rooms)))
        .method_not_allowed_fallback(api::method_not_allowed)
}

/// Answers with counts over all instances.
async fn all(
    State(core): State<Arc<Core>>,
    Extension(rooms): Extension<Arc<Rooms>>,
) -> Result<Json<Value>, Rejection> {
    let counted = handshake::deadline(&core, async { Ok(rooms.count().await?) }).await?;
    let here = rooms.table.all().iter().map(|room| room.sizes().here).sum::<usize>();
    Ok(Json(json!({
        "total_connections": counted.members,
        "timestamp": time::rfc3339(),
        "rooms": counted.rooms,
        "local_connections": here,
        "truncated": counted.is_cut,
    })))
}

/// Answers with the numbers of a room, and for those who may see them with its members.
async fn of_room(
    State(core): State<Arc<Core>>,
    Extension(rooms): Extension<Arc<Rooms>>,
    RoomId(id): RoomId,
    details: Details,
    parts: Parts,
) -> Result<Json<Value>, Rejection> {
    let shows_ids = rooms.is_development || details.of_family_are_for(&core, &parts, Scope::Rooms);
    let room = rooms.table.get(&id).filter(|room| room.is_open());
    let (members, entities) = match &room {
        Some(room) => {
            let Sizes { members, entities, .. } = room.sizes();
            (members as u64, entities as u64)
        }
        None => handshake::deadline(&core, async { Ok(rooms.sizes_of(&id).await?) }).await?,
    };
    let mut listed: Vec<_> = match (&room, shows_ids) {
        (_, false) => Vec::new(),
        (Some(room), true) => {
            let records = room.records();
            records.iter().filter_map(|(client, record)| Listed::parse(client, record)).collect()
        }
        (None, true) => {
            handshake::deadline(&core, async { Ok(rooms.keeper.members(&id).await?) }).await?
        }
    };
    listed.sort_unstable_by(|a, b| a.client.as_str().cmp(b.client.as_str()));
    let connections: Vec<_> =
        listed.iter().take(CONNECTIONS_MAX).map(|member| described(&id, member)).collect();
    let none = Traffic::default();
    let Traffic { messages_in, messages_out, bytes_in, bytes_out } =
        room.as_ref().map_or(&none, |room| &room.traffic);
    Ok(Json(json!({
        "room_id": id.as_str(),
        "connection_count": members,
        "connections": connections,
        "truncated": listed.len() > CONNECTIONS_MAX,
        "members": members,
        "entities": entities,
        "messages_in": messages_in.value(),
        "messages_out": messages_out.value(),
        "bytes_in": bytes_in.value(),
        "bytes_out": bytes_out.value(),
    })))
}

fn described(room: &Id, member: &Listed) -> Value {
    json!({
        "id": member.connection.to_string(),
        "room_id": room.as_str(),
        "user_id": member.user,
        "client_id": member.client.as_str(),
        "connected_at": member.record.since,
    })
}

impl Rooms {
    /// Returns the numbers of members and entities of a room that has no members here.
    async fn sizes_of(&self, room: &Id) -> Result<(u64, u64), StoreError> {
        let members = self.keeper.counts(std::slice::from_ref(room)).await?;
        Ok((members.into_iter().sum(), self.keeper.count_entities(room).await?))
    }

    /// Counts rooms and members over all instances. One count serves all callers for some seconds, since anybody may
    /// call.
    async fn count(&self) -> Result<Counted, StoreError> {
        let Some(registry) = &self.registry else { return Ok(Counted::default()) };
        let mut known = self.totals.0.lock().await;
        if let Some((at, counted)) = *known
            && at.elapsed() < COUNTED_FOR
        {
            return Ok(counted);
        }
        let list = registry.rooms(ROOMS_MAX).await?;
        let counts = self.keeper.counts(&list.rooms).await?;
        // A room stays listed for a moment behind its last member.
        let rooms = counts.iter().filter(|members| **members > 0).count();
        let counted = Counted { rooms, members: counts.iter().sum(), is_cut: list.is_cut };
        *known = Some((Instant::now(), counted));
        Ok(counted)
    }
}

/// Upper bound of the members that stats list.
const CONNECTIONS_MAX: usize = 1000;

/// Upper bound of the rooms whose members are counted for the stats of all rooms.
const ROOMS_MAX: usize = 10_000;

/// Time for which a count is good.
const COUNTED_FOR: Duration = Duration::from_secs(2);
