//! Calls of tools over HTTP: begun, waited for, asked for later, cancelled. Knows no connection.

use std::{
    borrow::Cow,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    Extension,
    extract::{
        Path, Query, State,
        rejection::{BytesRejection, PathRejection, QueryRejection},
    },
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Deserialize;
use serde_json::{json, value::RawValue};
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;
use wsproxy_proto::{
    agents::{self, answer::Answer, outcome::Failure},
    names::Id,
};

use crate::{
    core::Core,
    endpoint::agents::{
        Agents,
        api::{
            answer::Asked,
            hearing::{Hearing, ToolRequest},
            kept::{self, Kept},
            relay_of, stream,
        },
        caller::CallUpdate,
        relay::RelayedCall,
    },
    http::{
        answer_time::AnswerTime,
        api::{PathId, Worker, raw, read},
        follow::KEEP_ALIVE,
        handshake, path,
        rejection::Rejection,
    },
    hub::{follower::FollowerQueue, sink::Sink},
    traces::TRACEPARENT,
};

/// Body of a call.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CallRequest<'a> {
    #[serde(borrow)]
    tool: Cow<'a, str>,
    #[serde(borrow)]
    params: Option<&'a RawValue>,
    timeout_ms: Option<u64>,
}

/// Calls a tool of a user's agent.
pub(super) async fn call(
    worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(agents): Extension<Arc<Agents>>,
    Extension(time): Extension<AnswerTime>,
    PathId(user): PathId,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let relay = relay_of(&agents)?;
    let call = tool_request(&core, &headers, &read(body)?, user, &worker)?;
    // The request is whole, and its deadline bounds the answer.
    time.lift();
    if core.is_closing() {
        relay.refuse(&call.relayed());
        return Ok(call.asked.failure(Failure::InstanceBusy).into_response());
    }
    if prefers_async(&headers) {
        // A task of its own: a client that hangs up leaves no call behind that is noted and not sent.
        let begun = core.tasks.spawn(begin_async(Arc::clone(&core), agents, call)).await;
        return begun.unwrap_or_else(|error| Err(Rejection::internal("A fault.").because(error)));
    }
    let mut hearing = Hearing::begin(&agents, call)?;
    if !wants_events(&headers) {
        let end = hearing.end().await;
        return Ok(hearing.asked().answer(end).into_response());
    }
    // Until the head is sent, an end is answered as without an event stream.
    let first = match timeout(KEEP_ALIVE, hearing.next()).await {
        Ok(Some(CallUpdate::Progress(data))) => stream::progress(&data),
        Ok(end) => return Ok(hearing.asked().answer(end).into_response()),
        Err(_) => stream::COMMENT,
    };
    Ok(stream::response(hearing, first))
}

/// Calls a tool and waits for its outcome.
///
/// # Errors
/// 400: the body is malformed. 404: this instance serves no agents.
pub(super) async fn call_once(
    (agents, core): (&Agents, &Core),
    user: Id,
    body: &[u8],
    worker: &Worker,
) -> Result<Response, Rejection> {
    let call = tool_request(core, &HeaderMap::new(), body, user, worker)?;
    let mut hearing = Hearing::begin(agents, call)?;
    let end = hearing.end().await;
    Ok(hearing.asked().answer(end).into_response())
}

/// Reads a call.
///
/// # Errors
/// 400: the body or a header is malformed.
fn tool_request(
    core: &Core,
    headers: &HeaderMap,
    body: &[u8],
    user: Id,
    worker: &Worker,
) -> Result<ToolRequest, Rejection> {
    raw::check(body)?;
    let CallRequest { tool, params, timeout_ms } = raw::parse(body)?;
    if tool.is_empty() {
        return Err(Rejection::bad_request("tool is empty."));
    }
    let params = params.map_or("{}", RawValue::get);
    if !params.starts_with('{') {
        return Err(Rejection::bad_request("params must be an object."));
    }
    let config = &core.config.agents;
    let longest = u64::try_from(config.call_timeout_max.as_millis()).unwrap_or(u64::MAX);
    let time = match timeout_ms {
        None => config.call_timeout.min(config.call_timeout_max),
        Some(millis) if (1..=longest).contains(&millis) => Duration::from_millis(millis),
        Some(_) => {
            let why = format!("timeout_ms must be 1 to {longest} ([agents] call_timeout_max).");
            return Err(Rejection::bad_request(why));
        }
    };
    let key = idempotency_key(headers)?;
    let has_key = key.is_some();
    let request = match key {
        Some(key) => key,
        None => path::parse_id("the id", &Uuid::now_v7().to_string())?,
    };
    let traceparent = headers.get(TRACEPARENT).and_then(|value| value.to_str().ok());
    let traceparent = match worker.trace.context() {
        Some(context) => Some(context.to_string()),
        None => traceparent.map(str::to_owned),
    };
    Ok(ToolRequest {
        asked: Asked { user, request, has_key },
        hash: agents::body_hash(&tool, params.as_bytes()),
        tool: tool.into_owned(),
        params: Bytes::copy_from_slice(params.as_bytes()),
        time,
        begun: SystemTime::now(),
        deadline: Instant::now() + time,
        traceparent,
        progress: wants_events(headers),
        caller: Arc::from(&*worker.name),
    })
}

