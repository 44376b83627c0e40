//! A call of a tool by HTTP, between the request that waits for it and the connection of the agent. Knows neither.

use std::{
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use wsproxy_proto::{agents::outcome::Failure, names::Id};

use crate::http::rejection::Rejection;

/// A call of a tool by HTTP, for the agent's connection in this process.
#[derive(Debug)]
pub struct LocalCall {
    /// Id of the call.
    pub request: Id,
    /// Name of the tool.
    pub tool: String,
    /// Parameters as JSON, spliced into the message to the agent.
    pub params: Bytes,
    /// Time until the call's deadline.
    pub timeout: Duration,
    /// W3C trace context.
    pub traceparent: Option<String>,
    /// The caller wants to hear of progress.
    pub progress: bool,
    /// Name of the caller's API key.
    pub caller: Arc<str>,
    /// Hash of tool and parameters.
    pub hash: [u8; 16],
    /// The caller.
    pub answer: CallerHandle,
}

/// News of a call for its caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallUpdate {
    /// Progress: a JSON object `{"progress","total","message"}`.
    Progress(Bytes),
    /// End of the call.
    Ended(CallEnd),
    /// The gateway cannot tell the end of the call, or did not send it.
    Refused(Rejection),
}

/// End of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallEnd {
    /// The failure; `None` if the agent answered.
    pub failure: Option<Failure>,
    /// The object that callers by Redis get on a channel of their own, as JSON, with its `requestId` and its `outcome`.
    pub body: Bytes,
}

/// The caller's end of a call, held by the agent's connection.
///
/// Dropping it without [`Self::end`] tells the caller that the call never reached the agent, unless it was
/// [taken](Self::taken).
#[derive(Debug)]
pub struct CallerHandle(Arc<Shared>);

/// The call's end of a caller: hears progress and the end.
///
/// Invariant: at most one progress waits. A newer one takes its place.
#[derive(Debug)]
pub struct CallWaiter(Arc<Shared>);

/// Identity of a caller among those of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallerId(usize);

#[derive(Debug, Default)]
struct Shared(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    progress: Option<Bytes>,
    /// The end; `Some(None)` if the handle was dropped without one.
    end: Option<Option<CallUpdate>>,
    /// The caller hung up.
    is_gone: bool,
    /// Parameters for another attempt, until the agent's connection has taken the call.
    params: Option<Bytes>,
    waker: Option<Waker>,
}

/// Makes both ends of a call.
#[must_use]
pub fn call() -> (CallerHandle, CallWaiter) {
    let shared = Arc::new(Shared::default());
    (CallerHandle(Arc::clone(&shared)), CallWaiter(shared))
}

impl CallerHandle {
    /// Passes progress to the caller, in place of one that the caller has not taken yet.
    pub fn progress(&self, progress: Bytes) {
        self.0.change(|state| state.progress = Some(progress));
    }

    /// Passes the end to the caller.
    pub fn end(self, end: CallEnd) {
        self.0.change(|state| state.end = Some(Some(CallUpdate::Ended(end))));
    }

    /// Tells the caller that the gateway refuses the call, or cannot tell its end.
    pub fn refuse(self, refusal: Rejection) {
        self.0.change(|state| state.end = Some(Some(CallUpdate::Refused(refusal))));
    }

    /// Notes that the agent's connection has taken the call: there is no other attempt, which would need the parameters.
    pub fn taken(&self) {
        self.0.0.lock().params = None;
    }

    /// Returns whether the caller hung up.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.0.0.lock().is_gone
    }

    /// Returns the caller's identity.
    #[must_use]
    pub fn id(&self) -> CallerId {
        CallerId(Arc::as_ptr(&self.0) as usize)
    }
}

impl Drop for CallerHandle {
    fn drop(&mut self) {
        self.0.change(|state| {
            state.end.get_or_insert(None);
        });
    }
}

impl CallWaiter {
    /// Keeps the parameters for another attempt, as long as no connection has taken the call.
    pub fn keep(&self, params: Bytes) {
        self.0.0.lock().params = Some(params);
    }

    /// Takes the parameters; `None` if a connection has taken the call.
    #[must_use]
    pub fn take_params(&self) -> Option<Bytes> {
        self.0.0.lock().params.take()
    }

    /// Takes the next news; `None` if the call never reached an agent, and after the end.
    pub async fn next(&mut self) -> Option<CallUpdate> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// As [`Self::next`].
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<CallUpdate>> {
        let mut state = self.0.0.lock();
        // Progress in front of an end that has come meanwhile still counts.
        if let Some(progress) = state.progress.take() {
            return Poll::Ready(Some(CallUpdate::Progress(progress)));
        }
        match &mut state.end {
            Some(end) => Poll::Ready(end.take()),
            None => {
                if state.waker.as_ref().is_none_or(|known| !known.will_wake(cx.waker())) {
                    state.waker = Some(cx.waker().clone());
                }
                Poll::Pending
            }
        }
    }

    /// Returns the caller's identity, that of its handle.
    #[must_use]
    pub fn id(&self) -> CallerId {
        CallerId(Arc::as_ptr(&self.0) as usize)
    }
}

impl Drop for CallWaiter {
    fn drop(&mut self) {
        self.0.0.lock().is_gone = true;
    }
}

impl Shared {
    /// Changes the state, then wakes the caller outside the lock.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.0.lock();
        change(&mut state);
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end() -> CallEnd {
        CallEnd { failure: None, body: Bytes::from_static(b"{}") }
    }

    #[tokio::test]
    async fn a_caller_hears_the_newest_progress_and_one_end() {
        let (handle, mut waiter) = call();
        assert_eq!(handle.id(), waiter.id());
        handle.progress(Bytes::from_static(b"1"));
        handle.progress(Bytes::from_static(b"2"));
        assert_eq!(waiter.next().await, Some(CallUpdate::Progress(Bytes::from_static(b"2"))));
        assert!(!handle.is_gone());
        handle.end(end());
        assert_eq!(waiter.next().await, Some(CallUpdate::Ended(end())));
        assert_eq!(waiter.next().await, None);
    }

    #[test]
    fn parameters_are_kept_until_the_call_is_taken() {
        let (handle, waiter) = call();
        let params = Bytes::from(vec![b'x'; 9]);
        waiter.keep(params.clone());
        assert!(!params.is_unique());
        handle.taken();
        assert!(params.is_unique());
        assert_eq!(waiter.take_params(), None);
        let (handle, waiter) = call();
        waiter.keep(params.clone());
        drop(handle);
        assert_eq!(waiter.take_params(), Some(params));
    }

    #[tokio::test]
    async fn a_dropped_handle_ends_the_wait() {
        let (handle, mut waiter) = call();
        let waiting = tokio::join!(waiter.next(), async { drop(handle) });
        assert_eq!(waiting.0, None);
        let (handle, waiter) = call();
        drop(waiter);
        assert!(handle.is_gone());
    }
}
