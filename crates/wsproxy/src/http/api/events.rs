//! Events over HTTP: to everybody, to a user, to a connection, many at once.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{
        Path, Query, State,
        rejection::{BytesRejection, QueryRejection},
    },
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{json, value::RawValue};
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::{
    bus::Outcome,
    config::api_key::Scope,
    gateway::Gateway,
    http::{
        api::{
            PathId, Worker, check_close,
            history::{self, Range},
            publishing::{self, How},
            raw::{self, Members},
            read,
        },
        events::registry_of,
        rejection::Rejection,
        upgrade,
    },
    registry::control::{DisconnectError, Target},
    telemetry::time,
};

/// Most messages of one batch.
const BATCH_MAX: usize = 1000;

/// The routes of events.
pub(super) fn router() -> Router<Arc<Gateway>> {
    Router::new()
        .route("/api/v1/events/broadcast", post(broadcast))
        .route("/api/v1/events/users/{user_id}", post(to_user))
        .route("/api/v1/events/connections/{connection_id}", post(to_connection))
        .route("/api/v1/events/batch", post(batch))
        .route("/api/v1/events/history", get(read_history))
        .route("/api/v1/events/users/{user_id}/presence", get(presence))
        .route("/api/v1/events/disconnect", post(disconnect))
}

/// Whom an event is for.
enum To {
    /// A channel of the event endpoint.
    Events(String),
    /// A channel of a session.
    Session(String),
}

