//! Tokens of sessions: their form in the store and their scope. Knows neither requests nor endpoints.

use std::time::Duration;

use wsproxy_proto::names::Id;

use super::{equal, new_token};
use crate::store::{Store, command::StoreError};

/// The scope of a new token.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenScope {
    /// The agent whose path the token opens; `None`: the session under any agent id.
    pub agent: Option<Id>,
    /// Set for event streams until the token expires; otherwise the token opens one connection of either transport.
    pub event_stream: bool,
}

/// Makes a token and stores it under `key` for `ttl`.
///
/// # Errors
/// The store did not take the token; see [`StoreError`].
pub async fn issue(
    store: &Store,
    key: &str,
    ttl: Duration,
    scope: &TokenScope,
) -> Result<String, StoreError> {
    let prefix = if scope.event_stream { EVENT_STREAM_PREFIX } else { "" };
    let token = format!("{prefix}{}", new_token());
    let value = match &scope.agent {
        Some(agent) => format!("agent/{agent} {token}"),
        None => token.clone(),
    };
    store.save(key, value.as_bytes(), ttl).await?;
    Ok(token)
}

/// Returns whether a token opens event streams only, and any number of them.
#[must_use]
pub fn is_for_event_streams(token: &[u8]) -> bool {
    token.starts_with(EVENT_STREAM_PREFIX.as_bytes())
}

/// The reason why a token does not open a session, for the operator's log. Clients do not learn which reason it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WrongToken {
    /// The store has no token.
    #[error("no token is stored")]
    Missing,
    /// Another token is stored.
    #[error("another token is stored")]
    Another,
    /// The token is right, but bound to another agent.
    #[error("the token is bound to another agent")]
    Agent,
    /// The stored value begins with `agent/`, but has no id, space and token after it. It opens no session, since its
    /// worker wanted a binding.
    #[error("the stored value is no agent/{{agent_id}} {{token}}")]
    Malformed,
}

/// Checks that `token` opens the path of `agent`, with the value `stored` that the store has for the session. Compares
/// tokens in a time that depends on their lengths only.
///
/// # Errors
/// The reason why the token does not open the session.
pub fn check(stored: &[u8], token: &[u8], agent: &Id) -> Result<(), WrongToken> {
    let (bound_to, wanted) = match stored.strip_prefix(BOUND_PREFIX) {
        None => (None, stored),
        Some(bound) => {
            let space = bound.iter().position(|byte| *byte == b' ').ok_or(WrongToken::Malformed)?;
            let (id, wanted) = (&bound[..space], &bound[space + 1..]);
            let id = std::str::from_utf8(id).ok().and_then(|id| Id::parse(id).ok());
            (Some(id.ok_or(WrongToken::Malformed)?), wanted)
        }
    };
    if wanted.is_empty() {
        return Err(WrongToken::Missing);
    }
    if !equal(wanted, token) {
        return Err(WrongToken::Another);
    }
    if bound_to.is_none_or(|bound_to| bound_to == *agent) { Ok(()) } else { Err(WrongToken::Agent) }
}

/// Prefix of tokens that open event streams, any number of them until they expire.
///
/// The prefix is part of the token itself, so that clients and workers see the kind, and no setting of a gateway
/// changes it.
pub const EVENT_STREAM_PREFIX: &str = "sse.";

/// Prefix of a stored value that is bound to an agent: `agent/{agent_id} {token}`. No unbound token begins with it.
const BOUND_PREFIX: &[u8] = b"agent/";

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> Id {
        Id::parse(text).unwrap()
    }

    #[test]
    fn bound_tokens_open_one_agent_only() {
        let agent = id("a-1");
        for (stored, token, result) in [
            ("t", "t", Ok(())),
            ("t", "T", Err(WrongToken::Another)),
            ("", "t", Err(WrongToken::Missing)),
            ("", "", Err(WrongToken::Missing)),
            ("two words", "two words", Ok(())),
            ("agent/a-1 t", "t", Ok(())),
            ("agent/a-1 sse.t", "sse.t", Ok(())),
            ("agent/a-1 two words", "two words", Ok(())),
            ("agent/a-2 t", "t", Err(WrongToken::Agent)),
            ("agent/a-2 t", "u", Err(WrongToken::Another)),
            ("agent/a-1 t", "agent/a-1 t", Err(WrongToken::Another)),
            ("agent/a-1 t", " t", Err(WrongToken::Another)),
            ("agent/a-1  t", "t", Err(WrongToken::Another)),
            ("agent/a-1 ", "", Err(WrongToken::Missing)),
            ("agent/a-1", "agent/a-1", Err(WrongToken::Malformed)),
            ("agent/a-1", "", Err(WrongToken::Malformed)),
            ("agent/ t", "t", Err(WrongToken::Malformed)),
            ("agent/a:b t", "t", Err(WrongToken::Malformed)),
            ("agent/", "agent/", Err(WrongToken::Malformed)),
        ] {
            let checked = check(stored.as_bytes(), token.as_bytes(), &agent);
            assert_eq!(checked, result, "{stored:?} {token:?}");
        }
    }

    #[tokio::test]
    async fn issued_tokens_say_their_kind_and_binding() {
        let store = Store::Embedded(crate::embedded::store::EmbeddedStore::default());
        let minute = Duration::from_secs(60);
        for (agent, event_stream) in
            [(None, false), (None, true), (Some(id("a-1")), false), (Some(id("a-1")), true)]
        {
            let scope = TokenScope { agent, event_stream };
            let token = issue(&store, "key", minute, &scope).await.unwrap();
            assert_eq!(is_for_event_streams(token.as_bytes()), event_stream);
            assert!(Id::parse(&token).is_ok(), "{token} needs no encoding");
            let stored = store.load("key").await.unwrap().unwrap();
            assert_eq!(check(&stored, token.as_bytes(), &id("a-1")), Ok(()));
            let other = check(&stored, token.as_bytes(), &id("a-2"));
            assert_eq!(other.is_ok(), scope.agent.is_none());
        }
    }
}
