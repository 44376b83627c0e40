//! Deadlines of a proxied request: for the head of its answer, and for bodies that stand still. Knows no streams.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep};
use wsproxy_conn::clock;

use crate::config::tunnel::TunnelConfig;

/// Deadlines of a request. A watch, an event stream and an upgraded connection have none of them.
#[derive(Debug, Clone)]
pub struct Deadlines {
    /// Time of the agent's deadline for the head.
    head: Option<Instant>,
    /// Time that the gateway waits longer.
    margin: Duration,
    /// Longest time without a byte of a body.
    pub idle: Option<Duration>,
}

impl Deadlines {
    /// Returns the deadlines of a request that has just come.
    #[must_use]
    pub fn new(config: &TunnelConfig, may_last: bool) -> Self {
        Self {
            head: (!may_last).then(|| Instant::now() + config.head_timeout),
            margin: config.head_margin,
            idle: (!may_last).then_some(config.idle_timeout),
        }
    }

    /// Returns the deadlines of a request that another instance brings, with the time that is left for the head in
    /// milliseconds; 0: no limit.
    #[must_use]
    pub fn of_peer(config: &TunnelConfig, may_last: bool, head_ms: Option<u32>) -> Self {
        let own = Self::new(config, may_last);
        let left =
            |left: u32| (left > 0).then(|| Instant::now() + Duration::from_millis(left.into()));
        Self { head: head_ms.map_or(own.head, left), ..own }
    }

    /// Returns the time of the agent's deadline for the head.
    #[must_use]
    pub const fn head(&self) -> Option<Instant> {
        self.head
    }

    /// Returns the time that the agent has left for the head, in milliseconds; 0: no limit.
    #[must_use]
    pub fn head_ms(&self) -> u32 {
        let left = self.head.map(|at| at.saturating_duration_since(Instant::now()).as_millis());
        left.map_or(0, |left| u32::try_from(left).unwrap_or(u32::MAX).max(1))
    }

    /// Returns the wait for the head of a request that is sent now. `later`: time that this instance waits longer than
    /// another one, which has the same deadlines and says more.
    #[must_use]
    pub fn wait_for_head(&self, later: Duration) -> HeadWait {
        let left = self.head.map(|at| at.saturating_duration_since(Instant::now()));
        let max = left.map(|left| left + self.margin + later);
        let idle = self.idle.map(|idle| idle + later);
        HeadWait { max, idle, timer: Box::pin(sleep(max.unwrap_or_default())) }
    }
}

/// Wait for the head of an answer. The time for the head begins with the end of the request's body, as it does at the
/// agent. Before that end only a body that stands still is late.
#[derive(Debug)]
pub struct HeadWait {
    /// Time that the agent has, and the margin.
    max: Option<Duration>,
    idle: Option<Duration>,
    timer: Pin<Box<Sleep>>,
}

impl HeadWait {
    /// Waits until the head is late. `progress` has the end of the request's body, unless it `is_uploading`. May be
    /// dropped and called again.
    pub async fn over(&mut self, progress: &Progress, is_uploading: bool) {
        let max = if is_uploading { self.idle.filter(|_| self.max.is_some()) } else { self.max };
        let Some(max) = max else { return std::future::pending().await };
        loop {
            let left = max.saturating_sub(progress.still_for());
            if left.is_zero() {
                return;
            }
            self.timer.as_mut().reset(Instant::now() + left);
            self.timer.as_mut().await;
        }
    }
}

/// Time of the last byte of a request's bodies, which the tasks of both directions note.
#[derive(Debug, Clone)]
pub struct Progress(Arc<AtomicU64>);

impl Default for Progress {
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(clock::now().0)))
    }
}

impl Progress {
    /// Notes that bytes passed.
    pub fn note(&self) {
        self.0.store(clock::now().0, Relaxed);
    }

    /// Returns the time since the last byte.
    fn still_for(&self) -> Duration {
        Duration::from_micros(clock::now().0.saturating_sub(self.0.load(Relaxed)))
    }
}

/// Timer of bodies that stand still.
#[derive(Debug)]
pub struct Idle {
    progress: Progress,
    max: Duration,
    /// `None`: the body has not stood still yet.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Idle {
    /// Takes the longest time without a byte. Many bodies come whole, and need no timer.
    #[must_use]
    pub fn new(progress: &Progress, max: Duration) -> Self {
        Self { progress: progress.clone(), max, timer: None }
    }

    /// Waits until no byte passed for too long.
    pub fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let timer = self.timer.get_or_insert_with(|| {
            Box::pin(sleep(self.max.saturating_sub(self.progress.still_for())))
        });
        loop {
            ready!(timer.as_mut().poll(cx));
            let still_for = self.progress.still_for();
            if still_for >= self.max {
                return Poll::Ready(());
            }
            // Set again only here, so that a byte costs no work on the timer.
            timer.as_mut().reset(Instant::now() + (self.max - still_for));
        }
    }
}