impl To {
    /// `broadcast`, `user:{id}`, `connection:{id}` or `session:{id}`.
    fn parse(gateway: &Gateway, text: &str) -> Result<Self, Rejection> {
        let names = &gateway.names;
        Ok(match text.split_once(':') {
            None if text == "broadcast" => Self::Events(names.events_broadcast()),
            Some(("user", id)) => Self::Events(names.events_user(&upgrade::id("user", id)?)),
            Some(("connection", id)) => Self::Events(names.events_connection(&connection(id)?)),
            Some(("session", id)) => {
                Self::Session(names.session_down(&upgrade::id("session", id)?))
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
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    how: How,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let channel = gateway.names.events_broadcast();
    publish(&gateway, channel, how, body).await
}

async fn to_user(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    PathId(user): PathId,
    how: How,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let channel = gateway.names.events_user(&user);
    publish(&gateway, channel, how, body).await
}

async fn to_connection(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    Path(id): Path<String>,
    how: How,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let channel = gateway.names.events_connection(&connection(&id)?);
    publish(&gateway, channel, how, body).await
}

async fn publish(
    gateway: &Gateway,
    channel: String,
    how: How,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let (payload, how) = complete(&read(body)?, how)?;
    let (by_default, clock) = (gateway.config.events.history, gateway.names.events_clock());
    let keep = how.keep(gateway, &channel, by_default, Some(clock));
    publishing::publish(gateway, channel, payload, keep).await
}

/// An event as clients get it: it has a type and a time, and its id is known beside it. All else stays as it was
/// written.
fn complete(event: &[u8], mut how: How) -> Result<(Bytes, How), Rejection> {
    let mut event = Members::parse(event)?;
    if event.text("type")?.is_none() {
        return Err(Rejection::bad_request("An event needs a type, which is a string."));
    }
    match &how.event_id {
        Some(event_id) => event.set("event_id", event_id),
        None => how.event_id = event.text("event_id")?.map(Into::into),
    }
    how.check()?;
    if !event.has("timestamp") {
        event.set("timestamp", &time::rfc3339());
    }
    Ok((event.to_json().into(), how))
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

/// Publishes in the given order. Each message has its own result: one that is wrong stops no other.
async fn batch(
    worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let body = read(body)?;
    let batch: Batch<'_> = raw::parse(&body)?;
    if batch.messages.len() > BATCH_MAX {
        return Err(Rejection::bad_request(format!("A batch has at most {BATCH_MAX} messages.")));
    }
    let is_once = batch.messages.iter().all(|message| message.idempotency_key.is_some());
    let results = upgrade::deadline(&gateway, async {
        let mut waiting = Vec::with_capacity(batch.messages.len());
        for message in batch.messages {
            gateway.bus.publishable().await;
            waiting.push(enqueue(&gateway, &worker, message));
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

/// What will become of the message, and whether it may be sent twice.
fn enqueue(
    gateway: &Gateway,
    worker: &Worker,
    BatchMessage { to, message, history, idempotency_key }: BatchMessage<'_>,
) -> Result<(oneshot::Receiver<Outcome>, bool), Rejection> {
    let how = How { history, event_id: None, idempotency_key };
    how.check()?;
    let message = message.get();
    let (channel, payload, keep) = match To::parse(gateway, &to)? {
        To::Events(channel) => {
            if !message.starts_with('{') {
                return Err(Rejection::bad_request("An event is a JSON object."));
            }
            let (payload, how) = complete(message.as_bytes(), how)?;
            let (by_default, clock) = (gateway.config.events.history, gateway.names.events_clock());
            let keep = how.keep(gateway, &channel, by_default, Some(clock));
            (channel, payload, keep)
        }
        To::Session(channel) => {
            worker.check(Scope::Sessions)?;
            raw::check(message.as_bytes())?;
            let keep = how.keep(gateway, &channel, false, None);
            (channel, Bytes::copy_from_slice(message.as_bytes()), keep)
        }
    };
    let is_once = publishing::is_once(&keep);
    Ok((publishing::enqueue(gateway, channel, payload, keep)?, is_once))
}

async fn read_history(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    range: Result<Query<Range>, QueryRejection>,
) -> Result<Response, Rejection> {
    let Query(range) = range.map_err(|error| Rejection::bad_request(error.body_text()))?;
    let channel = range.channel.as_deref();
    let channel = channel.ok_or_else(|| Rejection::bad_request("channel is missing."))?;
    let To::Events(channel) = To::parse(&gateway, channel)? else {
        return Err(Rejection::bad_request("A session's history is at its own path."));
    };
    history::read(&gateway, &channel, Some(gateway.names.events_clock()), range).await
}

async fn presence(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    PathId(user): PathId,
) -> Result<Response, Rejection> {
    let connections = upgrade::deadline(&gateway, async {
        Ok(registry_of(&gateway)?.connections_of(&user).await?)
    });
    let connections = connections.await?;
    Ok(Json(json!({ "user_id": user.as_str(), "connections": connections })).into_response())
}

/// Whom to send away; exactly one of the first three.
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
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let request: DisconnectRequest = serde_json::from_slice(&read(body)?)
        .map_err(|error| Rejection::bad_request(error.to_string()))?;
    let DisconnectRequest { user_id, connection_id, jti, code, reason, revoke_seconds } = request;
    let target = match (user_id, connection_id, jti) {
        (Some(user), None, None) => Target::User(upgrade::id("user_id", &user)?),
        (None, Some(connection), None) => Target::Connection(connection),
        (None, None, Some(token)) => Target::Token(token),
        _ => {
            let wanted = "Give one of user_id, connection_id and jti.";
            return Err(Rejection::bad_request(wanted));
        }
    };
    check_close(code, reason.as_deref())?;
    let revoke =
        revoke_seconds.map(|seconds| revocation(&gateway, &target, seconds)).transpose()?;
    let told = upgrade::deadline(&gateway, async {
        let registry = registry_of(&gateway)?;
        let told = registry.disconnect(target, code, reason.as_deref(), revoke).await;
        told.map_err(|error| match error {
            DisconnectError::Store(error) => error.into(),
            DisconnectError::Bus(error) => error.into(),
        })
    });
    Ok(Json(json!({ "instances": told.await? })).into_response())
}

/// How long a revocation is to be remembered. One that would be shorter than what was asked for is refused: the worker
/// would believe that a token stays out which comes in again.
fn revocation(gateway: &Gateway, target: &Target, seconds: u64) -> Result<Duration, Rejection> {
    if matches!(target, Target::Connection(_)) {
        let message = "revoke_seconds needs a user_id or a jti: a connection has no token to name.";
        return Err(Rejection::bad_request(message));
    }
    let (asked, longest) = (Duration::from_secs(seconds), gateway.config.events.revocation_ttl);
    if asked.is_zero() || asked > longest {
        let longest = longest.as_secs();
        let message = format!("revoke_seconds must be 1 to {longest} ([events] revocation_ttl).");
        return Err(Rejection::bad_request(message));
    }
    Ok(asked)
}
