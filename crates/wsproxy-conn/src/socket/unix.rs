//! Unix socket whose writes end at a peer that takes nothing, as the kernel ends those of TCP; knows bytes only.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    net::UnixStream,
    time::{Sleep, sleep},
};

use crate::socket::poll_write;

/// Unix socket that its own task reads and that any task writes, without `&mut`.
#[derive(Debug)]
pub struct UnixSocket {
    pub(super) stream: UnixStream,
    /// Lock: taken while the state of a link may be locked; no other lock is taken under it.
    stall: Mutex<Stall>,
}

/// The time for which a peer takes nothing. The kernel has no option for it at unix sockets.
#[derive(Debug, Default)]
struct Stall {
    /// `None`: no bound.
    time_max: Option<Duration>,
    /// Runs since a write had to wait, until the kernel takes bytes again.
    timer: Option<Pin<Box<Sleep>>>,
}

impl UnixSocket {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, stall: Mutex::default() }
    }

    /// Returns the socket of the runtime.
    #[must_use]
    pub fn into_inner(self) -> UnixStream {
        self.stream
    }

    pub(super) fn set_unacknowledged_max(&self, unacknowledged_max: Duration) {
        *self.stall.lock() = Stall { time_max: Some(unacknowledged_max), timer: None };
    }

    pub(super) fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let written = self.stream.try_write_vectored(slices);
        if written.is_ok() {
            self.stall.lock().timer = None;
        }
        written
    }

    /// Returns whether a write is worth trying.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] where the peer has taken nothing for the longest time; once.
    pub(super) fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(ready) = self.stream.poll_write_ready(cx) {
            return Poll::Ready(ready);
        }
        let Stall { time_max, timer } = &mut *self.stall.lock();
        let Some(time_max) = *time_max else { return Poll::Pending };
        ready!(timer.get_or_insert_with(|| Box::pin(sleep(time_max))).as_mut().poll(cx));
        *timer = None;
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    /// Writes as [`Self::try_write_vectored`] does; waits where the kernel takes nothing.
    pub(super) fn poll_write_vectored(
        &self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        poll_write(|| self.try_write_vectored(slices), || self.poll_write_ready(cx))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncReadExt;

    use super::*;

    const TIME_MAX: Duration = Duration::from_secs(10);

    async fn write(socket: &UnixSocket) -> io::Result<usize> {
        let bytes = [0; 64 * 1024];
        poll_fn(|cx| socket.poll_write_vectored(cx, &[IoSlice::new(&bytes)])).await
    }

    async fn fill(socket: &UnixSocket) {
        while socket.try_write_vectored(&[IoSlice::new(&[0; 64 * 1024])]).is_ok() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_ends_a_write() {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let socket = UnixSocket::new(ours);
        socket.set_unacknowledged_max(TIME_MAX);
        fill(&socket).await;
        assert_eq!(write(&socket).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        // A peer that takes a part gets the whole time again.
        let mut taken = vec![0; 256 * 1024];
        let _ = peer.read(&mut taken).await.unwrap();
        assert!(write(&socket).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn an_earlier_wait_does_not_count() {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let socket = UnixSocket::new(ours);
        socket.set_unacknowledged_max(TIME_MAX);
        fill(&socket).await;
        assert!(tokio::time::timeout(TIME_MAX / 2, write(&socket)).await.is_err());
        let mut taken = vec![0; 256 * 1024];
        let _ = peer.read(&mut taken).await.unwrap();
        assert!(write(&socket).await.is_ok());
        fill(&socket).await;
        sleep(TIME_MAX * 2).await;
        assert!(tokio::time::timeout(TIME_MAX / 2, write(&socket)).await.is_err());
    }
}
