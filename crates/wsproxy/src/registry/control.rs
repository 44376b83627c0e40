//! Commands that reach connections on every instance: who gives them, and who carries them out.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, info, warn};
use uuid::Uuid;
use wsproxy_conn::clock;
use wsproxy_proto::{
    disconnect::{self, Disconnect},
    names::Id,
};

use crate::{
    bus::{self, BusError, Keep, Outcome, Publish},
    hub::{
        Sink,
        tap::{Tap, TapEntry},
    },
    registry::{Peer, Registry},
    store::StoreError,
};

/// Who is sent away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Every connection of a user.
    User(Id),
    /// One connection.
    Connection(Uuid),
    /// Every connection that was opened with the token of this name (`jti`).
    Token(String),
}

/// Why nobody was sent away, or not everybody.
#[derive(Debug, thiserror::Error)]
pub enum DisconnectError {
    /// The revocation was not stored.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Other instances were not told.
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// What is said on the channel of instances.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
enum Command {
    /// Send connections away.
    Disconnect(Order),
}

/// Who is sent away, and with which words. Exactly one of the first three is given.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Order {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    user_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    connection_id: Option<Uuid>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    jti: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl Registry {
    /// Sends connections away on every instance, and answers how many instances were told. Where
    /// `revoke` is given, the token, or all tokens of the user up to now, are refused for so long; a
    /// single connection has nothing to revoke. `code` must be one that may be sent.
    ///
    /// Has no deadline of its own. What was done once may be done again.
    ///
    /// # Errors
    /// [`DisconnectError::Store`]: the revocation may not have been stored, or others told: try again.
    /// [`DisconnectError::Bus`]: connections here are gone, but others may not have been told.
    pub async fn disconnect(
        &self,
        target: Target,
        code: Option<u16>,
        reason: Option<&str>,
        revoke: Option<Duration>,
    ) -> Result<u64, DisconnectError> {
        let revoked = revoke.and_then(|ttl| Some((self.revocation_key(&target)?, ttl)));
        let mut order = Order {
            code: code.or_else(|| revoke.map(|_| Disconnect::REVOKED.code)),
            reason: reason.map(ToOwned::to_owned),
            ..Order::default()
        };
        match target {
            Target::User(user) => order.user_id = Some(user.as_str().to_owned()),
            Target::Connection(connection) => order.connection_id = Some(connection),
            Target::Token(token) => order.jti = Some(token),
        }
        let command = Command::Disconnect(order);
        let payload = serde_json::to_vec(&command);
        let payload = payload.map_err(|error| BusError::Refused(error.to_string()))?;
        let Command::Disconnect(order) = command;
        if let Some((key, ttl)) = revoked {
            let told = self.revoke(&key, ttl, &payload).await?;
            self.carry_out(&order).await;
            if let Some(instances) = told {
                return Ok(instances);
            }
        } else {
            // Here at once, whatever the bus is doing.
            self.carry_out(&order).await;
        }
        self.tell_all(payload.into()).await
    }

    async fn tell_all(&self, payload: Bytes) -> Result<u64, DisconnectError> {
        let (receipt, outcome) = bus::awaited();
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

    pub(super) fn control_channel(&self) -> Arc<str> {
        self.settings.names.events("control").into()
    }

    async fn execute(&self, payload: &[u8]) {
        match serde_json::from_slice::<Command>(payload) {
            Ok(Command::Disconnect(order)) => self.carry_out(&order).await,
            Err(error) => self.bad_command(&error.to_string()),
        }
    }

    async fn carry_out(&self, order: &Order) {
        let peers = match (&order.user_id, order.connection_id, &order.jti) {
            (Some(user), None, None) => self.local.lock().peers_of_user(user),
            (None, Some(connection), None) => self.local.lock().peer(connection),
            (None, None, Some(token)) => self.local.lock().peers_of_token(token),
            _ => return self.bad_command("exactly one of user_id, connection_id, jti is needed"),
        };
        let why = match order.code {
            Some(code) if code == Disconnect::REVOKED.code => &Disconnect::REVOKED,
            _ => &Disconnect::BACKEND,
        };
        let code = order.code.unwrap_or(why.code);
        if !disconnect::is_sendable(code) {
            return self.bad_command(&format!("{code} is no close code"));
        }
        self.send_away(peers, why, code, order.reason.as_deref().unwrap_or(why.reason)).await;
    }

    /// Each of many costs a write to its socket: others get their turns in between.
    pub(super) async fn send_away(
        &self,
        peers: Vec<Peer>,
        why: &'static Disconnect,
        code: u16,
        reason: &str,
    ) {
        // One that is finishing may still be cut short.
        let count = peers.iter().filter(|peer| !peer.is_ending()).count();
        if count > 0 {
            info!(connections = count, code, reason = why.label, "Connections are sent away.");
            self.counters.disconnected.add(count as u64);
        }
        for peers in peers.chunks(TURN) {
            let now = clock::now();
            for peer in peers {
                peer.end(why, code, reason, now);
            }
            tokio::task::yield_now().await;
        }
    }

    fn bad_command(&self, error: &str) {
        self.counters.bad_commands.add(1);
        if let Some(left_out) = self.counters.bad_command_lines.pass() {
            warn!(error, left_out, "A command to all instances makes no sense.");
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

/// Follows them until something is wrong with the way they come.
async fn follow(registry: &Registry) {
    let tap = Tap::new(TAP_BYTES);
    let sinks = [(registry.control_channel(), Sink::Tap(Arc::clone(&tap)))];
    let _subscription = match registry.hub.subscribe(sinks).await {
        Ok(subscription) => subscription,
        Err(error) => return debug!(%error, "Commands to all instances cannot be followed now."),
    };
    // What was said before may have been for us.
    let mut recheck = Some(Instant::now());
    loop {
        tokio::select! {
            entry = tap.next_entry() => match entry {
                Some(TapEntry::Message(payload, _)) => registry.execute(&payload).await,
                Some(TapEntry::Gap(_)) => recheck = Some(Instant::now()),
                Some(TapEntry::Position(_) | TapEntry::Event(..)) => {}
                Some(TapEntry::End(_)) | None => {
                    return warn!("There are more commands than this instance can follow.");
                }
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

/// Commands that may wait, in bytes: some ten thousand.
const TAP_BYTES: usize = 4 * 1024 * 1024;

/// So many connections are sent away in one turn.
const TURN: usize = 128;

const RETRY: Duration = Duration::from_millis(500);
