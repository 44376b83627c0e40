//! The keys of leases in Redis: one for each instance, their index, and the claim of a reaper.
//!
//! Every time is Redis' own: the clocks of instances may differ by any amount. No script touches two
//! keys, since they lie in different slots of a cluster. The index alone says who lives; the lease
//! key tells its owner whether it was taken for dead.

use std::sync::Arc;

use uuid::Uuid;
use wsproxy_proto::names::Names;

use crate::{
    bus::redis::{milliseconds, resp::Reply},
    registry::{
        commands::{Commands, integer, odd_reply, text},
        lease::{Holder, Settings},
    },
    store::StoreError,
};

/// The keys of leases, for one instance.
pub(super) struct LeaseKeys {
    commands: Commands,
    names: Names,
    server_id: Arc<str>,
    /// This run of the instance: an earlier one may have had the same name.
    incarnation: String,
    lease: String,
    servers: String,
    /// Milliseconds, as words.
    lease_ms: String,
    index_ms: String,
}

/// The result of removing an instance from the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Buried {
    /// The instance is alive again and stays.
    Alive,
    /// Another instance was faster.
    Gone,
    /// This instance removed it.
    Removed,
}

impl LeaseKeys {
    pub(super) fn new(commands: Commands, settings: &Settings) -> Self {
        let Settings { names, server_id, pace, .. } = settings;
        // The index names lost instances, so it must live as long as anything that they may leave.
        let index_ttl = settings.index_ttl.max(pace.lease * 4);
        Self {
            commands,
            incarnation: Uuid::new_v4().to_string(),
            lease: names.events_server(server_id, ""),
            servers: names.events("servers"),
            lease_ms: milliseconds(pace.lease).to_string(),
            index_ms: milliseconds(index_ttl).to_string(),
            names: names.clone(),
            server_id: Arc::clone(server_id),
        }
    }

    /// Renews the lease, which tells also how many connections the instance has. Answers who held it.
    pub(super) async fn renew(&self, connections: u64) -> Result<Holder, StoreError> {
        let Self { incarnation, lease_ms, index_ms, .. } = self;
        let value = format!(r#"{{"connections":{connections},"incarnation":"{incarnation}"}}"#);
        let lease = self.commands.run(RENEW, &self.lease, [incarnation, &value, lease_ms]);
        let index =
            self.commands.run(ENLIST, &self.servers, [lease_ms, &*self.server_id, index_ms]);
        let (holder, _) = tokio::try_join!(lease, index)?;
        match integer(&holder)? {
            0 => Ok(Holder::Nobody),
            1 => Ok(Holder::Us),
            _ => Ok(Holder::Another),
        }
    }

    /// Gives the lease up. With `clean` the name leaves the index; otherwise others clean up at once.
    pub(super) async fn release(&self, clean: bool) -> Result<(), StoreError> {
        self.commands.call(&[b"DEL", self.lease.as_bytes()]).await?;
        let (servers, server) = (self.servers.as_bytes(), self.server_id.as_bytes());
        let reply = match clean {
            true => self.commands.call(&[b"ZREM", servers, server]).await,
            false => self.commands.call(&[b"ZADD", servers, b"XX", b"0", server]).await,
        };
        reply.map(drop)
    }

    /// Instances whose leases have run out, the longest dead first.
    pub(super) async fn expired(&self) -> Result<Vec<String>, StoreError> {
        match self.commands.run(EXPIRED, &self.servers, [""; 0]).await? {
            Reply::Array(servers) => {
                Ok(servers.iter().filter_map(text).map(ToOwned::to_owned).collect())
            }
            _ => Err(odd_reply()),
        }
    }

    /// Whether the lease of an instance runs.
    pub(super) async fn is_alive(&self, server: &str) -> Result<bool, StoreError> {
        Ok(integer(&self.commands.run(ALIVE, &self.servers, [server]).await?)? == 1)
    }

    /// Claims a lost instance for one reaper. Answers the claim, which ends by itself; `None`: another
    /// reaper has it.
    pub(super) async fn claim(&self, server: &str) -> Result<Option<String>, StoreError> {
        let (key, claim) = (self.claim_key(server), Uuid::new_v4().to_string());
        let words: [&[u8]; 6] =
            [b"SET", key.as_bytes(), claim.as_bytes(), b"NX", b"PX", CLAIM_MS.as_bytes()];
        let taken = !matches!(self.commands.call(&words).await?, Reply::Null);
        Ok(taken.then_some(claim))
    }

    /// Gives a claim up, unless it has ended and another reaper has one.
    pub(super) async fn unclaim(&self, server: &str, claim: &str) -> Result<(), StoreError> {
        self.commands.run(UNCLAIM, &self.claim_key(server), [claim]).await.map(drop)
    }

    /// Whether a reaper is at work on what this instance left, or died while it was.
    pub(super) async fn is_claimed(&self) -> Result<bool, StoreError> {
        let key = self.claim_key(&self.server_id);
        Ok(integer(&self.commands.call(&[b"EXISTS", key.as_bytes()]).await?)? > 0)
    }

    /// Removes a lost instance from the index and publishes that.
    pub(super) async fn bury(&self, server: &str) -> Result<Buried, StoreError> {
        let channel = self.names.events("registry");
        let message = serde_json::json!({ "event": "server_lost", "server_id": server });
        let arguments = [server, &channel, &message.to_string()];
        Ok(match integer(&self.commands.run(BURY, &self.servers, arguments).await?)? {
            -1 => Buried::Alive,
            1 => Buried::Removed,
            _ => Buried::Gone,
        })
    }

    fn claim_key(&self, server: &str) -> String {
        self.names.events_server(server, ":reaper")
    }
}

/// A reaper that dies is followed by another one after this time, in milliseconds.
pub(super) const CLAIM_MS: &str = "30000";

/// Key: lease. Arguments: incarnation, new value, length in milliseconds.
const RENEW: &str = "\
local held=redis.call('GET',KEYS[1]) local before=0 \
if held then before=2 if string.find(held,ARGV[1],1,true) then before=1 end end \
redis.call('SET',KEYS[1],ARGV[2],'PX',ARGV[3]) \
return before";

/// Key: servers. Arguments: length of the lease, server, TTL of the index. Instances may differ in the
/// TTL: the longest holds.
const ENLIST: &str = "\
local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
redis.call('ZADD',KEYS[1],now+ARGV[1],ARGV[2]) \
if redis.call('PTTL',KEYS[1])<tonumber(ARGV[3]) then redis.call('PEXPIRE',KEYS[1],ARGV[3]) end \
return 1";

/// Key: servers. Instances that cannot be cleaned up must not hide others: there are many places.
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
const BURY: &str = "\
local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
local ends=redis.call('ZSCORE',KEYS[1],ARGV[1]) \
if ends and tonumber(ends)>now then return -1 end \
if redis.call('ZREM',KEYS[1],ARGV[1])==0 then return 0 end \
redis.call('PUBLISH',ARGV[2],ARGV[3]) \
return 1";
