//! A Cluster with two instances under load: clients of histories at both, and plain messages beside them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use wsproxy_proto::names::slot;

use super::load::{self, Seen, Sent};
use crate::support::{
    cluster::Cluster,
    eventually,
    gateway::{TestInstance, config},
    soon,
};

/// The load, and what bears it.
pub struct Stage {
    pub cluster: Cluster,
    pub instances: Vec<TestInstance>,
    clients: Vec<JoinHandle<Seen>>,
    loads: Vec<JoinHandle<Sent>>,
    plain: JoinHandle<()>,
    plain_seen: Arc<AtomicU64>,
    end: CancellationToken,
}

impl Stage {
    pub async fn open() -> Self {
        let cluster = tokio::task::spawn_blocking(Cluster::start).await.unwrap();
        let mut instances = Vec::new();
        for _ in 0..2 {
            let mut config = config(Some(&cluster.url()));
            config.sessions.history = true;
            config.limits.max_connections = 2000;
            instances.push(TestInstance::start(config).await);
        }
        let end = CancellationToken::new();
        let (mut clients, mut loads) = (Vec::new(), Vec::new());
        for session in 0..sessions() {
            let client = instances[session % 2].client(&name(session)).await;
            clients.push(tokio::spawn(load::watch(client)));
        }
        for session in 0..sessions() {
            let core = Arc::clone(instances[session / 2 % 2].gateway());
            loads.push(tokio::spawn(load::publish(core, name(session), pause(), end.clone())));
        }
        let (plain, plain_seen) = plain(&instances, end.clone()).await;
        tokio::time::sleep(Duration::from_millis(700)).await;
        Self { cluster, instances, clients, loads, plain, plain_seen, end }
    }

    /// The sessions whose histories a master has.
    pub fn sessions_of(&self, master: usize) -> Vec<usize> {
        let owners = self.cluster.owners();
        let owner = |session| owners[usize::from(slot(self.log(session).as_bytes()))];
        (0..sessions()).filter(|session| owner(*session) == Some(master)).collect()
    }

    /// The key of a session's history.
    pub fn log(&self, session: usize) -> String {
        format!("{{session:{}:down}}:log", name(session))
    }

    /// Waits until plain messages of one instance reach the other, and returns the time of it.
    pub async fn plain_flow(&self) -> Instant {
        let before = self.plain_seen.load(Relaxed);
        eventually("plain messages flow", || self.plain_seen.load(Relaxed) > before + 1).await;
        Instant::now()
    }

    /// Asserts that each plain message of one instance reaches the other.
    pub async fn plain_messages_arrive(&self) {
        self.plain_messages_arrive_on("session:counted:down").await;
    }

    /// The same on a topic of the caller's.
    pub async fn plain_messages_arrive_on(&self, topic: &str) {
        let mut follower = self.instances[1].follow(topic).await;
        for number in 0..20 {
            self.instances[0].publish(topic, number.to_string());
            assert_eq!(follower.next().await, number.to_string());
        }
    }

    /// Ends the load, and compares what was published with what each client got, which is told of a loss at most
    /// `told_max` times.
    pub async fn judge(self, told_max: usize) {
        self.judge_each(|_| told_max).await;
    }

    /// The same with a bound for each session.
    pub async fn judge_each(self, told_max: impl Fn(usize) -> usize) {
        let Self { cluster, instances, clients, loads, plain, end, .. } = self;
        eventually("both instances are ready", || {
            instances.iter().all(|one| {
                let status = one.gateway().bus.status();
                status.connected && status.subscribed && status.refusal.is_none()
            })
        })
        .await;
        // Load on what is there now.
        tokio::time::sleep(Duration::from_millis(700)).await;
        end.cancel();
        let (mut objections, mut counts) = (Vec::new(), [0; 4]);
        for (session, (client, load)) in clients.into_iter().zip(loads).enumerate() {
            let sent = soon("the outcomes of a session", load).await.unwrap();
            load::publish_last(instances[0].gateway(), &name(session)).await;
            let seen = soon("the end of a session", client).await.unwrap();
            if let Some(objection) = load::objection(&sent, &seen, told_max(session)) {
                objections.push(format!("{} {objection}", name(session)));
            }
            let more = [sent.stored.len(), sent.refused.len(), sent.lost.len(), seen.notices.len()];
            counts.iter_mut().zip(more).for_each(|(count, more)| *count += more);
        }
        soon("the end of plain messages", plain).await.unwrap();
        let [stored, refused, lost, told] = counts;
        println!("{stored} stored, {refused} refused, {lost} lost, {told} told of a loss");
        assert!(objections.is_empty(), "{}", objections.join("\n"));
        // More than a second's load.
        let of_a_second = (1000 / pause().as_millis()) as usize;
        assert!(stored > of_a_second * sessions(), "{stored} stored");
        for instance in instances {
            instance.drain().await;
        }
        drop(cluster);
    }
}

/// Publishes plain messages at one instance and counts those that reach the other.
async fn plain(
    instances: &[TestInstance],
    end: CancellationToken,
) -> (JoinHandle<()>, Arc<AtomicU64>) {
    let seen = Arc::new(AtomicU64::new(0));
    let mut follower = instances[1].follow(PLAIN).await;
    let hub = Arc::clone(instances[0].gateway());
    let counted = Arc::clone(&seen);
    let task = tokio::spawn(async move {
        let mut tick = tokio::time::interval(Duration::from_millis(10));
        while !end.is_cancelled() {
            tokio::select! {
                _ = follower.next() => drop(counted.fetch_add(1, Relaxed)),
                _ = tick.tick() => {
                    let publish = crate::support::bus::message(PLAIN, "plain");
                    let _ = hub.hub.publish(publish);
                }
            }
        }
    });
    (task, seen)
}

fn name(session: usize) -> String {
    format!("s-{session}")
}

/// Whether the faults last as long as they may, under the whole load.
pub fn is_long() -> bool {
    std::env::var_os("CLUSTER_LONG").is_some()
}

/// Sessions with a client and a load each.
pub fn sessions() -> usize {
    if is_long() { 1000 } else { 60 }
}

/// Pause between two messages of a session: 2,000/s for 1,000 sessions, or 600/s.
fn pause() -> Duration {
    Duration::from_millis(if is_long() { 500 } else { 100 })
}

/// Topic of messages without history.
const PLAIN: &str = "session:plain:down";
