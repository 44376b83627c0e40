//! Tokens of sessions: how the store holds them, and what each one opens. Knows neither requests nor endpoints.

use std::time::Duration;

use wsproxy_proto::names::Id;

use super::{equal, new_token};
use crate::store::{Store, StoreError};

/// Prefix of tokens that open event streams, any number of them until they expire.
///
/// The kind is part of the token itself, so that whoever reads a token knows it, and no setting of a gateway turns
/// one kind into the other.
pub const EVENT_STREAM_PREFIX: &str = "sse.";

/// Prefix of a stored value that is bound to an agent: `agent/{agent_id} {token}`. No unbound token begins with it.
const BOUND_PREFIX: &[u8] = b"agent/";

/// What a new token is to open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    /// Only the path of this agent; `None`: the session under any agent id.
    pub agent: Option<Id>,
    /// Event streams until the token expires, rather than one connection of either transport.
    pub event_stream: bool,
}

/// Makes a token and stores it under `key` for `ttl`.
///
/// # Errors
/// The store did not take it.
pub async fn issue(
    store: &Store,
    key: &str,
    ttl: Duration,
    scope: &Scope,
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

/// Whether a token opens event streams only, and is not used up by them.
#[must_use]
pub fn is_for_event_streams(token: &[u8]) -> bool {
    token.starts_with(EVENT_STREAM_PREFIX.as_bytes())
}

/// Whether `token` opens the path of `agent`, where the store holds `stored` for the session. Takes a time that
/// depends on the lengths of the tokens only.
///
/// A stored value that begins like a bound one and is none opens nothing: whoever wrote it wanted a binding.
#[must_use]
pub fn opens(stored: &[u8], token: &[u8], agent: &Id) -> bool {
    match stored.strip_prefix(BOUND_PREFIX) {
        None => equal(stored, token),
        Some(bound) => {
            let end = bound.iter().position(|byte| *byte == b' ').unwrap_or(bound.len());
            let (bound_to, rest) = bound.split_at(end);
            let wanted = rest.strip_prefix(b" ").unwrap_or_default();
            let is_agent = bound_to == agent.as_str().as_bytes();
            equal(wanted, token) & is_agent & !token.is_empty()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> Id {
        Id::parse(text).unwrap()
    }

    #[test]
    fn bound_tokens_open_one_agent_only() {
        let agent = id("a-1");
        for (stored, token, is_open) in [
            ("t", "t", true),
            ("t", "T", false),
            ("", "t", false),
            ("two words", "two words", true),
            ("agent/a-1 t", "t", true),
            ("agent/a-1 sse.t", "sse.t", true),
            ("agent/a-1 two words", "two words", true),
            ("agent/a-2 t", "t", false),
            ("agent/a-1 t", "agent/a-1 t", false),
            ("agent/a-1 t", " t", false),
            ("agent/a-1  t", "t", false),
            ("agent/a-1", "agent/a-1", false),
            ("agent/a-1", "", false),
            ("agent/a-1 ", "", false),
            ("agent/ t", "t", false),
            ("agent/", "agent/", false),
        ] {
            let opened = opens(stored.as_bytes(), token.as_bytes(), &agent);
            assert_eq!(opened, is_open, "{stored:?} {token:?}");
        }
    }

    #[tokio::test]
    async fn issued_tokens_say_their_kind_and_binding() {
        let store = Store::Memory(crate::store::memory::MemoryStore::default());
        let minute = Duration::from_secs(60);
        for (agent, event_stream) in
            [(None, false), (None, true), (Some(id("a-1")), false), (Some(id("a-1")), true)]
        {
            let scope = Scope { agent, event_stream };
            let token = issue(&store, "key", minute, &scope).await.unwrap();
            assert_eq!(is_for_event_streams(token.as_bytes()), event_stream);
            assert!(Id::parse(&token).is_ok(), "{token} needs no encoding");
            let stored = store.load("key").await.unwrap().unwrap();
            assert!(opens(&stored, token.as_bytes(), &id("a-1")));
            assert_eq!(opens(&stored, token.as_bytes(), &id("a-2")), scope.agent.is_none());
        }
    }
}
