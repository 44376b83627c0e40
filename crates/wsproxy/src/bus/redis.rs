//! The bus on Redis: three links that are made again for ever, and what they share.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use secrecy::ExposeSecret;
use tokio::sync::{Notify, oneshot};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy_proto::names::Names;

use crate::{
    bus::{
        BusCounters, BusError, Deliver, Publish, Status,
        not_done::NotDone,
        queue::Back,
        redis::{
            address::Address,
            answer::Writes,
            connect::Connector,
            fault::Fault,
            outlet::{Birth, Outlet},
            pipeline::{Driver, Pipeline, Request},
            probe::Route,
            reader::Reader,
            resp::Reply,
            script::Script,
            subscriptions::Subscriptions,
            supervisor::Purpose,
        },
    },
    config,
    store::{StoreError, redis::RedisStore},
};

mod address;
mod answer;
mod connect;
mod fault;
mod link;
mod outlet;
mod pipeline;
mod probe;
mod reader;
pub(crate) mod resp;
mod scout;
pub(crate) mod script;
mod subscriptions;
mod supervisor;
mod watchdog;

/// Channels and messages on a Redis. Clones share one bus.
#[derive(Clone)]
pub struct RedisBus(Arc<Shared>);

/// What links and callers share.
struct Shared {
    connector: Connector,
    client_name: String,
    names: Names,
    probe_channel: Arc<str>,
    probe_interval: Duration,
    response_timeout: Duration,
    subscriptions: Subscriptions,
    publishes: Arc<Pipeline>,
    commands: Arc<Pipeline>,
    /// Messages in it are published over a connection of their own.
    scout: Outlet,
    /// The number of the newest connection.
    births: AtomicU64,
    /// Command links that were made.
    command_links: AtomicU64,
    /// A publishing or command link was made.
    links_changed: Notify,
    health: Health,
    counters: BusCounters,
    shutdown: CancellationToken,
}

/// How the links are.
#[derive(Default)]
struct Health {
    /// Trouble of each link, by [`Purpose`]; `None` inside: it is being made for the first time.
    troubles: Mutex<[Trouble; 3]>,
    subscribed: AtomicBool,
    /// The links end at different servers, or one is deaf; until it is proven that they agree.
    differ: AtomicBool,
    writes: Writes,
}

#[derive(Default)]
struct Trouble {
    up: bool,
    fault: Option<String>,
}

/// Checks a URL as [`RedisBus::new`] reads it.
pub(super) fn check_url(url: &str) -> Result<(), &'static str> {
    Address::parse(url).map(drop)
}

/// Makes one connection with what [`RedisBus::new`] is given, and closes it.
pub(super) async fn try_once(config: &config::Redis) -> Result<(), String> {
    let connector = connector(config)?;
    let made = connector.connect("wsproxy-trial").await;
    made.map(drop)
        .map_err(|fault| format!("Redis at {} cannot be used: {fault}", connector.address()))
}

fn connector(config: &config::Redis) -> Result<Connector, String> {
    let url = config.url.as_ref().map_or("", |url| url.expose_secret());
    let address = Address::parse(url).map_err(str::to_owned)?;
    Connector::new(address, config.ca_file.as_deref(), config.connect_timeout)
}

impl RedisBus {
    /// The database of keys.
    pub(super) fn database(&self) -> u32 {
        self.0.connector.address().database
    }

