//! Commands to connections on every instance: published by one instance, executed by each.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, info, warn};
use uuid::Uuid;
use wsproxy_conn::clock;
use wsproxy_proto::{
    disconnect::{self, Disconnect},
    names::{Id, events::Revoked},
};

use crate::{
    bus::publish::{self, BusError, Keep, Outcome, Publish},
    client::Client,
    hub::{
        follower::{Followed, FollowerQueue},
        sink::Sink,
    },
    registry::Registry,
    store::command::StoreError,
};

/// The connections that a command is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Every connection of a user.
    User(Id),
    /// One connection.
    Connection(Uuid),
    /// Every connection that was opened with the token of this name (`jti`).
    Token(String),
}

impl Target {
    /// Returns the user, the connection and the name of the token; one of them is given.
    pub fn parts(&self) -> (Option<&str>, Option<Uuid>, Option<&str>) {
        match self {
            Self::User(user) => (Some(user.as_str()), None, None),
            Self::Connection(connection) => (None, Some(*connection), None),
            Self::Token(token) => (None, None, Some(token)),
        }
    }

    /// Returns the subject of a revocation; `None` for a single connection, which has nothing to revoke.
    fn revoked(&self) -> Option<Revoked<'_>> {
        match self {
            Self::User(user) => Some(Revoked::User(user.as_str())),
            Self::Token(token) => Some(Revoked::Token(token)),
            Self::Connection(_) => None,
        }
    }
}

/// The reason why a command did not reach all connections.
#[derive(Debug, thiserror::Error)]
pub enum DisconnectError {
    /// The revocation was not stored.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The command was not published to other instances.
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// A command on the channel of instances.
#[derive(Debug, Serialize, Deserialize)]
#[serde(
    tag = "op",
    rename_all = "snake_case",
    deny_unknown_fields,
    expecting = "an object with the member op"
)]
enum InstanceCommand {
    /// Close connections.
    Disconnect(Order),
}

/// The connections to close, and the words that their clients get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "OrderJson", into = "OrderJson")]
struct Order {
    target: Target,
    code: Option<u16>,
    reason: Option<String>,
}

/// The JSON form of an order. Exactly one of the first three members is present.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct OrderJson {
    #[serde(skip_serializing_if = "Option::is_none")]
    user_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    connection_id: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    jti: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl From<Order> for OrderJson {
    fn from(Order { target, code, reason }: Order) -> Self {
        let rest = Self { code, reason, ..Self::default() };
        match target {
            Target::User(user) => Self { user_id: Some(user.to_string()), ..rest },
            Target::Connection(connection) => Self { connection_id: Some(connection), ..rest },
            Target::Token(token) => Self { jti: Some(token), ..rest },
        }
    }
}

impl TryFrom<OrderJson> for Order {
    type Error = String;

    fn try_from(json: OrderJson) -> Result<Self, String> {
        let OrderJson { user_id, connection_id, jti, code, reason } = json;
        let target = match (user_id, connection_id, jti) {
            (Some(user), None, None) => {
                Target::User(Id::parse(&user).map_err(|error| format!("user_id {error}"))?)
            }
            (None, Some(connection), None) => Target::Connection(connection),
            (None, None, Some(token)) => Target::Token(token),
            _ => return Err("exactly one of user_id, connection_id, jti is needed".into()),
        };
        Ok(Self { target, code, reason })
    }
}

impl Registry {
    /// Closes connections on every instance, and returns the number of instances that received the command. With
    /// `revoke`, the token, or all tokens of the user up to now, are refused for that time; a single connection has
    /// nothing to revoke. `code` must be a close code that may be sent.
    ///
    /// Has no deadline of its own. May be called again.
    ///
    /// # Errors
    /// [`DisconnectError::Store`]: the revocation may not have been stored or published: try again.
    /// [`DisconnectError::Bus`]: connections here are closed, but other instances may not have the command.
    pub async fn disconnect(
        &self,
        target: Target,
        code: Option<u16>,
        reason: Option<&str>,
        revoke: Option<Duration>,
    ) -> Result<u64, DisconnectError> {
        let code = code.or_else(|| revoke.map(|_| Disconnect::REVOKED.code));
        let order = Order { target, code, reason: reason.map(ToOwned::to_owned) };
        let payload = serde_json::to_vec(&InstanceCommand::Disconnect(order.clone()));
        let payload = payload.map_err(|error| BusError::Refused(error.to_string()))?;
        if let (Some(revoked), Some(ttl)) = (order.target.revoked(), revoke) {
            let channel = self.control_channel();
            let told = self.revocations.revoke(revoked, ttl, &channel, &payload).await?;
            self.execute(&order).await;
            if let Some(instances) = told {
                return Ok(instances);
            }
        } else {
            // Connections here do not wait for the bus.
            self.execute(&order).await;
        }
        self.tell_all(payload.into()).await
    }

