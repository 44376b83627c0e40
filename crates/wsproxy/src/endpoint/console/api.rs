//! The console's part of the worker API. Needs the scope `admin`; every action is logged with the name of the key.

use std::sync::Arc;

use axum::{
    Extension, Json, Router,
    extract::{
        Query, State,
        rejection::{BytesRejection, QueryRejection},
    },
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, header};
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};
use tracing::info;
use uuid::Uuid;
use wsproxy_proto::names::Id;

use crate::{
    bus::publish::Keep,
    config::render,
    core::Core,
    endpoint::{
        agents,
        console::{
            Console, find, reach,
            reach::{Kind, Subject},
            samples, troubles,
        },
        events, rooms,
    },
    http::{
        answer_time::AnswerTime,
        api::{
            self, Worker, check_close,
            publishing::{self, Outgoing},
            raw, read,
        },
        rejection::Rejection,
    },
    registry::control::Target,
    telemetry::time,
};

/// Makes the routes of the console.
pub(super) fn router() -> Router<Arc<Core>> {
    Router::new()
        .route("/api/v1/console/overview", get(overview))
        .route("/api/v1/console/find", get(find_subject))
        .route("/api/v1/console/config", get(configuration))
        .route("/api/v1/console/end", post(end))
        .route("/api/v1/console/send", post(send))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OverviewQuery {
    /// Time of the last sample that the page has, in seconds since 1970.
    #[serde(default)]
    after: u64,
}

async fn overview(
    worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(console): Extension<Arc<Console>>,
    query: Result<Query<OverviewQuery>, QueryRejection>,
) -> Result<Response, Rejection> {
    let Query(OverviewQuery { after }) =
        query.map_err(|error| Rejection::bad_request(error.body_text()))?;
    let mut overview = api::about(&core);
    for (name, value) in [
        ("key", json!(&*worker.name)),
        ("now", time::since_epoch().as_secs().into()),
        ("draining", core.is_draining().into()),
        ("interval_seconds", samples::EVERY.as_secs().into()),
        ("samples", console.samples.columns(after)),
        ("troubles", json!(troubles::all(&core, &console.samples))),
        ("latest", reach::latest(&core, LATEST).into()),
    ] {
        overview[name] = value;
    }
    Ok(fresh(overview))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FindQuery {
    kind: Kind,
    id: String,
}

async fn find_subject(
    worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(console): Extension<Arc<Console>>,
    query: Result<Query<FindQuery>, QueryRejection>,
) -> Result<Response, Rejection> {
    let Query(FindQuery { kind, id }) =
        query.map_err(|error| Rejection::bad_request(error.body_text()))?;
    let subject = Subject::read(kind, id.trim())?;
    let (label, id) = subject.parts();
    info!(key = &*worker.name, kind = label.label(), id, "An operator looked for a client.");
    Ok(fresh(find::find(&console, &core, &subject).await))
}

async fn configuration(worker: Worker, State(core): State<Arc<Core>>) -> Response {
    info!(key = &*worker.name, "An operator read the configuration.");
    let in_force = core.in_force.lock().clone();
    let settings = match in_force.as_deref() {
        Some((config, origins)) => render::settings(config, Some(origins)),
        None => render::settings(&core.config, None),
    };
    fresh(json!({ "settings": settings }))
}

/// Connections to end.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EndRequest {
    kind: Kind,
    id: String,
    /// One connection of the session or user; `None`: all.
    connection_id: Option<Uuid>,
    /// One client of the room; `None`: all.
    client_id: Option<String>,
    reason: Option<String>,
}

async fn end(
    worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(console): Extension<Arc<Console>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let request: EndRequest = raw::parse(&read(body)?)?;
    let EndRequest { kind, id, connection_id, client_id, reason } = request;
    let subject = Subject::read(kind, &id)?;
    let client = client_of(kind, client_id.as_deref())?;
    check_connection(kind, connection_id)?;
    check_close(None, reason.as_deref())?;
    info!(
        key = &*worker.name,
        kind = kind.label(),
        id,
        connection_id = connection_id.map(tracing::field::display),
        client_id,
        reason,
        "An operator ends connections."
    );
    let (families, told) = (&console.families, reason.as_deref());
    let answer = match subject {
        Subject::Session(session) => {
            let command = json!({ "op": "close", "reason": told, "connection_id": connection_id });
            let channel = core.names.session_control(&session);
            let payload = command.to_string().into();
            let message = Outgoing { trace: &worker.trace, channel, payload };
            publishing::outcome(&core, message, Keep::Nothing).await?
        }
        Subject::User(user) => {
            let target = connection_id.map_or(Target::User(user), Target::Connection);
            let ended = events::api::end((&families.events, &core), target, told, None, None);
            json!({ "instances": ended.await? })
        }
        Subject::Room(room) => {
            let place = (&*families.rooms, &*core);
            let words = told.unwrap_or_default();
            json!({ "members": rooms::api::end(place, &room, client.as_ref(), words).await? })
        }
        Subject::Agent(user) => agents::api::end((&families.agents, &core), user, reason).await?,
        Subject::Connection(_) => {
            let why = "A connection is ended by its session, user, room or agent.";
            return Err(Rejection::bad_request(why));
        }
    };
    Ok(fresh(answer))
}

/// A message for a client.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SendRequest<'a> {
    kind: Kind,
    id: String,
    connection_id: Option<Uuid>,
    client_id: Option<String>,
    /// JSON, which goes out as it was written.
    #[serde(borrow)]
    message: &'a RawValue,
}

