//! Revocations of tokens in the store. Knows no connection.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures_util::future::try_join_all;
use wsproxy_proto::names::{Id, Names, events::Revoked};

use crate::{
    bus::Bus,
    embedded::store::EmbeddedStore,
    redis::{
        reply::{integer, odd_reply},
        resp::Reply,
        words::milliseconds,
    },
    registry::commands::Commands,
    store::command::StoreError,
};

/// The revocations of all instances.
pub(crate) struct Revocations {
    store: RevocationStore,
    names: Names,
    /// Tolerated difference of clocks, in seconds.
    leeway: u64,
}

/// Storage of revocations.
enum RevocationStore {
    /// This process.
    Embedded(EmbeddedStore),
    /// Redis.
    Redis(Commands),
}

impl Revocations {
    /// Opens those in the store beside a bus. A command has the deadline `response_timeout`; `leeway` is in seconds.
    pub(crate) fn new(bus: &Bus, response_timeout: Duration, names: Names, leeway: u64) -> Self {
        let store = match bus {
            Bus::Embedded(bus) => RevocationStore::Embedded(bus.store()),
            Bus::Redis(bus) => {
                RevocationStore::Redis(Commands::new(bus.client().clone(), response_timeout))
            }
        };
        Self { store, names, leeway }
    }

    /// Returns whether a token was revoked, by its name or with all tokens of its user, in one round trip.
    ///
    /// A token without `iat` is refused as long as the store has any revocation of its user.
    ///
    /// # Errors
    /// The store did not answer.
    pub(crate) async fn cover(
        &self,
        user: &Id,
        token: Option<&str>,
        issued_at: Option<u64>,
    ) -> Result<bool, StoreError> {
        let mut revoked = vec![Revoked::User(user.as_str())];
        revoked.extend(token.map(Revoked::Token));
        let times = self.load(&revoked).await?;
        let by_user = times.first().copied().flatten().map(|time| self.covers_until(time));
        let by_name = times.get(1).is_some_and(Option::is_some);
        Ok(by_name || by_user.is_some_and(|until| issued_at.is_none_or(|at| at <= until)))
    }

    /// Returns for each user the time of issue up to which tokens are revoked; `None`: no token is.
    pub(super) async fn of_users(
        &self,
        users: &[Arc<str>],
    ) -> Result<Vec<Option<u64>>, StoreError> {
        let revoked: Vec<_> = users.iter().map(|user| Revoked::User(user)).collect();
        let times = self.load(&revoked).await?;
        Ok(times.into_iter().map(|time| time.map(|time| self.covers_until(time))).collect())
    }

    /// Returns for each name of a token whether that token is revoked.
    pub(super) async fn of_tokens(&self, tokens: &[Arc<str>]) -> Result<Vec<bool>, StoreError> {
        let revoked: Vec<_> = tokens.iter().map(|token| Revoked::Token(token)).collect();
        Ok(self.load(&revoked).await?.iter().map(Option::is_some).collect())
    }

    /// Revokes tokens that were issued up to now. Redis publishes the command in the same script, so that neither
    /// happens without the other. Returns the number of instances that received it; `None` for the embedded store,
    /// which publishes nothing.
    pub(super) async fn revoke(
        &self,
        revoked: Revoked<'_>,
        ttl: Duration,
        channel: &str,
        command: &[u8],
    ) -> Result<Option<u64>, StoreError> {
        let key = self.names.events_revocation(revoked);
        match &self.store {
            RevocationStore::Redis(commands) => {
                let ttl = milliseconds(ttl).to_string();
                let arguments = [ttl.as_bytes(), channel.as_bytes(), command];
                let instances = commands.run(REVOKE, &key, arguments).await?;
                Ok(Some(integer(&instances)?.unsigned_abs()))
            }
            RevocationStore::Embedded(store) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                store.save_for_longer(&key, now.as_secs().to_string().as_bytes(), ttl)?;
                Ok(None)
            }
        }
    }

    /// Returns the time of each of these revocations, in unix seconds.
    ///
    /// Reads the names of the previous version too, so that an upgrade does not let a revoked client in again. The
    /// next version need not.
    async fn load(&self, revoked: &[Revoked<'_>]) -> Result<Vec<Option<u64>>, StoreError> {
        let keys = revoked.iter().map(|revoked| self.names.events_revocation(*revoked));
        match &self.store {
            RevocationStore::Redis(commands) => {
                let keys: Vec<_> = keys.collect();
                let before = |revoked: &Revoked<'_>| self.names.events_revocation_before(*revoked);
                let before: Vec<_> = revoked.iter().map(before).collect();
                let (present, before) =
                    tokio::try_join!(load_all(commands, &keys), load_each(commands, &before))?;
                let both = present.into_iter().zip(before);
                Ok(both.map(|(value, before)| time_of(value).max(time_of(before))).collect())
            }
            RevocationStore::Embedded(store) => {
                keys.map(|key| Ok(time_of(store.load(&key)?))).collect()
            }
        }
    }

    /// Adds the leeway to the time of a revocation: an issuer's clock may be ahead by as much. Tokens from further
    /// ahead are refused anyway.
    const fn covers_until(&self, time: u64) -> u64 {
        time.saturating_add(self.leeway)
    }
}

/// Reads the values of keys in one slot, in their order.
async fn load_all(commands: &Commands, keys: &[String]) -> Result<Vec<Option<Bytes>>, StoreError> {
    let mut words: Vec<&[u8]> = vec![b"MGET"];
    words.extend(keys.iter().map(String::as_bytes));
    let Reply::Array(values) = commands.call(&words).await? else {
        return Err(odd_reply());
    };
    let value = |value| match value {
        Reply::Text(value) => Some(value),
        _ => None,
    };
    Ok(values.into_iter().map(value).collect())
}

/// Reads the values of keys in slots of their own, in their order.
async fn load_each(commands: &Commands, keys: &[String]) -> Result<Vec<Option<Bytes>>, StoreError> {
    let values =
        keys.iter().map(async |key| match commands.call(&[b"GET", key.as_bytes()]).await? {
            Reply::Text(value) => Ok(Some(value)),
            Reply::Null => Ok(None),
            _ => Err(odd_reply()),
        });
    try_join_all(values).await
}

/// Reads the time in a stored value. A value that cannot be read revokes everything.
fn time_of(value: Option<Bytes>) -> Option<u64> {
    let text = value?;
    let seconds = std::str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok());
    Some(seconds.unwrap_or(u64::MAX))
}

/// Key: revocation. Arguments: TTL, channel, message. A longer time to live of the key stays.
const REVOKE: &str = "\
local left=redis.call('PTTL',KEYS[1]) local now=redis.call('TIME')[1] \
if left==-1 then redis.call('SET',KEYS[1],now) else \
redis.call('SET',KEYS[1],now,'PX',string.format('%.0f',math.max(tonumber(ARGV[1]),left))) end \
return redis.call('PUBLISH',ARGV[2],ARGV[3])";
