//! Publishing for workers: what is kept, once for each idempotency key, and what became of it.

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
    bus::{self, History, Keep, Outcome, Publish},
    gateway::Gateway,
    http::{rejection::Rejection, upgrade},
};

/// For so long a publish with the same idempotency key is not done again.
const ONCE_FOR: Duration = Duration::from_secs(600);

/// Longest idempotency key.
const KEY_BYTES_MAX: usize = 128;

/// How a message is published.
#[derive(Debug, Clone, Default)]
pub(super) struct How {
    /// With history, or without; `None`: as the endpoint does.
    pub(super) history: Option<bool>,
    /// The id that the worker gives it.
    pub(super) event_id: Option<Box<str>>,
    /// Of several publishes with one key one is done.
    pub(super) idempotency_key: Option<Box<str>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HowQuery {
    history: Option<bool>,
    event_id: Option<Box<str>>,
}

impl FromRequestParts<Arc<Gateway>> for How {
    type Rejection = Rejection;

    async fn from_request_parts(
        parts: &mut Parts,
        gateway: &Arc<Gateway>,
    ) -> Result<Self, Rejection> {
        let query = Query::<HowQuery>::from_request_parts(parts, gateway).await;
        let Query(HowQuery { history, event_id }) =
            query.map_err(|error| Rejection::bad_request(error.body_text()))?;
        let key = parts
            .headers
            .get("idempotency-key")
            .map(|key| key.to_str().map(Into::into).map_err(|_| bad_key()));
        let how = Self { history, event_id, idempotency_key: key.transpose()? };
        how.check()?;
        Ok(how)
    }
}

impl How {
    /// Whether its parts fit together.
    pub(super) fn check(&self) -> Result<(), Rejection> {
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

    /// What is kept of a message of this channel. `clock`: of the logs with one order.
    pub(super) fn keep(
        self,
        gateway: &Gateway,
        channel: &str,
        by_default: bool,
        clock: Option<String>,
    ) -> Keep {
        let needed = self.idempotency_key.is_some();
        if !self.history.unwrap_or(by_default || needed) {
            return Keep::Nothing;
        }
        let log = gateway.names.log(channel);
        let once = self.idempotency_key;
        let once = once.map(|key| (gateway.names.published_once(channel, &key).into(), ONCE_FOR));
        Keep::History(Box::new(History {
            log: log.into(),
            clock: clock.map(Into::into),
            event_id: self.event_id,
            dedup: once,
            unique: false,
            limits: gateway.config.history.limits(),
        }))
    }
}

fn bad_key() -> Rejection {
    let why = format!("An idempotency key must be 1 to {KEY_BYTES_MAX} visible characters.");
    Rejection::bad_request(why)
}

/// Publishes and waits for what becomes of it.
pub(super) async fn publish(
    gateway: &Gateway,
    channel: String,
    payload: Bytes,
    keep: Keep,
) -> Result<Response, Rejection> {
    let is_once = is_once(&keep);
    send(gateway, channel, payload, keep).await.map_err(|rejection| rejection.in_doubt(is_once))
}

/// The same for a command, which may be given twice.
pub(super) async fn command(
    gateway: &Gateway,
    channel: String,
    payload: Bytes,
) -> Result<Response, Rejection> {
    send(gateway, channel, payload, Keep::Nothing).await
}

async fn send(
    gateway: &Gateway,
    channel: String,
    payload: Bytes,
    keep: Keep,
) -> Result<Response, Rejection> {
    let answer = upgrade::deadline(gateway, async {
        gateway.bus.publishable().await;
        let outcome = enqueue(gateway, channel, payload, keep)?;
        told(outcome.await)
    });
    Ok(Json(answer.await?).into_response())
}

/// Whether a message that is published twice arrives once.
pub(super) fn is_once(keep: &Keep) -> bool {
    matches!(keep, Keep::History(history) if history.dedup.is_some())
}

/// Puts a message into the queue of the bus.
pub(super) fn enqueue(
    gateway: &Gateway,
    channel: String,
    payload: Bytes,
    keep: Keep,
) -> Result<oneshot::Receiver<Outcome>, Rejection> {
    if keep == Keep::Nothing && envelope::is_reserved(&payload) {
        return Err(Rejection::bad_request(
            "A message must not begin with the bytes FF, H and a digit.",
        ));
    }
    let (receipt, outcome) = bus::awaited();
    let channel = channel.into();
    gateway.hub.publish(Publish { channel, payload, keep, receipt: Some(receipt) })?;
    Ok(outcome)
}

/// What a worker is told of an outcome.
pub(super) fn told(
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
