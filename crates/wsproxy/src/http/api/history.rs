//! Reading a channel's history over HTTP.

use std::sync::Arc;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};
use wsproxy_proto::history::{After, Entry, Lost, Position, rule};

use crate::{
    core::Core,
    http::{handshake, rejection::Rejection},
    store::command::SnapshotOf,
};

/// The part of a history that a worker asks for.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Range {
    /// Channel of an event history: `broadcast` or `user:{id}`.
    pub(crate) channel: Option<String>,
    /// Event id behind which the answer begins; absent: the start of the history.
    pub(crate) after: Option<String>,
    /// Upper bound of the entries.
    pub(crate) limit: Option<usize>,
}

/// Answers with the entries of a channel's history behind an event id.
///
/// # Errors
/// 400: a malformed range. 503, 504: the store is away or slow.
pub(crate) async fn read(
    core: &Arc<Core>,
    channel: &str,
    clock: Option<String>,
    range: Range,
) -> Result<Response, Rejection> {
    let after = After::parse(range.after.as_deref().unwrap_or_default())
        .map_err(|error| Rejection::bad_request(format!("after {error}.")))?;
    let limit = range.limit.unwrap_or(LIMIT_MAX);
    if !(1..=LIMIT_MAX).contains(&limit) {
        return Err(Rejection::bad_request(format!("limit must be 1 to {LIMIT_MAX}.")));
    }
    let of = SnapshotOf {
        logs: vec![core.names.log(channel).into()],
        clock: clock.map(Into::into),
        head_ttl: None,
        after: Some(after.unwrap_or(After::Position(Position::START))),
        entries_max: limit,
        streams_of: None,
    };
    let (snapshot, _) =
        handshake::deadline(core, async { Ok(core.store.snapshot(of).await?) }).await?;
    let ttl = core.config.history.limits().ttl;
    let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
    let judge = |after| rule::resume(after, ttl_ms, &snapshot);
    // A log that was never written has lost nothing.
    let is_empty = snapshot.logs.iter().all(|log| log.head.is_none());
    let lost = match snapshot.after.position() {
        Ok(Position::START) if is_empty => None,
        after => after.and_then(judge).err(),
    };
    // The worker passes this text as `after` when it reads on.
    let position = After::Position(snapshot.position()).to_string();
    let log = snapshot.logs.into_iter().next().unwrap_or_default();
    let events: Vec<Value> = log.entries.iter().map(entry).collect();
    let body = json!({
        "events": events,
        "complete": log.complete,
        "position": position,
        "history_lost": lost.map(Lost::label),
    });
    Ok(Json(body).into_response())
}

fn entry(entry: &Entry) -> Value {
    let mut event = json!({ "event_id": entry.id.to_string() });
    match std::str::from_utf8(&entry.data) {
        Ok(text) => event["data"] = text.into(),
        Err(_) => event["data_base64"] = BASE64_STANDARD.encode(&entry.data).into(),
    }
    if let Some(own) = &entry.event_id {
        event["own_event_id"] = (**own).into();
    }
    event
}

/// Upper bound of the entries in one answer.
const LIMIT_MAX: usize = 1000;
