//! The place of each user's agent: which connection, of all instances, holds it. Knows no connection.
//!
//! A claim takes a place with a new generation, and every change of the holder is a marker on the channel of the
//! agent's commands. So commands before the marker belong to the holder before, and commands behind it to the new one.

use std::{borrow::Cow, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;
use uuid::Uuid;
use wsproxy_proto::{
    agents::command::Marker,
    names::{Id, Names},
};

use crate::{
    bus::{
        Bus,
        publish::{BusError, Keep, Publish},
    },
    core::Core,
    endpoint::agents::owner::places::Places,
    hub::Hub,
    redis::{
        reply::{integer, odd_reply, text},
        resp::Reply,
        script,
        words::milliseconds,
    },
    registry::{agents::release::AgentPlaces, commands::Commands},
    store::command::StoreError,
    telemetry::time,
};

mod places;

/// The places of users' agents. Every call has the deadline `redis.response_timeout`.
pub struct Owners {
    settings: OwnerSettings,
    backend: OwnersBackend,
}

/// Parameters of the places.
#[derive(Debug, Clone)]
pub struct OwnerSettings {
    /// Name of this instance.
    pub server_id: Arc<str>,
    /// Spelling of keys and channels.
    pub names: Names,
    /// Time within which Redis must answer.
    pub response_timeout: Duration,
    /// Most replacements of one user's connection per minute; 0: no limit.
    pub replacements_per_minute: u32,
    /// Time for which the generation of a released place stays.
    pub offline_wait: Duration,
}

/// Storage of the places.
enum OwnersBackend {
    /// This process. The lock covers a change and the publishing of its marker, so that both have one order.
    Embedded(Mutex<Places>, Arc<Hub>),
    /// Redis.
    Redis(Commands, AgentPlaces),
}

/// A wish to hold a place.
#[derive(Debug, Clone, Copy)]
pub struct Claim {
    /// The connection that wants the place.
    pub connection: Uuid,
    /// Generation with which the connection holds the place already; `None`: a newcomer, which replaces the holder.
    pub held: Option<u64>,
    /// Publishes the marker even if the holder does not change.
    pub announce: bool,
}

/// A place that its holder keeps.
#[derive(Debug, Clone, Copy)]
pub struct Kept<'a> {
    /// The user.
    pub user: &'a Id,
    /// The connection.
    pub connection: Uuid,
    /// Generation with which the connection holds the place.
    pub generation: u64,
}

/// Holder of a place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// The connection; nil if a program other than a gateway wrote it.
    pub connection: Uuid,
    /// The instance of the connection.
    pub server: Box<str>,
}

/// A place as other instances see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlaceLook {
    /// Generation of the place; `None` if it is free, or Redis has lost its data.
    pub generation: Option<u64>,
    /// A connection listens to the agent's commands.
    pub is_heard: bool,
}

/// Answer to a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claimed {
    /// The connection holds the place.
    Held {
        /// Generation of the holder.
        generation: u64,
        /// Other connection that held the place until now.
        replaced: Option<Owner>,
        /// No other instance subscribes to the agent's commands, as far as the bus knows. Told only where the holder
        /// changes.
        is_alone: bool,
    },
    /// A newer connection holds the place or has held it.
    Lost {
        /// The present holder, if there is one.
        owner: Option<Owner>,
        /// Generation of the place.
        generation: u64,
    },
    /// The place changed its holder too often; the present holder stays.
    Flapping {
        /// Time after which a newcomer may try again.
        retry_after: Duration,
        /// The present holder.
        owner: Owner,
    },
}

impl Owners {
    /// Makes the places of an instance.
    #[must_use]
    pub fn new(core: &Core) -> Self {
        let settings = OwnerSettings {
            server_id: Arc::clone(&core.server_id),
            names: core.names.clone(),
            response_timeout: core.config.redis.response_timeout,
            replacements_per_minute: core.config.agents.replacements_per_minute,
            offline_wait: core.config.agents.offline_wait,
        };
        Self::on(settings, &core.hub, &core.bus)
    }

    /// Makes the places on a bus.
    #[must_use]
    pub fn on(settings: OwnerSettings, hub: &Arc<Hub>, bus: &Bus) -> Self {
        let backend = match bus {
            Bus::Embedded(_) => OwnersBackend::Embedded(Mutex::default(), Arc::clone(hub)),
            Bus::Redis(bus) => {
                let commands = Commands::new(bus.client().clone(), settings.response_timeout);
                let wait = settings.offline_wait;
                let places = AgentPlaces::new(commands.clone(), &settings.names, wait);
                OwnersBackend::Redis(commands, places)
            }
        };
        Self { settings, backend }
    }