    async fn tell_all(&self, payload: Bytes) -> Result<u64, DisconnectError> {
        let (receipt, outcome) = publish::awaited();
        let channel = self.control_channel();
        self.hub.publish(Publish {
            channel,
            payload,
            keep: Keep::Nothing,
            receipt: Some(receipt),
        })?;
        match outcome.await {
            Ok(Outcome::Received(instances)) => Ok(instances),
            Ok(Outcome::Refused(refusal)) => Err(BusError::NotDone(refusal).into()),
            _ => Err(BusError::Unreachable("the command may not have arrived".into()).into()),
        }
    }

    fn control_channel(&self) -> Arc<str> {
        self.settings.names.events_control().into()
    }

    async fn received(&self, payload: &[u8]) {
        match serde_json::from_slice::<InstanceCommand>(payload) {
            Ok(InstanceCommand::Disconnect(order)) => self.execute(&order).await,
            Err(error) => self.bad_command(&error.to_string()),
        }
    }

    async fn execute(&self, order: &Order) {
        let clients = {
            let local = self.local.lock();
            match &order.target {
                Target::User(user) => local.clients_of_user(user.as_str()),
                Target::Connection(connection) => local.client(*connection),
                Target::Token(token) => local.clients_of_token(token),
            }
        };
        let why = match order.code {
            Some(code) if code == Disconnect::REVOKED.code => &Disconnect::REVOKED,
            _ => &Disconnect::BACKEND,
        };
        let code = order.code.unwrap_or(why.code);
        if !disconnect::is_sendable(code) {
            return self.bad_command(&format!("{code} is no close code"));
        }
        let reason = order.reason.as_deref().unwrap_or(why.reason);
        self.send_away(clients, (why, code, reason), Some(&order.target)).await;
    }

