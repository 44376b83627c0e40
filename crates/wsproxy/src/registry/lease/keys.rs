//! The keys of leases in Redis: one for each instance, their index, and the claim of a reaper.
//!
//! Every time is by the clock of Redis, since those of instances may differ by any amount. No script touches two
//! keys, since they lie in different slots of a cluster. The index alone decides which instances live; the lease
//! key shows its owner whether the lease was lost.

use std::sync::Arc;

use uuid::Uuid;
use wsproxy_proto::names::Names;

use crate::{
    redis::{
        reply::{integer, odd_reply, text},
        resp::Reply,
        words::milliseconds,
    },
    registry::{
        commands::Commands,
        lease::{Holder, LeaseSettings},
    },
    store::command::StoreError,
};

/// The keys of leases, for one instance.
pub(super) struct LeaseKeys {
    commands: Commands,
    names: Names,
    server_id: Arc<str>,
    /// Id of this run of the instance: an earlier run may have had the same name.
    incarnation: String,
    lease: String,
    servers: String,
    /// Times in milliseconds, as words of commands.
    lease_ms: String,
    index_ms: String,
}

/// The result of removing an instance from the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Removal {
    /// The instance is alive again and stays.
    Alive,
    /// Another instance was faster.
    Gone,
    /// This instance removed it.
    Removed,
}

impl LeaseKeys {
    pub(super) fn new(commands: Commands, settings: &LeaseSettings) -> Self {
        let LeaseSettings { names, server_id, timing, .. } = settings;
        // The index names lost instances, so it must live as long as their leftovers.
        let index_ttl = settings.index_ttl.max(timing.lease * 4);
        Self {
            commands,
            incarnation: Uuid::new_v4().to_string(),
            lease: names.server_lease(server_id),
            servers: names.servers(),
            lease_ms: milliseconds(timing.lease).to_string(),
            index_ms: milliseconds(index_ttl).to_string(),
            names: names.clone(),
            server_id: Arc::clone(server_id),
        }
    }

