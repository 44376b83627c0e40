//! A bus with its store, and a recorder in the hub's place.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use secrecy::SecretString;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy::{
    bus::{
        Bus,
        deliver::{Deliver, Missed},
        publish::{Counts, Keep, Outcome, Publish, Receipt},
    },
    config,
    store::Store,
};
use wsproxy_proto::names::Names;

use super::{
    cluster::Cluster, eventually, redis_process::Server, redis_server::RedisServer,
    sentinel::lone_sentinel, soon,
};

/// A running bus, what it delivers, and the server behind it; dropping it ends its tasks.
pub struct TestBus {
    /// The bus.
    pub bus: Bus,
    /// The store beside it.
    pub store: Store,
    /// Its deliveries.
    pub seen: Recorder,
    /// Its channels have several servers.
    pub is_on_cluster: bool,
    /// The server, if it has one of its own.
    pub server: Option<RedisServer>,
    /// The sentinel of that server, if it has one.
    pub sentinel: Option<(Server, TempDir)>,
    /// The tasks of the bus.
    pub tasks: TaskTracker,
    /// Ends them.
    pub shutdown: CancellationToken,
}

impl TestBus {
    /// The embedded bus.
    pub fn memory() -> Self {
        Self::memory_with(&config(None))
    }

    /// The embedded bus with a configuration.
    pub fn memory_with(config: &config::RedisConfig) -> Self {
        let (seen, tasks, shutdown) =
            (Recorder::default(), TaskTracker::new(), CancellationToken::new());
        let bus = Bus::embedded(
            config,
            &config::LimitsConfig::default(),
            Box::new(seen.clone()),
            &tasks,
            shutdown.clone(),
        );
        Self {
            store: bus.store(),
            bus,
            seen,
            is_on_cluster: false,
            server: None,
            sentinel: None,
            tasks,
            shutdown,
        }
    }

    /// A bus on a server of its own.
    pub fn redis() -> Self {
        let server = RedisServer::start();
        let mut bus = Self::on(&config(Some(&server.url())));
        bus.server = Some(server);
        bus
    }

    /// A bus on a server of its own, which a sentinel names.
    pub fn sentinel() -> Self {
        let (server, directory) = (RedisServer::start(), tempfile::tempdir().unwrap());
        let sentinel = lone_sentinel(server.port(), directory.path());
        let url = format!("redis+sentinel://127.0.0.1:{}/mymaster", sentinel.port());
        let mut bus = Self::on(&config(Some(&url)));
        (bus.server, bus.sentinel) = (Some(server), Some((sentinel, directory)));
        bus
    }

    /// A bus on a Cluster, as a user with all rights.
    pub fn cluster(cluster: &Cluster) -> Self {
        let mut bus = Self::on(&config(Some(&cluster.admin_url())));
        bus.is_on_cluster = true;
        bus
    }

    /// A bus on the server of this configuration.
    pub fn on(config: &config::RedisConfig) -> Self {
        let (seen, tasks, shutdown) =
            (Recorder::default(), TaskTracker::new(), CancellationToken::new());
        let bus = Bus::redis(
            config,
            "test server",
            &Names::new(&config.channel_prefix),
            Box::new(seen.clone()),
            &tasks,
            shutdown.clone(),
        )
        .unwrap();
        Self {
            store: bus.store(),
            bus,
            seen,
            is_on_cluster: false,
            server: None,
            sentinel: None,
            tasks,
            shutdown,
        }
    }

    /// The server of its own.
    pub fn server(&mut self) -> &mut RedisServer {
        self.server.as_mut().expect("the bus has a server of its own")
    }

    /// Subscribes, which must succeed soon.
    #[track_caller]
    pub fn subscribe(&self, channels: &[&str]) -> impl Future<Output = ()> {
        let channels = channels.iter().map(|name| Arc::from(*name)).collect();
        let bus = self.bus.clone();
        let subscribing = soon("subscribe", async move { bus.subscribe(channels).await });
        async move { subscribing.await.unwrap() }
    }

    /// Publishes without a receipt; the queue must have room.
    pub fn publish(&self, channel: &str, payload: impl Into<Bytes>) {
        assert!(self.bus.publish(message(channel, payload)).is_ok());
    }

    /// Publishes and waits for what became of it.
    pub async fn outcome(&self, mut publish: Publish) -> Outcome {
        let (receipt, mut outcomes) = Receipts::channel();
        publish.receipt = Some(receipt);
        assert!(self.bus.publish(publish).is_ok());
        soon("the outcome of a publish", outcomes.recv()).await.unwrap()
    }

    /// Waits until every link is up and everything is subscribed.
    pub async fn ready(&self) {
        eventually("the bus is ready", || {
            let status = self.bus.status();
            status.connected && status.subscribed
        })
        .await;
    }

    /// Waits until a link is missed.
    pub async fn broken(&self) {
        eventually("the bus notices", || !self.bus.status().connected).await;
    }
}