    /// Closes clients in turns: each costs a write to its socket, and other tasks run in between.
    async fn send_away(
        &self,
        clients: Vec<Client>,
        (why, code, reason): (&'static Disconnect, u16, &str),
        target: Option<&Target>,
    ) {
        // A connection that is closing by itself can still be cut short.
        let count = clients.iter().filter(|client| !client.is_closing()).count();
        if count > 0 {
            let (user_id, connection_id, jti) = target.map_or((None, None, None), Target::parts);
            info!(
                connections = count,
                user_id,
                connection_id = connection_id.map(tracing::field::display),
                jti,
                code,
                reason,
                "Connections are closed by a command."
            );
            self.counters.disconnected.add(count as u64);
        }
        for clients in clients.chunks(TURN) {
            let now = clock::now();
            for client in clients {
                // A revoked client gets no message that still waits.
                if *why == Disconnect::REVOKED {
                    client.disconnect_with(why, code, reason, now);
                } else {
                    client.finish_with(why, code, reason, now);
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// Closes every connection whose token was revoked: the command may have been missed.
    async fn recheck(&self) -> Result<(), StoreError> {
        self.counters.rechecks.add(1);
        let (users, tokens) = {
            let local = self.local.lock();
            (local.users(), local.tokens())
        };
        for users in users.chunks(RECHECKED_AT_ONCE) {
            for (user, until) in users.iter().zip(self.revocations.of_users(users).await?) {
                if let Some(until) = until {
                    let clients = self.local.lock().clients_issued(user, until);
                    self.send_away_revoked(clients).await;
                }
            }
        }
        for tokens in tokens.chunks(RECHECKED_AT_ONCE) {
            let revoked = self.revocations.of_tokens(tokens).await?;
            for (token, _) in tokens.iter().zip(revoked).filter(|(_, is_revoked)| *is_revoked) {
                let clients = self.local.lock().clients_of_token(token);
                self.send_away_revoked(clients).await;
            }
        }
        Ok(())
    }

    async fn send_away_revoked(&self, clients: Vec<Client>) {
        let why = &Disconnect::REVOKED;
        self.send_away(clients, (why, why.code, why.reason), None).await;
    }

    fn bad_command(&self, error: &str) {
        self.counters.bad_commands.add(1);
        if let Some(left_out) = self.counters.bad_command_lines.pass() {
            warn!(error, left_out, "A command to all instances could not be read.");
        }
    }
}

/// Follows the commands until the registry closes.
pub(super) async fn run(registry: Arc<Registry>) {
    loop {
        tokio::select! {
            () = registry.closing.cancelled() => return,
            () = follow(&registry) => sleep(RETRY).await,
        }
    }
}

/// Follows the commands until messages may have been missed.
async fn follow(registry: &Registry) {
    let queue = FollowerQueue::new(QUEUE_BYTES);
    let sinks = [(registry.control_channel(), Sink::Follower(Arc::clone(&queue)))];
    let _subscription = match registry.hub.subscribe(sinks).await {
        Ok(subscription) => subscription,
        Err(error) => return debug!(%error, "Commands to all instances cannot be followed now."),
    };
    // Commands before the subscription may have been missed.
    let mut recheck = Some(Instant::now());
    loop {
        tokio::select! {
            entry = queue.next() => match entry {
                Some(Followed::Message(payload)) => registry.received(&payload).await,
                Some(Followed::Gap(_)) => recheck = Some(Instant::now()),
                None => return warn!("There are more commands than this instance can follow."),
            },
            () = sleep_until(recheck.unwrap_or_else(Instant::now)), if recheck.is_some() => {
                recheck = match registry.recheck().await {
                    Ok(()) => None,
                    Err(error) => {
                        debug!(%error, "Revocations cannot be read now.");
                        Some(Instant::now() + RETRY)
                    }
                };
            }
        }
    }
}

/// Upper bound of waiting commands, in bytes: some ten thousand commands.
const QUEUE_BYTES: usize = 4 * 1024 * 1024;

/// Users or tokens whose revocations are read at a time.
const RECHECKED_AT_ONCE: usize = 256;

/// Connections that are closed in one turn.
const TURN: usize = 128;

const RETRY: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;

    fn json(order: &Order) -> String {
        serde_json::to_string(&InstanceCommand::Disconnect(order.clone())).unwrap()
    }

    fn read(json: &str) -> Result<Order, String> {
        let command = serde_json::from_str(json).map_err(|error| error.to_string())?;
        let InstanceCommand::Disconnect(order) = command;
        Ok(order)
    }

    #[test]
    fn an_order_is_written_with_one_target_and_read_back() {
        let reason = Some("bye".to_owned());
        let user = Target::User(Id::parse("u-1").unwrap());
        let connection = Target::Connection(Uuid::nil());
        for (target, code, reason, expected) in [
            (
                user,
                Some(4000),
                reason,
                r#"{"op":"disconnect","user_id":"u-1","code":4000,"reason":"bye"}"#,
            ),
            (
                connection,
                None,
                None,
                r#"{"op":"disconnect","connection_id":"00000000-0000-0000-0000-000000000000"}"#,
            ),
            (
                Target::Token("t".into()),
                Some(1008),
                None,
                r#"{"op":"disconnect","jti":"t","code":1008}"#,
            ),
        ] {
            let order = Order { target, code, reason };
            assert_eq!(json(&order), expected);
            assert_eq!(read(expected), Ok(order));
        }
        let nulls = r#"{"op":"disconnect","user_id":null,"jti":"t","code":null}"#;
        assert_eq!(read(nulls).unwrap().target, Target::Token("t".into()));
    }

    #[test]
    fn an_order_without_exactly_one_target_is_refused() {
        for bad in [
            r#"{"op":"disconnect"}"#,
            r#"{"op":"disconnect","user_id":"u","jti":"t"}"#,
            r#"{"op":"disconnect","user_id":"u","other":1}"#,
            r#"{"op":"other","user_id":"u"}"#,
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