    /// Takes a place, keeps it, or takes it again after Redis lost data.
    ///
    /// # Errors
    /// The store did not answer. The claim may take effect later: release the connection.
    pub async fn claim(&self, user: &Id, claim: Claim) -> Result<Claimed, StoreError> {
        match &self.backend {
            OwnersBackend::Embedded(places, hub) => {
                let mut places = places.lock();
                let now = (Instant::now(), time::since_epoch().as_micros() as u64);
                let before = places.of(user);
                let claimed = places.claim(
                    user,
                    claim,
                    &self.settings.server_id,
                    self.settings.replacements_per_minute,
                    now,
                );
                if let Some(generation) = claimed.1 {
                    // Without its marker a change of the holder would not be seen.
                    let former = before.as_ref().and_then(|place| place.holder_at(now.0));
                    let connection = Some(claim.connection);
                    let marker = Marker { connection, generation, former };
                    if let Err(error) = self.mark(hub, user, marker) {
                        places.restore(user, before);
                        return Err(error);
                    }
                }
                Ok(claimed.0)
            }
            OwnersBackend::Redis(commands, _) => self.claim_in_redis(commands, user, claim).await,
        }
    }

    /// Keeps places, or takes them again after Redis lost data. Returns an answer for each; see [`Self::claim`].
    pub async fn keep(&self, places: &[Kept<'_>]) -> Vec<Result<Claimed, StoreError>> {
        let claim = |place: &Kept<'_>| Claim {
            connection: place.connection,
            held: Some(place.generation),
            announce: false,
        };
        let OwnersBackend::Redis(commands, _) = &self.backend else {
            let mut kept = Vec::with_capacity(places.len());
            for place in places {
                kept.push(self.claim(place.user, claim(place)).await);
            }
            return kept;
        };
        let calls: Vec<_> =
            places.iter().map(|place| self.words(place.user, claim(place))).collect();
        let replies = commands.run_each(&script::AGENT_CLAIM, &calls).await;
        let claimed = |(reply, place): (Result<Reply, StoreError>, &Kept<'_>)| {
            read_claimed(&reply?, place.connection).ok_or_else(odd_reply)
        };
        replies.into_iter().zip(places).map(claimed).collect()
    }

    /// Releases a place, unless another connection holds it. Returns whether this connection held it.
    ///
    /// # Errors
    /// The store did not answer. The release may take effect later.
    pub async fn release(&self, user: &Id, connection: Uuid) -> Result<bool, StoreError> {
        match &self.backend {
            OwnersBackend::Embedded(places, hub) => {
                let mut places = places.lock();
                let released =
                    places.release(user, connection, self.settings.offline_wait, Instant::now());
                if let Some(generation) = released {
                    let former = Some(connection);
                    drop(self.mark(hub, user, Marker { connection: None, generation, former }));
                }
                Ok(released.is_some())
            }
            OwnersBackend::Redis(_, places) => {
                Ok(places.release(user, connection).await?.is_some())
            }
        }
    }

    /// Returns whether an agent holds the place, or held it a moment ago.
    ///
    /// # Errors
    /// The store did not answer.
    pub async fn is_awaited(&self, user: &Id) -> Result<bool, StoreError> {
        match &self.backend {
            OwnersBackend::Embedded(places, _) => {
                Ok(places.lock().is_awaited(user, Instant::now()))
            }
            OwnersBackend::Redis(commands, _) => {
                let key = self.settings.names.agent_owner(user);
                Ok(integer(&commands.call(&["EXISTS", &key]).await?)? > 0)
            }
        }
    }

    /// Returns whether a connection holds the place, of any gateway.
    ///
    /// # Errors
    /// The store did not answer.
    pub async fn is_held(&self, user: &Id) -> Result<bool, StoreError> {
        match &self.backend {
            OwnersBackend::Embedded(places, _) => {
                let place = places.lock().of(user);
                Ok(place.is_some_and(|place| place.holder_at(Instant::now()).is_some()))
            }
            OwnersBackend::Redis(commands, _) => {
                let key = self.settings.names.agent_server(user);
                Ok(integer(&commands.call(&["EXISTS", &key]).await?)? > 0)
            }
        }
    }

