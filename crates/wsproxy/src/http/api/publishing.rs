//! Publishing for workers over HTTP: history, idempotency keys, and the answer with the outcome.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{FromRequestParts, Query},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::request::Parts;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use wsproxy_proto::history::{check_event_id, envelope};

use crate::{
    bus::publish::{self, History, Keep, Outcome, Publish},
    core::Core,
    http::{handshake, rejection::Rejection},
    traces::{self, Kind, Trace},
};

/// Options of a worker for one message.
#[derive(Debug, Clone, Default)]
pub(crate) struct PublishOptions {
    /// Keeps the message in the history, or does not; `None`: the endpoint's default.
    pub(crate) history: Option<bool>,
    /// The worker's own id for the message.
    pub(crate) event_id: Option<Box<str>>,
    /// Several publishes with the same key count as one.
    pub(crate) idempotency_key: Option<Box<str>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OptionsQuery {
    history: Option<bool>,
    event_id: Option<Box<str>>,
}

impl FromRequestParts<Arc<Core>> for PublishOptions {
    type Rejection = Rejection;

    async fn from_request_parts(parts: &mut Parts, core: &Arc<Core>) -> Result<Self, Rejection> {
        let query = Query::<OptionsQuery>::from_request_parts(parts, core).await;
        let Query(OptionsQuery { history, event_id }) =
            query.map_err(|error| Rejection::bad_request(error.body_text()))?;
        let key = parts
            .headers
            .get("idempotency-key")
            .map(|key| key.to_str().map(Into::into).map_err(|_| bad_key()));
        let options = Self { history, event_id, idempotency_key: key.transpose()? };
        options.check()?;
        Ok(options)
    }
}

impl PublishOptions {
    /// Checks the options.
    ///
    /// # Errors
    /// 400: an option is malformed, or an idempotency key comes with `history=false`.
    pub(crate) fn check(&self) -> Result<(), Rejection> {
        if let Some(event_id) = &self.event_id {
            check_event_id(event_id)
                .map_err(|error| Rejection::bad_request(format!("event_id {error}.")))?;
        }
        if let Some(key) = &self.idempotency_key {
            if !(1..=KEY_BYTES_MAX).contains(&key.len()) {
                return Err(bad_key());
            }
            if self.history == Some(false) {
                return Err(Rejection::bad_request("An idempotency key needs history."));
            }
        }
        Ok(())
    }

    /// Returns what the store keeps of a message on `channel`. `clock` names the clock of logs that share one order.
    pub(crate) fn keep(
        self,
        core: &Core,
        channel: &str,
        by_default: bool,
        clock: Option<String>,
    ) -> Keep {
        let needed = self.idempotency_key.is_some();
        if !self.history.unwrap_or(by_default || needed) {
            return Keep::Nothing;
        }
        let log = core.names.log(channel);
        let once = self.idempotency_key;
        let once = once.map(|key| (core.names.published_once(channel, &key).into(), ONCE_FOR));
        Keep::History(Box::new(History {
            log: log.into(),
            clock: clock.map(Into::into),
            event_id: self.event_id,
            dedup: once,
            unique: false,
            limits: core.config.history.limits(),
        }))
    }
}

fn bad_key() -> Rejection {
    let why = format!("An idempotency key must be 1 to {KEY_BYTES_MAX} visible characters.");
    Rejection::bad_request(why)
}

/// A worker's message on its way, for [`publish`] and [`command`].
pub(crate) struct Outgoing<'a> {
    /// Span of the worker's call.
    pub(crate) trace: &'a Trace,
    /// Channel of the message.
    pub(crate) channel: String,
    /// The message.
    pub(crate) payload: Bytes,
}

/// Publishes a message and answers with its outcome.
///
/// # Errors
/// 400: a reserved payload. 409, 500, 503, 504: the message was not published, or its outcome is not known.
pub(crate) async fn publish(
    core: &Core,
    message: Outgoing<'_>,
    keep: Keep,
) -> Result<Response, Rejection> {
    let is_once = is_once(&keep);
    send(core, message, keep).await.map_err(|rejection| rejection.in_doubt(is_once))
}

