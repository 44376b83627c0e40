//! Commands to all instances that end agents' connections: published by an instance or by `wsproxy agents`, executed
//! by each instance.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use uuid::Uuid;
use wsproxy_proto::{disconnect::Disconnect, names::Id};

use crate::{
    bus::publish::{self, BusError, Keep, Outcome, Publish},
    database::secrets::SecretId,
    endpoint::agents::presence::Presence,
    hub::{
        Hub,
        follower::{Followed, FollowerQueue},
        sink::Sink,
    },
};

/// The connections of an instance, handshakes included, which commands end.
pub trait Controlled: Send + Sync {
    /// Ends the connections that a command is for. Returns the number of those that no command had ended before.
    fn execute(&self, order: &Order) -> usize;
    /// Returns the secrets that opened the connections.
    fn opened(&self) -> Opened;
}

/// The secrets that opened the connections of an instance.
#[derive(Debug, Default)]
pub struct Opened {
    /// Users and secrets.
    pub secrets: Vec<(Id, SecretId)>,
    /// A handshake has a secret that is not judged yet.
    pub is_judging: bool,
}

/// A command to all instances.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "OrderJson", into = "OrderJson")]
pub struct Order {
    /// The user whose connections end.
    pub user: Id,
    /// The reason of the ending: [`Disconnect::REVOKED`] or [`Disconnect::BACKEND`].
    pub why: &'static Disconnect,
    /// Words for the agent, in place of those of the table.
    pub reason: Option<String>,
    /// The secret that was revoked; `None`: connections of any secret end.
    pub secret: Option<Uuid>,
}

/// The JSON form of a command.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct OrderJson {
    op: Operation,
    user_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    secret_id: Option<Uuid>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Operation {
    Revoke,
    Disconnect,
}

impl Order {
    /// Makes the command that ends the connections which a revoked secret opened; `None`: all of the user.
    #[must_use]
    pub const fn revoke(user: Id, secret: Option<Uuid>) -> Self {
        Self { user, why: &Disconnect::REVOKED, reason: None, secret }
    }

    /// Makes the command that ends a user's connections, since a person or an application wants that.
    #[must_use]
    pub const fn disconnect(user: Id, reason: Option<String>) -> Self {
        Self { user, why: &Disconnect::BACKEND, reason, secret: None }
    }

    /// Returns the message on the channel.
    #[must_use]
    pub fn payload(&self) -> Bytes {
        serde_json::to_vec(self).unwrap_or_default().into()
    }
}

impl From<Order> for OrderJson {
    fn from(Order { user, why, reason, secret }: Order) -> Self {
        let op = match *why == Disconnect::REVOKED {
            true => Operation::Revoke,
            false => Operation::Disconnect,
        };
        Self { op, user_id: user.to_string(), reason, secret_id: secret }
    }
}

impl TryFrom<OrderJson> for Order {
    type Error = String;

    fn try_from(json: OrderJson) -> Result<Self, String> {
        let OrderJson { op, user_id, reason, secret_id: secret } = json;
        let user = Id::parse(&user_id).map_err(|error| format!("userId {error}"))?;
        if reason.as_ref().is_some_and(|reason| reason.len() > REASON_BYTES_MAX) {
            return Err(format!("reason is longer than {REASON_BYTES_MAX} bytes"));
        }
        let why = match op {
            Operation::Revoke => &Disconnect::REVOKED,
            Operation::Disconnect => &Disconnect::BACKEND,
        };
        Ok(Self { user, why, reason, secret })
    }
}

/// Publishes a command, and returns the number of instances that received it.
///
/// # Errors
/// Instances may not have the command.
pub async fn tell_all(hub: &Hub, channel: Arc<str>, order: &Order) -> Result<u64, BusError> {
    let (receipt, outcome) = publish::awaited();
    let (payload, receipt) = (order.payload(), Some(receipt));
    hub.publish(Publish { channel, payload, keep: Keep::Nothing, receipt })?;
    match outcome.await {
        Ok(Outcome::Received(instances)) => Ok(instances),
        Ok(Outcome::Refused(refusal)) => Err(BusError::NotDone(refusal)),
        _ => Err(BusError::Unreachable("the command may not have arrived".into())),
    }
}

