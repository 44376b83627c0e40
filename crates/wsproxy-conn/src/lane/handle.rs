//! Handles of a lane: they open or accept streams, drain, and tell the lane's status. Knows no bytes of streams.

use std::{
    future::poll_fn,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll},
};

use wsproxy_proto::tunnel::{
    STREAM_MAX,
    code::Code,
    event::{Peer, Request},
    frame::{GoAway, Health, Open, Reset},
    lane::{OpenError, Role},
};

use super::{
    LaneEnd, LaneNumbers, LaneStatus, StreamReader, StreamWriter, reader::IfDropped, shared::Shared,
};
use crate::clock::{self, Micros};

/// Handle of a lane, for any number of tasks.
///
/// At a gateway, dropping the last clone drains the lane: its streams go on. The lane ends with the driver, not with
/// its handles.
#[derive(Debug, Clone)]
pub struct LaneHandle {
    owner: Arc<Owner>,
}

/// All clones of a handle.
#[derive(Debug)]
struct Owner {
    shared: Arc<Shared>,
    role: Role,
}

/// Stream that a gateway opened.
#[derive(Debug)]
pub struct OpenedStream {
    /// Body of the request. Finished already where OPEN has END.
    pub request: StreamWriter,
    /// Head and body of the answer. Dropping it before the end resets the stream.
    pub answer: StreamReader,
}

/// Stream that an agent accepted.
#[derive(Debug)]
pub struct AcceptedStream {
    /// Head of the request.
    pub request: Request,
    /// Body of the request. Dropping it before the end stops the gateway's sending; the answer goes on.
    pub body: StreamReader,
    /// Head and body of the answer.
    pub answer: StreamWriter,
}

/// Streams that the gateway opened, for the one task of an agent that accepts them.
///
/// Dropping it refuses the streams that wait, and drains the lane.
#[derive(Debug)]
pub struct StreamAcceptor {
    shared: Arc<Shared>,
}

impl LaneHandle {
    pub(super) fn new(shared: Arc<Shared>, role: Role) -> Self {
        Self { owner: Arc::new(Owner { shared, role }) }
    }

    /// Opens a stream of a gateway. The stream with the last number drains the lane.
    ///
    /// # Errors
    /// [`OpenError`]; nothing was sent.
    pub fn open(&self, open: &Open<'_>) -> Result<OpenedStream, OpenError> {
        let shared = self.shared();
        let number = shared.call(|state| {
            let number = state.core.open(clock::now().0, open)?;
            state.hold(number);
            Ok(number)
        })?;
        if number == STREAM_MAX {
            shared.drain(Code::Restarting, DRAIN);
        }
        Ok(OpenedStream {
            request: StreamWriter::new(Arc::clone(shared), number, open.end),
            answer: StreamReader::new(Arc::clone(shared), number, IfDropped::Reset, false),
        })
    }

    /// Sends GOAWAY: this side opens or takes no further streams. The lane ends when its streams have ended, or after
    /// `within`; then those that are open end with the lane.
    pub fn drain(&self, code: Code, within: Micros) {
        self.shared().drain(code, within);
    }

    /// Tells the gateway the health of an agent.
    pub fn set_health(&self, health: &Health<'_>) {
        self.shared().call(|state| state.core.set_health(health));
    }

    /// Returns the status of the lane.
    #[must_use]
    pub fn status(&self) -> LaneStatus {
        self.shared().status()
    }

    /// Waits for a status with another version than `seen`.
    pub async fn changed(&self, seen: u64) -> LaneStatus {
        self.shared().changed(seen).await
    }

    /// Waits for the peer's HELLO.
    ///
    /// # Errors
    /// The lane ended before.
    pub async fn ready(&self) -> Result<Arc<Peer>, LaneEnd> {
        self.until(|status| status.peer.clone()).await
    }

    /// Waits for the peer's GOAWAY.
    ///
    /// # Errors
    /// The lane ended before.
    pub async fn going_away(&self) -> Result<GoAway, LaneEnd> {
        self.until(|status| status.go_away).await
    }

    /// Waits for the end of the lane.
    pub async fn ended(&self) -> LaneEnd {
        let never = |_: &LaneStatus| None::<std::convert::Infallible>;
        match self.until(never).await {
            Err(end) => end,
        }
    }

    /// Returns the streams of the lane, as [`LaneNumbers::streams`] says: for the choice among lanes.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.shared().streams()
    }

    /// Returns the bytes that came from the socket so far.
    #[must_use]
    pub fn bytes_received(&self) -> u64 {
        self.shared().bytes_received.load(Relaxed)
    }

    /// Returns the numbers of the lane. Looks at every stream.
    #[must_use]
    pub fn numbers(&self) -> LaneNumbers {
        self.shared().numbers()
    }

    /// Returns the stream with waiting bytes that is longest without progress, and the time of its last progress. Looks
    /// at every stream.
    #[must_use]
    pub fn slowest(&self) -> Option<(u32, Micros)> {
        let slowest = self.shared().call(|state| state.core.slowest());
        slowest.map(|(number, at)| (number, Micros(at)))
    }

    /// Resets a stream that [`Self::slowest`] named. Does nothing where it has ended.
    pub fn reset(&self, number: u32, reset: &Reset<'_>) {
        self.shared().call(|state| state.core.reset(number, reset));
    }

    async fn until<T>(&self, found: impl Fn(&LaneStatus) -> Option<T>) -> Result<T, LaneEnd> {
        let mut status = self.status();
        loop {
            if let Some(found) = found(&status) {
                return Ok(found);
            }
            if let Some(end) = status.end {
                return Err(end);
            }
            status = self.changed(status.version).await;
        }
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.owner.shared
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if self.role == Role::Gateway {
            self.shared.drain(Code::Restarting, DRAIN);
        }
    }
}

impl StreamAcceptor {
    pub(super) const fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Waits for the next stream. `None`: the lane has ended.
    pub async fn accept(&mut self) -> Option<AcceptedStream> {
        poll_fn(|cx| self.poll_accept(cx)).await
    }

    /// Returns the next stream, as [`Self::accept`] does.
    pub fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Option<AcceptedStream>> {
        let (opened, is_over) = self.shared.call(|state| {
            let opened = state.next_opened(cx);
            if let Some((number, _)) = &opened {
                state.hold(*number);
            }
            (opened, state.status.end.is_some())
        });
        let Some((number, request)) = opened else {
            return if is_over { Poll::Ready(None) } else { Poll::Pending };
        };
        let shared = || Arc::clone(&self.shared);
        Poll::Ready(Some(AcceptedStream {
            body: StreamReader::new(shared(), number, IfDropped::Stop, request.end),
            answer: StreamWriter::new(shared(), number, false),
            request,
        }))
    }
}

impl Drop for StreamAcceptor {
    fn drop(&mut self) {
        self.shared.call(|state| state.stop_accepting());
        self.shared.drain(Code::Restarting, DRAIN);
    }
}

/// Time that streams get which outlive the handles of their lane, or its numbers.
const DRAIN: Micros = Micros(20_000_000);
