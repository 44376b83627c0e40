//! Which tokens are no longer good although they have not expired.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use wsproxy_proto::{disconnect::Disconnect, names::Id};

use crate::{
    registry::{Backend, Peer, Registry, control::Target},
    store::StoreError,
};

/// Keys that are read at a time.
const BATCH: usize = 256;

impl Registry {
    /// Whether a token was revoked, by its name or with all of its user. One round trip, without a
    /// deadline of its own.
    ///
    /// A token that does not say when it was made is refused as long as any revocation of its user is
    /// remembered.
    ///
    /// # Errors
    /// The store did not answer: nobody knows.
    pub async fn is_revoked(
        &self,
        user: &Id,
        token: Option<&str>,
        issued_at: Option<u64>,
    ) -> Result<bool, StoreError> {
        let mut keys = vec![self.user_key(user.as_str())];
        keys.extend(token.map(|token| self.token_key(token)));
        let values = self.load_all(&keys).await?;
        let by_user = values.first().and_then(Option::as_ref).map(|value| until(value));
        let by_name = values.get(1).is_some_and(Option::is_some);
        Ok(by_name || by_user.is_some_and(|until| issued_at.is_none_or(|at| at <= until)))
    }

    /// Where a revocation is remembered; a single connection has nothing to revoke.
    pub(super) fn revocation_key(&self, target: &Target) -> Option<String> {
        match target {
            Target::User(user) => Some(self.user_key(user.as_str())),
            Target::Token(token) => Some(self.token_key(token)),
            Target::Connection(_) => None,
        }
    }

    /// Remembers a revocation up to now. In Redis the command goes out with it, as one: nobody is told
    /// of what is not stored, and nothing is stored of which nobody is told. Answers how many were told
    /// then.
    pub(super) async fn revoke(
        &self,
        key: &str,
        ttl: Duration,
        command: &[u8],
    ) -> Result<Option<u64>, StoreError> {
        match &self.backend {
            Backend::Redis(redis) => {
                redis.stamp(key, ttl, &self.control_channel(), command).await.map(Some)
            }
            Backend::Memory => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                self.store.save(key, now.as_secs().to_string().as_bytes(), ttl).await?;
                Ok(None)
            }
        }
    }

    /// Sends away everybody here whose token was revoked: the command may have been missed.
    pub(super) async fn recheck(&self) -> Result<(), StoreError> {
        self.counters.rechecks.add(1);
        let (users, tokens) = {
            let local = self.local.lock();
            (local.users(), local.tokens())
        };
        for users in users.chunks(BATCH) {
            let values = self.load_each(users, |user| self.user_key(user)).await?;
            for (user, value) in users.iter().zip(values) {
                if let Some(value) = value {
                    let peers = self.local.lock().peers_issued(user, until(&value));
                    self.send_away_revoked(peers).await;
                }
            }
        }
        for tokens in tokens.chunks(BATCH) {
            let values = self.load_each(tokens, |token| self.token_key(token)).await?;
            for (token, _) in tokens.iter().zip(values).filter(|(_, value)| value.is_some()) {
                let peers = self.local.lock().peers_of_token(token);
                self.send_away_revoked(peers).await;
            }
        }
        Ok(())
    }

    async fn send_away_revoked(&self, peers: Vec<Peer>) {
        let why = &Disconnect::REVOKED;
        self.send_away(peers, why, why.code, why.reason).await;
    }

    async fn load_each(
        &self,
        names: &[Arc<str>],
        key: impl Fn(&str) -> String,
    ) -> Result<Vec<Option<Bytes>>, StoreError> {
        let keys: Vec<_> = names.iter().map(|name| key(name)).collect();
        self.load_all(&keys).await
    }

    async fn load_all(&self, keys: &[String]) -> Result<Vec<Option<Bytes>>, StoreError> {
        match &self.backend {
            Backend::Redis(redis) => redis.load_all(keys).await,
            Backend::Memory => {
                let mut values = Vec::with_capacity(keys.len());
                for key in keys {
                    values.push(self.store.load(key).await?);
                }
                Ok(values)
            }
        }
    }

    fn user_key(&self, user: &str) -> String {
        self.settings.names.events(&format!("revoked:user:{user}"))
    }

    fn token_key(&self, token: &str) -> String {
        self.settings.names.events(&format!("revoked:jti:{token}"))
    }
}

/// Up to when tokens are revoked, in unix seconds. What cannot be read revokes all.
fn until(value: &[u8]) -> u64 {
    std::str::from_utf8(value).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(u64::MAX)
}