/// Follows the commands until `end`.
pub(super) async fn run(presence: Arc<Presence>, end: CancellationToken) {
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            () = follow(&presence) => sleep(RETRY).await,
        }
    }
}

/// Follows the commands until messages may have been missed.
async fn follow(presence: &Presence) {
    let queue = FollowerQueue::new(QUEUE_BYTES);
    let channel = presence.names.agents_control().into();
    let sinks = [(channel, Sink::Follower(Arc::clone(&queue)))];
    let _subscription = match presence.hub.subscribe(sinks).await {
        Ok(subscription) => subscription,
        Err(error) => return debug!(%error, "Commands for agents cannot be followed now."),
    };
    // Commands before the subscription may have been missed.
    let mut recheck = Some(Instant::now());
    loop {
        tokio::select! {
            entry = queue.next() => match entry {
                Some(Followed::Message(payload)) => received(presence, &payload),
                Some(Followed::Gap(_)) => recheck = Some(Instant::now()),
                None => return warn!("There are more commands for agents than this instance can follow."),
            },
            () = sleep_until(recheck.unwrap_or_else(Instant::now)), if recheck.is_some() => {
                recheck = match presence.recheck().await {
                    Ok(is_judging) => is_judging.then(|| Instant::now() + JUDGED_WITHIN),
                    Err(error) => {
                        debug!(%error, "Revoked secrets of agents cannot be read now.");
                        Some(Instant::now() + RECHECK_RETRY)
                    }
                };
            }
        }
    }
}

fn received(presence: &Presence, payload: &[u8]) {
    match serde_json::from_slice::<Order>(payload) {
        Ok(order) => presence.execute(&order),
        Err(error) => {
            presence.counters.bad_commands.add(1);
            if let Some(left_out) = presence.counters.bad_command_lines.pass() {
                warn!(%error, left_out, "A command for agents could not be read.");
            }
        }
    }
}

/// Longest reason: a close frame has no room for more.
pub const REASON_BYTES_MAX: usize = 123;

/// Upper bound of waiting commands, in bytes: some ten thousand commands.
const QUEUE_BYTES: usize = 4 * 1024 * 1024;

const RETRY: Duration = Duration::from_millis(500);

/// Pause before revoked secrets are read again where the database did not answer.
const RECHECK_RETRY: Duration = Duration::from_secs(2);

/// Time within which the secret of a handshake is judged.
const JUDGED_WITHIN: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_written_and_read_back() {
        let user = Id::parse("u-1").unwrap();
        for (order, expected) in [
            (Order::revoke(user.clone(), None), r#"{"op":"revoke","userId":"u-1"}"#),
            (
                Order::revoke(user.clone(), Some(Uuid::nil())),
                r#"{"op":"revoke","userId":"u-1","secretId":"00000000-0000-0000-0000-000000000000"}"#,
            ),
            (
                Order::disconnect(user, Some("bye".into())),
                r#"{"op":"disconnect","userId":"u-1","reason":"bye"}"#,
            ),
        ] {
            assert_eq!(order.payload(), expected);
            assert_eq!(serde_json::from_str::<Order>(expected).unwrap(), order);
        }
    }

    #[test]
    fn an_odd_order_is_refused() {
        let long = format!(r#"{{"op":"disconnect","userId":"u","reason":"{}"}}"#, "x".repeat(124));
        for bad in [
            "",
            "[]",
            r#"{"op":"revoke"}"#,
            r#"{"op":"other","userId":"u"}"#,
            r#"{"op":"revoke","userId":"a:b"}"#,
            r#"{"op":"revoke","userId":"u","secretId":"x"}"#,
            r#"{"op":"revoke","userId":"u","other":1}"#,
            &long,
        ] {
            assert!(serde_json::from_str::<Order>(bad).is_err(), "{bad}");
        }
    }
}
