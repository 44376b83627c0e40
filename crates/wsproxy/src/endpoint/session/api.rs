//! Sessions in the worker API: tokens, messages, token streams, history, clients' messages, announcements.

use std::{ops::RangeInclusive, sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
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
use tracing::info;
use uuid::Uuid;
use wsproxy_proto::names::Id;

use crate::{
    auth::session::{self, TokenScope},
    core::Core,
    endpoint::session::{
        Sessions,
        announcements::{self, Start},
    },
    http::{
        Body,
        api::{
            PathId, Worker, check_close,
            history::{self, Range},
            optional_json,
            publishing::{self, Outgoing, PublishOptions, publish},
            raw, read,
        },
        follow, handshake, path,
        rejection::Rejection,
    },
    store::{
        command::StoreError,
        token_streams::{StreamCommand, StreamError, StreamHead, StreamOp, StreamOutcome},
    },
};

/// Makes the routes of sessions.
pub fn router(sessions: &Arc<Sessions>) -> Router<Arc<Core>> {
    Router::new()
        .route("/api/v1/sessions/{session_id}/token", post(create_token))
        .route("/api/v1/sessions/{session_id}/messages", post(publish_message))
        .route("/api/v1/sessions/{session_id}/history", get(read_history))
        .route("/api/v1/sessions/{session_id}/streams/{stream_id}", post(change_stream))
        .route("/api/v1/sessions/{session_id}/close", post(close_session))
        .route("/api/v1/sessions/{session_id}/upstream", get(follow_upstream))
        .route("/api/v1/sessions/events", get(follow_sessions))
        .route("/api/v1/agents/{agent_id}/sessions/events", get(follow_sessions_of))
        .layer(Extension(Arc::clone(sessions)))
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenRequest {
    ttl_seconds: Option<u64>,
    /// The token opens event streams until it expires, rather than one connection.
    #[serde(default)]
    event_stream: bool,
    /// The token opens the path of this agent only.
    agent_id: Option<String>,
}

async fn create_token(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    PathId(session): PathId,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let request: TokenRequest = optional_json(body)?;
    let ttl = match request.ttl_seconds {
        None => core.config.sessions.token_ttl,
        Some(seconds @ 1..=TOKEN_TTL_MAX) => Duration::from_secs(seconds),
        Some(_) => {
            return Err(Rejection::bad_request(format!(
                "ttl_seconds must be 1 to {TOKEN_TTL_MAX}."
            )));
        }
    };
    let agent = request.agent_id.map(|agent| path::parse_id("agent_id", &agent)).transpose()?;
    let scope = TokenScope { agent, event_stream: request.event_stream };
    let key = core.names.session_auth(&session);
    let issued = async { Ok(session::issue(&core.store, &key, ttl, &scope).await?) };
    let token = handshake::deadline(&core, issued).await?;
    let body =
        json!({ "session_id": session.as_str(), "token": token, "expires_in": ttl.as_secs() });
    Ok((StatusCode::CREATED, [(header::CACHE_CONTROL, "no-store")], Json(body)).into_response())
}

async fn publish_message(
    worker: Worker,
    State(core): State<Arc<Core>>,
    PathId(session): PathId,
    options: PublishOptions,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let payload = read(body)?;
    let channel = core.names.session_down(&session);
    let keep = options.keep(&core, &channel, false, None);
    publish(&core, Outgoing { trace: &worker.trace, channel, payload }, keep).await
}

async fn read_history(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    PathId(session): PathId,
    range: Result<Query<Range>, QueryRejection>,
) -> Result<Response, Rejection> {
    let Query(range) = range.map_err(|error| Rejection::bad_request(error.body_text()))?;
    if range.channel.is_some() {
        return Err(Rejection::bad_request("A session has one channel."));
    }
    history::read(&core, &core.names.session_down(&session), None, range).await
}

/// Operation of a worker on a token stream. Each operation's members have a type of their own: an internally tagged
/// enum could not keep `meta` and `error` byte for byte.
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

/// Parses an operation on a token stream.
///
/// # Errors
/// 400: the body does not follow the schema, or the lease is out of range.
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
    State(core): State<Arc<Core>>,
    path: Result<Path<(String, String)>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let Path((session, stream)) = path.map_err(|error| Rejection::bad_id(error.body_text()))?;
    let (session, stream) =
        (path::parse_id("session_id", &session)?, path::parse_id("stream_id", &stream)?);
    let op = stream_op(&read(body)?)?;
    let is_once = !matches!(op, StreamOp::Append { seq: None, .. });
    let command = StreamCommand { session, stream, op, limits: core.config.history.limits() };
    let changed = handshake::deadline(&core, async {
        core.store.stream(command).await.map_err(stream_rejection)
    });
    let StreamHead { seq, id } = changed.await.map_err(|rejection| rejection.in_doubt(is_once))?;
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

/// Maps errors of token streams to 400, 404, 409 and 413, and errors of the store to their own statuses.
fn stream_rejection(error: StreamError) -> Rejection {
    match error {
        StreamError::NotFound => {
            Rejection::not_found("There is no such stream, or it has expired.")
        }
        StreamError::Exists => Rejection::conflict("There is such a stream already."),
        StreamError::Ended(_) => Rejection::conflict("The stream has ended."),
        StreamError::WrongSeq { .. } => {
            Rejection::conflict("The stream has another number of appends.")
        }
        StreamError::BadJson => Rejection::bad_request("meta and error must be JSON objects."),
        StreamError::TooLarge => Rejection::too_large("The stream's text is too large."),
        // Only the reaper gets this error.
        StreamError::LeaseRuns => StoreError::Refused(error.to_string()).into(),
        StreamError::Store(error) => error.into(),
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
    worker: Worker,
    State(core): State<Arc<Core>>,
    PathId(session): PathId,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let request: CloseRequest = optional_json(body)?;
    check_close(request.code, request.reason.as_deref())?;
    info!(
        key = &*worker.name,
        session_id = session.as_str(),
        connection_id = request.connection_id.map(tracing::field::display),
        reason = request.reason,
        "A worker ends a session."
    );
    let command = json!({
        "op": "close",
        "code": request.code,
        "reason": request.reason,
        "connection_id": request.connection_id,
    });
    let channel = core.names.session_control(&session);
    let payload = command.to_string().into();
    publishing::command(&core, Outgoing { trace: &worker.trace, channel, payload }).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FollowQuery {
    #[serde(default)]
    log: bool,
}

async fn follow_upstream(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    PathId(session): PathId,
    query: Result<Query<FollowQuery>, QueryRejection>,
) -> Result<http::Response<Body>, Rejection> {
    let Query(query) = query.map_err(|error| Rejection::bad_request(error.body_text()))?;
    let names = &core.names;
    // The previous version wrote to the log's earlier name, so the entries there are older.
    let logs = [names.session_up_log_before(&session), names.session_up_log(&session)];
    let logs = logs.into_iter().filter(|_| query.log).collect();
    let entries_max = core.config.sessions.up_log_entries_max;
    follow::follow(&core, names.session_up(&session), logs, entries_max).await
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
    State(core): State<Arc<Core>>,
    Extension(sessions): Extension<Arc<Sessions>>,
    headers: HeaderMap,
    query: Result<Query<SessionsQuery>, QueryRejection>,
) -> Result<http::Response<Body>, Rejection> {
    let Query(query) = query.map_err(|error| Rejection::bad_request(error.body_text()))?;
    let agent = query.agent.as_deref();
    let agent = agent.ok_or_else(|| Rejection::bad_request("agent is missing."))?;
    let agent = Id::parse(agent).map_err(|error| Rejection::bad_id(format!("agent {error}.")))?;
    let start = Start::read(&headers, query.after.as_deref(), query.log)?;
    announcements::follow(&sessions, &core, &agent, start).await
}

/// As [`follow_sessions`], at an older path.
async fn follow_sessions_of(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(sessions): Extension<Arc<Sessions>>,
    PathId(agent): PathId,
    headers: HeaderMap,
    query: Result<Query<SessionsQuery>, QueryRejection>,
) -> Result<http::Response<Body>, Rejection> {
    let Query(query) = query.map_err(|error| Rejection::bad_request(error.body_text()))?;
    if query.agent.is_some() {
        return Err(Rejection::bad_request("The agent stands in the path."));
    }
    let start = Start::read(&headers, query.after.as_deref(), query.log)?;
    announcements::follow(&sessions, &core, &agent, start).await
}

/// Upper bound of a token's life in seconds.
const TOKEN_TTL_MAX: u64 = 24 * 3600;

/// Default lease of a token stream in milliseconds.
const LEASE_MS: u64 = 15_000;

/// Leases that a worker may ask for.
const LEASE_ALLOWED: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);

/// The routes of the family in the worker API: method, and path in OpenAPI's form.
pub const ROUTES: &[(&str, &str)] = &[
    ("post", "/api/v1/sessions/{session_id}/token"),
    ("post", "/api/v1/sessions/{session_id}/messages"),
    ("post", "/api/v1/sessions/{session_id}/close"),
    ("get", "/api/v1/sessions/{session_id}/upstream"),
    ("get", "/api/v1/sessions/events"),
    ("get", "/api/v1/agents/{agent_id}/sessions/events"),
    ("get", "/api/v1/sessions/{session_id}/history"),
    ("post", "/api/v1/sessions/{session_id}/streams/{stream_id}"),
];
