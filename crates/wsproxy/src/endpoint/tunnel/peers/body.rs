//! Body of a request on its way to another instance. It is not read before that instance wants it, so that another one can
//! get the request whole.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::endpoint::tunnel::{
    access::Access,
    deadlines::Progress,
    exchange::upload::{Upload, Uploaded},
};

/// Body of a request. The HTTP library has one end; [`Held`] is the other.
pub(super) struct HeldBody(Option<Arc<Held>>);

/// Body that waits for the word of the instance that gets it.
pub(in crate::endpoint::tunnel) struct Held {
    state: Mutex<State>,
    /// Time of the last byte.
    pub(super) progress: Progress,
    /// Signals that the upload has begun or ended.
    turned: Notify,
}

#[derive(Default)]
struct State {
    /// The body; `None`: it was taken back.
    upload: Option<Upload>,
    /// The other instance wants it.
    is_wanted: bool,
    /// The library has its last part.
    has_ended: bool,
    /// Failure of the body.
    failed: Option<Uploaded>,
    waker: Option<Waker>,
    /// Line of the request.
    access: Option<Arc<Access>>,
}

/// The body ends before its end.
#[derive(Debug, thiserror::Error)]
#[error("the body of the request ended early")]
pub(super) struct Broken;

impl Held {
    /// Holds a body.
    pub(super) fn new(upload: Upload, access: &Arc<Access>) -> Arc<Self> {
        let (upload, access) = (Some(upload), Some(Arc::clone(access)));
        let state = Mutex::new(State { upload, access, ..State::default() });
        Arc::new(Self { state, progress: Progress::default(), turned: Notify::new() })
    }

    /// Lets the body go.
    pub(super) fn let_go(&self) {
        let mut state = self.state.lock();
        state.is_wanted = true;
        let waker = state.waker.take();
        drop(state);
        self.progress.note();
        self.turned.notify_one();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Takes the body back; `None`: a part of it is gone.
    pub(in crate::endpoint::tunnel) fn take_back(&self) -> Option<Upload> {
        let mut state = self.state.lock();
        if state.is_wanted {
            return None;
        }
        let upload = state.upload.take();
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        upload
    }

    /// Returns whether the body is on its way, and the library has not taken its last part.
    pub(super) fn is_uploading(&self) -> bool {
        let state = self.state.lock();
        state.is_wanted && !state.has_ended
    }

    /// Waits until the upload has begun or ended.
    pub(super) async fn turned(&self) {
        self.turned.notified().await;
    }

    /// Returns the failure of the body.
    pub(super) fn failed(&self) -> Option<Uploaded> {
        self.state.lock().failed
    }
}

impl HeldBody {
    /// Returns the body of a request, if it has one.
    pub(super) fn of(held: Option<&Arc<Held>>) -> Self {
        Self(held.cloned())
    }
}

impl Body for HeldBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let Some(held) = &self.0 else { return Poll::Ready(None) };
        let mut state = held.state.lock();
        let State { upload, is_wanted, has_ended, failed, waker, access } = &mut *state;
        let Some(upload) = upload else { return Poll::Ready(Some(Err(Broken))) };
        if !*is_wanted {
            *waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let next = upload.poll_next(cx);
        if next.is_ready() {
            held.progress.note();
        }
        // The library does not ask for the end of a body whose length it knows.
        if upload.has_ended() && !std::mem::replace(has_ended, true) {
            held.turned.notify_one();
        }
        match next {
            Poll::Pending => Poll::Pending,
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Ready(Some(Ok(frame))) => {
                if let (Some(access), Some(piece)) = (access, frame.data_ref()) {
                    access.received(piece.len());
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(why))) => {
                *failed = Some(why);
                Poll::Ready(Some(Err(Broken)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        // The length of a body is that of its header, which the library keeps.
        if self.0.is_none() { SizeHint::with_exact(0) } else { SizeHint::default() }
    }
}