    /// Returns whether no connection holds the place; `false` on the embedded bus, which loses no answer.
    ///
    /// # Errors
    /// The store did not answer.
    pub async fn is_free(&self, user: &Id) -> Result<bool, StoreError> {
        let OwnersBackend::Redis(commands, _) = &self.backend else { return Ok(false) };
        let key = self.settings.names.agent_owner(user);
        Ok(text(&commands.call(&["HGET", &key, "connection"]).await?).is_none())
    }

    /// Looks at a place from outside; `None` on the embedded bus, whose only instance knows its own agents.
    ///
    /// # Errors
    /// The store did not answer.
    pub async fn look(&self, user: &Id) -> Result<Option<PlaceLook>, StoreError> {
        let OwnersBackend::Redis(commands, _) = &self.backend else { return Ok(None) };
        let names = &self.settings.names;
        let generation = commands.call(&["HGET", &names.agent_owner(user), "gen"]).await?;
        let channel = names.agent_commands(user);
        let Reply::Array(counts) = commands.call(&["PUBSUB", "NUMSUB", &channel]).await? else {
            return Err(odd_reply());
        };
        let listeners = integer(counts.get(1).ok_or_else(odd_reply)?)?;
        let generation = text(&generation).and_then(|text| text.parse().ok());
        Ok(Some(PlaceLook { generation, is_heard: listeners > 0 }))
    }

    async fn claim_in_redis(
        &self,
        commands: &Commands,
        user: &Id,
        claim: Claim,
    ) -> Result<Claimed, StoreError> {
        let words = self.words(user, claim);
        let words = words.each_ref().map(|word| &**word);
        let reply = commands.run_script(&script::AGENT_CLAIM, &words).await?;
        read_claimed(&reply, claim.connection).ok_or_else(odd_reply)
    }

    /// Returns the words of the claiming script.
    fn words(&self, user: &Id, claim: Claim) -> [Cow<'_, str>; 10] {
        let Claim { connection, held, announce } = claim;
        [
            "2".into(),
            self.settings.names.agent_owner(user).into(),
            self.settings.names.agent_server(user).into(),
            connection.to_string().into(),
            (&*self.settings.server_id).into(),
            held.map_or_else(String::new, |generation| generation.to_string()).into(),
            milliseconds(PLACE_TTL).to_string().into(),
            self.settings.names.agent_commands(user).into(),
            if announce { "1" } else { "" }.into(),
            self.settings.replacements_per_minute.to_string().into(),
        ]
    }

    /// Publishes the marker of a change on the embedded bus, whose queue keeps the order.
    fn mark(&self, hub: &Hub, user: &Id, marker: Marker) -> Result<(), StoreError> {
        let payload = marker.encode().into();
        let channel = self.settings.names.agent_commands(user).into();
        let publish = Publish { channel, payload, keep: Keep::Nothing, receipt: None };
        hub.publish(publish).map_err(|error| match error {
            BusError::Closed => StoreError::Closed,
            _ => StoreError::Full,
        })
    }
}

/// Reads the answer of the claiming script.
fn read_claimed(reply: &Reply, connection: Uuid) -> Option<Claimed> {
    let Reply::Array(parts) = reply else { return None };
    let [Reply::Integer(verdict), number, holder, server, rest @ ..] = &parts[..] else {
        return None;
    };
    let number: u64 = text(number)?.parse().ok()?;
    let owner = match (text(holder)?, text(server)?) {
        ("", _) => None,
        (holder, server) => Some(Owner {
            connection: Uuid::try_parse(holder).unwrap_or_default(),
            server: server.into(),
        }),
    };
    match (verdict, rest) {
        (1, [Reply::Integer(listening)]) => Some(Claimed::Held {
            generation: number,
            replaced: owner.filter(|owner| owner.connection != connection),
            is_alone: (0..=1).contains(listening),
        }),
        (0, []) => Some(Claimed::Lost { owner, generation: number }),
        (-1, []) => Some(Claimed::Flapping {
            retry_after: Duration::from_secs(number.clamp(1, WINDOW.as_secs())),
            owner: owner?,
        }),
        _ => None,
    }
}

/// Time after which a place is free that its holder does not keep.
pub const PLACE_TTL: Duration = Duration::from_secs(120);

/// Time over which replacements are counted.
const WINDOW: Duration = Duration::from_secs(60);
