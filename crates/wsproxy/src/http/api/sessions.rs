//! Sessions over HTTP: tokens, messages, streams, history, what clients say.

use std::{ops::RangeInclusive, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{
        Path, Query, State,
        rejection::{BytesRejection, PathRejection, QueryRejection},
    },
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{json, value::RawValue};
use uuid::Uuid;
use wsproxy_proto::names::Id;

use crate::{
    auth::session::{self, Scope},
    gateway::Gateway,
    http::{
        Body,
        announcements::{self, Start},
        api::{
            PathId, Worker, check_close,
            history::{self, Range},
            optional_json,
            publishing::{self, How, publish},
            raw, read,
        },
        follow,
        rejection::Rejection,
        upgrade,
    },
    store::{StoreError, StreamCommand, StreamOp, StreamOutcome},
};

/// Longest life of a token that the API makes, in seconds.
const TOKEN_TTL_MAX: u64 = 24 * 3600;

/// The lease of a token stream whose worker names none, in milliseconds.
const LEASE_MS: u64 = 15_000;

/// Leases that a worker may ask for.
const LEASE_ALLOWED: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);

/// The routes of sessions.
pub(super) fn router() -> Router<Arc<Gateway>> {
    Router::new()
        .route("/api/v1/sessions/{session_id}/token", post(create_token))
        .route("/api/v1/sessions/{session_id}/messages", post(publish_message))
        .route("/api/v1/sessions/{session_id}/history", get(read_history))
        .route("/api/v1/sessions/{session_id}/streams/{stream_id}", post(change_stream))
        .route("/api/v1/sessions/{session_id}/close", post(close_session))
        .route("/api/v1/sessions/{session_id}/upstream", get(follow_upstream))
        .route("/api/v1/sessions/events", get(follow_sessions))
        .route("/api/v1/agents/{agent_id}/sessions/events", get(follow_sessions_of))
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenRequest {
    ttl_seconds: Option<u64>,
    /// Event streams until it expires, rather than one connection.
    #[serde(default)]
    event_stream: bool,
    /// Only the path of this agent.
    agent_id: Option<String>,
}

async fn create_token(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    PathId(session): PathId,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let request: TokenRequest = optional_json(body)?;
    let ttl = match request.ttl_seconds {
        None => gateway.config.sessions.token_ttl,
        Some(seconds @ 1..=TOKEN_TTL_MAX) => Duration::from_secs(seconds),
        Some(_) => {
            return Err(Rejection::bad_request(format!(
                "ttl_seconds must be 1 to {TOKEN_TTL_MAX}."
            )));
        }
    };
    let agent = request.agent_id.map(|agent| upgrade::id("agent_id", &agent)).transpose()?;
    let scope = Scope { agent, event_stream: request.event_stream };
    let key = gateway.names.session_auth(&session);
    let issued = async { Ok(session::issue(&gateway.store, &key, ttl, &scope).await?) };
    let token = upgrade::deadline(&gateway, issued).await?;
    let body =
        json!({ "session_id": session.as_str(), "token": token, "expires_in": ttl.as_secs() });
    Ok((StatusCode::CREATED, [(header::CACHE_CONTROL, "no-store")], Json(body)).into_response())
}

async fn publish_message(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    PathId(session): PathId,
    how: How,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let payload = read(body)?;
    let channel = gateway.names.session_down(&session);
    let keep = how.keep(&gateway, &channel, false, None);
    publish(&gateway, channel, payload, keep).await
}

async fn read_history(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    PathId(session): PathId,
    range: Result<Query<Range>, QueryRejection>,
) -> Result<Response, Rejection> {
    let Query(range) = range.map_err(|error| Rejection::bad_request(error.body_text()))?;
    if range.channel.is_some() {
        return Err(Rejection::bad_request("A session has one channel."));
    }
    history::read(&gateway, &gateway.names.session_down(&session), None, range).await
}

/// What a worker does with a token stream. What belongs to it is read by a type of its own: an enum with a tag inside
/// could not leave `meta` and `error` as they were written.
#[derive(Debug, Deserialize)]
struct StreamRequest {
    op: StreamOpName,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StreamOpName {
    Open,
    Append,
    Renew,
    End,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OpenStream<'a> {
    #[serde(rename = "op")]
    _op: IgnoredAny,
    #[serde(borrow)]
    meta: Option<&'a RawValue>,
    lease_ms: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AppendToStream {
    #[serde(rename = "op")]
    _op: IgnoredAny,
    text: String,
    seq: Option<u64>,
    lease_ms: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RenewStream {
    #[serde(rename = "op")]
    _op: IgnoredAny,
    lease_ms: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EndStream<'a> {
    #[serde(rename = "op")]
    _op: IgnoredAny,
    outcome: StreamOutcome,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

/// What is to be done with a token stream.
fn stream_op(body: &[u8]) -> Result<StreamOp, Rejection> {
    raw::check(body)?;
    let StreamRequest { op } = raw::parse(body)?;
    Ok(match op {
        StreamOpName::Open => {
            let OpenStream { meta, lease_ms, .. } = raw::parse(body)?;
            StreamOp::Open { meta: json_bytes(meta), lease: lease(lease_ms)? }
        }
        StreamOpName::Append => {
            let AppendToStream { text, seq, lease_ms, .. } = raw::parse(body)?;
            StreamOp::Append { text: text.into(), seq, lease: lease(lease_ms)? }
        }
        StreamOpName::Renew => {
            let RenewStream { lease_ms, .. } = raw::parse(body)?;
            StreamOp::Renew { lease: lease(lease_ms)? }
        }
        StreamOpName::End => {
            let EndStream { outcome, error, .. } = raw::parse(body)?;
            StreamOp::End { outcome, error: json_bytes(error) }
        }
    })
}

async fn change_stream(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    path: Result<Path<(String, String)>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let Path((session, stream)) = path.map_err(|error| Rejection::bad_id(error.body_text()))?;
    let (session, stream) =
        (upgrade::id("session_id", &session)?, upgrade::id("stream_id", &stream)?);
    let op = stream_op(&read(body)?)?;
    let is_once = !matches!(op, StreamOp::Append { seq: None, .. });
    let command = StreamCommand { session, stream, op, limits: gateway.config.history.limits() };
    let changed = upgrade::deadline(&gateway, async {
        gateway.store.stream(command).await.map_err(stream_rejection)
    });
    let (seq, id) = changed.await.map_err(|rejection| rejection.in_doubt(is_once))?;
    Ok(Json(json!({ "seq": seq, "event_id": id.to_string() })).into_response())
}

fn json_bytes(value: Option<&RawValue>) -> Bytes {
    value.map_or_else(Bytes::new, |value| Bytes::copy_from_slice(value.get().as_bytes()))
}

fn lease(milliseconds: Option<u64>) -> Result<Duration, Rejection> {
    let lease = Duration::from_millis(milliseconds.unwrap_or(LEASE_MS));
    if LEASE_ALLOWED.contains(&lease) {
        Ok(lease)
    } else {
        Err(Rejection::bad_request("lease_ms must be 1000 to 3600000."))
    }
}

/// A stream that is not as the worker believes is the worker's affair.
fn stream_rejection(error: StoreError) -> Rejection {
    let StoreError::Refused(why) = &error else { return error.into() };
    match why.split([' ', ':']).next() {
        Some("NOSTREAM") => Rejection::not_found("There is no such stream, or it has expired."),
        Some("EXISTS") => Rejection::conflict("There is such a stream already."),
        Some("ENDED") => Rejection::conflict("The stream has ended."),
        Some("SEQ") => Rejection::conflict("The stream has another number of appends."),
        Some("BADJSON") => Rejection::bad_request("meta and error must be JSON objects."),
        Some("TOOLARGE") => Rejection::too_large("The stream's text is too large."),
        _ => error.into(),
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct CloseRequest {
    code: Option<u16>,
    reason: Option<String>,
    connection_id: Option<Uuid>,
}

async fn close_session(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    PathId(session): PathId,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let request: CloseRequest = optional_json(body)?;
    check_close(request.code, request.reason.as_deref())?;
    let command = json!({
        "op": "close",
        "code": request.code,
        "reason": request.reason,
        "connection_id": request.connection_id,
    });
    let channel = gateway.names.session_control(&session);
    publishing::command(&gateway, channel, command.to_string().into()).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FollowQuery {
    #[serde(default)]
    log: bool,
}

async fn follow_upstream(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    PathId(session): PathId,
    query: Result<Query<FollowQuery>, QueryRejection>,
) -> Result<http::Response<Body>, Rejection> {
    let Query(query) = query.map_err(|error| Rejection::bad_request(error.body_text()))?;
    let names = &gateway.names;
    // For one version messages may stand under the earlier name too; these are older.
    let logs = [names.session_up_log_before(&session), names.session_up_log(&session)];
    let logs = logs.into_iter().filter(|_| query.log).collect();
    follow::follow(&gateway, names.session_up(&session), logs).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SessionsQuery {
    agent: Option<String>,
    after: Option<String>,
    #[serde(default)]
    log: bool,
}

async fn follow_sessions(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    headers: HeaderMap,
    query: Result<Query<SessionsQuery>, QueryRejection>,
) -> Result<http::Response<Body>, Rejection> {
    let Query(query) = query.map_err(|error| Rejection::bad_request(error.body_text()))?;
    let agent = query.agent.as_deref();
    let agent = agent.ok_or_else(|| Rejection::bad_request("agent is missing."))?;
    let agent = Id::parse(agent).map_err(|error| Rejection::bad_id(format!("agent {error}.")))?;
    let start = Start::read(&headers, query.after.as_deref(), query.log)?;
    announcements::follow(&gateway, &agent, start).await
}

/// The same at an older path.
async fn follow_sessions_of(
    _worker: Worker,
    State(gateway): State<Arc<Gateway>>,
    PathId(agent): PathId,
    headers: HeaderMap,
    query: Result<Query<SessionsQuery>, QueryRejection>,
) -> Result<http::Response<Body>, Rejection> {
    let Query(query) = query.map_err(|error| Rejection::bad_request(error.body_text()))?;
    if query.agent.is_some() {
        return Err(Rejection::bad_request("The agent stands in the path."));
    }
    let start = Start::read(&headers, query.after.as_deref(), query.log)?;
    announcements::follow(&gateway, &agent, start).await
}
