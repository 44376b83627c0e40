//! Rooms: members who see each other come, go, move and speak. State that all rooms share.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use tokio::{sync::Semaphore, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;
use wsproxy_conn::{Link, Profile};
use wsproxy_proto::{
    names::{Id, Names},
    rooms::wire::Connection,
};

use crate::{
    auth::jwt::JwtVerifier,
    config::{Config, rooms::RoomsConfig},
    core::{self, Core, acks::Patience},
    endpoint::rooms::{
        attempts::RoomAttempts, counters::RoomCounters, keeper::Keeper, leaving::Leaving,
        proxies::ProxyWarning, rates::RoomRates, stats::Totals, table::Table, ticker::Ticker,
    },
    http::rejection::Rejection,
    hub::Hub,
    registry::{revocation::Revocations, rooms::RoomRegistry},
};

pub mod api;
mod attempts;
pub mod counters;
mod development;
pub mod entrance;
mod fanout;
mod identity;
mod keeper;
mod leaving;
mod logic;
mod member;
mod metrics;
mod proxies;
mod rates;
mod record;
mod rejoin;
mod reliable;
mod requests;
mod room;
pub mod stats;
mod table;
mod ticker;

/// The rooms family of an instance.
pub struct Rooms {
    /// Section `[rooms]` of the configuration.
    pub config: RoomsConfig,
    names: Names,
    hub: Arc<Hub>,
    /// Settings and counters that all connections share.
    profile: Arc<Profile>,
    /// Verifier of tokens; `None` if rooms are not served.
    jwt: Option<JwtVerifier>,
    /// Seconds for which a token stays valid after its `exp`.
    leeway: u64,
    /// Tokens that a worker has revoked.
    revocations: Revocations,
    /// Number of this run of the instance, which heads of messages and records have.
    server: u64,
    last_connection: AtomicU64,
    /// Largest message of a client, in bytes.
    message_bytes_max: u32,
    /// Positions of a room whose members are all here are published only once a second. Off where the bus does not
    /// tell all receivers of a publish.
    spares_local: bool,
    attempts: RoomAttempts,
    /// Warning of a proxy that is not trusted.
    proxy_warning: ProxyWarning,
    /// Clients without a token are believed.
    is_development: bool,
    rates: RoomRates,
    /// Limits of reliable messages that wait.
    patience: Patience,
    keeper: Keeper,
    /// The rooms of all instances; `None` if rooms are not served.
    registry: Option<Arc<RoomRegistry>>,
    table: Arc<Table>,
    ticker: Arc<Ticker>,
    leaving: Leaving,
    /// Rooms and members of all instances, as they were counted last.
    totals: Totals,
    leave_permits: Semaphore,
    /// Leaves that run. An instance that ends waits for them.
    leave_tasks: TaskTracker,
    /// Permits of readings that run at once, so that an outage does not end in a flood.
    read_permits: Semaphore,
    tasks: TaskTracker,
    end: CancellationToken,
    /// Counters that the metrics read.
    pub counters: Arc<RoomCounters>,
}

/// A member of a room at this instance.
#[derive(Debug, Clone)]
pub struct Here {
    /// The room.
    pub room: Id,
    /// The member's user.
    pub user: Id,
    /// The member's name in the room.
    pub client: Id,
    /// The member's connection.
    pub link: Arc<Link>,
}

impl Rooms {
    /// Starts the family: the verifier of tokens, the ticker, and the task of leaves.
    ///
    /// # Errors
    /// A sentence for the operator: the keys for tokens cannot be used.
    pub(super) fn start(
        core: &Arc<Core>,
        background: &TaskTracker,
        end: &CancellationToken,
    ) -> Result<Arc<Self>, String> {
        let config = &core.config;
        let is_served = config.endpoints.rooms;
        // Without a key too: a reload of the configuration may bring one.
        let jwt = match is_served {
            true => Some(JwtVerifier::new(&config.jwt, &core.jwt_keys, background, end.clone())?),
            false => None,
        };
        let server = rand::random();
        let registry = is_served.then(|| RoomRegistry::start(core.lease(), &core.bus, server));
        let table = Table::new(config.rooms.rooms_max, config.rooms.state_bytes);
        let rooms = Arc::new(Self {
            config: config.rooms.clone(),
            names: core.names.clone(),
            hub: Arc::clone(&core.hub),
            profile: Arc::new(Profile {
                // The family counts messages itself: above the rate positions wait, and the connection stays.
                rate: None.into(),
                // Positions are left out for a client that reads slowly, so that little waits for it.
                low_water_bytes: LOW_WATER_BYTES.min(config.limits.send_buffer_bytes),
                ..core::profile(config)
            }),
            jwt,
            leeway: config.jwt.leeway_seconds(),
            revocations: Revocations::new(
                &core.bus,
                config.redis.response_timeout,
                core.names.clone(),
                config.jwt.leeway_seconds(),
            ),
            server,
            last_connection: AtomicU64::new(0),
            message_bytes_max: u32::try_from(config.limits.max_message_bytes).unwrap_or(u32::MAX),
            spares_local: true,
            attempts: RoomAttempts::new(&config.rate_limit, &core.attempts),
            proxy_warning: ProxyWarning::default(),
            is_development: development::is_on(config),
            rates: RoomRates::new(&config.rooms),
            patience: reliable::patience(&config.rooms),
            keeper: Keeper::new(core, &table),
            registry,
            table,
            ticker: Arc::default(),
            leaving: Leaving::default(),
            totals: Totals::default(),
            leave_permits: leaving::permits(),
            leave_tasks: TaskTracker::new(),
            read_permits: Semaphore::new(READINGS_MAX),
            tasks: background.clone(),
            end: end.clone(),
            counters: Arc::default(),
        });
        if is_served {
            development::warn_of(config, background, end);
            background.spawn(ticker::run(Arc::clone(&rooms.ticker), end.clone()));
            background.spawn(leaving::run(Arc::clone(&rooms), end.clone()));
            background.spawn(rejoin::run(Arc::clone(&rooms), end.clone()));
        }
        Ok(rooms)
    }