/// Publishes a command. A worker may repeat a command, so every passing error is retryable.
///
/// # Errors
/// As [`publish`].
pub(crate) async fn command(core: &Core, message: Outgoing<'_>) -> Result<Response, Rejection> {
    send(core, message, Keep::Nothing).await
}

async fn send(core: &Core, message: Outgoing<'_>, keep: Keep) -> Result<Response, Rejection> {
    Ok(Json(outcome(core, message, keep).await?).into_response())
}

/// Publishes a message and returns the JSON of its outcome.
///
/// # Errors
/// As [`publish`].
pub(crate) async fn outcome(
    core: &Core,
    Outgoing { trace, channel, payload }: Outgoing<'_>,
    keep: Keep,
) -> Result<Value, Rejection> {
    let mut span = trace.child("publish", Kind::Producer);
    span.add("messaging.destination.name", || traces::Value::text(&channel));
    span.add("messaging.message.body.size", || (payload.len() as u64).into());
    let answer = handshake::deadline(core, async {
        core.bus.publishable().await;
        let outcome = enqueue(core, channel, payload, keep)?;
        told(outcome.await)
    });
    let answer = answer.await;
    match &answer {
        Ok(told) => {
            span.add("wsproxy.receivers", || told["receivers"].as_u64().unwrap_or(0).into());
            if let Some(event_id) = told["event_id"].as_str() {
                span.add("messaging.message.id", || traces::Value::text(event_id));
            }
        }
        Err(rejection) => span.fail(rejection.code, rejection.status.is_server_error()),
    }
    answer
}

/// Returns whether the message has an idempotency key, so that a repeated publish has no effect.
pub(crate) fn is_once(keep: &Keep) -> bool {
    matches!(keep, Keep::History(history) if history.dedup.is_some())
}

/// Puts a message into the bus's publish queue. The receiver gets the outcome.
///
/// # Errors
/// 400: a reserved payload. 503: the queue is full or closed.
pub(crate) fn enqueue(
    core: &Core,
    channel: String,
    payload: Bytes,
    keep: Keep,
) -> Result<oneshot::Receiver<Outcome>, Rejection> {
    if keep == Keep::Nothing && envelope::is_reserved(&payload) {
        // Instances would read the payload as an entry of a history.
        return Err(Rejection::bad_request(
            "A message must not begin with the bytes FF, H and a digit.",
        ));
    }
    let (receipt, outcome) = publish::awaited();
    let channel = channel.into();
    core.hub.publish(Publish { channel, payload, keep, receipt: Some(receipt) })?;
    Ok(outcome)
}

/// Returns the JSON that tells a worker the outcome of a publish.
///
/// # Errors
/// 409, 500, 503: the bus refused the message. 503: the bus was lost before the outcome came.
pub(crate) fn told(
    outcome: Result<Outcome, oneshot::error::RecvError>,
) -> Result<Value, Rejection> {
    match outcome {
        Ok(Outcome::Received(receivers)) => Ok(json!({ "receivers": receivers })),
        Ok(Outcome::Kept) => Ok(json!({ "receivers": 0 })),
        Ok(Outcome::Stored { receivers, id, duplicate }) => {
            let event_id = id.to_string();
            Ok(json!({ "receivers": receivers, "event_id": event_id, "duplicate": duplicate }))
        }
        Ok(Outcome::Refused(refusal)) => Err(Rejection::not_done(refusal)),
        Ok(Outcome::Lost) | Err(_) => {
            Err(Rejection::bus_unavailable("The bus was lost; the message may not have arrived."))
        }
    }
}

/// Time for which the store remembers an idempotency key.
const ONCE_FOR: Duration = Duration::from_secs(600);

/// Upper bound of an idempotency key.
const KEY_BYTES_MAX: usize = 128;