async fn send(
    worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(console): Extension<Arc<Console>>,
    Extension(answer_time): Extension<AnswerTime>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let body = read(body)?;
    raw::check(&body)?;
    let request: SendRequest<'_> = raw::parse(&body)?;
    let SendRequest { kind, id, connection_id, client_id, message } = request;
    let subject = Subject::read(kind, &id)?;
    let client = client_of(kind, client_id.as_deref())?;
    check_connection(kind, connection_id)?;
    let message = Bytes::copy_from_slice(message.get().as_bytes());
    info!(
        key = &*worker.name,
        kind = kind.label(),
        id,
        connection_id = connection_id.map(tracing::field::display),
        client_id,
        bytes = message.len(),
        "An operator sends a message."
    );
    let families = &console.families;
    let answer = match subject {
        Subject::Session(_) if connection_id.is_some() => {
            let why = "All connections of a session get the same messages.";
            return Err(Rejection::bad_request(why));
        }
        Subject::Session(session) => {
            let channel = core.names.session_down(&session);
            let message = Outgoing { trace: &worker.trace, channel, payload: message };
            publishing::outcome(&core, message, Keep::Nothing).await?
        }
        Subject::User(user) => {
            let place = (&*core, &worker.trace);
            events::api::send(place, &user, connection_id, &message).await?
        }
        Subject::Room(room) => {
            let place = (&*families.rooms, &*core, &worker.trace);
            rooms::api::send(place, &room, client.as_ref(), message).await?
        }
        Subject::Agent(user) => {
            // The call has a deadline of its own.
            answer_time.lift();
            let place = (&*families.agents, &*core);
            return agents::api::send(place, user, &message, &worker).await;
        }
        Subject::Connection(_) => {
            let why = "A message goes to a session, user, room or agent.";
            return Err(Rejection::bad_request(why));
        }
    };
    Ok(fresh(answer))
}

/// Reads the client of a room.
///
/// # Errors
/// 400: the id is malformed, or the subject is no room.
fn client_of(kind: Kind, client: Option<&str>) -> Result<Option<Id>, Rejection> {
    let Some(client) = client else { return Ok(None) };
    if kind != Kind::Room {
        return Err(Rejection::bad_request("client_id is for rooms."));
    }
    let id = Id::parse(client);
    id.map(Some).map_err(|error| Rejection::bad_id(format!("client_id {error}.")))
}

/// Refuses the id of a connection where it means nothing.
///
/// # Errors
/// 400: the subject is neither a session nor a user.
fn check_connection(kind: Kind, connection: Option<Uuid>) -> Result<(), Rejection> {
    if connection.is_some() && !matches!(kind, Kind::Session | Kind::User) {
        return Err(Rejection::bad_request("connection_id is for sessions and users."));
    }
    Ok(())
}

/// Makes an answer that no cache stores.
fn fresh(body: Value) -> Response {
    let no_store: [(HeaderName, HeaderValue); 1] =
        [(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))];
    (no_store, Json(body)).into_response()
}

/// Number of the newest ends and refusals in the overview.
const LATEST: usize = 20;

/// The routes of the console in the worker API: method, and path in OpenAPI's form.
pub const ROUTES: &[(&str, &str)] = &[
    ("get", "/api/v1/console/overview"),
    ("get", "/api/v1/console/find"),
    ("get", "/api/v1/console/config"),
    ("post", "/api/v1/console/end"),
    ("post", "/api/v1/console/send"),
];