    pub(super) fn new(
        config: &config::Redis,
        server_id: &str,
        names: &Names,
        deliver: Box<dyn Deliver>,
        tasks: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Result<Self, BusError> {
        let connector =
            connector(config).map_err(|why| BusError::Refused(format!("redis.url: {why}")))?;
        let database = connector.address().database;
        if database != 0 && config.channel_prefix.is_empty() {
            tracing::warn!(
                database,
                "Databases of one Redis do not separate channels: set redis.channel_prefix, \
                unless nothing else uses this Redis."
            );
        }
        let shared = Arc::new(Shared {
            connector,
            client_name: client_name(server_id),
            names: names.clone(),
            probe_channel: names.probe(server_id).into(),
            probe_interval: config.probe_interval,
            response_timeout: config.response_timeout,
            subscriptions: Subscriptions::default(),
            publishes: Arc::new(Pipeline::new(config.publish_queue_bytes)),
            commands: Arc::new(Pipeline::new(COMMAND_QUEUE_BYTES)),
            scout: Outlet::default(),
            births: AtomicU64::new(0),
            command_links: AtomicU64::new(0),
            links_changed: Notify::new(),
            health: Health::default(),
            counters: BusCounters::default(),
            shutdown,
        });
        // The first subscription of every connection; nobody waits for it.
        drop(shared.subscriptions.want(vec![shared.probe_channel.clone()]));
        tasks.spawn(Reader::new(shared.clone(), deliver).run());
        for (pipeline, purpose) in
            [(&shared.publishes, Purpose::Publish), (&shared.commands, Purpose::Command)]
        {
            tasks.spawn(Driver::new(shared.clone(), pipeline.clone(), purpose).run());
        }
        tasks.spawn(scout::run(shared.clone()));
        Ok(Self(shared))
    }

    pub(super) fn store(&self) -> RedisStore {
        RedisStore::new(self.clone())
    }

    pub(super) async fn subscribe(&self, channels: Vec<Arc<str>>) -> Result<(), BusError> {
        let Some(waiting) = self.0.subscriptions.want(channels)? else { return Ok(()) };
        waiting
            .await
            .unwrap_or_else(|_| Err(BusError::Unreachable("unsubscribed meanwhile".into())))
    }

    pub(super) fn unsubscribe(&self, channels: Vec<Arc<str>>) {
        self.0.subscriptions.unwant(channels);
    }

    #[expect(clippy::result_large_err, reason = "the message goes back without an allocation")]
    pub(super) fn publish(&self, publish: Publish) -> Result<(), (BusError, Publish)> {
        let bytes = publish.queued_bytes();
        let Err((back, request)) = self.0.publishes.queue.push(Request::Publish(publish), bytes)
        else {
            return Ok(());
        };
        let error = match back {
            Back::Full => {
                self.0.counters.publish_full.add(1);
                BusError::Full
            }
            Back::Closed => BusError::Closed,
        };
        match request {
            Request::Publish(publish) => Err((error, publish)),
            Request::Command(..) => unreachable!("a queue gives back what was pushed"),
        }
    }

    pub(super) fn poll_publishable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.0.publishes.queue.poll_open(cx)
    }

    pub(super) fn status(&self) -> Status {
        let (connected, last_error) = self.0.health.report();
        Status {
            connected,
            subscribed: self.0.health.subscribed.load(Ordering::Acquire)
                && self.0.are_links_proven(),
            refusal: self.0.refusal(),
            // The probe's own channel is nobody's business.
            channels: self.0.subscriptions.len().saturating_sub(1),
            queued_bytes: self.0.publishes.queue.bytes(),
            last_error,
        }
    }

    pub(crate) fn counters(&self) -> &BusCounters {
        &self.0.counters
    }

    /// Number of links for commands so far. With another number commands may reach another server.
    pub(crate) fn command_links(&self) -> u64 {
        self.0.command_links.load(Ordering::Acquire)
    }

    /// How keys and channels are spelled.
    pub(crate) fn names(&self) -> &Names {
        &self.0.names
    }

    /// Runs a script; `words` are the number of keys, the keys and the arguments.
    pub(crate) async fn run(&self, script: &Script, words: &[&[u8]]) -> Result<Reply, StoreError> {
        debug_assert!(has_one_slot(words), "a script must touch one slot");
        let call = |is_loaded| [&script.call(is_loaded)[..], words].concat();
        match self.command(&call(true)).await {
            // It certainly did not run; with its text it does, and is known from then on.
            Err(StoreError::NotDone { refusal: NotDone::Script, .. }) => {
                self.command(&call(false)).await
            }
            reply => reply,
        }
    }

    /// Sends a command on the connection for such and waits for its reply.
    pub(crate) async fn command(&self, words: &[&[u8]]) -> Result<Reply, StoreError> {
        let mut command = bytes::BytesMut::new();
        resp::words(&mut command, words);
        let (caller, reply) = oneshot::channel();
        self.enqueue(command.freeze(), caller)?;
        reply.await.unwrap_or(Err(StoreError::Closed))
    }

