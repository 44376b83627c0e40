//! Events in the worker API: to all clients, to a user, to a connection, in batches; presence and disconnects.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
    extract::{
        Path, Query, State,
        rejection::{BytesRejection, QueryRejection},
    },
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};
use tokio::sync::oneshot;
use tracing::info;
use uuid::Uuid;
use wsproxy_proto::names::Id;

use crate::{
    bus::publish::Outcome,
    config::api_key::Scope,
    core::Core,
    endpoint::events::{Events, entrance::registry_of},
    http::{
        api::{
            PathId, Worker, check_close,
            history::{self, Range},
            publishing::{self, Outgoing, PublishOptions},
            raw::{self, JsonMembers},
            read,
        },
        handshake, path,
        rejection::Rejection,
    },
    registry::control::{DisconnectError, Target},
    telemetry::time,
    traces::Trace,
};

/// Makes the routes of events.
pub fn router(events: &Arc<Events>) -> Router<Arc<Core>> {
    Router::new()
        .route("/api/v1/events/broadcast", post(broadcast))
        .route("/api/v1/events/users/{user_id}", post(to_user))
        .route("/api/v1/events/connections/{connection_id}", post(to_connection))
        .route("/api/v1/events/batch", post(batch))
        .route("/api/v1/events/history", get(read_history))
        .route("/api/v1/events/users/{user_id}/presence", get(presence))
        .route("/api/v1/events/disconnect", post(disconnect))
        .layer(Extension(Arc::clone(events)))
}

/// Addressee of a message in a batch.
enum To {
    /// A channel of the event endpoint.
    Events(String),
    /// A channel of a session.
    Session(String),
}

impl To {
    /// Parses `broadcast`, `user:{id}`, `connection:{id}` or `session:{id}`.
    ///
    /// # Errors
    /// 400: another text, or a malformed id.
    fn parse(core: &Core, text: &str) -> Result<Self, Rejection> {
        let names = &core.names;
        Ok(match text.split_once(':') {
            None if text == "broadcast" => Self::Events(names.events_broadcast()),
            Some(("user", id)) => Self::Events(names.events_user(&path::parse_id("user", id)?)),
            Some(("connection", id)) => Self::Events(names.events_connection(&connection(id)?)),
            Some(("session", id)) => {
                Self::Session(names.session_down(&path::parse_id("session", id)?))
            }
            _ => {
                let allowed = "broadcast, user:{id}, connection:{id} or session:{id}";
                return Err(Rejection::bad_request(format!("A message can go to {allowed}.")));
            }
        })
    }
}

fn connection(id: &str) -> Result<String, Rejection> {
    let id = Uuid::parse_str(id).map_err(|_| Rejection::bad_id("connection_id is no UUID."))?;
    Ok(id.to_string())
}

async fn broadcast(
    worker: Worker,
    State(core): State<Arc<Core>>,
    options: PublishOptions,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let channel = core.names.events_broadcast();
    publish(&core, &worker, channel, options, body).await
}

async fn to_user(
    worker: Worker,
    State(core): State<Arc<Core>>,
    PathId(user): PathId,
    options: PublishOptions,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let channel = core.names.events_user(&user);
    publish(&core, &worker, channel, options, body).await
}

async fn to_connection(
    worker: Worker,
    State(core): State<Arc<Core>>,
    Path(id): Path<String>,
    options: PublishOptions,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let channel = core.names.events_connection(&connection(&id)?);
    publish(&core, &worker, channel, options, body).await
}

async fn publish(
    core: &Core,
    worker: &Worker,
    channel: String,
    options: PublishOptions,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let (payload, options) = complete(&read(body)?, options)?;
    let (by_default, clock) = (core.config.events.history, core.names.events_clock());
    let keep = options.keep(core, &channel, by_default, Some(clock));
    let trace = &worker.trace;
    publishing::publish(core, Outgoing { trace, channel, payload }, keep).await
}

