//! The request of a member that takes time: a newer token.

use std::sync::{Arc, Weak};

use secrecy::SecretString;
use wsproxy_proto::names::Id;

use crate::{
    client::{Client, event::Event},
    core::Core,
    endpoint::rooms::{identity, member::Membership},
    http::handshake,
    logic::Serve,
};

/// Request of a member's logic. [`Event::Done`] brings the [`MemberAnswer`].
#[derive(Debug)]
pub(super) enum MemberRequest {
    /// Checks a newer token.
    Token(SecretString),
}

/// Answer to a request.
#[derive(Debug)]
pub(super) enum MemberAnswer {
    /// The token is good until this unix time.
    Token(Option<u64>),
    /// The token is of another user, or no longer good for this room.
    OtherToken,
    /// The token was refused: code and message.
    BadToken(&'static str, String),
}

/// Serves the requests of one member. The logic holds the membership: a request that waits must not keep a member that
/// has left.
pub(super) struct MemberRequests(pub(super) Weak<Membership>);

impl Serve<MemberRequest> for MemberRequests {
    fn serve(&self, request: MemberRequest, client: &Client, core: &Arc<Core>) {
        let Some(membership) = self.0.upgrade() else { return };
        let (core_too, client) = (Arc::clone(core), client.clone());
        core.tasks.spawn(async move {
            let MemberRequest::Token(token) = request;
            let answer = check(&core_too, &membership, &token).await;
            drop(membership);
            client.notify(Event::Done(Box::new(answer)));
        });
    }
}

async fn check(core: &Core, membership: &Membership, token: &SecretString) -> MemberAnswer {
    let room: &Id = &membership.room.id;
    let checking = identity::check(&membership.rooms, token, room);
    match handshake::deadline(core, checking).await {
        Ok(claims) if claims.user == membership.user => MemberAnswer::Token(claims.expires_at),
        Ok(_) => MemberAnswer::OtherToken,
        Err(rejection) if rejection.status.is_client_error() => {
            MemberAnswer::BadToken("invalid_token", rejection.message)
        }
        Err(rejection) => MemberAnswer::BadToken(rejection.code, rejection.message),
    }
}
