//! Life of an agent: one task owns the state of its lane, and nothing else dials.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout, timeout_at},
};
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};
use uuid::Uuid;
use wsproxy_conn::lane::{self, LaneEnd, LaneHandle};
use wsproxy_proto::tunnel::{code::Code, frame::GoAway, memory::Memory};

use crate::{
    config::AgentConfig,
    dialling::{NoLane, dial},
    health::{self, Probed},
    metrics::{self, Counters},
    pauses::Failures,
    serve::Server,
    upstream::Upstream,
};

/// Runs an agent until `stop` is cancelled. Then its lane is drained: the gateway sends new requests elsewhere, and
/// those in flight get [`AgentConfig::drain`].
pub async fn run(config: AgentConfig, stop: CancellationToken) {
    let tasks = TaskTracker::new();
    let server = Arc::new(Server {
        service: config.service.clone(),
        upstream: Upstream::new(config.upstream.clone(), tasks.clone()),
        tasks: tasks.clone(),
        streams: AtomicU32::new(0),
        counters: Counters::default(),
    });
    let memory = Memory::new(config.memory);
    let boot = Uuid::new_v4();
    let (drain, health, metrics_port) = (config.drain, config.health.clone(), config.metrics_port);
    let (news, probed) = watch::channel(None);
    let (failures, leaving) = (Failures::default(), None);
    let mut keeper = Keeper { config, server, memory, boot, probed, dialled: 0, failures, leaving };
    let ticking = keep_upstream(Arc::clone(&keeper.server));
    let serving = metrics::serve_if(metrics_port, Arc::clone(&keeper.server));
    let probing = health::probe_if(health, Arc::clone(&keeper.server), news);
    let lane = tokio::select! {
        lane = keeper.keep(&stop) => lane,
        never = ticking => match never {},
        never = probing => match never {},
        never = serving => match never {},
    };
    let lanes: Vec<_> = lane.into_iter().chain(keeper.leaving.take()).collect();
    for lane in &lanes {
        lane.handle.drain(Code::Restarting, drain.into());
    }
    let until = Instant::now() + drain + CLOSING;
    for lane in &lanes {
        let _ = timeout_at(until, lane.handle.ended()).await;
    }
    drop(lanes);
    tasks.close();
    let _ = timeout(CLOSING, tasks.wait()).await;
}

/// Runs an agent until the process gets SIGTERM or SIGINT. A second signal ends it at once.
///
/// # Errors
/// The operating system refused to tell signals.
pub async fn run_until_signal(config: AgentConfig) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut signalled = async || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let stop = CancellationToken::new();
    let running = run(config, stop.clone());
    tokio::pin!(running);
    tokio::select! {
        () = &mut running => return Ok(()),
        () = signalled() => {}
    }
    tracing::info!("The agent stops: requests in flight are finished.");
    stop.cancel();
    tokio::select! {
        () = &mut running => {}
        () = signalled() => {}
    }
    Ok(())
}

/// Looks after the connections to the upstream and the agent's credential there.
async fn keep_upstream(server: Arc<Server>) -> std::convert::Infallible {
    let mut ticks = interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        server.upstream.tick();
    }
}

/// The one owner of the agent's lanes: one, and two during a drain.
struct Keeper {
    config: AgentConfig,
    server: Arc<Server>,
    memory: Arc<Memory>,
    boot: Uuid,
    probed: watch::Receiver<Option<Probed>>,
    /// Number of connections so far.
    dialled: u64,
    failures: Failures,
    /// Lane whose gateway drains it, until the next lane is ready.
    leaving: Option<Lane>,
}

/// Lane that the gateway has accepted. Dropping it closes its connection.
struct Lane {
    handle: LaneHandle,
    ready_at: Instant,
    _driver: AbortOnDropHandle<LaneEnd>,
}

/// Reason why the agent needs another lane.
enum Left {
    /// The lane has ended.
    Ended(LaneEnd),
    /// The gateway drains the lane, which goes on meanwhile.
    Draining(GoAway),
}

impl Keeper {
    /// Keeps a lane open until `stop`, and returns the one that is open then.
    async fn keep(&mut self, stop: &CancellationToken) -> Option<Lane> {
        loop {
            let opened = tokio::select! {
                () = stop.cancelled() => return None,
                opened = self.open() => opened,
            };
            let pause = match opened {
                Err(error) => self.after_refusal(&error),
                Ok(lane) => {
                    self.leave_old();
                    let left = tokio::select! {
                        () = stop.cancelled() => return Some(lane),
                        left = self.attend(&lane) => left,
                    };
                    self.after_lane(lane, left)
                }
            };
            tokio::select! {
                () = stop.cancelled() => return None,
                () = sleep(pause) => {}
            }
        }
    }