/// Completes an event for clients: adds a missing `timestamp`, and makes its `event_id` and that of `options` the same. All
/// other members stay byte for byte.
///
/// # Errors
/// 400: the event is not an object with a `type`, or its id is malformed.
fn complete(
    event: &[u8],
    mut options: PublishOptions,
) -> Result<(Bytes, PublishOptions), Rejection> {
    let mut event = JsonMembers::parse(event)?;
    if event.text("type")?.is_none() {
        return Err(Rejection::bad_request("An event needs a type, which is a string."));
    }
    match &options.event_id {
        Some(event_id) => event.set("event_id", event_id),
        None => options.event_id = event.text("event_id")?.map(Into::into),
    }
    options.check()?;
    if !event.has("timestamp") {
        event.set("timestamp", &time::rfc3339());
    }
    Ok((event.to_json().into(), options))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Batch<'a> {
    #[serde(borrow)]
    messages: Vec<BatchMessage<'a>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BatchMessage<'a> {
    to: String,
    #[serde(borrow)]
    message: &'a RawValue,
    history: Option<bool>,
    idempotency_key: Option<Box<str>>,
}

/// Publishes messages in the given order. Each message has a result of its own, and an error stops no other message.
async fn batch(
    worker: Worker,
    State(core): State<Arc<Core>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let body = read(body)?;
    let batch: Batch<'_> = raw::parse(&body)?;
    if batch.messages.len() > BATCH_MAX {
        return Err(Rejection::bad_request(format!("A batch has at most {BATCH_MAX} messages.")));
    }
    worker.trace.add("wsproxy.messages", || (batch.messages.len() as u64).into());
    let is_once = batch.messages.iter().all(|message| message.idempotency_key.is_some());
    let results = handshake::deadline(&core, async {
        let mut waiting = Vec::with_capacity(batch.messages.len());
        for message in batch.messages {
            core.bus.publishable().await;
            waiting.push(enqueue(&core, &worker, message));
        }
        let mut results = Vec::with_capacity(waiting.len());
        for outcome in waiting {
            let result = match outcome {
                Ok((outcome, is_once)) => {
                    publishing::told(outcome.await).map_err(|rejection| rejection.in_doubt(is_once))
                }
                Err(rejection) => Err(rejection),
            };
            results.push(result.unwrap_or_else(|rejection| rejection.body()));
        }
        Ok(results)
    });
    let results = results.await.map_err(|rejection| rejection.in_doubt(is_once))?;
    Ok(Json(json!({ "results": results })).into_response())
}

/// Queues a message of a batch. Returns the receiver of its outcome, and whether the message may be repeated.
///
/// # Errors
/// 400: the message is malformed. 403: the worker's key lacks a scope. 503: the queue is full.
fn enqueue(
    core: &Core,
    worker: &Worker,
    BatchMessage { to, message, history, idempotency_key }: BatchMessage<'_>,
) -> Result<(oneshot::Receiver<Outcome>, bool), Rejection> {
    let options = PublishOptions { history, event_id: None, idempotency_key };
    options.check()?;
    let message = message.get();
    let (channel, payload, keep) = match To::parse(core, &to)? {
        To::Events(channel) => {
            if !message.starts_with('{') {
                return Err(Rejection::bad_request("An event is a JSON object."));
            }
            let (payload, options) = complete(message.as_bytes(), options)?;
            let (by_default, clock) = (core.config.events.history, core.names.events_clock());
            let keep = options.keep(core, &channel, by_default, Some(clock));
            (channel, payload, keep)
        }
        To::Session(channel) => {
            worker.check(Scope::Sessions)?;
            raw::check(message.as_bytes())?;
            let keep = options.keep(core, &channel, false, None);
            (channel, Bytes::copy_from_slice(message.as_bytes()), keep)
        }
    };
    let is_once = publishing::is_once(&keep);
    Ok((publishing::enqueue(core, channel, payload, keep)?, is_once))
}

async fn read_history(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    range: Result<Query<Range>, QueryRejection>,
) -> Result<Response, Rejection> {
    let Query(range) = range.map_err(|error| Rejection::bad_request(error.body_text()))?;
    let channel = range.channel.as_deref();
    let channel = channel.ok_or_else(|| Rejection::bad_request("channel is missing."))?;
    let To::Events(channel) = To::parse(&core, channel)? else {
        return Err(Rejection::bad_request("A session's history is at its own path."));
    };
    history::read(&core, &channel, Some(core.names.events_clock()), range).await
}

async fn presence(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(events): Extension<Arc<Events>>,
    PathId(user): PathId,
) -> Result<Response, Rejection> {
    let connections = handshake::deadline(&core, async {
        Ok(registry_of(&events, &core)?.connections_of(&user).await?)
    });
    let connections = connections.await?;
    Ok(Json(json!({ "user_id": user.as_str(), "connections": connections })).into_response())
}

/// Connections to close. Exactly one of the first three members is given.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DisconnectRequest {
    user_id: Option<String>,
    connection_id: Option<Uuid>,
    jti: Option<String>,
    code: Option<u16>,
    reason: Option<String>,
    revoke_seconds: Option<u64>,
}

