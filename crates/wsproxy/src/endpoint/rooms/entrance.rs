//! The handshake of a room's member: its token, then the room, then its place in it.

use std::sync::Arc;

use http::{Request, Response};
use hyper::body::Incoming;
use tracing::debug;
use wsproxy_conn::clock;
use wsproxy_proto::names::Id;

use crate::{
    client::Client,
    core::Core,
    endpoint::rooms::{
        Rooms, check_room_id,
        identity::{self, Asked, Identity},
        logic::RoomLogic,
        member::{FULL_WAIT, Membership},
        record::MemberRecord,
        requests::MemberRequests,
        room::Room,
        table::RoomHold,
    },
    http::{
        Body,
        handshake::{self, Admitted, Opening, credentials::Protocols},
        path,
        rejection::Rejection,
    },
    telemetry::{family::Family, time},
    traces::Value,
};

/// Opens a member of a room.
///
/// # Errors
/// 400, 401, 403, 405, 409, 426, 429, 500, 503, 504.
pub async fn open(
    rooms: &Arc<Rooms>,
    core: &Arc<Core>,
    mut request: Request<Incoming>,
    room: &str,
) -> Result<Response<Body>, Rejection> {
    let room = path::parse_id("room_id", room)?;
    check_room_id(&room)?;
    let shared = (Family::Rooms, &rooms.profile);
    let opening = Opening::begin_counted(core, &mut request, shared, Protocols::PLAIN)?;
    let asked = Asked::read(rooms, core, &request)?;
    // Free the headers: the token's issuer and the store may take their time.
    drop(request);
    let entering = enter((rooms, core), opening, asked, &room);
    let entered = handshake::deadline(core, entering).await?;
    let Entered { client, membership, expires_at } = entered;
    debug!(room = room.as_str(), user_id = %membership.user, client_id = %membership.client,
        connection_id = %client.id(), "Authenticated; a member of the room.");
    let requests = MemberRequests(Arc::downgrade(&membership));
    let caller = Arc::clone(client.caller());
    let Client::WebSocket(link) = client.client().clone() else {
        return Err(Rejection::internal("A member has no WebSocket."));
    };
    let logic = RoomLogic::new(membership, link, caller, expires_at);
    Ok(client.accept(core, None, logic, requests))
}

/// A client that has passed all checks.
struct Entered {
    client: Admitted,
    membership: Arc<Membership>,
    expires_at: Option<u64>,
}

/// Checks the token, opens the room and joins it: in this order.
async fn enter(
    (rooms, core): (&Arc<Rooms>, &Arc<Core>),
    opening: Opening,
    asked: Asked,
    room: &Id,
) -> Result<Entered, Rejection> {
    let trace = opening.trace().clone();
    trace.add("wsproxy.room_id", || Value::text(room.as_str()));
    trace.enter("authenticate");
    let Identity { user, client: name, display_name, is_name_of_token, expires_at } =
        identity::identify(rooms, asked, room).await?;
    trace.add("wsproxy.user_id", || Value::text(user.as_str()));
    let client = opening.admit(core)?;
    trace.enter("open room");
    let Client::WebSocket(link) = client.client() else {
        return Err(Rejection::internal("A member has no WebSocket."));
    };
    let hold = hold(rooms, room)?;
    hold.room().open(rooms).await?;
    let display_name = (display_name, is_name_of_token);
    let record = MemberRecord::new(&core.server_id, time::rfc3339(), display_name);
    let membership = Membership::new(rooms, hold, (name, user), link, record)?;
    trace.enter("join room");
    membership.join().await?;
    Ok(Entered { client, membership, expires_at })
}

/// Holds the room, which is made where it is not here.
///
/// # Errors
/// 503: this instance has no place for a further room.
fn hold(rooms: &Arc<Rooms>, id: &Id) -> Result<RoomHold, Rejection> {
    let make = |bytes| Room::new(rooms, id, bytes, clock::now());
    rooms.table.hold(id, make).ok_or_else(|| {
        let message = "The instance has no place for a further room.";
        Rejection::room_full(message).after(FULL_WAIT)
    })
}
