//! Reading a channel's history.

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
    gateway::Gateway,
    http::{rejection::Rejection, upgrade},
    store::SnapshotOf,
};

/// Most entries of one answer.
const LIMIT_MAX: usize = 1000;

/// Where to read and how much.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Range {
    /// The channel, where there are several: `broadcast` or `user:{id}`.
    pub(super) channel: Option<String>,
    /// Behind this event id; absent: from the start.
    pub(super) after: Option<String>,
    /// At most so many.
    pub(super) limit: Option<usize>,
}

/// The entries of a channel's history behind an event id.
pub(super) async fn read(
    gateway: &Arc<Gateway>,
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
        logs: vec![gateway.names.log(channel).into()],
        clock: clock.map(Into::into),
        head_ttl: None,
        after: Some(after.unwrap_or(After::Position(Position::START))),
        entries_max: limit,
        streams_of: None,
    };
    let (snapshot, _) =
        upgrade::deadline(gateway, async { Ok(gateway.store.snapshot(of).await?) }).await?;
    let ttl = gateway.config.history.limits().ttl;
    let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
    let judge = |after| rule::resume(after, ttl_ms, &snapshot);
    // A log that was never written has lost nothing.
    let is_empty = snapshot.logs.iter().all(|log| log.head.is_none());
    let lost = match snapshot.after.position() {
        Ok(Position::START) if is_empty => None,
        after => after.and_then(judge).err(),
    };
    // In the form that `after` takes.
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