    fn enqueue(
        &self,
        command: Bytes,
        caller: oneshot::Sender<Result<Reply, StoreError>>,
    ) -> Result<(), StoreError> {
        let queue = &self.0.commands.queue;
        let bytes = command.len() + COMMAND_OVERHEAD_BYTES;
        match queue.push(Request::Command(command, caller), bytes) {
            Ok(()) => Ok(()),
            Err((Back::Closed, _)) => Err(StoreError::Closed),
            Err((Back::Full, request)) => {
                // In an outage most of what waits has been given up by its callers.
                queue.retain(|request| match request {
                    Request::Command(_, caller) => !caller.is_closed(),
                    Request::Publish(_) => true,
                });
                queue.push(request, bytes).map_err(|_| StoreError::Full)
            }
        }
    }
}

impl Shared {
    /// The number of a connection that is about to be made.
    fn next_birth(&self) -> Birth {
        self.births.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn outlet(&self, route: Route) -> &Outlet {
        match route {
            Route::Publish => &self.publishes.outlet,
            Route::Command => &self.commands.outlet,
            Route::Fresh => &self.scout,
        }
    }

    /// Whether a probe through every other link came back over the subscribing one.
    fn are_links_proven(&self) -> bool {
        self.publishes.outlet.is_proven() && self.commands.outlet.is_proven()
    }

    /// Why no writes are taken. A refusal that not even the probe repeats is over.
    fn refusal(&self) -> Option<NotDone> {
        self.health.writes.refusal(self.probe_interval * 3 + self.response_timeout)
    }
}

impl Health {
    fn up(&self, purpose: Purpose) {
        self.troubles.lock()[purpose as usize] = Trouble { up: true, fault: None };
    }

    fn down(&self, purpose: Purpose, fault: &Fault) {
        self.troubles.lock()[purpose as usize] =
            Trouble { up: false, fault: Some(fault.to_string()) };
    }

    fn is_up(&self, purpose: Purpose) -> bool {
        self.troubles.lock()[purpose as usize].up
    }

    fn subscribed(&self, is: bool) {
        if is {
            self.troubles.lock()[Purpose::Subscribe as usize].fault = None;
        }
        self.subscribed.store(is, Ordering::Release);
    }

    fn differ(&self) {
        self.differ.store(true, Ordering::Release);
    }

    fn agree(&self) {
        self.differ.store(false, Ordering::Release);
    }

    /// The link is up, but of no use.
    fn denied(&self, why: &str) {
        self.subscribed.store(false, Ordering::Release);
        self.troubles.lock()[Purpose::Subscribe as usize].fault = Some(why.to_owned());
    }

    fn report(&self) -> (bool, Option<String>) {
        let troubles = self.troubles.lock();
        let fault = troubles.iter().find_map(|trouble| trouble.fault.clone());
        let differ = self.differ.load(Ordering::Acquire).then(|| Fault::Probe.to_string());
        (troubles.iter().all(|trouble| trouble.up), fault.or(differ))
    }
}

/// Whether all keys of a script are in one slot of a Redis Cluster; `words` begin with how many keys there are.
fn has_one_slot(words: &[&[u8]]) -> bool {
    let count = words.first().and_then(|count| std::str::from_utf8(count).ok()?.parse().ok());
    let keys = words.iter().skip(1).take(count.unwrap_or(0));
    let mut slots = keys.map(|key| wsproxy_proto::names::slot(key));
    let first = slots.next();
    slots.all(|slot| Some(slot) == first)
}

/// Milliseconds as Redis wants them: a whole number above zero that it can add to its clock.
pub(crate) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).clamp(1, MILLISECONDS_MAX)
}

/// Redis refuses client names with spaces and the like.
fn client_name(server_id: &str) -> String {
    let plain = |c: char| if c.is_ascii_graphic() { c } else { '_' };
    format!("wsproxy-{}", server_id.chars().map(plain).collect::<String>())
}

/// Bound of what waits for the store; handshakes that do not fit are refused.
const COMMAND_QUEUE_BYTES: usize = 8 * 1024 * 1024;

/// What a queued command costs beside its bytes, roughly.
const COMMAND_OVERHEAD_BYTES: usize = 128;

/// A hundred years.
const MILLISECONDS_MAX: u64 = 100 * 365 * 24 * 3600 * 1000;