    /// Dials, and waits until the lane is ready.
    async fn open(&mut self) -> Result<Lane, NoLane> {
        self.dialled += 1;
        let dialled = dial(&self.config, self.boot, self.dialled).await?;
        let (settings, memory) = (self.config.lane.clone(), Arc::clone(&self.memory));
        let lane = lane::agent(dialled.socket, &dialled.leftover, settings, memory);
        let (driver, handle, acceptor) = lane.map_err(|error| NoLane::Failed(error.to_string()))?;
        let driver = AbortOnDropHandle::new(self.server.tasks.spawn(driver));
        self.server.tasks.spawn(Arc::clone(&self.server).serve(acceptor));
        let peer = handle.ready().await.map_err(|end| NoLane::Failed(end.to_string()))?;
        self.server.counters.lanes.fetch_add(1, Relaxed);
        tracing::info!(
            gateway = &*peer.instance,
            version = &*peer.build,
            number = self.dialled,
            "The lane is ready."
        );
        Ok(Lane { handle, ready_at: Instant::now(), _driver: driver })
    }

    /// Tells the gateway the health of the upstream until the agent needs another lane.
    async fn attend(&mut self, lane: &Lane) -> Left {
        let mut ticks = interval(health::TOLD_AGAIN);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                left = lane.handle.going_away() => return match left {
                    Ok(go_away) => Left::Draining(go_away),
                    Err(end) => Left::Ended(end),
                },
                Ok(()) = self.probed.changed() => {}
                _ = ticks.tick() => {}
            }
            if let Some(probed) = &*self.probed.borrow_and_update() {
                probed.tell(&self.server, &lane.handle);
            }
        }
    }

    /// Leaves the lane that the gateway drains, now that there is another one.
    fn leave_old(&mut self) {
        let Some(old) = self.leaving.take() else { return };
        let ms = old.handle.status().go_away.map_or(0, |go_away| go_away.drain_ms);
        let within = Duration::from_millis(ms.into()) + CLOSING;
        old.handle.drain(Code::Restarting, within.into());
        self.server.tasks.spawn(async move {
            old.handle.ended().await;
            drop(old);
        });
    }

    /// Returns the wait after a dial that failed.
    fn after_refusal(&mut self, error: &NoLane) -> Duration {
        self.server.counters.refusals.fetch_add(1, Relaxed);
        let mut pause = self.next_pause();
        if error.is_refused_for_long() {
            pause = pause.max(self.config.pauses.refused);
        }
        let pause = pause.max(error.retry_after().unwrap_or_default());
        let wait_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        tracing::warn!(%error, wait_ms, "There is no lane to the gateway; it is dialled again.");
        pause
    }

    /// Returns the wait after a lane.
    fn after_lane(&mut self, lane: Lane, left: Left) -> Duration {
        if lane.ready_at.elapsed() >= self.config.pauses.reset_after {
            self.failures = Failures::default();
        }
        let code = match &left {
            Left::Draining(go_away) => Some(go_away.code),
            Left::Ended(LaneEnd::GoneAway(code)) => Some(*code),
            Left::Ended(_) => None,
        };
        let is_draining = matches!(left, Left::Draining(_));
        let pause = if code == Some(Code::Superseded) {
            self.config.pauses.refused
        } else {
            let is_at_once = is_draining && self.failures.is_empty();
            let pause = self.next_pause();
            if is_at_once { Duration::ZERO } else { pause }
        };
        let wait_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        match left {
            _ if code == Some(Code::Superseded) => tracing::error!(
                agent_id = self.config.agent_id.as_str(),
                wait_ms,
                "Another process has taken this agent's lane: two processes use one agent id."
            ),
            Left::Draining(_) => {
                tracing::info!(wait_ms, "The gateway drains the lane; another one is dialled.");
            }
            Left::Ended(end) => {
                tracing::warn!(%end, wait_ms, "The lane is lost; it is dialled again.")
            }
        }
        if is_draining {
            self.leaving = Some(lane);
        }
        pause
    }

    fn next_pause(&mut self) -> Duration {
        let (random, _) = Uuid::new_v4().as_u64_pair();
        self.failures.note(&self.config.pauses, Instant::now(), random)
    }
}

/// Time for frames of a lane that ends, and for tasks behind it.
const CLOSING: Duration = Duration::from_secs(1);
