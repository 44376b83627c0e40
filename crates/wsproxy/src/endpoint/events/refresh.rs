//! Checks of the newer tokens that connected clients send.

use std::sync::Arc;

use secrecy::SecretString;
use tracing::info;
use wsproxy_conn::clock;
use wsproxy_proto::disconnect::Disconnect;

use crate::{
    client::{Client, event::Event},
    core::Core,
    endpoint::events::{
        Events,
        entrance::{authenticate, check_revoked},
        messages::TokenVerdict,
    },
    http::{handshake, rejection::Rejection},
    logic::Serve,
    registry::Membership,
};

/// Request to check a newer token. [`Event::Done`] brings a [`TokenVerdict`].
#[derive(Debug)]
pub struct CheckToken(pub SecretString);

/// Checks the tokens of one connection, and keeps the connection in the registry.
pub struct TokenChecks {
    events: Arc<Events>,
    /// Entry in the registry; `None` if there is no registry.
    entry: Option<Arc<Membership>>,
}

impl TokenChecks {
    /// Makes the checks of a connection with this entry in the registry.
    #[must_use]
    pub(super) fn new(events: &Arc<Events>, entry: Option<Membership>) -> Self {
        Self { events: Arc::clone(events), entry: entry.map(Arc::new) }
    }
}

impl Serve<CheckToken> for TokenChecks {
    fn serve(&self, CheckToken(token): CheckToken, client: &Client, core: &Arc<Core>) {
        let (owner, client) = (Arc::clone(core), client.clone());
        let events = Arc::clone(&self.events);
        // A check in flight must not keep a closed connection in the registry.
        let entry = self.entry.as_ref().map(Arc::downgrade);
        core.tasks.spawn(async move {
            let checking = async {
                let claims = authenticate(&events, &token).await?;
                check_revoked(&events, &claims).await?;
                Ok(claims)
            };
            let verdict = match handshake::deadline(&owner, checking).await {
                Ok(claims) => {
                    let entry = entry.and_then(|entry| entry.upgrade());
                    // A token of another user ends the connection when the logic reads the verdict.
                    if let Some(entry) = entry.filter(|entry| entry.is_of(&claims.user)) {
                        entry.renew(claims.jti.as_deref(), claims.issued_at);
                        drop(entry);
                        // Check again: a revocation just before `renew` did not find this token's connection.
                        let checking = check_revoked(&events, &claims);
                        let again = handshake::deadline(&owner, checking).await;
                        if again.is_err_and(|rejection| rejection.status.is_client_error()) {
                            client.disconnect(&Disconnect::REVOKED, clock::now());
                        }
                    }
                    let user = claims.user.as_str().into();
                    TokenVerdict::Good { user, expires_at: claims.expires_at }
                }
                Err(rejection) => refuse(&owner, &client, rejection),
            };
            client.notify(Event::Done(Box::new(verdict)));
        });
    }
}

fn refuse(core: &Core, client: &Client, rejection: Rejection) -> TokenVerdict {
    if let Some(left_out) = core.lines.pass("token refused") {
        info!(connection_id = %client.id(), code = rejection.code, error = rejection.cause, left_out,
            "A newer token was refused.");
    }
    // One code for all faults of a token: details would only help an attacker.
    let is_token = rejection.status.is_client_error();
    let code = if is_token { "invalid_token" } else { rejection.code };
    TokenVerdict::Bad { code: code.into(), message: rejection.message }
}
