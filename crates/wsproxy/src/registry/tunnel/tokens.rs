//! Tokens of cluster agents that Redis has, as hashes.

use std::{fmt, time::Duration};

use aws_lc_rs::digest::{SHA256, digest};
use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};
use tracing::warn;
use wsproxy_proto::names::{Id, Names};

use crate::{
    auth,
    store::{Store, command::StoreError},
    telemetry::throttle::Throttle,
};

/// SHA-256 of a token.
#[derive(Clone, Copy)]
pub struct TokenHash([u8; 32]);

impl TokenHash {
    /// Reads 64 hex digits; `None`: it is no hash.
    #[must_use]
    pub fn parse(hex: &[u8]) -> Option<Self> {
        let hex = std::str::from_utf8(hex).ok()?.trim();
        if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let mut hash = [0; 32];
        for (byte, digits) in hash.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        }
        Some(Self(hash))
    }

    /// Returns whether this is the hash of a token; takes the same time for all tokens of one length.
    #[must_use]
    pub fn is_of(&self, token: &str) -> bool {
        auth::equal(&self.0, digest(&SHA256, token.as_bytes()).as_ref())
    }
}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenHash")
    }
}

/// The tokens of clusters in the store.
pub(super) struct ClusterTokens {
    store: Store,
    names: Names,
    response_timeout: Duration,
    /// Clusters that were looked up lately, and whether they have a token. At most [`KNOWN_MAX`]; beyond that all are
    /// looked up again.
    known: Mutex<HashMap<Id, (bool, Instant)>>,
    lines: Throttle,
}

impl ClusterTokens {
    pub(super) fn new(store: Store, names: &Names, response_timeout: Duration) -> Self {
        Self {
            store,
            names: names.clone(),
            response_timeout,
            known: Mutex::default(),
            lines: Throttle::default(),
        }
    }

    /// Returns the hash of a cluster's token, and notes whether there is one.
    pub(super) async fn load(&self, cluster: &Id) -> Result<Option<TokenHash>, StoreError> {
        let key = self.names.tunnel_auth(cluster);
        let loaded = timeout(self.response_timeout, self.store.load(&key)).await;
        let loaded = loaded.map_err(|_| StoreError::Lost("no answer in time".into()))??;
        let hash = loaded.as_deref().and_then(TokenHash::parse);
        if loaded.is_some()
            && hash.is_none()
            && let Some(left_out) = self.lines.pass()
        {
            warn!(
                cluster = cluster.as_str(),
                left_out, "The token of a cluster is no SHA-256 in hex."
            );
        }
        let (now, mut known) = (Instant::now(), self.known.lock());
        if known.len() >= KNOWN_MAX && !known.contains_key(cluster) {
            known.clear();
        }
        known.insert(cluster.clone(), (hash.is_some(), now));
        Ok(hash)
    }

    /// Returns whether a cluster has a token, as it was lately.
    pub(super) async fn is_known(&self, cluster: &Id, now: Instant) -> Result<bool, StoreError> {
        let known = self.known.lock().get(cluster).copied();
        match known {
            Some((has_token, at)) if now.duration_since(at) < KNOWN_FOR => Ok(has_token),
            _ => Ok(self.load(cluster).await?.is_some()),
        }
    }
}

/// Most clusters whose lookup is remembered.
const KNOWN_MAX: usize = 4096;

/// Time for which a lookup is remembered.
const KNOWN_FOR: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_that_of_its_token_only() {
        // As `printf token | sha256sum` prints.
        let hex = b"3c469e9d6c5875d37a43f353d4f88e61fcf812c66eee3457465a40b0da4153e0";
        let hash = TokenHash::parse(hex).unwrap();
        assert!(hash.is_of("token") && !hash.is_of("Token"));
        assert!(!format!("{hash:?}").contains("3c"));
        assert!(TokenHash::parse(&hex.to_ascii_uppercase()).unwrap().is_of("token"));
        for bad in [&hex[1..], b"", &[b'g'; 64], &[b'+'; 64]] {
            assert!(TokenHash::parse(bad).is_none());
        }
    }
}
