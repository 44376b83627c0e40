//! Which tokens are no longer good although they have not expired.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
    /// A token that does not say when it was issued is refused as long as any revocation of its user is
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
        let mut names = vec![user_name(user.as_str())];
        names.extend(token.map(token_name));
        let stamps = self.load_stamps(&names).await?;
        let by_user = stamps.first().copied().flatten().map(|stamp| self.covers_until(stamp));
        let by_name = stamps.get(1).is_some_and(Option::is_some);
        Ok(by_name || by_user.is_some_and(|until| issued_at.is_none_or(|at| at <= until)))
    }

    /// Where a revocation is remembered; a single connection has nothing to revoke.
    pub(super) fn revocation_key(&self, target: &Target) -> Option<String> {
        match target {
            Target::User(user) => Some(self.key(&user_name(user.as_str()))),
            Target::Token(token) => Some(self.key(&token_name(token))),
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
            Backend::Memory(store) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                store.save_for_longer(key, now.as_secs().to_string().as_bytes(), ttl)?;
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
            let names: Vec<_> = users.iter().map(|user| user_name(user)).collect();
            for (user, stamp) in users.iter().zip(self.load_stamps(&names).await?) {
                if let Some(stamp) = stamp {
                    let until = self.covers_until(stamp);
                    let peers = self.local.lock().peers_issued(user, until);
                    self.send_away_revoked(peers).await;
                }
            }
        }
        for tokens in tokens.chunks(BATCH) {
            let names: Vec<_> = tokens.iter().map(|token| token_name(token)).collect();
            let stamps = self.load_stamps(&names).await?;
            for (token, _) in tokens.iter().zip(stamps).filter(|(_, stamp)| stamp.is_some()) {
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

    /// When each of these was revoked last, in unix seconds.
    ///
    /// Revocations that the version before made are under its names. This version reads both, since an upgrade must
    /// not let anybody in again; the next one does not.
    async fn load_stamps(&self, names: &[String]) -> Result<Vec<Option<u64>>, StoreError> {
        let keys: Vec<_> = names.iter().map(|name| self.key(name)).collect();
        match &self.backend {
            Backend::Redis(redis) => {
                let earlier = |name| self.settings.names.events(&format!("revoked:{name}"));
                let earlier: Vec<_> = names.iter().map(earlier).collect();
                let (present, earlier) =
                    tokio::try_join!(redis.load_all(&keys), redis.load_each(&earlier))?;
                let both = present.into_iter().zip(earlier);
                Ok(both.map(|(value, earlier)| stamp(value).max(stamp(earlier))).collect())
            }
            Backend::Memory(store) => keys.iter().map(|key| Ok(stamp(store.load(key)?))).collect(),
        }
    }

    /// A revocation covers what was issued until then by any clock that is believed: one that is ahead by more than the
    /// leeway issues tokens that are refused.
    const fn covers_until(&self, stamp: u64) -> u64 {
        stamp.saturating_add(self.settings.leeway)
    }

    fn key(&self, name: &str) -> String {
        self.settings.names.events_revoked(name)
    }
}

fn user_name(user: &str) -> String {
    format!("user:{user}")
}

fn token_name(token: &str) -> String {
    format!("jti:{token}")
}

/// The time in a stored value. One that cannot be read revokes everything.
fn stamp(value: Option<Bytes>) -> Option<u64> {
    let text = value?;
    let seconds = std::str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok());
    Some(seconds.unwrap_or(u64::MAX))
}
