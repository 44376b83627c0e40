//! The end of an instance: in a fixed order and within its time, or at once at a second signal.

use std::{
    io,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::Mutex,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};
use wsproxy_conn::clock;
use wsproxy_proto::disconnect::Disconnect;

use crate::{client::Client, core::Core, endpoint::Families, telemetry};

/// The signals SIGTERM and SIGINT.
pub struct Signals(Mutex<(Signal, Signal)>);

/// The signal SIGHUP, which asks for a reload.
pub struct Hangups(Signal);

impl Hangups {
    /// Catches the signal, which from now on does not kill the process.
    ///
    /// # Errors
    /// The operating system refuses.
    pub fn new() -> io::Result<Self> {
        signal(SignalKind::hangup()).map(Self)
    }

    /// Waits for the next signal. Several that come before this call count as one.
    pub async fn wait(&mut self) {
        self.0.recv().await;
    }
}

impl Signals {
    /// Catches the signals, which from now on do not kill the process.
    ///
    /// # Errors
    /// The operating system refuses.
    pub fn new() -> io::Result<Self> {
        let (terminate, interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        Ok(Self(Mutex::new((terminate, interrupt))))
    }

    /// Waits for the next signal.
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

/// Source of the order to end at once.
pub trait Hurry {
    /// Waits for the order to end at once.
    fn hurry(&self) -> impl Future<Output = ()> + Send;
}

impl Hurry for Signals {
    async fn hurry(&self) {
        // Some supervisors signal both the process and its group: this counts as one signal.
        sleep(SAME_SIGNAL).await;
        let _ = timeout(Duration::ZERO, self.wait()).await;
        self.wait().await;
        warn!("A second signal: ending at once.");
        telemetry::log::flush();
        std::process::exit(EXIT_HURRIED);
    }
}

/// Never orders to end at once.
impl Hurry for () {
    async fn hurry(&self) {
        std::future::pending().await
    }
}

/// Parts of an instance that have to end.
pub struct Shutdown {
    pub(crate) core: Arc<Core>,
    pub(crate) families: Arc<Families>,
    pub(crate) listener: JoinHandle<()>,
    pub(crate) accepting: CancellationToken,
    pub(crate) answering: CancellationToken,
    pub(crate) background: TaskTracker,
    pub(crate) background_end: CancellationToken,
}

impl Shutdown {
    /// Ends everything within `server.shutdown_timeout`.
    pub async fn run(self, hurry: impl Hurry) {
        tokio::select! {
            () = self.end() => {}
            () = hurry.hurry() => {}
        }
    }

    async fn end(mut self) {
        let server = &self.core.config.server;
        let deadline = Instant::now() + server.shutdown_timeout.saturating_sub(LAST_GRACE * 2);
        // Readiness first: load balancers send clients until they notice, and these clients are accepted as before.
        self.core.draining.store(true, Relaxed);
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        info!(connections = self.core.seats.taken(), "Draining.");
        sleep(server.drain_delay).await;
        self.accepting.cancel();
        // Clients that the listener took at its end are served as those before them.
        let _ = timeout(NEWCOMERS_MAX, self.answer_newcomers()).await;
        self.core.closing.store(true, Relaxed);
        self.families.stop_calls(deadline);
        self.answering.cancel();
        self.core.followers_end.cancel();
        self.disconnect_all(deadline).await;
        self.core.tasks.close();
        let drained = timeout_at(deadline, self.core.tasks.wait()).await.is_ok();
        if !drained {
            warn!(connections = self.core.seats.taken(), "The time to drain is over.");
            self.clients().iter().for_each(Client::abort);
            let _ = timeout_at(deadline + LAST_GRACE, self.core.tasks.wait()).await;
        }
        let last = Instant::now().max(deadline) + LAST_GRACE;
        if timeout_at(last, self.leave(deadline)).await.is_err() {
            warn!("There was no time to leave the registry.");
        }
        // End the bus last: announcements of closed sessions are still in its queue.
        self.background_end.cancel();
        self.background.close();
        let last = Instant::now().max(deadline) + LAST_GRACE;
        if timeout_at(last, self.background.wait()).await.is_err() {
            warn!("The bus did not end in time.");
        }
        info!(drained, "Ended.");
    }

    /// Waits until the listener has closed, and each socket has got its first answer.
    async fn answer_newcomers(&mut self) {
        let _ = (&mut self.listener).await;
        while self.core.sockets.newcomers() > 0 {
            sleep(LOOK_AT_NEWCOMERS_EVERY).await;
        }
    }

    /// Removes this instance's entries from Redis. The lease goes last: while it runs, no other instance
    /// removes them. Waits at most until `deadline` for members of rooms who come back elsewhere.
    async fn leave(&self, deadline: Instant) {
        self.families.close(deadline).await;
        if let Some(lease) = self.core.lease.get() {
            lease.close().await;
        }
    }

    /// Closes connections spread over `drain_spread`, so that clients do not all reconnect at once. Agents with calls in
    /// flight go last, each when its calls have ended or when half of the time is over. The last step also closes
    /// connections of late handshakes.
    async fn disconnect_all(&self, deadline: Instant) {
        let spread = self.core.config.server.drain_spread;
        let batches = (spread.as_millis() as u32 * BATCHES_PER_SECOND / 1000).max(1);
        let start = Instant::now();
        let mut clients = self.clients();
        // Ids grow with time. The newest connections go first: the oldest ones are most likely busy.
        clients.sort_unstable_by_key(Client::id);
        for batch in 0..batches {
            let left = (batches - batch) as usize;
            let count = clients.len().div_ceil(left);
            let busy = self.families.busy();
            let last = clients.drain(clients.len() - count..).rev();
            for client in last.filter(|client| !busy.contains(&client.id())) {
                client.finish(&Disconnect::RESTART, clock::now());
            }
            if clients.is_empty() {
                break;
            }
            if left > 1 {
                sleep_until((start + spread * (batch + 1) / batches).min(deadline)).await;
            }
        }
        self.disconnect_busy(start + deadline.duration_since(start) / 2).await;
        for client in self.clients() {
            client.finish(&Disconnect::RESTART, clock::now());
        }
    }

    /// Closes the connections of agents with calls in flight, as soon as the calls have ended.
    async fn disconnect_busy(&self, until: Instant) {
        let mut before = self.families.busy();
        while !before.is_empty() && Instant::now() < until {
            sleep(LOOK_AT_BUSY_EVERY).await;
            let busy = self.families.busy();
            for client in self.clients() {
                if before.contains(&client.id()) && !busy.contains(&client.id()) {
                    client.finish(&Disconnect::RESTART, clock::now());
                }
            }
            before = busy;
        }
        self.families.end_busy();
    }

    fn clients(&self) -> Vec<Client> {
        let links = self.core.runtime.links().into_iter().map(Client::WebSocket);
        let streams = self.core.event_streams.list().into_iter().map(Client::EventStream);
        links.chain(streams).collect()
    }
}

/// Batches per second in which connections are closed.
const BATCHES_PER_SECOND: u32 = 20;

/// Longest wait for the first requests of clients that came last. Some sockets never send one.
const NEWCOMERS_MAX: Duration = Duration::from_secs(1);

/// Interval of looks at sockets without an answer.
const LOOK_AT_NEWCOMERS_EVERY: Duration = Duration::from_millis(10);

/// Interval of looks at agents with calls in flight.
const LOOK_AT_BUSY_EVERY: Duration = Duration::from_millis(50);

/// Time for running tasks to end after the time of the drain.
const LAST_GRACE: Duration = Duration::from_millis(500);

/// Time after a signal within which another one counts as the same.
const SAME_SIGNAL: Duration = Duration::from_millis(300);

/// Exit code after a second signal, as of a process that SIGINT killed.
const EXIT_HURRIED: i32 = 130;