/// Reads the caller's own id of a call.
///
/// # Errors
/// 400: it is no id.
fn idempotency_key(headers: &HeaderMap) -> Result<Option<Id>, Rejection> {
    let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
    let key = key.to_str().unwrap_or_default();
    let key = Id::parse(key);
    key.map(Some).map_err(|error| Rejection::bad_id(format!("The idempotency key {error}.")))
}

/// Returns whether a header lists a word (RFC 9110, section 5.6.1), whatever parameters the word has.
fn lists(headers: &HeaderMap, name: &str, word: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    let mut words = values.flat_map(|value| value.split(','));
    words
        .any(|listed| listed.split(';').next().is_some_and(|w| w.trim().eq_ignore_ascii_case(word)))
}

fn prefers_async(headers: &HeaderMap) -> bool {
    lists(headers, "prefer", "respond-async")
}

fn wants_events(headers: &HeaderMap) -> bool {
    lists(headers, "accept", "text/event-stream") && !prefers_async(headers)
}

/// Begins a call whose outcome is kept, and answers when its owner has it.
async fn begin_async(
    core: Arc<Core>,
    agents: Arc<Agents>,
    call: ToolRequest,
) -> Result<Response, Rejection> {
    let relay = relay_of(&agents)?;
    let asked = call.asked.clone();
    let (place, name) = ((&core.store, &core.names), (&asked.user, &asked.request));
    let begun = handshake::deadline(&core, async {
        Ok(kept::begin(place, name, call.hash, call.time).await?)
    });
    if let Some(kept) = begun.await? {
        return Ok(match kept.left_ms {
            _ if !kept.is(&asked.user, call.hash) => {
                asked.failure(Failure::Conflict).into_response()
            }
            Some(left) => accepted(&asked, left),
            None => asked.failure(Failure::Duplicate).into_response(),
        });
    }
    let (hash, deadline) = (call.hash, call.deadline);
    let call = RelayedCall { keep: true, ..call.relayed() };
    match relay.hand_over(&call).await {
        Ok(()) => {
            let left = deadline.saturating_duration_since(Instant::now()).as_millis();
            Ok(accepted(&asked, i64::try_from(left).unwrap_or(i64::MAX)))
        }
        Err(end) => {
            let was_sent =
                matches!(&end, CallUpdate::Refused(why) if why.code == "outcome_unknown");
            if !was_sent {
                let forgotten = async { Ok(kept::forget(place, name, hash).await?) };
                // A note that stays runs out.
                let _ = handshake::deadline(&core, forgotten).await;
            }
            Ok(asked.answer(Some(end)).into_response())
        }
    }
}