    /// Puts the values of another configuration into force that a reload replaces.
    pub(super) fn reload(&self, config: &Config) {
        self.profile.byte_rate.store(core::byte_rate(&config.limits));
        self.rates.allow(&config.rooms);
        self.attempts.allow(&config.rate_limit);
    }

    /// Runs all waiting leaves: after the grace, or at `deadline`. Connections must be gone by then.
    pub(super) async fn close(self: &Arc<Self>, deadline: Instant) {
        leaving::close(self, deadline).await;
        if let Some(registry) = &self.registry {
            registry.close().await;
        }
    }

    /// Drops a client's connection to a room here without a close frame, as a lost network does. Returns whether there
    /// is one.
    #[must_use]
    pub fn cut(&self, room: &Id, client: &Id) -> bool {
        self.table.get(room).is_some_and(|room| room.cut(client))
    }

    /// Returns at most `most` members of a room at this instance.
    #[must_use]
    pub fn here(&self, room: &Id, most: usize) -> Vec<Here> {
        self.table.get(room).map(|room| room.here(most, |_| true)).unwrap_or_default()
    }

    /// Returns at most `most` memberships of a user at this instance.
    #[must_use]
    pub fn here_of(&self, user: &Id, most: usize) -> Vec<Here> {
        let all = self.table.all();
        let of_user = all.iter().flat_map(|room| room.here(most, |member| member == user));
        of_user.take(most).collect()
    }

    /// Counts reliable messages to a member that are given up, and logs them once a second.
    fn tell_given_up(&self, client: &Id, outcome: GivenUp, count: u64) {
        if count == 0 {
            return;
        }
        let counters = &self.counters;
        let (counter, lines) = match outcome {
            GivenUp::Tries => (&counters.acks_tries, &counters.tries_lines),
            GivenUp::Overflow => (&counters.acks_overflow, &counters.overflow_lines),
        };
        counter.add(count);
        let Some(left_out) = lines.pass() else { return };
        let client = client.as_str();
        match outcome {
            GivenUp::Tries => warn!(
                client,
                count,
                left_out,
                "A member did not acknowledge a reliable message, which is given up."
            ),
            GivenUp::Overflow => warn!(
                client,
                count, left_out, "Too many reliable messages wait for a member: one is given up."
            ),
        }
    }

    /// Returns the name of a connection that is about to join a room.
    fn next_connection(&self) -> Connection {
        let number = self.last_connection.fetch_add(1, Relaxed) + 1;
        Connection { server: self.server, number }
    }
}

/// Reason why a reliable message is given up.
#[derive(Debug, Clone, Copy)]
enum GivenUp {
    /// The member acknowledged no copy of it.
    Tries,
    /// Too many wait for the member.
    Overflow,
}

/// Refuses an id that no room has.
///
/// # Errors
/// 400: a path has this name.
fn check_room_id(id: &Id) -> Result<(), Rejection> {
    if NO_ROOMS.contains(&id.as_str()) {
        return Err(Rejection::bad_id(format!("{id} is the name of a path, and of no room.")));
    }
    Ok(())
}

/// Ids that no room has, since paths below `/ws` have these names.
pub const NO_ROOMS: [&str; 2] = ["stats", "health"];

/// Bytes that may wait for a member before it is sent no further positions.
const LOW_WATER_BYTES: usize = 32 * 1024;

/// Readings of rooms that run at once.
const READINGS_MAX: usize = 64;
