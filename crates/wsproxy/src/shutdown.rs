//! How an instance ends: politely, in a fixed order, within its time; or at once when told twice.

use std::{
    io,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::Mutex,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};
use uuid::Uuid;
use wsproxy_conn::{Link, clock};
use wsproxy_proto::disconnect::Disconnect;

use crate::{gateway::Gateway, http::sse::open::OpenStream, telemetry};

/// Connections are closed in batches, so many of them a second.
const BATCHES_PER_SECOND: u32 = 20;

/// At the end of its time whatever still runs gets so long to notice.
const LAST_GRACE: Duration = Duration::from_millis(500);

/// Signals within so long of the first are the same one.
const SAME_SIGNAL: Duration = Duration::from_millis(300);

/// Exit code after a second signal: as if the first had killed the process.
const EXIT_HURRIED: i32 = 130;

/// SIGTERM and SIGINT.
pub struct Signals(Mutex<(Signal, Signal)>);

impl Signals {
    /// From now on signals do not kill the process.
    ///
    /// # Errors
    /// The system refused.
    pub fn new() -> io::Result<Self> {
        let (terminate, interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        Ok(Self(Mutex::new((terminate, interrupt))))
    }

    /// Resolves at the next signal.
    pub async fn wait(&self) {
        let mut signals = self.0.lock().await;
        let (terminate, interrupt) = &mut *signals;
        // SIGTERM is how Kubernetes and systemd end a process; SIGINT is Ctrl-C.
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}

/// Whoever can cut an ending short.
pub trait Hurry {
    /// Resolves when the ending must be over at once.
    fn hurry(&self) -> impl Future<Output = ()> + Send;
}

impl Hurry for Signals {
    async fn hurry(&self) {
        // Some supervisors signal the process and its group: that is one wish, not two.
        sleep(SAME_SIGNAL).await;
        let _ = timeout(Duration::ZERO, self.wait()).await;
        self.wait().await;
        warn!("A second signal: ending at once.");
        telemetry::log::flush();
        std::process::exit(EXIT_HURRIED);
    }
}

/// Nobody can.
impl Hurry for () {
    async fn hurry(&self) {
        std::future::pending().await
    }
}

/// Everything that has to end.
pub struct Ending {
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) accepting: CancellationToken,
    pub(crate) background: TaskTracker,
    pub(crate) background_end: CancellationToken,
}

impl Ending {
    /// Ends everything within `server.shutdown_timeout`.
    pub async fn run(self, hurry: impl Hurry) {
        tokio::select! {
            () = self.end() => {}
            () = hurry.hurry() => {}
        }
    }

    async fn end(self) {
        let server = &self.gateway.config.server;
        let deadline = Instant::now() + server.shutdown_timeout.saturating_sub(LAST_GRACE * 2);
        // Readiness first: until load balancers have noticed, they send clients, who are taken as before.
        self.gateway.draining.store(true, Relaxed);
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        info!(connections = self.gateway.places.taken(), "Draining.");
        sleep(server.drain_delay).await;
        self.gateway.closing.store(true, Relaxed);
        self.accepting.cancel();
        self.gateway.followers_end.cancel();
        self.disconnect_all(deadline).await;
        self.gateway.tasks.close();
        let drained = timeout_at(deadline, self.gateway.tasks.wait()).await.is_ok();
        if !drained {
            warn!(connections = self.gateway.places.taken(), "The time to drain is over.");
            self.gateway.runtime.links().iter().for_each(|link| link.abort());
            self.gateway.event_streams.list().iter().for_each(OpenStream::abort);
            let _ = timeout_at(deadline + LAST_GRACE, self.gateway.tasks.wait()).await;
        }
        let last = Instant::now().max(deadline) + LAST_GRACE;
        if timeout_at(last, self.leave()).await.is_err() {
            warn!("There was no time to leave the registry.");
        }
        // Last the bus: announcements of closed sessions are on their way.
        self.background_end.cancel();
        self.background.close();
        let last = Instant::now().max(deadline) + LAST_GRACE;
        if timeout_at(last, self.background.wait()).await.is_err() {
            warn!("The bus did not end in time.");
        }
        info!(drained, "Ended.");
    }

    /// Takes what other instances know of this one out of Redis. The lease goes last: while it runs, no
    /// other instance cleans up.
    async fn leave(&self) {
        let Gateway { session_log, registry, lease, .. } = &*self.gateway;
        if let Some(log) = session_log {
            log.close().await;
        }
        if let Some(registry) = registry {
            registry.close().await;
        }
        if let Some(lease) = lease {
            lease.close().await;
        }
    }

    /// Closes connections spread over `drain_spread`, so that they do not all come back at once.
    /// A connection that is accepted by a late handshake is found by the next look.
    async fn disconnect_all(&self, deadline: Instant) {
        let spread = self.gateway.config.server.drain_spread;
        let batches = (spread.as_millis() as u32 * BATCHES_PER_SECOND / 1000).max(1);
        let start = Instant::now();
        let mut clients = self.clients();
        // The newest last in the list, first to go: whoever is here longest is most likely busy.
        clients.sort_unstable_by_key(Client::id);
        for batch in 0..batches {
            let left = (batches - batch) as usize;
            let count = clients.len().div_ceil(left);
            for client in clients.drain(clients.len() - count..).rev() {
                client.finish(&Disconnect::RESTART);
            }
            if clients.is_empty() {
                break;
            }
            if left > 1 {
                sleep_until((start + spread * (batch + 1) / batches).min(deadline)).await;
            }
        }
        for client in self.clients() {
            client.finish(&Disconnect::RESTART);
        }
    }

    fn clients(&self) -> Vec<Client> {
        let links = self.gateway.runtime.links().into_iter().map(Client::WebSocket);
        let streams = self.gateway.event_streams.list().into_iter().map(Client::EventStream);
        links.chain(streams).collect()
    }
}

/// Whoever must be told to go.
enum Client {
    WebSocket(Arc<Link>),
    EventStream(OpenStream),
}

impl Client {
    fn id(&self) -> Uuid {
        match self {
            Self::WebSocket(link) => link.id(),
            Self::EventStream(stream) => stream.id(),
        }
    }

    fn finish(&self, why: &'static Disconnect) {
        match self {
            Self::WebSocket(link) => link.finish(why, clock::now()),
            Self::EventStream(stream) => stream.finish(why),
        }
    }
}