/// Answers that a call runs: 202.
fn accepted(asked: &Asked, left_ms: i64) -> Response {
    let body = json!({
        "request_id": asked.request.as_str(),
        "status": "running",
        "deadline_ms": left_ms.max(0),
    });
    let mut response = (StatusCode::ACCEPTED, axum::Json(body)).into_response();
    let location = format!("/api/v1/agents/{}/calls/{}", asked.user, asked.request);
    let headers = response.headers_mut();
    if let Ok(location) = HeaderValue::try_from(location) {
        headers.insert(header::LOCATION, location);
    }
    headers.insert("preference-applied", HeaderValue::from_static("respond-async"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WaitQuery {
    /// Seconds to wait for the outcome.
    #[serde(default)]
    wait: u64,
}

/// Answers with the outcome of an asynchronous call.
pub(super) async fn outcome(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(agents): Extension<Arc<Agents>>,
    Extension(time): Extension<AnswerTime>,
    path: Result<Path<(String, String)>, PathRejection>,
    query: Result<Query<WaitQuery>, QueryRejection>,
) -> Result<Response, Rejection> {
    relay_of(&agents)?;
    let asked = named_call(path)?;
    let Query(WaitQuery { wait }) =
        query.map_err(|error| Rejection::bad_request(error.body_text()))?;
    if wait > WAIT_MAX {
        return Err(Rejection::bad_request(format!("wait must be 0 to {WAIT_MAX} seconds.")));
    }
    time.lift();
    let load = async || {
        let loaded = handshake::deadline(&core, async {
            Ok(kept::load((&core.store, &core.names), &asked.request).await?)
        });
        let kept = loaded.await?.filter(|kept| kept.user == asked.user);
        kept.ok_or_else(|| Rejection::not_found("There is no such call, or it is forgotten."))
    };
    if wait == 0 {
        return Ok(told(&asked, &load().await?));
    }
    let until = Instant::now() + Duration::from_secs(wait);
    // Subscribe first: an outcome that comes behind the look into the store is then heard.
    let queue = FollowerQueue::new(QUEUE_BYTES);
    let topic = core.names.response(&asked.request).into();
    let sink = Sink::Follower(Arc::clone(&queue));
    let _subscription =
        handshake::deadline(&core, async { Ok(core.hub.subscribe([(topic, sink)]).await?) })
            .await?;
    loop {
        let kept = load().await?;
        let Some(left) = kept.left_ms.filter(|left| *left > -LATE_MS) else {
            return Ok(told(&asked, &kept));
        };
        // A message, a gap of the bus, or one that did not fit: each is a reason to look again. So is a deadline.
        let late = Duration::from_millis(u64::try_from(left + LATE_MS).unwrap_or(0) + 1);
        let look = until.min(Instant::now() + late);
        tokio::select! {
            _ = timeout_at(look, queue.next()) => {}
            () = core.followers_end.cancelled() => return Ok(told(&asked, &kept)),
        }
        if Instant::now() >= until {
            return Ok(told(&asked, &load().await?));
        }
    }
}

/// Answers with the state of a call: 200, 202 or 504.
fn told(asked: &Asked, kept: &Kept) -> Response {
    match (kept.left_ms, Answer::parse(&kept.text)) {
        (Some(left), _) if left > -LATE_MS => accepted(asked, left),
        (Some(_), _) => asked.failure(Failure::Timeout).into_response(),
        (None, Some(Answer::Ended(answer))) => asked.kept(&answer, kept.too_large).into_response(),
        (None, _) => Rejection::internal("The outcome cannot be read.").into_response(),
    }
}

/// Cancels a call: 202.
pub(super) async fn cancel(
    _worker: Worker,
    State(_core): State<Arc<Core>>,
    Extension(agents): Extension<Arc<Agents>>,
    path: Result<Path<(String, String)>, PathRejection>,
) -> Result<Response, Rejection> {
    let relay = relay_of(&agents)?;
    let Asked { user, request, .. } = named_call(path)?;
    let was_unsent = relay.cancel_unsent(&user, &request);
    if was_unsent != Some(true) {
        match agents.local(&user) {
            Some(inbox) => {
                inbox.cancel(&request);
                // The agent may have come a moment ago, before another instance has sent the call.
                relay.cancel_waiting(&user, &request);
            }
            None => match relay.cancel(&user, &request).await {
                // The call of this instance was just being sent, to no instance: it ends as cancelled.
                Err(refusal) if was_unsent.is_some() && refusal.code == "not_found" => {}
                told => told?,
            },
        }
    }
    let body = json!({ "request_id": request.as_str() });
    Ok((StatusCode::ACCEPTED, axum::Json(body)).into_response())
}

/// Reads the call that a path names. Its caller knows the id, so a repetition is known too.
fn named_call(path: Result<Path<(String, String)>, PathRejection>) -> Result<Asked, Rejection> {
    let Path((user, request)) = path.map_err(|error| Rejection::bad_id(error.body_text()))?;
    let user = path::parse_id("user_id", &user)?;
    Ok(Asked { user, request: path::parse_id("request_id", &request)?, has_key: true })
}

/// Upper bound of the seconds that a question for an outcome waits.
const WAIT_MAX: u64 = 60;

/// Milliseconds behind its deadline after which a call whose outcome did not come counts as timed out.
const LATE_MS: i64 = 2000;

/// Upper bound of the bytes that wait for a question. An outcome that does not fit is read from the store all the same.
const QUEUE_BYTES: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_in_a_list_is_found_whatever_its_parameters() {
        let mut headers = HeaderMap::new();
        assert!(!prefers_async(&headers) && !wants_events(&headers));
        headers.append(
            "accept",
            HeaderValue::from_static("application/json, Text/Event-Stream;q=0.9"),
        );
        assert!(wants_events(&headers));
        headers.append("prefer", HeaderValue::from_static("wait=10"));
        headers.append("prefer", HeaderValue::from_static("handling=lenient, respond-async"));
        assert!(prefers_async(&headers) && !wants_events(&headers));
    }
}