    /// Renews the lease, with the instance's number of connections as its value. Returns the holder before.
    pub(super) async fn renew(&self, connections: u64) -> Result<Holder, StoreError> {
        let Self { incarnation, lease_ms, index_ms, .. } = self;
        let value = format!(r#"{{"connections":{connections},"incarnation":"{incarnation}"}}"#);
        let lease = self.commands.run(RENEW, &self.lease, [incarnation, &value, lease_ms]);
        let index =
            self.commands.run(ENLIST, &self.servers, [lease_ms, &*self.server_id, index_ms]);
        let (holder, _) = tokio::try_join!(lease, index)?;
        match integer(&holder)? {
            0 => Ok(Holder::None),
            1 => Ok(Holder::Us),
            _ => Ok(Holder::Other),
        }
    }

    /// Releases the lease. With `clean` the name leaves the index; otherwise another instance cleans up at once.
    pub(super) async fn release(&self, clean: bool) -> Result<(), StoreError> {
        self.commands.call(&[b"DEL", self.lease.as_bytes()]).await?;
        let (servers, server) = (self.servers.as_bytes(), self.server_id.as_bytes());
        let reply = match clean {
            true => self.commands.call(&[b"ZREM", servers, server]).await,
            false => self.commands.call(&[b"ZADD", servers, b"XX", b"0", server]).await,
        };
        reply.map(drop)
    }

    /// Returns the instances whose leases have run out, the longest dead first.
    pub(super) async fn expired(&self) -> Result<Vec<String>, StoreError> {
        match self.commands.run(EXPIRED, &self.servers, [""; 0]).await? {
            Reply::Array(servers) => {
                Ok(servers.iter().filter_map(text).map(ToOwned::to_owned).collect())
            }
            _ => Err(odd_reply()),
        }
    }

    /// Returns whether the lease of an instance runs.
    pub(super) async fn is_alive(&self, server: &str) -> Result<bool, StoreError> {
        Ok(integer(&self.commands.run(ALIVE, &self.servers, [server]).await?)? == 1)
    }

    /// Claims a lost instance for one reaper. Returns the claim, which expires by itself; `None`: another reaper has
    /// one.
    pub(super) async fn claim(&self, server: &str) -> Result<Option<String>, StoreError> {
        let (key, claim) = (self.claim_key(server), Uuid::new_v4().to_string());
        let words: [&[u8]; 6] =
            [b"SET", key.as_bytes(), claim.as_bytes(), b"NX", b"PX", CLAIM_MS.as_bytes()];
        let taken = !matches!(self.commands.call(&words).await?, Reply::Null);
        Ok(taken.then_some(claim))
    }

    /// Releases a claim, unless it has expired and another reaper has one.
    pub(super) async fn unclaim(&self, server: &str, claim: &str) -> Result<(), StoreError> {
        self.commands.run(UNCLAIM, &self.claim_key(server), [claim]).await.map(drop)
    }

    /// Returns whether a reaper has a claim on this instance, even if the reaper has died since.
    pub(super) async fn is_claimed(&self) -> Result<bool, StoreError> {
        let key = self.claim_key(&self.server_id);
        Ok(integer(&self.commands.call(&[b"EXISTS", key.as_bytes()]).await?)? > 0)
    }

    /// Removes a lost instance from the index and publishes that.
    pub(super) async fn remove_dead(&self, server: &str) -> Result<Removal, StoreError> {
        let channel = self.names.registry();
        let message = serde_json::json!({ "event": "server_lost", "server_id": server });
        let arguments = [server, &channel, &message.to_string()];
        Ok(match integer(&self.commands.run(REMOVE_DEAD, &self.servers, arguments).await?)? {
            -1 => Removal::Alive,
            1 => Removal::Removed,
            _ => Removal::Gone,
        })
    }

    fn claim_key(&self, server: &str) -> String {
        self.names.server_reaper(server)
    }
}

/// Lifetime of a claim in milliseconds: then another reaper follows one that died.
pub(super) const CLAIM_MS: &str = "30000";

/// Key: lease. Arguments: incarnation, new value, length in milliseconds.
const RENEW: &str = "\
local held=redis.call('GET',KEYS[1]) local before=0 \
if held then before=2 if string.find(held,ARGV[1],1,true) then before=1 end end \
redis.call('SET',KEYS[1],ARGV[2],'PX',ARGV[3]) \
return before";

/// Key: servers. Arguments: length of the lease, server, TTL of the index. If instances have different TTLs, the
/// longest holds.
const ENLIST: &str = "\
local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
redis.call('ZADD',KEYS[1],now+ARGV[1],ARGV[2]) \
if redis.call('PTTL',KEYS[1])<tonumber(ARGV[3]) then redis.call('PEXPIRE',KEYS[1],ARGV[3]) end \
return 1";

/// Key: servers. Returns many instances, so that those that cannot be removed do not hide others.
const EXPIRED: &str = "\
local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
return redis.call('ZRANGEBYSCORE',KEYS[1],'-inf',now,'LIMIT',0,1024)";

/// Key: servers. Argument: server.
const ALIVE: &str = "\
local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
local ends=redis.call('ZSCORE',KEYS[1],ARGV[1]) \
if ends and tonumber(ends)>now then return 1 end \
return 0";

/// Key: claim. Argument: its value.
const UNCLAIM: &str = "\
if redis.call('GET',KEYS[1])==ARGV[1] then return redis.call('DEL',KEYS[1]) end \
return 0";

/// Key: servers. Arguments: server, channel, message.
const REMOVE_DEAD: &str = "\
local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
local ends=redis.call('ZSCORE',KEYS[1],ARGV[1]) \
if ends and tonumber(ends)>now then return -1 end \
if redis.call('ZREM',KEYS[1],ARGV[1])==0 then return 0 end \
redis.call('PUBLISH',ARGV[2],ARGV[3]) \
return 1";