async fn disconnect(
    worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(events): Extension<Arc<Events>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let request: DisconnectRequest = serde_json::from_slice(&read(body)?)
        .map_err(|error| Rejection::bad_request(error.to_string()))?;
    let DisconnectRequest { user_id, connection_id, jti, code, reason, revoke_seconds } = request;
    let target = match (user_id, connection_id, jti) {
        (Some(user), None, None) => Target::User(path::parse_id("user_id", &user)?),
        (None, Some(connection), None) => Target::Connection(connection),
        (None, None, Some(token)) => Target::Token(token),
        _ => {
            let wanted = "Give one of user_id, connection_id and jti.";
            return Err(Rejection::bad_request(wanted));
        }
    };
    check_close(code, reason.as_deref())?;
    let revoke = revoke_seconds.map(|seconds| revocation(&core, &target, seconds)).transpose()?;
    registry_of(&events, &core)?;
    let (user_id, connection_id, jti) = target.parts();
    info!(
        key = &*worker.name,
        user_id,
        connection_id = connection_id.map(tracing::field::display),
        jti,
        reason,
        revoke_seconds,
        "A worker ends connections."
    );
    let told = end((&events, &core), target, reason.as_deref(), revoke, code).await?;
    Ok(Json(json!({ "instances": told })).into_response())
}

/// Closes connections on all instances, and returns the number of instances that were told.
///
/// # Errors
/// 404: this instance serves no events. 500, 503, 504: other instances may not have the command. It may be repeated.
pub(in crate::endpoint) async fn end(
    (events, core): (&Events, &Core),
    target: Target,
    reason: Option<&str>,
    revoke: Option<Duration>,
    code: Option<u16>,
) -> Result<u64, Rejection> {
    let told = handshake::deadline(core, async {
        let told = registry_of(events, core)?.disconnect(target, code, reason, revoke).await;
        told.map_err(|error| match error {
            DisconnectError::Store(error) => error.into(),
            DisconnectError::Bus(error) => error.into(),
        })
    });
    told.await
}

/// Publishes an event to a user, or to one of the user's connections, and returns the JSON of the outcome.
///
/// # Errors
/// 400: the event is not an object with a `type`. 409, 500, 503, 504: as in [`publishing::publish`].
pub(in crate::endpoint) async fn send(
    (core, trace): (&Core, &Trace),
    user: &Id,
    connection: Option<Uuid>,
    event: &[u8],
) -> Result<Value, Rejection> {
    let channel = match connection {
        Some(connection) => core.names.events_connection(&connection.to_string()),
        None => core.names.events_user(user),
    };
    let (payload, options) = complete(event, PublishOptions::default())?;
    let (by_default, clock) = (core.config.events.history, core.names.events_clock());
    let keep = options.keep(core, &channel, by_default, Some(clock));
    publishing::outcome(core, Outgoing { trace, channel, payload }, keep).await
}

/// Checks for how long a worker wants a revocation to be remembered. A longer time than the maximum is refused rather
/// than cut: the worker would rely on a revocation that has ended.
///
/// # Errors
/// 400: the time is out of range, or the target is a connection.
fn revocation(core: &Core, target: &Target, seconds: u64) -> Result<Duration, Rejection> {
    if matches!(target, Target::Connection(_)) {
        let message = "revoke_seconds needs a user_id or a jti: a connection has no token to name.";
        return Err(Rejection::bad_request(message));
    }
    let (asked, longest) = (Duration::from_secs(seconds), core.config.events.revocation_ttl);
    if asked.is_zero() || asked > longest {
        let longest = longest.as_secs();
        let message = format!("revoke_seconds must be 1 to {longest} ([events] revocation_ttl).");
        return Err(Rejection::bad_request(message));
    }
    Ok(asked)
}

/// Upper bound of the messages in a batch.
const BATCH_MAX: usize = 1000;

/// The routes of the family in the worker API: method, path as OpenAPI writes it.
pub const ROUTES: &[(&str, &str)] = &[
    ("post", "/api/v1/events/broadcast"),
    ("post", "/api/v1/events/users/{user_id}"),
    ("post", "/api/v1/events/connections/{connection_id}"),
    ("post", "/api/v1/events/batch"),
    ("get", "/api/v1/events/history"),
    ("get", "/api/v1/events/users/{user_id}/presence"),
    ("post", "/api/v1/events/disconnect"),
];