impl Drop for TestBus {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// Short times, so that faults are noticed within a test, but not so short that a busy machine is one.
pub fn config(url: Option<&str>) -> config::RedisConfig {
    config::RedisConfig {
        url: url.map(SecretString::from),
        connect_timeout: Duration::from_secs(2),
        response_timeout: Duration::from_secs(1),
        probe_interval: Duration::from_millis(200),
        ..config::RedisConfig::default()
    }
}

/// A message that is gone without a subscriber.
pub fn message(channel: &str, payload: impl Into<Bytes>) -> Publish {
    Publish { channel: channel.into(), payload: payload.into(), keep: Keep::Nothing, receipt: None }
}

/// A message that is kept in a log where it has no subscriber.
pub fn kept_message(channel: &str, payload: impl Into<Bytes>, log: &str, max: u64) -> Publish {
    let (entries_max, bytes_max, ttl) = (max, 1 << 20, Duration::from_secs(60));
    let keep = Keep::IfNoReceiver { log: log.into(), entries_max, bytes_max, ttl };
    Publish { keep, ..message(channel, payload) }
}

/// Takes notes of everything that a bus delivers. Clones share them.
#[derive(Clone, Default)]
pub struct Recorder(Arc<Mutex<Notes>>);

/// The deliveries.
#[derive(Default)]
pub struct Notes {
    /// Channel and payload of every message.
    pub messages: Vec<(String, Bytes)>,
    /// Messages since the last flush.
    pub unflushed: usize,
    /// Causes of losses.
    pub lost: Vec<String>,
    /// Gaps of recoveries.
    pub recovered: Vec<Duration>,
    /// Every message takes so long.
    pub slowness: Duration,
    /// Messages are counted here instead of kept, if set.
    pub only_count: bool,
    /// Number of the deliveries.
    pub count: usize,
}

impl Recorder {
    /// Looks at the notes.
    pub fn notes<T>(&self, look: impl FnOnce(&mut Notes) -> T) -> T {
        look(&mut self.0.lock().unwrap())
    }

    /// Number of messages that came.
    pub fn count(&self) -> usize {
        self.notes(|notes| notes.count)
    }

    /// Waits for so many messages, which must have been flushed.
    pub async fn wait_for(&self, messages: usize) {
        eventually("messages arrive and are flushed", || {
            self.notes(|notes| notes.count >= messages && notes.unflushed == 0)
        })
        .await;
        assert_eq!(self.count(), messages);
    }

    /// Waits for so many losses and recoveries.
    pub async fn wait_for_recoveries(&self, count: usize) {
        eventually("the bus recovers", || self.notes(|notes| notes.recovered.len() >= count)).await;
        self.notes(|notes| {
            assert_eq!(
                (notes.lost.len(), notes.recovered.len()),
                (count, count),
                "{:?}",
                notes.lost
            );
        });
    }

    /// The payloads that came on a channel.
    pub fn payloads(&self, channel: &str) -> Vec<Bytes> {
        let of_channel = |notes: &mut Notes| {
            let messages = notes.messages.iter().filter(|(name, _)| name == channel);
            messages.map(|(_, payload)| payload.clone()).collect()
        };
        self.notes(of_channel)
    }
}

impl Deliver for Recorder {
    fn message(&mut self, channel: &[u8], payload: &[u8], _last: bool) {
        let slowness = self.notes(|notes| {
            notes.count += 1;
            notes.unflushed += 1;
            if !notes.only_count {
                let channel = String::from_utf8(channel.to_vec()).unwrap();
                notes.messages.push((channel, Bytes::copy_from_slice(payload)));
            }
            notes.slowness
        });
        if !slowness.is_zero() {
            std::thread::sleep(slowness);
        }
    }

    fn flush(&mut self) {
        self.notes(|notes| notes.unflushed = 0);
    }

    fn proceed(&mut self) -> bool {
        false
    }

    fn lost(&mut self, cause: &str, _missed: &Missed) {
        self.notes(|notes| notes.lost.push(cause.into()));
    }

    fn recovered(&mut self, gap: Duration) {
        self.notes(|notes| notes.recovered.push(gap));
    }
}

/// Collects outcomes in the order in which they come.
pub struct Receipts(mpsc::UnboundedSender<Outcome>);

impl Receipts {
    /// A receipt for any number of publishes, and where their outcomes arrive.
    #[allow(clippy::disallowed_methods)]
    pub fn channel() -> (Arc<dyn Receipt>, mpsc::UnboundedReceiver<Outcome>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Arc::new(Self(sender)), receiver)
    }
}

impl Receipt for Receipts {
    fn published(&self, outcome: Outcome) {
        let _ = self.0.send(outcome);
    }

    fn counts(&self) -> Counts {
        Counts::Any
    }
}

/// Runs each test, a function of a [`TestBus`] with what hangs on it, over every backend. The attributes are those of the
/// test that runs all of them on a Cluster.
macro_rules! contract {
    ($(#[$on_cluster:meta])* $($name:ident),* $(,)?) => {
        mod memory {
            $(#[tokio::test] async fn $name() { super::$name(super::TestBus::memory()).await; })*
        }
        mod redis {
            $(#[tokio::test] async fn $name() { super::$name(super::TestBus::redis()).await; })*
        }
        mod sentinel {
            $(#[tokio::test] async fn $name() { super::$name(super::TestBus::sentinel()).await; })*
        }
        mod cluster {
            // One after another: six processes are too many for each.
            $(#[$on_cluster])* #[tokio::test] async fn all_hold() {
                let cluster = $crate::support::cluster::Cluster::shared().await;
                $(
                    cluster.flush().await;
                    eprintln!("{}", stringify!($name));
                    Box::pin(super::$name(super::TestBus::cluster(&cluster))).await;
                )*
            }
        }
    };
}
pub(crate) use contract;
