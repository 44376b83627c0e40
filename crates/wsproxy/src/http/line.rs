//! The socket under an HTTP connection, and what a long answer on it may ask for.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, sync::Notify};

/// What the answers on a connection can ask of its socket.
#[derive(Debug, Default)]
pub struct Line {
    /// In milliseconds; 0: as the listener set it.
    patience: AtomicU64,
    cut: Notify,
}

impl Line {
    /// From the next write on, written bytes may stay unacknowledged for this long, and the peer's window closed.
    pub fn be_patient(&self, unacknowledged_max: Duration) {
        let milliseconds = u64::try_from(unacknowledged_max.as_millis()).unwrap_or(u64::MAX);
        self.patience.store(milliseconds, Relaxed);
    }

    /// Closes the connection, whatever is on its way.
    pub fn cut(&self) {
        self.cut.notify_one();
    }

    /// Resolves when it is to be closed.
    pub async fn wait_cut(&self) {
        self.cut.notified().await;
    }
}

/// A socket that does what its [`Line`] is asked for.
#[derive(Debug)]
pub struct LineSocket {
    io: TokioIo<TcpStream>,
    line: Arc<Line>,
    /// The patience that the kernel was told.
    told: u64,
}

impl LineSocket {
    /// A socket that was accepted.
    #[must_use]
    pub fn new(stream: TcpStream, line: Arc<Line>) -> Self {
        Self { io: TokioIo::new(stream), line, told: 0 }
    }

    /// The socket alone.
    #[must_use]
    pub fn into_inner(self) -> TcpStream {
        self.io.into_inner()
    }

    fn obey(&mut self) {
        let patience = self.line.patience.load(Relaxed);
        if patience != self.told {
            self.told = patience;
            #[cfg(target_os = "linux")]
            let _ = socket2::SockRef::from(self.io.inner())
                .set_tcp_user_timeout(Some(Duration::from_millis(patience)));
        }
    }
}

impl Read for LineSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl Write for LineSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.obey();
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.obey();
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
